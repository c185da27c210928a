"""What figures were taken on: the machine, the libraries, and the state of clocks and power modes.

Clocks and power modes decide the speed of small devices (Jetson: `nvpmodel`, `jetson_clocks`) and drift on any machine
that gets warm, so their state is recorded before and after a run.
"""

import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from bar_edge.benchmarks.energy import load_nvml

_CPUINFO = Path("/proc/cpuinfo")
_CPUS = Path("/sys/devices/system/cpu")
_THERMAL = Path("/sys/class/thermal")
_BOARD = Path("/proc/device-tree/model")
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "bf16", "sve")
_LIBRARIES = ("bar-edge", "torch", "onnxruntime", "tensorrt", "numpy")
_JETSON_TOOLS = {"nvpmodel": ("-q",), "jetson_clocks": ("--show",)}
_TOOL_SECONDS = 10


def machine() -> dict[str, Any]:
    """Processor, cores this process may use, instructions that matter here, system, Python, a board's name, GPUs."""
    lines = _CPUINFO.read_text(encoding="utf-8").splitlines() if _CPUINFO.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    facts = {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": [name for name in _INSTRUCTIONS if name in flags],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    if _BOARD.exists():
        facts["board"] = _BOARD.read_text(encoding="utf-8").rstrip("\0")
    return facts | _gpus()


def _gpus() -> dict[str, Any]:
    """`gpus`, by name and memory, and `gpu_driver`; nothing where NVML does not tell."""
    library = load_nvml()
    if library is None:
        return {}
    try:
        devices = [library.nvmlDeviceGetHandleByIndex(index) for index in range(library.nvmlDeviceGetCount())]
        names = [
            f"{library.nvmlDeviceGetName(device)}, {library.nvmlDeviceGetMemoryInfo(device).total / 2**30:.1f} GiB"
            for device in devices
        ]
        return {"gpus": names, "gpu_driver": library.nvmlSystemGetDriverVersion()} if names else {}
    except library.NVMLError:  # a Jetson's GPU tells little
        return {}


def versions() -> dict[str, str]:
    """Versions of the libraries whose speed is measured."""
    known = {}
    for name in _LIBRARIES:
        try:
            known[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            known[name] = "not installed"
    return known


def power_state(cpus: Path = _CPUS, thermal: Path = _THERMAL) -> dict[str, Any]:
    """Load, clocks, governors, temperature and power modes right now; only what this machine tells.

    `load_average` of one minute, `cpu_mhz` and `governors` of all cores, `hottest_celsius`, and on Jetson the output of
    `nvpmodel -q` and `jetson_clocks --show` under the tools' names.
    """
    state: dict[str, Any] = {}
    if hasattr(os, "getloadavg"):
        state["load_average"] = round(os.getloadavg()[0], 2)
    clocks = [int(text) // 1000 for text in _read_all(cpus, "cpu[0-9]*/cpufreq/scaling_cur_freq")]
    if clocks:
        state["cpu_mhz"] = clocks
        state["governors"] = sorted(set(_read_all(cpus, "cpu[0-9]*/cpufreq/scaling_governor")))
    degrees = [int(text) / 1000 for text in _read_all(thermal, "thermal_zone*/temp")]
    if degrees:
        state["hottest_celsius"] = max(degrees)
    for tool, arguments in _JETSON_TOOLS.items():
        if path := shutil.which(tool):
            state[tool] = _output_of(path, *arguments)
    return state


def _read_all(folder: Path, pattern: str) -> list[str]:
    found = []
    for file in sorted(folder.glob(pattern)):
        try:
            found.append(file.read_text(encoding="utf-8").strip())
        except OSError:  # a sensor that is switched off
            continue
    return found


def _output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no answer ({error})"
    return (done.stdout or done.stderr).strip()
