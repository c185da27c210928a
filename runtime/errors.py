"""The closed list of errors bar-edge raises on purpose.

Each message says what was found, what was expected and what to do about it. The command line prints it on one
line and exits 2; anything that is not a BarEdgeError is a bug and keeps its traceback.
"""


class BarEdgeError(Exception):
    """Base of every error a user can cause and mend."""


class CheckpointError(BarEdgeError):
    """A checkpoint or its YAML cannot be read, is incomplete, or does not fit its tokenizer."""


class BundleError(BarEdgeError):
    """A bundle is damaged, tampered with, incomplete, or would be overwritten."""


class CompatibilityError(BarEdgeError):
    """A sound file that this version, machine or library cannot use."""


class CalibrationError(BarEdgeError):
    """Calibration data or settings that do not fit the bundle."""


class EngineError(BarEdgeError):
    """An engine cannot start or failed while running."""


class RequestError(BarEdgeError):
    """Generation options that make no sense for this model."""
