"""`bar-edge demo`, start to finish."""

from contextlib import nullcontext

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from bar_edge.export import demo
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.cli import app
from bar_edge.runtime.errors import RequestError
from bar_edge.runtime.pictures import read_settings


def test_the_demo_exports_draws_verifies_quantizes_judges_and_times(tmp_path, monkeypatch):
    few = {"_TIMED_ROUNDS": 1, "_PER_CLASS": 3, "_SHOWN": 2, "_SHOWN_BESIDE": 1, "_CALIBRATION_IMAGES": 8}
    for name, value in few.items():
        monkeypatch.setattr(demo, name, value)
    output = tmp_path / "demo"
    done = CliRunner().invoke(app, ["demo", "-o", str(output)], catch_exceptions=False)
    assert done.exit_code == 0
    exact, int8 = Bundle.open(output / "bundle"), Bundle.open(output / "bundle-int8")
    assert exact.spec == int8.spec and exact.spec.num_classes == 10
    assert int8.manifest["provenance"]["source"]["digest"] == exact.digest
    for name, columns, rows in (("digits.png", 2, 10), ("fp32-and-int8.png", 2, 10)):
        with Image.open(output / name) as sheet:
            assert 128 * columns < sheet.width < 200 * columns and 128 * rows < sheet.height < 200 * rows, name
        settings = read_settings(output / name)
        assert settings["seed"] == demo.SEED and settings["bundles"] == [exact.digest, int8.digest]
    for line in ("self-test: all 768 bits equal", "0 without a tie", "decisions flip", "fp32: ", "int8: ",
                 "Fréchet distance to real digits", "PyTorch fp32", "bundle-int8", "digits.png"):  # fmt: skip
        assert line in done.stdout, line
    assert "error" not in done.stdout.lower()

    again = CliRunner().invoke(app, ["demo", "-o", str(output)])
    assert isinstance(again.exception, RequestError)
    assert "has files already" in str(again.exception)


def test_the_demos_data_ship_with_the_package():
    with demo.data() as folder:
        names = {entry.name for entry in folder.iterdir()}
    assert {"generator.bin", "tokenizer.bin", "config.yaml", "reference_samples.npz"} <= names


def test_a_file_is_no_folder_for_the_demo(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="is a file; choose a folder"):
        demo.run(tmp_path / "file", force=True, console=Console(), progress=nullcontext)
