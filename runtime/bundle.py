"""The bundle: the only thing that moves between machines.

A folder with `manifest.json` and the files it lists, each with size and SHA-256. `publish` makes one atomically;
`Bundle.open` verifies one completely, before any native parser sees a byte of it: no file changed, missing, extra,
linked or outside the folder, ONNX external data included. Nothing in a bundle is executable Python or a pickle.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bar_edge.runtime.errors import BundleError, CompatibilityError
from bar_edge.runtime.onnx_locations import external_locations
from bar_edge.runtime.spec import ModelSpec, Recipe

MANIFEST = "manifest.json"
SELFTEST = "selftest.npz"
FORMAT = "bar-edge bundle"
FORMAT_VERSION = 1
_CHUNK = 4 * 2**20
_MAX_MANIFEST = 16 * 2**20
_SPARE_DISK = 64 * 2**20

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all


@dataclass(frozen=True)
class Bundle:
    """A verified bundle. `graphs` maps graph names to file names; `manifest` is the parsed manifest."""

    path: Path
    spec: ModelSpec
    recipe: Recipe
    variant: str | None
    graphs: Mapping[str, str]
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path | str, progress: Progress | None = None) -> "Bundle":
        """Verify and describe the bundle in folder `path`.

        Raises BundleError if anything differs from the manifest, CompatibilityError if the format is unknown.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        try:
            files = {
                str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()
            }
            graphs = {str(name): str(entry["file"]) for name, entry in manifest["graphs"].items()}
            spec = ModelSpec.from_dict(manifest["model"])
            sampling = manifest["recipe"]
            recipe = Recipe(
                float(sampling["guidance"]), float(sampling["temperature"]), tuple(map(int, sampling["allocation"]))
            )
            variant = manifest["variant"]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise BundleError(f"{path / MANIFEST}: incomplete or malformed ({error!r}). {_REMEDY}") from error
        _verify_files(path, files, progress)
        for name, file in graphs.items():
            if file not in files:
                raise BundleError(f"{path / MANIFEST}: graph {name} is in {file!r}, which is not listed. {_REMEDY}")
            if not file.endswith(".onnx"):
                raise BundleError(f"{path / MANIFEST}: graph {name} is in {file!r}, which is no .onnx file. {_REMEDY}")
        for file in files:
            if file.lower().endswith(".onnx"):
                _check_locations(path / file, files)
        return cls(path, spec, recipe, variant, graphs, manifest)

    def graph(self, name: str) -> Path:
        """The file of a graph. Raises CompatibilityError if the bundle has none of that name."""
        if name not in self.graphs:
            raise CompatibilityError(
                f"{self.path}: has no graph {name!r} (it has {', '.join(self.graphs)}); "
                "export it again with this version"
            )
        return self.path / self.graphs[name]

    @property
    def engines(self) -> tuple[str, ...]:
        """Names of the engines it was made for."""
        return tuple(self.manifest["engines"]) if "engines" in self.manifest else ("onnxruntime",)

    def file_bytes(self, name: str) -> int:
        """Size of a listed file."""
        return int(self.manifest["files"][name]["bytes"])

    @property
    def digest(self) -> str:
        """SHA-256 over the names and hashes of all files: the identity of the bundle's content."""
        listing = "".join(f"{name} {entry['sha256']}\n" for name, entry in sorted(self.manifest["files"].items()))
        return hashlib.sha256(listing.encode()).hexdigest()


_REMEDY = "Copy the bundle again, or export it again"


def write_manifest(
    folder: Path,
    *,
    spec: ModelSpec,
    recipe: Recipe,
    variant: str | None,
    graphs: Mapping[str, Mapping[str, Any]],
    provenance: Mapping[str, Any],
    quantization: Mapping[str, Any] | None = None,
    engines: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> None:
    """Hash every file in `folder` and write its manifest.

    `graphs`: name -> {"file", "precision"}; `engines`: what a bundle was compiled for, engine -> what it needs and has.
    """
    names = sorted(entry.name for entry in folder.iterdir())
    sizes = {name: (folder / name).stat().st_size for name in names}
    total, done = sum(sizes.values()), 0
    files = {}
    for name in names:
        done, digest = _hash(folder / name, done, total, "hashing", progress)
        files[name] = {"bytes": sizes[name], "sha256": digest}
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "variant": variant,
        "model": spec.to_dict(),
        "recipe": asdict(recipe),
        "graphs": graphs,
        "provenance": provenance,
        **({"quantization": quantization} if quantization is not None else {}),
        **({"engines": engines} if engines is not None else {}),
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def sha256(path: Path) -> str:
    """The hash of a file's content."""
    return _hash(path, 0, 0, "", None)[1]


def check_output(output: Path, *, force: bool) -> None:
    """Raise BundleError if a bundle must not be written to `output`; long work asks before it begins."""
    if output.is_symlink():
        raise BundleError(f"{output}: is a link; give the folder itself")
    if output.exists() and not force:
        raise BundleError(f"{output}: exists already; choose another folder or pass --force to replace it")
    if (
        force
        and output.exists()
        and not (output / MANIFEST).is_file()
        and (not output.is_dir() or any(output.iterdir()))
    ):
        raise BundleError(f"{output}: is not a bundle, so --force will not replace it; remove it by hand")


@contextmanager
def publish(output: Path, needed_bytes: int, *, force: bool) -> Iterator[Path]:
    """Give a temporary sibling folder of `output`; when the block ends well it becomes `output`, whole and synced.

    Raises BundleError if `output` exists and `force` is not set, or the disk has less than `needed_bytes` free.
    On any error or interruption nothing is left behind.
    """
    check_output(output, force=force)
    parent = output.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(parent).free
        if free < needed_bytes + _SPARE_DISK:
            raise BundleError(
                f"{parent}: {free / 2**20:.0f} MiB free, {(needed_bytes + _SPARE_DISK) / 2**20:.0f} MiB needed; "
                "free some space or choose another disk"
            )
        temporary = parent / f".{output.name}.{uuid.uuid4().hex[:8]}.partial"
        temporary.mkdir()
    except OSError as error:
        raise BundleError(f"{parent}: cannot be written to ({error.strerror})") from error
    try:
        yield temporary
        for entry in [*temporary.iterdir(), temporary]:
            _sync(entry)
        if output.exists():
            old = temporary.with_suffix(".old")
            output.rename(old)
            try:
                temporary.rename(output)
            except OSError:
                old.rename(output)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(output)
        _sync(parent)
    except OSError as error:
        raise BundleError(f"{output}: writing failed ({error.strerror or error}); nothing was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        kind = "is a file, not a bundle folder" if path.is_file() else "no such folder"
        raise BundleError(f"{path}: {kind}; give a folder made by `bar-edge export`")
    file = path / MANIFEST
    if file.is_symlink() or not file.is_file():
        raise BundleError(f"{path}: has no {MANIFEST}, so it is not a bundle; give a folder made by `bar-edge export`")
    if file.stat().st_size > _MAX_MANIFEST:
        raise BundleError(f"{file}: too large to be a manifest. {_REMEDY}")
    try:
        manifest = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{file}: cut short or not JSON ({error}). {_REMEDY}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise BundleError(f"{file}: not the manifest of a bar-edge bundle. {_REMEDY}")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CompatibilityError(
            f"{file}: bundle format {manifest.get('format_version')!r}, this version reads {FORMAT_VERSION}; "
            "install the bar-edge that made it, or export again with this one"
        )
    return manifest


def _verify_files(path: Path, files: Mapping[str, tuple[int, str]], progress: Progress | None) -> None:
    for name in files:
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise BundleError(f"{path / MANIFEST}: lists {name!r}, a path out of the bundle. {_REMEDY}")
    present = {entry.name for entry in os.scandir(path)} - {MANIFEST}
    if missing := sorted(set(files) - present):
        raise BundleError(f"{path}: missing {', '.join(missing)}. {_REMEDY}")
    if extra := sorted(present - set(files)):
        raise BundleError(
            f"{path}: holds {', '.join(extra)}, not listed in its manifest. Remove them, or {_REMEDY.lower()}"
        )
    for name, (size, _) in files.items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise BundleError(f"{file}: a link or not a plain file; a bundle holds only plain files. {_REMEDY}")
        if (found := file.stat().st_size) != size:
            how = "truncated" if found < size else "grown"
            raise BundleError(f"{file}: {how}, {found} bytes where the manifest says {size}. {_REMEDY}")
    total, done = sum(size for size, _ in files.values()), 0
    for name, (_, expected) in files.items():
        done, digest = _hash(path / name, done, total, "verifying", progress)
        if digest != expected:
            raise BundleError(f"{path / name}: its content was changed (SHA-256 differs from the manifest). {_REMEDY}")


def _check_locations(file: Path, files: Mapping[str, Any]) -> None:
    try:
        locations = external_locations(file.read_bytes())
    except ValueError as error:
        raise BundleError(f"{file}: not a well-formed ONNX graph ({error}). {_REMEDY}") from error
    if outside := sorted(locations - set(files)):
        raise BundleError(f"{file}: its external data point to {outside[0]!r}, which is not in the bundle. {_REMEDY}")


def _hash(path: Path, done: int, total: int, what: str, progress: Progress | None) -> tuple[int, str]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if progress is not None:
                progress(what, done, total)
    return done, digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
