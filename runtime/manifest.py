"""`manifest.json` of a bundle: read, and every field that code relies on checked for its type.

The manifest has no hash of its own, so a damaged one may still be JSON; what it says of engines in detail is checked
by the engines.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from bar_edge.runtime.errors import BundleError, CompatibilityError

MANIFEST = "manifest.json"
FORMAT = "bar-edge bundle"
FORMAT_VERSION = 1
REMEDY = "Copy the bundle again, or export it again"
COMPILED_FOR = ("tensorrt", "cuda")  # engines that a bundle is compiled for
_MAX_BYTES = 16 * 2**20

Kinds = tuple[type, ...]
_NUMBER = (float, int)
_WORDS = {str: "text", NoneType: "null", dict: "an object", list: "a list", int: "a whole number", float: "a number"}
_FIELDS: dict[str, Kinds] = {
    "variant": (str, NoneType), "model": (dict,), "recipe": (dict,), "graphs": (dict,), "provenance": (dict,),
    "files": (dict,),
}  # fmt: skip
_OPTIONAL = ("quantization", "engines")
_RECIPE: dict[str, Kinds] = {"guidance": _NUMBER, "temperature": _NUMBER, "allocation": (list,)}
_MEMBERS: dict[str, dict[str, Kinds]] = {  # of every graph, file and engine
    "graphs": {"file": (str,), "precision": (str,)},
    "files": {"bytes": (int,), "sha256": (str,)},
    "engines": {},
}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the bundle in `folder`.

    Raises BundleError if there is none or it is malformed, CompatibilityError for another format or unknown engines,
    OSError if it cannot be read.
    """
    if not folder.is_dir():
        kind = "is a file, not a bundle folder" if folder.is_file() else "no such folder"
        raise BundleError(f"{folder}: {kind}; give a folder made by `bar-edge export`")
    file = folder / MANIFEST
    if file.is_symlink():
        raise BundleError(f"{file}: is a link, and a bundle holds only plain files; copy its folder with `cp -rL`")
    if not file.is_file():
        raise BundleError(
            f"{folder}: has no {MANIFEST}, so it is not a bundle; give a folder made by `bar-edge export`"
        )
    if file.stat().st_size > _MAX_BYTES:
        raise BundleError(f"{file}: too large to be a manifest. {REMEDY}")
    try:
        manifest = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{file}: cut short or not JSON ({error}). {REMEDY}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleError(f"{file}: not the manifest of a bar-edge bundle. {REMEDY}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CompatibilityError(
            f"{file}: bundle format {manifest.get('format_version')!r}, this version reads {FORMAT_VERSION}; "
            "install the bar-edge that made it, or export again with this one"
        )
    try:
        _check(manifest)
    except ValueError as error:
        raise BundleError(f"{file}: incomplete or malformed ({error}). {REMEDY}") from error
    if unknown := sorted(set(manifest.get("engines", ())) - set(COMPILED_FOR)):
        raise CompatibilityError(
            f"{file}: was compiled for {', '.join(unknown)}, this version knows {', '.join(COMPILED_FOR)}; "
            "install the bar-edge that made it, or compile again with this one"
        )
    return manifest


def _check(manifest: Mapping[str, Any]) -> None:
    """Raise ValueError naming the first field that is missing or not what it should be."""
    _check_fields(manifest, _FIELDS)
    _check_fields(manifest, {name: (dict,) for name in _OPTIONAL if name in manifest})
    if manifest.get("engines") == {}:
        raise ValueError("engines is empty")
    _check_fields(manifest["recipe"], _RECIPE, "recipe.")
    for i, bits in enumerate(manifest["recipe"]["allocation"]):
        _check_kind(bits, (int,), f"recipe.allocation[{i}]")
    for section, fields in _MEMBERS.items():
        for name, entry in manifest.get(section, {}).items():
            _check_kind(entry, (dict,), f"{section}.{name}")
            _check_fields(entry, fields, f"{section}.{name}.")


def _check_fields(values: Mapping[str, Any], fields: Mapping[str, Kinds], prefix: str = "") -> None:
    for name, kinds in fields.items():
        if name not in values:
            raise ValueError(f"{prefix}{name} is missing")
        _check_kind(values[name], kinds, f"{prefix}{name}")


def _check_kind(value: Any, kinds: Kinds, field: str) -> None:
    if type(value) not in kinds:  # exactly: a bool is no number
        expected = " or ".join(_WORDS[kind] for kind in kinds)
        raise ValueError(f"{field} is {repr(value)[:60]}, expected {expected}")
