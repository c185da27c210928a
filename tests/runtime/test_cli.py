"""The command: what each verb writes and prints, exit codes, and one sentence for every mistake."""

import itertools
import json
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from bar_edge.benchmarks.random_checkpoint import random_generator, random_tokenizer, write_checkpoint
from bar_edge.export.exporter import export_bundle
from bar_edge.runtime import cli, folders, selftest
from bar_edge.runtime.bundle import MANIFEST, SELFTEST, Bundle
from bar_edge.runtime.cli import app
from bar_edge.runtime.errors import BarEdgeError, BundleError, RequestError
from bar_edge.runtime.folders import locked
from bar_edge.runtime.pictures import read_settings
from bar_edge.runtime.spec import ModelSpec, Recipe

MAIN = "from bar_edge.runtime.cli import main\nmain()"


def run(*arguments: object):
    """A verb in this process; what it raises is raised."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def command(python):
    """The command as a user runs it, in a process of its own."""
    return lambda *arguments: python(MAIN, *arguments)


@pytest.fixture(scope="module")
def thousand(tmp_path_factory) -> Bundle:
    """A tiny model with ImageNet's number of classes."""
    spec = ModelSpec(
        hidden_size=32, num_layers=1, num_heads=2, image_seq_len=16, token_size=4, patch_size=2, num_classes=1000,
        repeat_class_condition=2, head_width=32, head_layers=1, decoder_patch_size=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("thousand")
    write_checkpoint(
        folder, spec, Recipe(2.0, 1.0, (4, 4, 8)), random_generator(spec), random_tokenizer(spec, width=32, layers=1)
    )
    sources = (folder / name for name in ("generator.bin", "tokenizer.bin", "config.yaml"))
    return export_bundle(*sources, folder / "bundle")


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# -- export ------------------------------------------------------------------------------------------------------------


def test_export_makes_a_bundle_and_tells_its_recipe(patch1, tmp_path):
    output = tmp_path / "bundle"
    done = run("export", patch1.generator, "--config", patch1.config, "--tokenizer", patch1.tokenizer, "-o", output)
    assert done.exit_code == 0
    assert Bundle.open(output).digest == patch1.bundle.digest
    assert "64x64; samples with guidance 5, temperature 2.5, allocation 1,2,3" in done.stdout
    assert "\n" not in done.stdout.strip()


def test_export_takes_overrides(patch1, tmp_path):
    done = run(
        "export", patch1.generator, "--config", patch1.config, "--tokenizer", patch1.tokenizer, "-o", tmp_path / "b",
        "model.generator.guidance_scale=1.5", "model.generator.mbm_head.tokens_allocation=[3,3]",
    )  # fmt: skip
    assert done.exit_code == 0
    recipe = Bundle.open(tmp_path / "b").recipe
    assert (recipe.guidance, recipe.allocation) == (1.5, (3, 3))


def test_export_replaces_a_bundle_only_with_force(patch1, bundle_copy):
    arguments = (
        "export", patch1.generator, "--config", patch1.config, "--tokenizer", patch1.tokenizer, "-o", bundle_copy,
    )  # fmt: skip
    with pytest.raises(BundleError, match="exists already"):
        run(*arguments)
    assert run(*arguments, "--force").exit_code == 0


# -- generate ----------------------------------------------------------------------------------------------------------


def test_a_contact_sheet_shows_the_first_images_of_many(patch1, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_SHEET_IMAGES", 2)
    done = run("generate", patch1.bundle.path, "--class", "1", "--num", "3", "-o", tmp_path / "out")
    assert names(tmp_path / "out") == ["00000.png", "00001.png", "00002.png", "sheet.png"]
    with Image.open(tmp_path / "out" / "sheet.png") as sheet, Image.open(tmp_path / "out" / "00000.png") as image:
        assert 2 * image.width < sheet.width < 3 * image.width
        assert sheet.height < 2 * image.height
    assert "3 images in" in done.stdout and "contact sheet of the first 2" in done.stdout


def test_generate_writes_images_with_their_settings_and_a_sheet(patch1, tmp_path):
    output = tmp_path / "new" / "out"
    done = run(
        "generate", patch1.bundle.path, "--class", 7, "--class", 2, "--num", 2, "--seed", 9, "-o", output,
        "--guidance", 2, "--temperature", 0.5, "--allocation", "2,4", "--order", "random", "--batch-size", 3,
    )  # fmt: skip
    assert done.exit_code == 0
    assert names(output) == ["00000.png", "00001.png", "00002.png", "00003.png", "sheet.png"]
    expected = patch1.runtime.generate(
        [7, 2], num=2, seed=9, guidance=2, temperature=0.5, allocation=[2, 4], order="random"
    )  # fmt: skip
    for index, image in enumerate(expected):
        file = output / f"{index:05d}.png"
        with Image.open(file) as stored:
            assert stored.tobytes() == image.tobytes()
        class_id = 7 if index < 2 else 2
        assert read_settings(file) == {
            "bundle": patch1.bundle.digest, "variant": None, "engine": "onnxruntime",
            "bar-edge": metadata.version("bar-edge"), "seed": 9, "order": "random", "guidance": 2.0, "temperature": 0.5,
            "allocation": [2, 4], "class_id": class_id, "class": str(class_id), "index": index,
        }  # fmt: skip
    assert read_settings(output / "sheet.png")["seed"] == 9
    with Image.open(output / "sheet.png") as sheet:
        assert sheet.width > 2 * 64 and sheet.height > 2 * 64
    assert "4 images in" in done.stdout and "engine onnxruntime" in done.stdout


def test_the_settings_in_a_file_draw_it_again(patch1, tmp_path):
    run("generate", patch1.bundle.path, "--class", 3, "--num", 3, "--seed", 2**63, "-o", tmp_path / "a")
    settings = read_settings(tmp_path / "a" / "00002.png")
    run(
        "generate", patch1.bundle.path, "--class", settings["class_id"], "--num", settings["index"] + 1,
        "--seed", settings["seed"], "--guidance", settings["guidance"], "--temperature", settings["temperature"],
        "--allocation", ",".join(map(str, settings["allocation"])), "--order", settings["order"], "-o", tmp_path / "b",
    )  # fmt: skip
    assert (tmp_path / "a" / "00002.png").read_bytes() == (tmp_path / "b" / "00002.png").read_bytes()


def test_generate_prints_nothing_but_json_when_asked(patch1, tmp_path):
    done = run("generate", patch1.bundle.path, "--class", 3, "-o", tmp_path / "out", "--json")
    facts = json.loads(done.stdout)
    assert facts["images"] == [str(tmp_path / "out" / "00000.png")]
    assert Path(facts["sheet"]).is_file()
    assert facts["settings"]["guidance"] == patch1.checkpoint.recipe.guidance


def test_a_log_gets_a_line_of_progress_a_minute(patch1, tmp_path, monkeypatch):
    arguments = ("generate", patch1.bundle.path, "--class", 3, "--seed", 5, "-o")
    assert run(*arguments, tmp_path / "quick").stderr == ""
    clock = itertools.count(step=25.0)  # seconds between two reports
    monkeypatch.setattr(cli, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    lines = run(*arguments, tmp_path / "slow").stderr.splitlines()
    assert {re.sub(r"\d+(,\d{3})*", "N", line) for line in lines} == {
        "verifying: N of N",
        "images N-N of N, tokens: N of N",
    }
    tokens = [int(line.split()[-3]) for line in lines if "tokens" in line]
    assert 3 <= len(tokens) <= 8 and tokens == sorted(set(tokens))  # of 16


def test_generate_without_a_class(patch1, tmp_path):
    done = run("generate", patch1.bundle.path, "--unconditional", "--num", 2, "-o", tmp_path / "out")
    assert done.exit_code == 0
    settings = read_settings(tmp_path / "out" / "00001.png")
    assert (settings["class_id"], settings["class"]) == (None, "unconditional")


def test_generate_writes_into_a_folder_with_files_only_with_force(patch1, tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    arguments = ("generate", patch1.bundle.path, "--class", 3, "-o", tmp_path)
    with pytest.raises(RequestError, match="has files already"):
        run(*arguments)
    assert names(tmp_path) == ["mine.txt"]
    assert run(*arguments, "--force").exit_code == 0
    assert names(tmp_path) == ["00000.png", "mine.txt", "sheet.png"]


def test_images_are_not_written_into_a_bundle(patch1, bundle_copy):
    with pytest.raises(RequestError, match="is a bundle, which other files would spoil"):
        run("generate", patch1.bundle.path, "--class", 1, "-o", bundle_copy, "--force")
    Bundle.open(bundle_copy)


def test_two_commands_do_not_draw_into_one_folder(patch1, tmp_path):
    with locked(tmp_path), pytest.raises(RequestError, match="another command is writing into it; let it finish"):
        run("generate", patch1.bundle.path, "--class", 1, "-o", tmp_path)
    assert not list(tmp_path.iterdir())
    assert run("generate", patch1.bundle.path, "--class", 1, "-o", tmp_path).exit_code == 0


def test_who_comes_second_to_an_empty_folder_finds_it_full(patch1, tmp_path, monkeypatch):
    @contextmanager
    def waits(folder):
        (folder / "00000.png").touch()  # of whom it has waited for
        yield

    monkeypatch.setattr(folders, "locked", waits)
    with pytest.raises(RequestError, match="has files already"):
        run("generate", patch1.bundle.path, "--class", 1, "-o", tmp_path)


def test_generate_uses_an_empty_folder(patch1, tmp_path):
    assert run("generate", patch1.bundle.path, "--class", 3, "-o", tmp_path).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --class .* or --unconditional, one of the two"),
        (("--class", "3", "--unconditional"), "one of the two"),
        (("--class", "10"), "10 is not; this model has classes 0 to 9"),
        (("--class", "cat"), "this model has no class names"),
        (("--class", "3", "--allocation", "1,2"), "does not fit"),
        (("--class", "3", "--allocation", "many"), "not a list of numbers like 2,2,5,7"),
        (("--class", "3", "--guidance", "-1"), "guidance must be"),
        (("--class", "3", "--temperature", "nan"), "temperature must be"),
        (("--class", "3", "--order", "spiral"), "order must be raster or random"),
        (("--class", "3", "--seed", "-1"), "seed must be between"),
        (("--class", "3", "--engine", "tpu"), "unknown engine"),
    ],
)
def test_generate_refuses_before_it_makes_the_folder(patch1, tmp_path, arguments, message):
    with pytest.raises(BarEdgeError, match=message):
        run("generate", patch1.bundle.path, "-o", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_generate_knows_imagenet_names_for_a_thousand_classes(thousand, tmp_path):
    done = run("generate", thousand.path, "--class", "golden retriever", "--class", "0", "-o", tmp_path / "out")
    assert done.exit_code == 0
    found = [read_settings(tmp_path / "out" / f"0000{i}.png") for i in range(2)]
    assert [(s["class_id"], s["class"]) for s in found] == [(207, "golden retriever"), (0, "tench")]


@pytest.mark.parametrize(("name", "message"), [("crane", "could be 2 classes"), ("unicorn", "no ImageNet class")])
def test_generate_refuses_ambiguous_and_unknown_names(thousand, tmp_path, name, message):
    with pytest.raises(RequestError, match=message):
        run("generate", thousand.path, "--class", name, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- inspect -----------------------------------------------------------------------------------------------------------


def test_inspect_describes_a_bundle(patch1):
    facts = json.loads(run("inspect", patch1.bundle.path, "--json").stdout)
    assert facts["kind"] == "bundle"
    assert facts["model"] == patch1.spec.to_dict()
    assert facts["recipe"] == {"guidance": 5.0, "temperature": 2.5, "allocation": [1, 2, 3]}
    assert facts["image"] == "64x64, 16 tokens of 6 bits"
    assert facts["graphs"].keys() == patch1.bundle.graphs.keys()
    assert facts["graphs"]["trunk_step"]["precision"] == "fp32"
    assert facts["weights"]["dtypes"] == ["float32"]
    assert 0 < facts["bytes_read_per_token"] < 3 * facts["weights"]["bytes"]
    assert facts["kv_cache_bytes_per_row_fp32"] == 2 * 3 * 49 * 64 * 4
    assert facts["digest"] == patch1.bundle.digest
    assert facts["provenance"]["sources"][0]["file"] == "generator.bin"


@pytest.mark.parametrize("kind", ["generator", "tokenizer", "graph"])
def test_inspect_describes_files(patch1, kind):
    path = {"generator": patch1.generator, "tokenizer": patch1.tokenizer, "graph": patch1.bundle.graph("trunk_step")}[
        kind
    ]
    facts = json.loads(run("inspect", path, "--json").stdout)
    assert facts["kind"] == {"graph": "ONNX graph"}.get(kind, f"{kind} checkpoint")
    assert facts["file_bytes"] == path.stat().st_size


@pytest.mark.parametrize("what", ["bundle", "generator", "graph"])
def test_inspect_prints_the_same_for_people(patch1, what):
    path = {"bundle": patch1.bundle.path, "generator": patch1.generator, "graph": patch1.bundle.graph("trunk_step")}[
        what
    ]
    done = run("inspect", path)
    assert done.exit_code == 0
    assert "kind" in done.stdout and "MiB" in done.stdout


# -- verify ------------------------------------------------------------------------------------------------------------


def test_verify_passes_on_a_sound_bundle(patch1):
    done = run("verify", patch1.bundle.path, "--json")
    facts = json.loads(done.stdout)
    assert done.exit_code == 0
    assert facts["passed"] and facts["selftest"]["passed"]
    assert "against_checkpoint" not in facts


def test_verify_against_the_checkpoint_it_came_from(patch1):
    done = run(
        "verify", patch1.bundle.path, "--against", patch1.generator, "--tokenizer", patch1.tokenizer,
        "--config", patch1.config, "--num", 3, "--seed", 5, "--json",
    )  # fmt: skip
    facts = json.loads(done.stdout)
    assert done.exit_code == 0
    assert facts["against_checkpoint"]["images"] == 3
    assert facts["against_checkpoint"]["tokens_differing_without_tie"] == 0


def test_verify_fails_on_an_altered_self_test_with_true_hashes(bundle_copy, reseal, command):
    with np.load(bundle_copy / SELFTEST) as stored:
        record = dict(stored)
    record["bits"][0] ^= 0x80
    np.savez(bundle_copy / SELFTEST, **record)
    reseal(bundle_copy)
    done = command("verify", bundle_copy, "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["selftest"]["differing_bits"] == 1
    assert "Traceback" not in done.stderr


def test_verify_fails_beside_a_checkpoint_with_other_weights(patch1, tmp_path):
    tensors = {name: tensor.clone() for name, tensor in patch1.checkpoint.generator.items()}
    tensors["lm_head.output_embed.bias"] += torch.randn_like(tensors["lm_head.output_embed.bias"])
    torch.save(tensors, tmp_path / "other.bin")
    done = run(
        "verify", patch1.bundle.path, "--against", tmp_path / "other.bin", "--tokenizer", patch1.tokenizer,
        "--config", patch1.config, "--json",
    )  # fmt: skip
    assert done.exit_code == 1
    facts = json.loads(done.stdout)
    assert facts["selftest"]["passed"] and not facts["against_checkpoint"]["passed"] and not facts["passed"]


def test_verify_refuses_the_checkpoint_of_another_model(patch1, cases):
    other = cases("patch2")
    with pytest.raises(RequestError, match="is not the checkpoint of"):
        run(
            "verify", patch1.bundle.path, "--against", other.generator, "--tokenizer", other.tokenizer,
            "--config", other.config,
        )  # fmt: skip


def test_verify_refuses_the_yaml_of_no_checkpoint(patch1):
    with pytest.raises(RequestError, match="--config is the checkpoint's"):
        run("verify", patch1.bundle.path, "--config", patch1.config)


def test_a_number_that_json_has_not_is_null(patch1, monkeypatch):
    found = selftest.SelfTest("onnxruntime", False, 0, 96, None, float("nan"), None, 0, 0.0, "latents differ")
    monkeypatch.setattr(selftest, "run", lambda runtime: found)
    done = run("verify", patch1.bundle.path, "--json")
    assert done.exit_code == 1 and json.loads(done.stdout)["selftest"]["latent_error"] is None
    assert "NaN" not in done.stdout


# -- doctor and help ---------------------------------------------------------------------------------------------------


def test_doctor_tells_engines_and_extras():
    facts = json.loads(run("doctor", "--json").stdout)
    assert facts["engines"]["onnxruntime"]["usable"]
    assert facts["extras"]["export"] == "installed"
    assert facts["bar-edge"] == metadata.version("bar-edge")


def test_doctor_works_where_nothing_is_installed(python):
    hide = "import sys\nfor name in ('onnxruntime', 'torch', 'onnx'): sys.modules[name] = None\n"
    done = python(hide + MAIN, "doctor", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert not facts["engines"]["onnxruntime"]["usable"]
    assert "pip install onnxruntime" in facts["engines"]["onnxruntime"]["detail"]
    assert facts["extras"]["export"] == "missing torch, onnx; pip install 'bar-edge[export]'"


@pytest.mark.parametrize("verb", ["export", "generate", "inspect", "verify", "doctor", "demo"])
def test_every_verb_has_help_with_an_example(verb):
    assert verb in run("--help").stdout
    done = run(verb, "--help")
    assert done.exit_code == 0
    assert f"bar-edge {verb}" in done.stdout


# -- mistakes, as a user sees them -------------------------------------------------------------------------------------


MISTAKES = {
    "an unknown engine": (("generate", "{bundle}", "--class", "1", "-o", "{new}", "--engine", "tpu"),
                          "EngineError: unknown engine 'tpu'"),
    "no bundle": (("generate", "{new}", "--class", "1", "-o", "{new}"), "BundleError: {new}: no such folder"),
    "no such file": (("inspect", "{new}"), "RequestError: {new}: no such file or folder"),
    "a class name": (("generate", "{bundle}", "--class", "cat", "-o", "{new}"), "RequestError: class 'cat'"),
    "a damaged bundle": (("verify", "{damaged}"), "BundleError: {damaged}/decode.onnx: truncated"),
    "half a comparison": (("verify", "{bundle}", "--against", "{bundle}"), "--against and --tokenizer go together"),
    "no checkpoint": (("inspect", "{manifest}"), "CheckpointError: {manifest}: "),
}  # fmt: skip


@pytest.fixture
def places(patch1, bundle_copy, tmp_path) -> dict[str, Path]:
    decode = bundle_copy / "decode.onnx"
    decode.write_bytes(decode.read_bytes()[:-1])
    bundle = patch1.bundle.path
    return {"bundle": bundle, "new": tmp_path / "new [red]", "damaged": bundle_copy, "manifest": bundle / MANIFEST}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(command, places, mistake):
    arguments, message = MISTAKES[mistake]
    done = command(*(argument.format(**places) for argument in arguments))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message.format(**places) in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not places["new"].exists()


def test_debug_shows_where_it_happened(command, places):
    done = command("--debug", "generate", places["new"], "--class", "1", "-o", places["new"])
    assert done.returncode != 0
    assert "Traceback (most recent call last)" in done.stderr
    assert "BundleError" in done.stderr


def test_wrong_usage_is_exit_code_2_without_traceback(command):
    for arguments in (("generate",), ("fly",), ("doctor", "--loud")):
        done = command(*arguments)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def test_a_bug_keeps_its_traceback(python, patch1):
    program = "import bar_edge.runtime.inspection as i\ni.describe_bundle = lambda bundle: 1 / 0\n" + MAIN
    done = python(program, "inspect", patch1.bundle.path)
    assert done.returncode not in (0, 2)
    assert "ZeroDivisionError" in done.stderr


def test_an_interruption_is_exit_code_130_and_leaves_no_half_written_file(digits, tmp_path):
    output = tmp_path / "out"
    arguments = ["generate", digits.bundle.path, "--class", "1", "--num", "5000", "--batch-size", "1", "-o", output]
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *map(str, arguments)], stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores it
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (output / "00001.png").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert stderr == "interrupted; nothing half-written was left behind\n"
    assert all(name.endswith(".png") and not name.startswith(".") for name in names(output))
    for file in output.iterdir():
        read_settings(file)


def test_a_folder_that_cannot_be_made_is_one_sentence(command, digits):
    done = command("generate", digits.bundle.path, "--class", "1", "-o", "/proc/bar-edge/out")
    assert done.returncode == 2
    assert done.stderr.startswith("error: /proc/bar-edge") and "nothing half-written" in done.stderr
    assert "Traceback" not in done.stderr
