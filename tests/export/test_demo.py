"""`bar-edge demo`, start to finish."""

from PIL import Image
from typer.testing import CliRunner

from bar_edge.export import demo
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.cli import app
from bar_edge.runtime.errors import RequestError
from bar_edge.runtime.pictures import read_settings


def test_the_demo_exports_draws_verifies_and_times(tmp_path, monkeypatch):
    for name in ("_TIMED_ROUNDS", "PER_CLASS"):
        monkeypatch.setattr(demo, name, 1)
    monkeypatch.setattr(demo, "cpu_count", lambda: 1)
    output = tmp_path / "demo"
    done = CliRunner().invoke(app, ["demo", "-o", str(output)], catch_exceptions=False)
    assert done.exit_code == 0
    assert Bundle.open(output / "bundle").spec.num_classes == 10
    with Image.open(output / "digits.png") as sheet:
        assert sheet.width > 128 * demo.PER_CLASS and sheet.height > 128 * 10
    assert read_settings(output / "digits.png")["seed"] == demo.SEED
    for line in ("self-test: all 768 bits equal", "0 without a tie", "pytorch", "onnxruntime", "digits.png"):
        assert line in done.stdout, line
    assert "error" not in done.stdout.lower()

    again = CliRunner().invoke(app, ["demo", "-o", str(output)])
    assert isinstance(again.exception, RequestError)
    assert "has files already" in str(again.exception)


def test_the_demos_data_ship_with_the_package():
    with demo.data() as folder:
        names = {entry.name for entry in folder.iterdir()}
    assert {"generator.bin", "tokenizer.bin", "config.yaml", "reference_samples.npz"} <= names
