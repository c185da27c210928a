"""What the machine tells of its clocks, and of the energy it uses."""

import sys
import time
import types
from pathlib import Path

import pytest

from bar_edge.benchmarks import energy
from bar_edge.benchmarks import machine as machine_module
from bar_edge.benchmarks.machine import machine, power_state


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def tool(folder: Path, name: str, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put an executable on the path."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{program}")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


def test_clocks_governors_and_temperature_are_read(tmp_path):
    for cpu, kilohertz in enumerate((1_500_000, 2_000_000)):
        write(tmp_path / f"cpu{cpu}/cpufreq/scaling_cur_freq", kilohertz)
        write(tmp_path / f"cpu{cpu}/cpufreq/scaling_governor", "schedutil")
    for zone, millidegrees in enumerate((41_000, 52_500)):
        write(tmp_path / f"thermal/thermal_zone{zone}/temp", millidegrees)
    state = power_state(tmp_path, tmp_path / "thermal")
    assert state["cpu_mhz"] == [1500, 2000]
    assert state["governors"] == ["schedutil"]
    assert state["hottest_celsius"] == 52.5


def test_a_jetson_tells_its_power_mode(tmp_path, monkeypatch):
    tool(tmp_path, "nvpmodel", "import sys; print('NV Power Mode: MAXN', sys.argv[1])", monkeypatch)
    assert power_state(tmp_path, tmp_path)["nvpmodel"] == "NV Power Mode: MAXN -q"


def test_what_a_machine_does_not_tell_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert power_state(tmp_path, tmp_path).keys() <= {"load_average"}


def zone(folder: Path, name: str, microjoules: int) -> Path:
    for file, value in (("name", name), ("energy_uj", microjoules), ("max_energy_range_uj", 1_000_000)):
        write(folder / file, value)
    return folder


def test_rapl_counts_packages_through_the_end_of_their_range(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    package = zone(tmp_path / "intel-rapl:0", "package-0", 900_000)
    zone(tmp_path / "intel-rapl:0:0", "core", 0)
    zone(tmp_path / "intel-rapl:1", "psys", 0)
    meters, _ = energy.find_meters(tmp_path)
    (meter,) = (meter for meter in meters if meter.source == "RAPL package-0")
    assert not any("core" in other.source or "psys" in other.source for other in meters)
    before = meter.joules()
    write(package / "energy_uj", 400_000)
    assert meter.joules() - before == pytest.approx(0.5)


def test_a_machine_without_meters_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(energy, "load_nvml", lambda: None)
    meters, missing = energy.find_meters(tmp_path)
    assert not meters
    assert [text.split(":")[0] for text in missing] == ["RAPL", "NVML", "tegrastats"]


class FakeNvml(types.SimpleNamespace):
    """Two GPUs, of which the second holds process 7."""

    NVMLError = RuntimeError

    def nvmlDeviceGetCount(self):  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        return index

    def nvmlDeviceGetName(self, device):  # noqa: N802
        return f"card {device}"

    def nvmlDeviceGetMemoryInfo(self, device):  # noqa: N802
        return types.SimpleNamespace(total=(device + 1) * 2**34)

    def nvmlSystemGetDriverVersion(self):  # noqa: N802
        return "580.1"

    def nvmlDeviceGetTotalEnergyConsumption(self, device):  # noqa: N802
        return 1500 * (device + 1)

    def nvmlDeviceGetComputeRunningProcesses(self, device):  # noqa: N802
        return [types.SimpleNamespace(pid=7 * device, usedGpuMemory=2**20)]


def test_gpus_count_energy_and_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(energy, "load_nvml", FakeNvml)
    meters, _ = energy.find_meters(tmp_path)
    assert [(meter.source, meter.joules()) for meter in meters] == [
        ("NVML GPU 0 (card 0)", 1.5), ("NVML GPU 1 (card 1)", 3.0),
    ]  # fmt: skip
    assert energy.gpu_memory_bytes(7) == 2**20
    assert energy.gpu_memory_bytes(8) is None


def test_the_memory_of_a_process_is_that_on_all_gpus(monkeypatch):
    class Both(FakeNvml):
        def nvmlDeviceGetComputeRunningProcesses(self, device):  # noqa: N802
            others = types.SimpleNamespace(pid=8, usedGpuMemory=2**30), types.SimpleNamespace(pid=7, usedGpuMemory=None)
            return [types.SimpleNamespace(pid=7, usedGpuMemory=(device + 1) * 2**20), *others]

    monkeypatch.setattr(energy, "load_nvml", Both)
    assert energy.gpu_memory_bytes(7) == 3 * 2**20


def test_a_machine_tells_its_gpus_and_their_driver(monkeypatch):
    monkeypatch.setattr(machine_module, "load_nvml", FakeNvml)
    facts = machine()
    assert facts["gpus"] == ["card 0, 16.0 GiB", "card 1, 32.0 GiB"] and facts["gpu_driver"] == "580.1"
    monkeypatch.setattr(machine_module, "load_nvml", lambda: None)
    assert not {"gpus", "gpu_driver"} & set(machine())


def test_tegrastats_power_is_summed_over_time(tmp_path, monkeypatch):
    """A board that draws 2 W by its own account, then 5: each counts for as long as it was the last that was told."""
    program = """
import pathlib, sys, time
line = "RAM 1/2MB CPU [1%@1] VDD_IN {}mW/1900mW VDD_SOC 900mW/900mW"
print(line.format(2000), flush=True)
while not pathlib.Path(sys.argv[0]).with_name("more").exists():
    time.sleep(0.01)
print(line.format(5000), flush=True)
time.sleep(60)
"""
    tool(tmp_path, "tegrastats", program, monkeypatch)
    monkeypatch.setattr(energy, "load_nvml", lambda: None)
    clock = [0.0]
    monkeypatch.setattr(energy, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    meters, _ = energy.find_meters(tmp_path)
    (meter,) = meters

    def wait_for(watts: float) -> None:
        deadline = time.monotonic() + 30
        while meter._watts != watts and time.monotonic() < deadline:  # until the line was read
            time.sleep(0.01)

    try:
        wait_for(2)
        before = meter.joules()
        clock[0] += 3
        assert meter.joules() - before == pytest.approx(6)
        clock[0] += 4
        (tmp_path / "more").touch()
        wait_for(5)
        clock[0] += 1
        assert meter.joules() - before == pytest.approx(2 * 7 + 5)
    finally:
        meter.close()
