"""Energy in joules, wherever the machine tells: RAPL (x86 packages), NVML (NVIDIA GPUs), tegrastats (Jetson).

A meter counts what the whole package, card or board draws, other processes included. Reading it before and after an
image gives the energy of that image, as long as nothing else runs.
"""

import re
import shutil
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

_POWERCAP = Path("/sys/class/powercap")
_TEGRASTATS_MS = 100
_BOARD_RAIL = re.compile(r"\b(VDD_IN|POM_5V_IN|VIN_SYS_5V0) (\d+)(?:mW)?/")  # milliwatts of the whole board


class Meter(Protocol):
    """A counter of energy."""

    source: str

    def joules(self) -> float:
        """Energy since some fixed moment."""

    def close(self) -> None:
        """Stop counting."""


def find_meters(powercap: Path = _POWERCAP) -> tuple[list[Meter], list[str]]:
    """Every meter of this machine, and for every kind that there is none of, why not."""
    meters: list[Meter] = []
    missing = []
    for found, reason in (_rapl(powercap), _nvml(), _tegrastats()):
        meters += found
        if reason:
            missing.append(reason)
    return meters, missing


class Rapl:
    """One package's counter of microjoules, which starts again from 0 at the end of its range."""

    def __init__(self, zone: Path) -> None:
        self.source = f"RAPL {(zone / 'name').read_text().strip()}"
        self._counter = zone / "energy_uj"
        self._range = int((zone / "max_energy_range_uj").read_text())
        self._last = int(self._counter.read_text())
        self._total = 0

    def joules(self) -> float:
        now = int(self._counter.read_text())
        self._total += (now - self._last) % self._range
        self._last = now
        return self._total * 1e-6

    def close(self) -> None:
        pass


class Nvml:
    """One NVIDIA GPU's counter of millijoules."""

    def __init__(self, library: Any, index: int) -> None:
        self._library = library
        self._device = library.nvmlDeviceGetHandleByIndex(index)
        self.source = f"NVML GPU {index} ({library.nvmlDeviceGetName(self._device)})"
        self.joules()  # raises where the card has no counter

    def joules(self) -> float:
        return float(self._library.nvmlDeviceGetTotalEnergyConsumption(self._device)) * 1e-3

    def close(self) -> None:
        pass


class Tegrastats:
    """A Jetson board's input power as `tegrastats` prints it, summed over time."""

    def __init__(self, tool: str) -> None:
        self.source = "tegrastats, board input"
        self._lock = threading.Lock()
        self._watts = self._joules = 0.0
        self._since = time.monotonic()
        command = [tool, "--interval", str(_TEGRASTATS_MS)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def joules(self) -> float:
        with self._lock:
            self._advance()
            return self._joules

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._thread.join()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if rail := _BOARD_RAIL.search(line):
                with self._lock:
                    self._advance()
                    self._watts = int(rail[2]) * 1e-3

    def _advance(self) -> None:
        now = time.monotonic()
        self._joules += self._watts * (now - self._since)
        self._since = now


def gpu_memory_bytes(pid: int) -> int | None:
    """Memory a process holds on NVIDIA GPUs; None where NVML does not tell."""
    library = load_nvml()
    if library is None:
        return None
    used = None
    with suppress(library.NVMLError):
        for index in range(library.nvmlDeviceGetCount()):
            device = library.nvmlDeviceGetHandleByIndex(index)
            for process in library.nvmlDeviceGetComputeRunningProcesses(device):
                if process.pid == pid and process.usedGpuMemory is not None:
                    used = (used or 0) + int(process.usedGpuMemory)
    return used


def _rapl(powercap: Path) -> tuple[list[Meter], str]:
    zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    if not zones:
        return [], "RAPL: this machine shows no counters"
    try:
        return [Rapl(zone) for zone in zones if (zone / "name").read_text().startswith("package")], ""
    except PermissionError:
        return [], "RAPL: its counters are readable by root only"
    except (OSError, ValueError) as error:
        return [], f"RAPL: its counters cannot be read ({error})"


def _nvml() -> tuple[list[Meter], str]:
    library = load_nvml()
    if library is None:
        return [], "NVML: no NVIDIA driver, or nvidia-ml-py is not installed"
    try:
        return [Nvml(library, index) for index in range(library.nvmlDeviceGetCount())], ""
    except library.NVMLError as error:
        return [], f"NVML: the GPU does not count energy ({error})"


def _tegrastats() -> tuple[list[Meter], str]:
    tool = shutil.which("tegrastats")
    return ([Tegrastats(tool)], "") if tool else ([], "tegrastats: not a Jetson")


def load_nvml() -> Any:
    """NVIDIA's management library, started; None where there is no driver or no nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
