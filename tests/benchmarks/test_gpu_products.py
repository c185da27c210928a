"""Products timed on a driver that keeps books: each shape, form and choice of rows once, all memory given back."""

from io import StringIO

import pytest
from rich.console import Console

from bar_edge.benchmarks import gpu_products
from bar_edge.runtime.engines.cuda.device import CudaDevice
from tests.runtime.engines.cuda.fake_driver import FakeDriver, stand_in


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr(gpu_products, "SHAPES", ((256, 72),))
    monkeypatch.setattr(gpu_products, "ROWS", (2, 64))
    monkeypatch.setattr(gpu_products, "_STACK_BYTES", 300_000)
    monkeypatch.setattr(gpu_products, "_AWAKE_AFTER", 0)
    monkeypatch.setattr(gpu_products, "_pytorch", lambda k, n, rows: figure(k, n, "pytorch fp16", rows, None))
    return stand_in(monkeypatch, FakeDriver(memory=2**26))


def figure(inputs, outputs, form, rows, block_rows, seconds=1e-4):
    return gpu_products.Figure(inputs, outputs, form, rows, block_rows, False, seconds, 2 * inputs * outputs)


def test_everything_the_engine_could_choose_is_timed(driver):
    device = CudaDevice()
    driver.durations["cuGraphLaunch"] = 8.0  # ms, of a graph
    figures = gpu_products.measure(device)
    assert not driver.memory
    ours = [one for one in figures if one.block_rows]
    assert {one.form for one in ours} == {"fp16", "int8", "int8-weight", "int4-weight"}
    by_rows = {rows: [one.block_rows for one in ours if (one.form, one.rows) == ("fp16", rows)] for rows in (2, 64)}
    assert by_rows == {2: [16], 64: [16, 32, 64, 128]}
    assert all(one.chosen == (one.block_rows == {2: 16, 64: 64}[one.rows]) for one in ours)
    fp16 = next(one for one in ours if one.form == "fp16")
    assert fp16.weight_bytes == 9 * 8 * 512  # tiles of 8 outputs, chunks of 32 inputs
    assert 300_000 // fp16.weight_bytes == 8
    assert fp16.seconds == pytest.approx(8e-3 / 32)  # a stack four times
    assert {name for name, *_ in driver.launched} >= {"few_rows_int4_weight_16", "many_rows_int8"}
    device.close()
    assert not any(driver.held.values())


def test_rates_are_of_weights_and_operations():
    told = figure(256, 72, "fp16", 2, 16, seconds=1e-3).to_dict()
    assert told["bytes_per_second"] == pytest.approx(256 * 72 * 2 * 1e3)
    assert gpu_products.Figure.from_dict(told) == figure(256, 72, "fp16", 2, 16, seconds=1e-3)
    assert told["flops_per_second"] == pytest.approx(2 * 2 * 256 * 72 * 1e3)


def test_the_table_marks_what_the_engine_chooses(monkeypatch):
    monkeypatch.setattr(gpu_products, "SHAPES", ((256, 72),))
    monkeypatch.setattr(gpu_products, "ROWS", (2,))
    chosen = gpu_products.Figure(256, 72, "fp16", 2, 16, True, 3e-6, 1)
    console = Console(width=120, file=StringIO())
    console.print(gpu_products.table([chosen, figure(256, 72, "pytorch fp16", 2, None)]))
    text = console.file.getvalue()
    assert "16: 3.0*" in text and "100.0" in text
