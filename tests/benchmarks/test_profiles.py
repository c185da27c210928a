"""The split by stage: every node has one, and the parts add up to the whole."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from bar_edge.benchmarks import profiles
from bar_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from bar_edge.runtime.noise import SeededNoise
from bar_edge.runtime.sampling import to_fine_grid


def test_nodes_are_told_apart_by_what_they_compute(small):
    stages = profiles.stages_of_nodes(small.bundle.graph("onnxruntime_step"))
    assert {stages[f"attention.{i}"] for i in range(small.spec.num_layers)} == {"trunk"}
    assert {stage for name, stage in stages.items() if name.startswith("TopK")} == {"sampling"}
    assert set(stages.values()) == {"trunk", "head", "sampling"}


def test_every_linear_layer_of_trunk_and_head_is_in_its_stage(small):
    import onnx

    path = small.bundle.graph("onnxruntime_step")
    stages = profiles.stages_of_nodes(path)
    graph = onnx.load(path, load_external_data=False).graph
    body = next(a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH)
    for node in [*graph.node, *body.node]:
        for name in node.input:
            if name.endswith(".weight") and node.op_type == "Gemm":
                assert stages[node.name] == ("head" if name.startswith("lm_head.") else "trunk"), name


@pytest.mark.parametrize("which", ["fp32", "int8"])
def test_a_bundle_is_split_into_stages_that_add_up(small, which):
    bundle = small.bundle if which == "fp32" else small.quantized(which)
    split = profiles.split_onnxruntime(bundle, 1, np.arange(2), SeededNoise(0, range(2)))
    assert tuple(split.seconds) == profiles.STAGES
    assert all(seconds > 0 for seconds in split.seconds.values())
    assert sum(split.seconds.values()) == pytest.approx(split.wall_seconds)
    assert split.overhead > 0


@pytest.fixture
def ticking(monkeypatch):
    """Every look at the host's clock takes a second, and every kernel as long as it is told."""

    def set_kernels(seconds: float) -> None:
        def told(engine):
            events = recorded(engine)
            for event in events:
                if event["name"].endswith("_kernel_time"):
                    event["dur"] = 1e6 * seconds
            return events

        monkeypatch.setattr(profiles._ProfiledEngine, "step_events", told)

    recorded, seconds = profiles._ProfiledEngine.step_events, itertools.count()
    monkeypatch.setattr(profiles, "time", SimpleNamespace(perf_counter=lambda: float(next(seconds))))
    return set_kernels


def test_graphs_beside_the_step_count_where_they_belong_and_only_those_of_the_image_itself(small, ticking):
    """Modulation is the prefix's, the embedding of mask ratios the head's; the warm-up's runs are nobody's."""
    ticking(0.0)
    split = profiles.split_onnxruntime(small.bundle, 1, np.arange(2), SeededNoise(0, range(2)))
    runs = (split.wall_seconds - 4) / 2  # two looks at the clock for each; four around sampling and decoding
    assert runs > 1 and split.seconds["prefix"] == runs - 1 and split.seconds["head"] == 1
    assert (split.seconds["trunk"], split.seconds["sampling"]) == (0, 0)
    assert split.overhead == split.wall_seconds  # an unprofiled image takes a single tick


def test_the_prefix_is_that_of_the_image_and_not_all_that_ran_before(small, ticking):
    ticking(1.0)
    seconds = profiles.split_onnxruntime(small.bundle, 1, np.arange(2), SeededNoise(0, range(2))).seconds
    assert 0 < seconds["prefix"] < (seconds["trunk"] + seconds["head"] + seconds["sampling"]) / 4  # one run beside 16


def test_cuda_events_tell_milliseconds():
    begin, end = SimpleNamespace(elapsed_time=lambda other: 1500.0), SimpleNamespace(synchronize=lambda: None)
    assert profiles.TorchEvents().seconds(begin, end) == 1.5


def test_the_profiled_engine_draws_the_same(small, tmp_path):
    batch = profiles._batch(small.bundle, np.arange(2), SeededNoise(3, range(2)))
    profiled, plain = profiles._ProfiledEngine(small.bundle, 1, tmp_path), OnnxRuntimeEngine(small.bundle, 1)
    assert np.array_equal(profiled.sample(batch), plain.sample(batch))
    assert profiled.step_events()
    profiled.close()
    plain.close()


class Counted(profiles.HostClock):
    """The host's clock in the place of a GPU's, and how often it was looked at."""

    on_gpu = True

    def __init__(self):
        self.marks = 0

    def mark(self):
        self.marks += 1
        return super().mark()


def test_the_reference_is_split_and_left_as_it_was(small):
    from bar_edge.export.model import generate_bits

    recipe, spec = small.checkpoint.recipe, small.spec

    def sample(class_ids, noise, progress):
        drawn = generate_bits(small.reference, class_ids.tolist(), recipe, noise, progress)
        return to_fine_grid(drawn.numpy(), spec)

    def decode(bits):
        return np.zeros((len(bits), 3, 4, 4), dtype=np.float32)

    request = (np.arange(2), SeededNoise(0, range(2)))
    clock = Counted()
    split = profiles.split_pytorch(small.reference, sample, decode, spec, recipe, *request, compiled=False, clock=clock)
    assert set(split.seconds) == set(profiles.STAGES)
    assert sum(split.seconds.values()) == pytest.approx(split.wall_seconds, rel=0.01)
    assert split.overhead is None
    parts = spec.num_tokens * (1 + len(recipe.allocation))
    assert clock.marks == 2 * parts + spec.num_tokens  # for a GPU: before and after every part, and after every token
    assert len(split.token_seconds) == spec.num_tokens - 1
    assert sum(split.token_seconds) < split.wall_seconds
    assert not {"prefix_latents", "token_latents"} & small.reference.__dict__.keys()
    assert "forward" not in small.reference.lm_head.__dict__


class Stream:
    """A GPU's clock: its stream is done with a step a second after that was put into it, and nobody waits."""

    on_gpu = True

    def __init__(self):
        self.now = 0

    def mark(self):
        return self.now

    def seconds(self, begin, end):
        return end - begin

    def step(self):
        self.now += 1


def test_a_stage_is_what_lies_between_its_marks_in_the_stream():
    gpu = Stream()
    gpu.now = 5
    with profiles._timers([(gpu, "step", "trunk")], gpu) as spans:
        gpu.step()
        gpu.now += 3  # of nobody's
        gpu.step()
    assert spans == {"trunk": [(5, 6), (9, 10)]}


def test_on_the_cpu_the_split_times_no_tokens(small):
    from bar_edge.export.model import generate_bits

    recipe, spec = small.checkpoint.recipe, small.spec

    def sample(class_ids, noise, progress):
        drawn = generate_bits(small.reference, class_ids.tolist(), recipe, noise, progress)
        return to_fine_grid(drawn.numpy(), spec)

    split = profiles.split_pytorch(
        small.reference, sample, lambda bits: np.zeros((len(bits), 3, 4, 4), np.float32), spec, recipe, np.arange(1),
        SeededNoise(0, range(1)), compiled=False, clock=profiles.HostClock(),
    )  # fmt: skip
    assert split.token_seconds is None


def test_kernels_are_given_to_runs_and_made_up_nodes_to_their_neighbours():
    def kernel(name, ts, dur=1, op="Gemm"):
        return {"name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": {"op_name": op}}

    events = [
        {"name": "model_run", "ts": 0, "dur": 10}, kernel("a", 1), kernel("made up", 3, 2), kernel("b", 6, 4),
        {"name": "model_run", "ts": 20, "dur": 10}, kernel("b", 21, 8, op="Scan"), kernel("b", 22, 3),
    ]  # fmt: skip
    first, second = profiles._runs(events)
    stages = {"a": "trunk", "b": "head"}
    assert profiles._by_stage(first, stages) == pytest.approx({"trunk": 3e-6, "head": 4e-6})
    assert profiles._by_stage(second, stages) == pytest.approx({"head": 3e-6})
