"""Shared fixtures: recorded data, and bundles exported once per test session."""

from pathlib import Path

GOLDEN = Path(__file__).parent / "data" / "golden"
GENERATORS = ("patch1", "patch1_10bit", "patch2", "patch4")
SAMPLINGS = ("cfg", "nocfg", "greedy", "random_order")
