"""The bundle: the only thing that moves between machines.

A folder with `manifest.json` and the files it lists, each with size and SHA-256. `publish` makes one atomically;
`Bundle.open` verifies one completely, before any native parser sees a byte of it: no file changed, missing, extra,
linked or outside the folder, ONNX external data included. Nothing in a bundle is executable Python or a pickle.
"""

import hashlib
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from bar_edge.runtime import weights
from bar_edge.runtime.errors import BundleError, CompatibilityError, RequestError
from bar_edge.runtime.manifest import FORMAT, FORMAT_VERSION, REMEDY, read_manifest
from bar_edge.runtime.manifest import MANIFEST as MANIFEST
from bar_edge.runtime.onnx_locations import external_locations, graph_name
from bar_edge.runtime.progress import Progress, silent
from bar_edge.runtime.spec import ModelSpec, Recipe

SELFTEST = "selftest.npz"
_CHUNK = 4 * 2**20
_SPARE_DISK = 64 * 2**20


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
    def open(cls, path: Path | str, progress: Progress = silent) -> "Bundle":
        """Verify and describe the bundle in folder `path`.

        Raises BundleError if anything differs from the manifest, CompatibilityError if the format is unknown.
        """
        path = Path(path)
        try:
            return cls._verified(path, progress)
        except OSError as error:
            raise BundleError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error

    @classmethod
    def _verified(cls, path: Path, progress: Progress) -> "Bundle":
        manifest = read_manifest(path)
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        graphs = {name: entry["file"] for name, entry in manifest["graphs"].items()}
        sampling = manifest["recipe"]
        try:
            spec = ModelSpec.from_dict(manifest["model"])
            recipe = Recipe(
                float(sampling["guidance"]), float(sampling["temperature"]), tuple(sampling["allocation"])
            ).validated(spec.bits_per_token)
        except (ValueError, OverflowError, RequestError) as error:
            raise BundleError(f"{path / MANIFEST}: incomplete or malformed ({error}). {REMEDY}") from error
        _verify_files(path, files, progress)
        for name, file in graphs.items():
            if file not in files:
                raise BundleError(f"{path / MANIFEST}: graph {name} is in {file!r}, which is not listed. {REMEDY}")
            if not file.endswith(".onnx"):
                raise BundleError(f"{path / MANIFEST}: graph {name} is in {file!r}, which is no .onnx file. {REMEDY}")
        for file in files:
            if file.lower().endswith(".onnx"):
                _check_graph(path / file, files, [name for name, of in graphs.items() if of == file])
        weights.check_sizes(path / weights.FILE_NAME, spec)
        return cls(path, spec, recipe, manifest["variant"], graphs, manifest)

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


def check_not_compiled(source: Bundle) -> None:
    """Raise RequestError for a bundle that only its engine can read: its weights are in another form, or in plans."""
    if "engines" in source.manifest:
        raise compiled_already(source.path)


def compiled_already(what: Path | str) -> RequestError:
    """The error for a compiled bundle where one that is not is needed."""
    return RequestError(f"{what}: is compiled already; use the bundle it was made from")


def derived_provenance(source: Bundle, *packages: str) -> dict[str, Any]:
    """Where a bundle comes from that is made of another, and the packages that made it beside bar-edge."""
    return {
        "made_by": {name: metadata.version(name) for name in ("bar-edge", *packages)},
        "source": {"digest": source.digest, "provenance": source.manifest["provenance"]},
    }


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
    progress: Progress = silent,
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
    return _hash(path, 0, 0, "", silent)[1]


def check_output(output: Path, *, force: bool, sources: Iterable[Path] = ()) -> None:
    """Raise BundleError if a bundle made of `sources` must not be written to `output`; long work asks before."""
    if output.is_symlink():
        raise BundleError(f"{output}: is a link; give the folder itself")
    for source in sources:
        if _contains(output, source) or _contains(source, output):
            raise BundleError(f"{output}: is, holds or lies in {source}, which it is made of; choose another folder")
    if output.exists() and not force:
        raise BundleError(f"{output}: exists already; choose another folder or pass --force to replace it")
    if force and output.exists() and not _replaceable(output):
        raise BundleError(
            f"{output}: is not a bundle, or not only one, so --force will not replace it; remove it by hand"
        )


@contextmanager
def publish(output: Path, needed_bytes: int, *, force: bool, sources: Iterable[Path] = ()) -> Iterator[Path]:
    """Give a temporary sibling folder of `output`; when the block ends well it becomes `output`, whole and synced.

    `sources`: what the block reads, which `output` must not replace.

    Raises BundleError if `output` exists and `force` is not set, then or in the end; if the disk has less than
    `needed_bytes` free; if something cannot be read or written. On any error or interruption nothing is left behind.
    """
    sources = tuple(sources)
    check_output(output, force=force, sources=sources)
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
    old = temporary.with_suffix(".old")
    try:
        yield temporary
        for entry in [*temporary.iterdir(), temporary]:
            _sync(entry)
        check_output(output, force=force, sources=sources)  # someone else may have been faster
        if force and output.exists():
            output.rename(old)
            try:
                temporary.rename(output)
            except BaseException:  # an interruption as well
                old.rename(output)
                raise
        else:
            temporary.rename(output)
        _sync(parent)
    except OSError as error:
        places = [Path(str(place)) for place in (error.filename, error.filename2) if place is not None]
        written = (temporary, old, output)
        if places and not any(place == parent or any(map(place.is_relative_to, written)) for place in places):
            raise BundleError(
                f"{places[0]}: cannot be read or written ({error.strerror}); nothing was left behind"
            ) from error
        raise BundleError(f"{output}: writing failed ({error.strerror or error}); nothing was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if old.exists():
        _remove(old, output)


def _replaceable(output: Path) -> bool:
    """Whether a folder is a bundle, a damaged or older one too, with nothing else in it; or empty."""
    if not output.is_dir():
        return False
    entries = {entry.name for entry in output.iterdir()}
    if not entries:
        return True
    try:
        manifest = json.loads((output / MANIFEST).read_bytes())
        return manifest["format"] == FORMAT and entries <= {MANIFEST, *manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _contains(outer: Path, inner: Path) -> bool:
    """Whether `outer` is `inner` or a folder above it, however they are spelled."""
    inner = inner.resolve()
    return outer.exists() and any(place.exists() and place.samefile(outer) for place in (inner, *inner.parents))


def _remove(old: Path, output: Path) -> None:
    try:
        old.chmod(stat.S_IRWXU)  # out of a read-only folder no file can be removed
        shutil.rmtree(old)
    except OSError as error:
        raise BundleError(
            f"{output}: is the new bundle, but the one it replaced is left in {old} ({error.strerror}); "
            "remove that by hand"
        ) from error


def _verify_files(path: Path, files: Mapping[str, tuple[int, str]], progress: Progress) -> None:
    for name in files:
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise BundleError(f"{path / MANIFEST}: lists {name!r}, a path out of the bundle. {REMEDY}")
    if unlisted := sorted({weights.FILE_NAME, SELFTEST} - set(files)):
        raise BundleError(f"{path / MANIFEST}: lists no {unlisted[0]}, which every bundle has. {REMEDY}")
    present = {entry.name for entry in os.scandir(path)} - {MANIFEST}
    if missing := sorted(set(files) - present):
        raise BundleError(f"{path}: missing {', '.join(missing)}. {REMEDY}")
    if extra := sorted(present - set(files)):
        raise BundleError(
            f"{path}: holds {', '.join(extra)}, not listed in its manifest. Remove them, or {REMEDY.lower()}"
        )
    for name, (size, _) in files.items():
        file = path / name
        if file.is_symlink():
            raise BundleError(f"{file}: is a link, and a bundle holds only plain files; copy its folder with `cp -rL`")
        if not file.is_file():
            raise BundleError(f"{file}: not a plain file; a bundle holds only those. {REMEDY}")
        if (found := file.stat().st_size) != size:
            how = "truncated" if found < size else "grown"
            raise BundleError(f"{file}: {how}, {found} bytes where the manifest says {size}. {REMEDY}")
    total, done = sum(size for size, _ in files.values()), 0
    for name, (_, expected) in files.items():
        done, digest = _hash(path / name, done, total, "verifying", progress)
        if digest != expected:
            raise BundleError(f"{path / name}: its content was changed (SHA-256 differs from the manifest). {REMEDY}")


def _check_graph(file: Path, files: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise BundleError unless the graph's data lie in the bundle and it is the one that the manifest calls so."""
    model = file.read_bytes()
    try:
        locations, own_name = external_locations(model), graph_name(model)
    except ValueError as error:
        raise BundleError(f"{file}: not a well-formed ONNX graph ({error}). {REMEDY}") from error
    if outside := sorted(locations - set(files)):
        raise BundleError(f"{file}: its external data point to {outside[0]!r}, which is not in the bundle. {REMEDY}")
    for name in names:
        if own_name not in (name, name.removeprefix("onnxruntime_")):  # a canonical graph may be written for it
            raise BundleError(f"{file}: holds the graph {own_name!r}, the manifest says {name}. {REMEDY}")


def _hash(path: Path, done: int, total: int, what: str, progress: Progress) -> tuple[int, str]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            progress(what, done, total)
    return done, digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
