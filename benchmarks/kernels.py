"""What NVRTC makes of our kernels, for every GPU we aim at: registers, memory that stands in for them, shared memory.

    python -m bar_edge.benchmarks.kernels -o build/kernels.json

They are compiled with what compiles them at run time; no GPU is needed. Exit code 1 if a kernel keeps in memory what
belongs into registers, or takes more of them than the blocks that it promises can have.
"""

import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from bar_edge.benchmarks.measure import save, stamp
from bar_edge.runtime.engines.cuda.compiler import KERNELS, OPTIONS, installed, listing
from bar_edge.runtime.errors import EngineError
from bar_edge.runtime.terminal import run_function

SOURCES = tuple(sorted(KERNELS.parent.glob("*.cu")))
TARGETS = (80, 86, 87, 89, 90, 100, 110, 120)

# CUDA C++ Programming Guide, technical specifications per compute capability; alike on all targets
_REGISTERS = 65536  # of a multiprocessor
_REGISTERS_OF_A_THREAD = 255
_REGISTERS_TOGETHER = 8  # 256 for the 32 threads of a warp are handed out at once
_WARP, _BLOCK = 32, 1024

_WIDTH = 100  # of the tables, in logs as well

# PTX ISA, performance-tuning directives, which __launch_bounds__ becomes; ptxas --verbose
_ENTRY = re.compile(r"\.entry (\w+)\([^)]*\)([^{]*)\{")
_THREADS, _BLOCKS = re.compile(r"\.maxntid ([\d, ]+)"), re.compile(r"\.minnctapersm (\d+)")
_SECTION = re.compile(r"Compiling entry function '(\w+)'")
_LOCAL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED, _SHARED = re.compile(r"Used (\d+) registers"), re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one GPU. Registers and bytes are those of a thread, but shared memory is a block's."""

    kernel: str
    sm: int
    registers: int
    stack_bytes: int  # local memory, spilled registers included; of the functions it calls as well
    spill_store_bytes: int
    spill_load_bytes: int
    shared_bytes: int  # static
    threads: int  # of the largest block it may be launched in
    blocks: int  # of those, that it promises to fit into a multiprocessor together

    @property
    def registers_allowed(self) -> int:
        """What the threads of the promised blocks can have each."""
        warps = -(-self.threads // _WARP) * self.blocks
        share = _REGISTERS // (_WARP * warps) // _REGISTERS_TOGETHER * _REGISTERS_TOGETHER
        return min(share, _REGISTERS_OF_A_THREAD)

    @property
    def faults(self) -> list[str]:
        """What must not be, a sentence each."""
        where = f"{self.kernel} on sm_{self.sm}"
        found = []
        if self.spill_store_bytes or self.spill_load_bytes:
            found.append(f"{where} spills: {self.spill_store_bytes} bytes stored, {self.spill_load_bytes} loaded")
        elif self.stack_bytes:
            found.append(f"{where} keeps {self.stack_bytes} bytes of every thread in memory, on its stack")
        if self.registers > self.registers_allowed:
            found.append(
                f"{where} takes {self.registers} registers a thread, {self.blocks} x {self.threads} threads leave "
                f"{self.registers_allowed}"
            )
        return found


def resources(source: Path, sm: int) -> list[Resources]:
    """What every kernel of a CUDA source takes on compute capability `sm`, in the order of the source.

    Raises EngineError if NVRTC is missing, rejects the source, or does not tell of every kernel in it.
    """
    ptx, log = listing(source, sm)
    _, *told = _SECTION.split(log)  # name, what is said of it, name, ...
    sections = dict(zip(told[::2], told[1::2], strict=True))
    entries = _ENTRY.findall(ptx)
    if not entries or sections.keys() != {name for name, _ in entries}:
        raise EngineError(
            f"{source.name}: NVRTC {installed()[0]} compiles {len(entries)} kernels and tells what {len(sections)} of "
            "them take: a newer nvidia-cuda-nvrtc tells it of all"
        )
    return [_resources(name, sm, directives, sections[name]) for name, directives in entries]


def _resources(kernel: str, sm: int, directives: str, section: str) -> Resources:
    threads, blocks = _THREADS.search(directives), _BLOCKS.search(directives)
    used, shared, local = _USED.search(section), _SHARED.search(section), _LOCAL.findall(section)
    if used is None or not local:
        raise EngineError(f"{kernel}: NVRTC does not tell what it takes: install a newer nvidia-cuda-nvrtc")
    stack, stores, loads = (sum(map(int, column)) for column in zip(*local, strict=True))
    return Resources(
        kernel, sm, int(used[1]), stack, stores, loads, int(shared[1]) if shared else 0,
        prod(map(int, threads[1].split(","))) if threads else _BLOCK, int(blocks[1]) if blocks else 1,
    )  # fmt: skip


def _table(title: str, found: Iterable[Resources]) -> Table:
    """A row a kernel: its registers on every GPU, and the largest of the rest."""
    kernels: dict[str, list[Resources]] = defaultdict(list)
    for one in found:
        kernels[one.kernel].append(one)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("kernel", no_wrap=True)
    sms = [str(one.sm) for one in next(iter(kernels.values()))]
    for heading in ("limit", *sms, "stack", "spilled", "shared"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, on in kernels.items():
        spilled = max(one.spill_store_bytes + one.spill_load_bytes for one in on)
        stack, shared = max(one.stack_bytes for one in on), max(one.shared_bytes for one in on)
        row = (on[0].registers_allowed, *(one.registers for one in on), stack, spilled, shared)
        table.add_row(name, *map(str, row))
    return table


def main(output: Annotated[Path, typer.Option("-o", "--output", help="JSON to write.")]) -> None:
    """Compile every kernel for every target, print the tables, write the JSON, and judge."""
    console = Console(width=_WIDTH)
    version, known = installed()
    targets = [sm for sm in TARGETS if sm in known]
    skipped = [f"sm_{sm}: NVRTC {version} does not know it" for sm in TARGETS if sm not in known]
    kernels = {}
    with ThreadPoolExecutor() as pool:
        for source in SOURCES:
            made = pool.map(lambda sm, source=source: resources(source, sm), targets)
            kernels[source.name] = [one for on_one_gpu in made for one in on_one_gpu]
    for name, found in kernels.items():
        title = f"{name}, NVRTC {version}: registers a thread, at most and by SM; bytes of the rest"
        console.print(_table(title, found))
    faults = [fault for found in kernels.values() for one in found for fault in one.faults]
    for sentence in (*(f"skipped {one}" for one in skipped), *faults):
        console.print(sentence, highlight=False, soft_wrap=True)
    report = {
        **stamp(f"python -m bar_edge.benchmarks.kernels {shlex.join(sys.argv[1:])}"),
        "compiler": f"NVRTC {version}",
        "options": OPTIONS,
        "skipped": skipped,
        "faults": faults,
        "kernels": {
            name: [{**asdict(one), "registers_allowed": one.registers_allowed} for one in found]
            for name, found in kernels.items()
        },
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    save(report, output)
    if faults:
        raise typer.Exit(1)


if __name__ == "__main__":
    run_function(main)
