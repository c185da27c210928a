"""An evaluation set on a Ray cluster of two one-CPU nodes: the files are those drawn alone, also if a worker dies."""

import os
import signal
import time
from dataclasses import replace

import numpy as np
import pytest

from bar_edge.runtime import ray_shards
from bar_edge.runtime.errors import BundleError, EngineError, RequestError
from bar_edge.runtime.evaluation_set import EvaluationSet
from bar_edge.runtime.evaluation_settings import EvaluationSettings

SECONDS = 60
NO_RAY = "ray is not installed: pip install 'bar-edge[ray]'"


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster that reports to nobody."""
    pytest.importorskip("ray", reason=NO_RAY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
        made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        made.add_node(**node)
        yield made.address
        made.shutdown()


@pytest.fixture(scope="module")
def settings(digits) -> EvaluationSettings:
    made = EvaluationSettings.of(digits.bundle, engine="onnxruntime", num=56, seed=3)
    return replace(made, shard_images=10)


def files(folder: EvaluationSet) -> dict[str, bytes]:
    return {str(f.relative_to(folder.path)): f.read_bytes() for f in sorted(folder.path.rglob("*")) if f.is_file()}


def kill_a_worker(folder: EvaluationSet) -> int:
    """Kill a process that has just begun a shard; its unfinished folder says which. Returns its id."""
    begun, deadline = set(folder.shards.glob(".*.partial")), time.monotonic() + SECONDS
    while not (new := set(folder.shards.glob(".*.partial")) - begun):
        assert time.monotonic() < deadline, "no worker began a shard"
        time.sleep(0.002)
    worker = int(new.pop().name.split(".")[2])
    os.kill(worker, signal.SIGKILL)
    return worker


def test_a_killed_workers_shard_is_drawn_by_another(digits, settings, cluster, tmp_path):
    killed, seen = [], []

    def progress(what, done, total):
        seen.append((done, total))
        if not killed:
            killed.append(kill_a_worker(shared))

    with EvaluationSet.begin(tmp_path / "ray", settings) as shared:
        ray_shards.draw(shared, digits.bundle, address=cluster, threads=1, batch_size=4, progress=progress)
        assert list(shared.shards.glob(f".*.{killed[0]}.*.partial")), "the worker was killed between two shards"
        shared.assemble()
    assert sorted(entry.name for entry in shared.path.iterdir()) == ["images", "samples.npz", "sampling.json"]
    with EvaluationSet.begin(tmp_path / "alone", settings) as alone:
        alone.draw(digits.runtime, batch_size=4)
        alone.assemble()
    assert len(seen) == 6 and seen[-1] == (56, 56) and seen == sorted(seen)
    assert sum(name.endswith(".png") for name in files(shared)) == 56
    assert files(shared) == files(alone)
    with np.load(shared.samples) as stored:
        assert len(np.unique(stored["arr_0"].reshape(56, -1), axis=0)) == 56


def test_a_workers_error_is_one_sentence_with_the_nodes_name(patch1, settings, cluster, tmp_path):
    with EvaluationSet.begin(tmp_path / "set", settings) as folder:
        with pytest.raises(BundleError, match=r"^on node .*: is another bundle than .* at the same paths$") as caught:
            ray_shards.draw(folder, patch1.bundle, address=cluster, threads=1, batch_size=4)
        assert not list(folder.path.rglob("*.npy"))
    assert "\n" not in str(caught.value)


def test_workers_that_fit_no_node_are_refused(digits, settings, cluster, tmp_path):
    with (
        EvaluationSet.begin(tmp_path / "set", settings) as folder,
        pytest.raises(EngineError, match="a worker needs 2 CPUs and 0 GPUs, but the cluster's nodes have 1 CPUs"),
    ):
        ray_shards.draw(folder, digits.bundle, address=cluster, threads=2, batch_size=4)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere", "127.0.0.1:port"])
def test_no_cluster_is_one_sentence(digits, settings, tmp_path, address):
    pytest.importorskip("ray", reason=NO_RAY)
    with EvaluationSet.begin(tmp_path / "set", settings) as folder:
        with pytest.raises(EngineError, match=f"no Ray cluster at '{address}' .* or pass --ray local$") as caught:
            ray_shards.draw(folder, digits.bundle, address=address, threads=1, batch_size=4)
        assert len(folder.missing()) == 6
    assert "\n" not in str(caught.value)


def test_threads_must_be_given(digits, settings, tmp_path):
    with (
        EvaluationSet.begin(tmp_path / "set", settings) as folder,
        pytest.raises(RequestError, match="pass --threads"),
    ):
        ray_shards.draw(folder, digits.bundle, address="local", threads=0, batch_size=4)


def test_a_node_without_the_shared_folder_is_named(digits, tmp_path):
    with pytest.raises(RequestError, match=r"^on node .*sampling\.json: no such file.* at the same paths$"):
        ray_shards.draw_shard(str(digits.bundle.path), str(tmp_path / "elsewhere"), 0, 1, 4)
