"""Acceptance on a GPU: here, where there is none, it refuses; its parts run on what stands in."""

import subprocess
import sys

import pytest

from bar_edge.benchmarks import gpu_acceptance
from bar_edge.runtime import engines
from bar_edge.runtime.engines.cuda.device import host_sm


@pytest.mark.skipif(host_sm() is not None, reason="there is a GPU here")
def test_without_a_gpu_nothing_is_accepted(tmp_path):
    command = [sys.executable, "-m", "bar_edge.benchmarks.gpu_acceptance", "-o", str(tmp_path / "report.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "no NVIDIA GPU answers here" in done.stderr
    assert not list(tmp_path.iterdir())


def test_bundles_are_made_for_the_usable_engines_only(small, tmp_path, monkeypatch):
    bundle, usable = small.bundle, {"cuda": True, "tensorrt": False}
    monkeypatch.setattr(engines, "status", lambda name: engines.Status(name, usable[name], ""))
    made = dict(gpu_acceptance._compiled(bundle, tmp_path, 90))
    assert list(made) == ["cuda"]
    assert made["cuda"].engines == ("cuda",)


def test_what_cannot_be_made_or_run_is_told(small):
    assert gpu_acceptance._judged(small.bundle, "no library") == {"failed": "no library"}
    assert gpu_acceptance._judged(small.bundle, small.bundle)["decisions_differing"] == 0
