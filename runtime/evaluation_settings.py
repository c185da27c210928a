"""What decides the images of an evaluation set, as its `sampling.json` records it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.classes import parse_class
from bar_edge.runtime.errors import RequestError
from bar_edge.runtime.noise import SeededNoise
from bar_edge.runtime.spec import Recipe, whole_number

SHARD_IMAGES = 128  # what an interruption may cost: minutes on a CPU; a multiple of the usual batch sizes


@dataclass(frozen=True)
class EvaluationSettings:
    """Everything that decides the images of a set, and how they are stored."""

    bundle: str  # digest
    bar_edge: str  # version
    engine: str
    num: int
    classes: Literal["balanced"] | tuple[int, ...]  # taken in turn; balanced: all classes of the model
    num_classes: int
    seed: int
    guidance: float
    temperature: float
    allocation: tuple[int, ...]
    png: bool
    image_size: int
    shard_images: int = SHARD_IMAGES

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        *,
        engine: str,
        num: int,
        classes: str = "balanced",
        seed: int = 0,
        guidance: float | None = None,
        temperature: float | None = None,
        allocation: Sequence[int] | None = None,
        png: bool = True,
    ) -> "EvaluationSettings":
        """The settings of a set of `num` images.

        Args:
            engine: the name of an engine, not `auto`: one set is drawn by one engine.
            classes: `balanced`, or classes with commas between them, by number or name.
            guidance, temperature, allocation: the bundle's recipe unless given.

        Raises RequestError for a number, class, seed or recipe that does not fit the model.
        """
        spec = bundle.spec
        num = whole_number(num, "num")
        if num < 1:
            raise RequestError(f"num must be at least 1, is {num}")
        seed = SeededNoise(seed, ()).seed  # refuses one out of range
        recipe = bundle.recipe.overridden(
            spec.bits_per_token, guidance=guidance, temperature=temperature, allocation=allocation
        )
        taken = tuple(parse_class(text, spec) for text in classes.split(",")) if classes != "balanced" else ()
        for class_id in taken:
            if not 0 <= class_id < spec.num_classes:
                raise RequestError(f"class {class_id} is not there: this model has classes 0 to {spec.num_classes - 1}")
        return cls(
            bundle.digest, metadata.version("bar-edge"), engine, num, taken or "balanced", spec.num_classes, seed,
            recipe.guidance, recipe.temperature, recipe.allocation, png, spec.image_size,
        )  # fmt: skip

    @classmethod
    def from_json(cls, text: str) -> "EvaluationSettings":
        """Inverse of `to_json`. Raises ValueError or TypeError for anything else."""
        values = json.loads(text)
        if not isinstance(values, dict) or set(values) != {field.name for field in fields(cls)}:
            raise ValueError("its fields are not those of this version")
        arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**arguments)

    def to_json(self) -> str:
        """The fields as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @property
    def recipe(self) -> Recipe:
        """How tokens are sampled."""
        return Recipe(self.guidance, self.temperature, self.allocation)

    @property
    def image_bytes(self) -> int:
        """Bytes of an image's pixels."""
        return 3 * self.image_size**2

    def class_ids(self, indices: range) -> NDArray[np.int64]:
        """The class ids [B] of the images with these indices."""
        classes = np.arange(self.num_classes) if self.classes == "balanced" else np.array(self.classes)
        return np.asarray(classes[np.asarray(indices) % len(classes)], dtype=np.int64)
