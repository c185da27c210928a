"""The static-cache form of the reference draws what the reference draws."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bar_edge.benchmarks import static_cache
from bar_edge.benchmarks.static_cache import Captured, StaticCacheSampler, capture_cuda
from bar_edge.export.model import generate_bits
from bar_edge.runtime.errors import EngineError
from bar_edge.runtime.noise import SeededNoise
from bar_edge.runtime.spec import Recipe


def plain(function):
    """In the place of the compiler."""
    return function


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_bits_are_those_of_the_growing_cache(golden, guidance):
    recipe = Recipe(guidance, 2.0, golden.checkpoint.recipe.allocation)
    noise, class_ids = SeededNoise(5, range(2)), [0, 1]
    sampler = StaticCacheSampler(copy.deepcopy(golden.reference), 2, recipe, plain)
    steps = []
    drawn = sampler.sample(class_ids, noise, lambda done, total: steps.append((done, total)))
    expected = generate_bits(golden.reference, class_ids, recipe, noise)
    assert np.array_equal(drawn.numpy(), expected.numpy())
    assert steps == [(n + 1, golden.spec.num_tokens) for n in range(golden.spec.num_tokens)]


def test_a_sampler_draws_the_same_again_and_takes_a_generator_from_another(small):
    model, noise = copy.deepcopy(small.reference), SeededNoise(1, range(1))
    recipe = small.checkpoint.recipe
    first = StaticCacheSampler(model, 1, recipe, plain)
    drawn = first.sample([0], noise)
    assert np.array_equal(drawn, first.sample([0], noise))  # what the last image left in the cache is not seen
    StaticCacheSampler(model, 2, recipe, plain)
    assert np.array_equal(drawn, StaticCacheSampler(model, 1, recipe, plain).sample([0], noise))


def test_a_sampler_stays_on_the_models_device(small):
    """PyTorch refuses to mix devices: a tensor made on the CPU would be found."""
    model = copy.deepcopy(small.reference).to("meta")
    sampler = StaticCacheSampler(model, 2, small.checkpoint.recipe, plain)
    assert sampler.sample([0, 1], SeededNoise(1, range(2))).device.type == "meta"


# ---- captured, as on a GPU ----


class Graph:
    """In the place of a CUDA graph: while it is captured nothing is computed, and every replay fills one tensor."""

    def __init__(self, function):
        self._function = function
        self.output = torch.full_like(function(), 77)
        self.replays = 0

    def replay(self):
        self.replays += 1
        self.output.copy_(self._function())


class Capturing:
    """Makes such graphs, after running what is captured as often as `capture_cuda` does."""

    def __init__(self):
        self.graphs = []

    def __call__(self, function):
        for _ in range(static_cache._WARM_UPS):
            function()
        self.graphs.append(Graph(function))
        return self.graphs[-1].replay, self.graphs[-1].output


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_captured_functions_draw_the_same(golden, guidance):
    recipe = Recipe(guidance, 2.0, golden.checkpoint.recipe.allocation)
    capturing, tokens = Capturing(), golden.spec.num_tokens
    sampler = StaticCacheSampler(copy.deepcopy(golden.reference), 2, recipe, plain, capturing)
    for seed, class_ids in ((5, [0, 1]), (6, [1, 0])):  # the second replays what the first captured
        noise = SeededNoise(seed, range(2))
        expected = generate_bits(golden.reference, class_ids, recipe, noise)
        assert np.array_equal(sampler.sample(class_ids, noise).numpy(), expected.numpy())
    assert [graph.replays for graph in capturing.graphs] == [2, 2 * tokens, 2 * (tokens - 1)]  # prefix, head, trunk


def test_what_is_captured_reads_its_own_inputs_and_is_captured_again_for_other_shapes():
    capturing = Capturing()
    doubled = Captured(lambda x: 2 * x, capturing)
    x = torch.ones(3)
    first = doubled(x)
    assert first.tolist() == [2, 2, 2]
    x += 1
    assert first.tolist() == [2, 2, 2] and doubled(x).tolist() == [4, 4, 4]
    assert first.tolist() == [4, 4, 4]  # one tensor for all results
    assert doubled(torch.ones(1)).tolist() == [2] and len(capturing.graphs) == 2


@pytest.fixture
def cuda(monkeypatch):
    """PyTorch's CUDA in so far as capturing needs it; what was done, in order."""
    done = []

    class Stream:
        def wait_stream(self, other):
            done.append("wait")

    class Recording:
        def __init__(self, graph, stream):
            assert isinstance(stream, Stream)

        def __enter__(self):
            done.append("begin")

        def __exit__(self, kind, *_):
            done.append("end")
            if kind is not None:
                raise RuntimeError("operation failed due to a previous error during capture")

    graph = SimpleNamespace(replay=lambda: done.append("replay"))
    known = {
        "Stream": Stream, "current_stream": Stream, "stream": nullcontext, "CUDAGraph": lambda: graph,
        "graph": Recording,
    }  # fmt: skip
    for name, stand_in in known.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return done


def test_a_function_runs_before_it_is_captured(cuda):
    def function():
        cuda.append("run")
        return torch.ones(1)

    replay, output = capture_cuda(function)
    assert cuda == ["wait", *["run"] * static_cache._WARM_UPS, "wait", "begin", "run", "end"]
    replay()
    assert cuda[-1] == "replay" and output.tolist() == [1]


def test_what_cannot_be_captured_is_an_error_and_not_launched_from_the_host(cuda):
    def function(x):
        if "begin" in cuda:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x

    with pytest.raises(
        EngineError, match=r"cannot hold \(RuntimeError: operation not permitted when stream is capturing"
    ):
        Captured(function)(torch.ones(1))


def test_a_sampler_that_cannot_be_captured_draws_nothing(small):
    def refuse(function):
        raise EngineError("no graph")

    sampler = StaticCacheSampler(copy.deepcopy(small.reference), 1, small.checkpoint.recipe, plain, refuse)
    with pytest.raises(EngineError, match="no graph"):
        sampler.sample([0], SeededNoise(1, range(1)))
