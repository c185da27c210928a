"""The authors' YAML, and what the command line sets over it: read, held against the tensors, and sampled with."""

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from bar_edge.runtime.errors import CheckpointError, RequestError
from bar_edge.runtime.spec import VARIANTS, ModelSpec, Recipe

_GUIDANCE = "model.generator.guidance_scale"
_TEMPERATURE = "model.generator.mbm_head.randomize_temperature"
_ALLOCATION = "model.generator.mbm_head.tokens_allocation"
_SIZES: dict[str, Callable[[ModelSpec], int]] = {  # what a YAML states, and what it must be
    "model.generator.hidden_size": lambda spec: spec.hidden_size,
    "model.generator.num_hidden_layers": lambda spec: spec.num_layers,
    "model.generator.num_attention_heads": lambda spec: spec.num_heads,
    "model.generator.image_seq_len": lambda spec: spec.image_seq_len,
    "model.generator.condition_num_classes": lambda spec: spec.num_classes,
    "model.generator.target_codebook_size": lambda spec: 2,
    "model.generator.patch_size": lambda spec: spec.patch_size,
    "model.generator.repeat_class_condition": lambda spec: spec.repeat_class_condition,
    "model.generator.latent_height": lambda spec: spec.grid_size,
    "model.generator.latent_width": lambda spec: spec.grid_size,
    "model.generator.mbm_head.width": lambda spec: spec.head_width,
    "model.generator.mbm_head.num_layers": lambda spec: spec.head_layers,
    "model.vq_model.token_size": lambda spec: spec.token_size,
    "model.vq_model.vit_dec_patch_size": lambda spec: spec.decoder_patch_size,
    "dataset.preprocessing.crop_size": lambda spec: spec.image_size,
}
_DEFAULTS = {"model.generator.patch_size": 1, "model.generator.repeat_class_condition": 32}  # of the authors' YAML
_SETTINGS = (_GUIDANCE, _TEMPERATURE, _ALLOCATION, *_SIZES)  # all that is read


def read_config(path: Path | None, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Parse the authors' YAML and apply `dotted.key=value` overrides. Without a path it is empty.

    Raises CheckpointError if the YAML is not the authors' or an override is malformed or of a setting nobody reads.
    """
    settings: Any = {}
    if path is not None:
        try:
            settings = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise CheckpointError(f"{path}: not a readable YAML file ({first_line(error)})") from error
        if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
            raise CheckpointError(f"{path}: has no `model` section; give the YAML that belongs to the checkpoint")
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            raise CheckpointError(f"override {override!r} is not of the form dotted.key=value")
        if key not in _SETTINGS:
            near = difflib.get_close_matches(key, _SETTINGS, n=1)
            meant = f"did you mean {near[0]}?" if near else f"these are: {', '.join(_SETTINGS)}"
            raise CheckpointError(f"override {override!r}: {key} is not read; {meant}")
        *parents, leaf = key.split(".")
        section = settings
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise CheckpointError(f"override {override!r}: {parent!r} is a value, not a section")
        try:
            section[leaf] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise CheckpointError(f"override {override!r}: the value is not YAML ({first_line(error)})") from error
    return dict(settings)


def check_config(spec: ModelSpec, settings: dict[str, Any], overridden: set[str], path: Path) -> None:
    """Raise CheckpointError unless every size that the YAML states is that of the tensors."""
    described = _setting(settings, "model.generator.hidden_size") is not None  # the authors' YAML, not only overrides
    defaults = _DEFAULTS if described else {}
    wrong = []
    for key, size in _SIZES.items():
        value = _setting(settings, key, defaults.get(key))
        if value is not None and not _is_interpolation(value) and value != size(spec):
            wrong.append(f"{key} is {value!r} {_origin(key, overridden)}, {size(spec)} in the tensors")
    if wrong:
        raise CheckpointError(f"{path} and its settings do not belong together: {listing(wrong, '; ')}")


def choose_recipe(settings: dict[str, Any], published: Recipe | None, overridden: set[str], spec: ModelSpec) -> Recipe:
    """The authors' evaluation recipe for a published variant, else the YAML's; a command-line override wins.

    Raises CheckpointError if there is none or it does not fit the model.
    """
    known = {
        _GUIDANCE: published and published.guidance,
        _TEMPERATURE: published and published.temperature,
        _ALLOCATION: published and published.allocation,
    }
    chosen = {
        key: _setting(settings, key) if published is None or key in overridden else value
        for key, value in known.items()
    }
    absent = [key for key, value in chosen.items() if value is None]
    if absent:
        raise CheckpointError(
            f"no sampling recipe: {listing(absent)} not given, and the shapes match no published variant "
            f"({', '.join(VARIANTS)}). Give the YAML with --config, or the values as key=value"
        )
    for key, value in chosen.items():
        fits, form = (
            (_is_list, "a list of whole numbers, as [2,2,5,7]") if key == _ALLOCATION else (_is_number, "a number")
        )
        if not fits(value):
            raise CheckpointError(f"{key} is {value!r} {_origin(key, overridden)}, expected {form}")
    recipe = Recipe(float(chosen[_GUIDANCE]), float(chosen[_TEMPERATURE]), tuple(chosen[_ALLOCATION]))
    try:
        return recipe.validated(spec.bits_per_token)
    except RequestError as error:
        changed = " with what the command line overrides" if overridden & chosen.keys() else " in the YAML"
        raise CheckpointError(f"the sampling recipe{changed} does not fit: {error}") from error


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(type(bits) is int for bits in value)


def _origin(key: str, overridden: set[str]) -> str:
    return "on the command line" if key in overridden else "in the YAML"


def _setting(settings: dict[str, Any], key: str, default: Any = None) -> Any:
    *parents, leaf = key.split(".")
    section = settings
    for parent in parents:
        section = _section(section, parent)
    return section.get(leaf, default)


def _section(settings: Any, name: str) -> dict[str, Any]:
    value = settings.get(name, {}) if isinstance(settings, dict) else {}
    return value if isinstance(value, dict) else {}


def _is_interpolation(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("${")


def listing(items: list[str], separator: str = ", ") -> str:
    """The first of many, and how many more there are."""
    shown = separator.join(items[:10])
    return shown if len(items) <= 10 else f"{shown}{separator}and {len(items) - 10} more"


def first_line(error: BaseException) -> str:
    """What a library says, or what kind of error it is."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
