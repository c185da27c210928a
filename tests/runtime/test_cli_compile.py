"""`bar-edge compile`, and the other verbs on what it makes, as a user without a GPU meets them."""

import json
import re

import pytest
from typer.testing import CliRunner

from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.cli import app
from bar_edge.runtime.engines import status
from bar_edge.runtime.errors import BundleError, CompatibilityError, EngineError, RequestError

pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13")

MAIN = "from bar_edge.runtime.cli import main\nmain()"
GRAPHS = ("modulation", "mask_ratio", "prefix", "step", "head_pass", "decode")
PLAN = re.compile(r"^  (\w+): (\d+\.\d) MiB, (\d+) kernels, (.+)$", re.MULTILINE)


def run(*arguments: object):
    """A verb in this process; what it raises is raised."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def no_gpu():
    """Where a driver answers, these verbs would run."""
    usable, reason = status("tensorrt").usable, status("tensorrt").detail
    if usable or "driver" not in reason:
        pytest.skip("this machine has an NVIDIA driver; these tests say what is said without one")


@pytest.fixture(scope="module")
def printed(small, tmp_path_factory):
    """What `compile` said, and the bundle it made for two sizes of batches."""
    output = tmp_path_factory.mktemp("compile") / "new" / "compiled"
    done = run("compile", small.quantized("int8").path, "--target", "rtx", "--batch", 1, "--batch", 3, "-o", output)
    assert done.exit_code == 0
    return done.stdout, Bundle.open(output)


# -- compile -----------------------------------------------------------------------------------------------------------


def test_compile_says_what_became_of_every_graph(printed):
    stdout, bundle = printed
    facts = bundle.manifest["engines"]["tensorrt"]
    lines = stdout.splitlines()
    assert lines[0] == f"{bundle.path}: tensorrt_rtx {facts['version']}, SM 8.0, 8.6, 8.9, 12.0, fp16"
    told = PLAN.findall(stdout)
    assert [name for name, *_ in told] == [*GRAPHS, *GRAPHS]
    made = [plan for profile in facts["profiles"] for plan in profile["plans"].values()]
    for (_, size, kernels, products), plan in zip(told, made, strict=True):
        assert abs(float(size) - plan["bytes"] / 2**20) <= 0.05 + 1e-9
        assert int(kernels) == plan["kernels"]
        assert products == ", ".join(f"{kind} x{count}" for kind, count in plan["products"].items())
    assert "int8 x13" in next(line for line in lines if line.startswith("  step: "))
    rows = [line for line in lines if "MiB of buffers" in line]
    assert [line.split(" rows, ")[0] for line in rows] == ["2", "6"]
    assert len(lines) == 1 + 2 * (1 + len(GRAPHS))


def test_nothing_but_the_bundle_is_left(printed):
    _, bundle = printed
    assert [entry.name for entry in bundle.path.parent.iterdir()] == ["compiled"]


def test_force_and_kept_graphs(patch1, tmp_path):
    arguments = ("compile", patch1.bundle.path, "--target", "rtx4090", "-o", tmp_path / "out")
    assert run(*arguments, "--keep-onnx", tmp_path / "graphs").exit_code == 0
    assert {f"{name}-2.onnx" for name in GRAPHS} < {entry.name for entry in (tmp_path / "graphs").iterdir()}
    assert Bundle.open(tmp_path / "out").manifest["engines"]["tensorrt"]["sms"] == [89]
    with pytest.raises(BundleError, match=r"exists already.*--force"):
        run(*arguments)
    done = run(*arguments, "--precision", "bf16", "--force")
    assert done.stdout.splitlines()[0].endswith(", SM 8.9, bf16")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["graphs", "out"]


MISTAKES = {
    "a device elsewhere": (("--target", "orin"), "EngineError: target orin: the Jetson Orin is SM 8.7"),
    "an unknown target": (("--target", "rtx2080"), "EngineError: unknown target 'rtx2080'; known: rtx, host"),
    "an unknown precision": (("--target", "rtx", "--precision", "fp8"), "RequestError: precision 'fp8'"),
    "no GPU": ((), "EngineError: target host: no NVIDIA GPU answers here"),
}


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(python, patch1, tmp_path, mistake):
    options, message = MISTAKES[mistake]
    done = python(MAIN, "compile", patch1.bundle.path, "-o", tmp_path / "out", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_batch_of_no_images_is_explained_by_the_command_line(python, patch1, tmp_path):
    done = python(MAIN, "compile", patch1.bundle.path, "-o", tmp_path / "out", "--target", "rtx", "--batch", 0)
    assert done.returncode == 2 and "--batch" in done.stderr and "Traceback" not in done.stderr


def test_a_compiled_bundle_is_not_compiled_again(printed, tmp_path):
    with pytest.raises(RequestError, match="is compiled already"):
        run("compile", printed[1].path, "--target", "rtx", "-o", tmp_path / "again")


# -- the other verbs on a compiled bundle ------------------------------------------------------------------------------


def test_inspect_says_what_a_compiled_bundle_is(printed, small):
    _, bundle = printed
    facts = json.loads(run("inspect", bundle.path, "--json").stdout)
    assert (facts["kind"], facts["model"], facts["digest"]) == ("bundle", small.spec.to_dict(), bundle.digest)
    assert facts["graphs"] == {} and facts["quantization"]["precision"] == "int8"
    assert facts["provenance"]["source"]["digest"] == small.quantized("int8").digest
    assert run("inspect", bundle.path).exit_code == 0


def test_inspect_shows_the_engines_of_a_compiled_bundle(printed):
    _, bundle = printed
    facts = json.loads(run("inspect", bundle.path, "--json").stdout)
    assert facts["engines"] == bundle.manifest["engines"]
    assert "tensorrt_rtx" in run("inspect", bundle.path).stdout


def test_inspect_does_not_claim_that_a_compiled_token_reads_next_to_nothing(printed, small):
    compiled, source = (
        json.loads(run("inspect", path, "--json").stdout)["bytes_read_per_token"]
        for path in (printed[1].path, small.quantized("int8").path)
    )
    assert compiled is None or compiled >= source


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("verb", ["generate", "verify"])
def test_without_a_driver_a_compiled_bundle_does_not_run_and_nothing_stands_in(printed, tmp_path, verb):
    _, bundle = printed
    options = ("--class", 0, "-o", tmp_path / "images") if verb == "generate" else ()
    with pytest.raises(
        EngineError, match=r"engine 'auto' cannot run here.*tensorrt: no NVIDIA driver.*install"
    ) as told:
        run(verb, bundle.path, *options)
    assert "onnxruntime" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_another_engine_is_refused_by_name(printed):
    with pytest.raises(CompatibilityError, match="was made for tensorrt, not for onnxruntime; use the bundle that it"):
        run("verify", printed[1].path, "--engine", "onnxruntime")


def test_an_uncompiled_bundle_is_told_to_be_compiled(patch1):
    with pytest.raises(CompatibilityError, match="was made for onnxruntime, not for tensorrt; compile it: bar-edge"):
        run("verify", patch1.bundle.path, "--engine", "tensorrt")


@pytest.mark.usefixtures("no_gpu")
def test_doctor_lists_tensorrt_and_why_it_is_unusable():
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["engines"]["tensorrt"]["usable"] is False
    assert re.search("no NVIDIA driver.*; install", facts["engines"]["tensorrt"]["detail"])
    assert facts["engines"]["onnxruntime"]["usable"] and facts["extras"]["compile"] == "installed"
    assert "tensorrt: usable no" in " ".join(run("doctor").stdout.split())
