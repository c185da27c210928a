"""The shards of an evaluation set on the machines of a Ray cluster.

A thin layer: a task is one shard, drawn by `EvaluationSet.draw_shard` into the shared folder, so a task that runs twice
does no harm, and Ray runs those of a worker or node that dies again. Nothing but paths and numbers travels through Ray:
bundle and folder must be at the same paths on every node, which every task checks. Needs the extra `ray`.
"""

import os
import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.errors import BarEdgeError, BundleError, EngineError, RequestError
from bar_edge.runtime.evaluation_set import EvaluationSet
from bar_edge.runtime.generator import Generator
from bar_edge.runtime.progress import Progress, silent

LOCAL = "local"
_CPU_ENGINES = ("onnxruntime",)  # every other engine has a GPU to itself
_RETRIES = 3  # of a shard whose worker dies; one that kills every worker must not run for ever
_SECONDS_TO_ANSWER = 10
_OBJECT_STORE = 80 * 2**20  # bytes, about the least Ray takes: nothing is stored


def draw(
    folder: EvaluationSet,
    bundle: Bundle,
    *,
    address: str,
    threads: int,
    batch_size: int,
    progress: Progress = silent,
) -> None:
    """Draw every missing shard on a cluster.

    Args:
        address: `local` for a cluster of this machine's own that ends with the call, else what `ray.init` takes.
        threads: CPU threads of one worker; a node runs as many workers as it has CPUs, or GPUs, for.

    Raises EngineError if there is no such cluster, it is too small or keeps losing workers, RequestError for threads,
    and what drawing raises.
    """
    if threads < 1:
        raise RequestError("with Ray, threads must say how many each worker uses: pass --threads, at least 1")
    gpus = 0 if folder.settings.engine in _CPU_ENGINES else 1
    with _cluster(address) as ray:
        _check_room(ray, threads, gpus)
        task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=_RETRIES)(draw_shard)
        paths = str(bundle.path.absolute()), str(folder.path.absolute())
        waiting = {task.remote(*paths, shard, threads, batch_size): shard for shard in folder.missing()}
        done = folder.images_done
        while waiting:
            for finished in ray.wait(list(waiting), num_returns=1)[0]:
                shard = waiting.pop(finished)
                _check_result(ray, finished, shard)
                done += len(folder.indices(shard))
                progress("images", done, folder.settings.num)


def draw_shard(bundle_path: str, folder_path: str, shard: int, threads: int, batch_size: int) -> None:
    """What a worker does: one shard, with an engine that it keeps for the next one.

    Raises BarEdgeErrors that name the node.
    """
    try:
        folder = EvaluationSet.open(Path(folder_path))
        generator = _generator(bundle_path, folder.settings.engine, threads)
        if generator.bundle.digest != folder.settings.bundle:
            raise BundleError(f"{bundle_path}: is another bundle than the one the set was begun with")
        folder.draw_shard(shard, generator, batch_size=batch_size)
    except BarEdgeError as error:
        raise type(error)(
            f"on node {platform.node()}: {error}. Every node needs the bundle and the output at the same paths"
        ) from error


@lru_cache(maxsize=1)
def _generator(bundle_path: str, engine: str, threads: int) -> Generator:
    return Generator(bundle_path, engine=engine, threads=threads)


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # no reports to anyone, from a cluster started here
    import ray

    own = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE} if address == LOCAL else {}
    try:
        _knock(address)
        ray.init(address, log_to_driver=False, logging_level="ERROR", **own)
    except (OSError, RuntimeError, ValueError) as error:
        raise EngineError(
            f"no Ray cluster at {address!r} that this machine can join ({error}); start one with `ray start --head`, "
            "the same Ray and Python on every node, or pass --ray local"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT: Ray itself would try for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host:
        socket.create_connection((host, int(port)), timeout=_SECONDS_TO_ANSWER).close()


def _check_room(ray: Any, threads: int, gpus: int) -> None:
    """A task that fits no node would wait for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= threads and node.get("GPU", 0) >= gpus for node in nodes):
        found = "; ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise EngineError(
            f"a worker needs {threads} CPUs and {gpus} GPUs, but the cluster's nodes have {found}; lower --threads or "
            "start larger nodes"
        )


def _check_result(ray: Any, finished: Any, shard: int) -> None:
    try:
        ray.get(finished)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise EngineError(
            f"Ray gave up on shard {shard}, whose worker died {1 + _RETRIES} times ({type(error).__name__}), perhaps "
            "for want of memory; finished shards are kept, run the command again with fewer workers (more --threads)"
        ) from error
