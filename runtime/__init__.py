"""From a bundle to images. Needs numpy, pillow and one engine library; never torch."""

from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.errors import (
    BarEdgeError,
    BundleError,
    CalibrationError,
    CheckpointError,
    CompatibilityError,
    EngineError,
    RequestError,
)
from bar_edge.runtime.generator import Drawn, Generator
from bar_edge.runtime.spec import ModelSpec, Recipe

__all__ = [
    "BarEdgeError",
    "Bundle",
    "BundleError",
    "CalibrationError",
    "CheckpointError",
    "CompatibilityError",
    "Drawn",
    "EngineError",
    "Generator",
    "ModelSpec",
    "Recipe",
    "RequestError",
]
