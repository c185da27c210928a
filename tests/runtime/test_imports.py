"""The runtime needs no torch and no onnx, loads no more than it needs, and nothing imports a folder bare."""

import ast
import json
from pathlib import Path

import bar_edge.runtime

REPOSITORY = Path(__file__).parents[2]
BANNED = {"runtime", "export", "calibration", "benchmarks"}

WITHOUT_EXTRAS = """
import sys
for name in ("torch", "onnx", "safetensors", "yaml", "onnxscript", "scipy"):
    sys.modules[name] = None
"""
IMPORT_ALL = """
import importlib, json, pkgutil
import bar_edge.runtime
names = [m.name for m in pkgutil.walk_packages(bar_edge.runtime.__path__, "bar_edge.runtime.")]
for name in names:
    importlib.import_module(name)
print(json.dumps(names))
"""
DRAW = """
from bar_edge.runtime import Generator
with Generator(sys.argv[1], threads=1) as bar:
    images, bits = bar.generate([3], seed=5, return_bits=True)
    from bar_edge.runtime import selftest
    print(images[0].size, bits.sum(), selftest.run(bar).passed)
"""
LOADED = """
import json, sys
before = set(sys.modules)
import bar_edge.runtime
names = {name.split(".")[0] for name in sys.modules.keys() - before}
print(json.dumps([name for name in names if name not in sys.stdlib_module_names]))
"""


def test_every_runtime_module_imports_without_the_extras(python):
    done = python(WITHOUT_EXTRAS + IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    names = json.loads(done.stdout)
    assert {"bar_edge.runtime.cli", "bar_edge.runtime.engines.onnxruntime", "bar_edge.runtime.bundle"} <= set(names)
    sources = {path for path in (REPOSITORY / "runtime").rglob("*.py") if path.parent.name != "cuda"}
    assert len(names) >= len(sources) - 1  # the package itself is not listed


def test_a_bundle_draws_and_proves_itself_without_the_extras(python, patch1):
    done = python(WITHOUT_EXTRAS + DRAW, patch1.bundle.path)
    assert done.returncode == 0, done.stderr
    bits = patch1.runtime.generate([3], seed=5, return_bits=True)[1]
    assert done.stdout.split() == ["(64,", "64)", str(bits.sum()), "True"]


def test_importing_the_runtime_loads_only_libraries_that_every_image_needs(python):
    """So that it is fast: the engine, the command line and its tables come when they are used."""
    done = python(LOADED)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == {"bar_edge", "numpy", "PIL"}


def test_the_command_says_which_extra_is_missing(python, patch1):
    program = WITHOUT_EXTRAS + "from bar_edge.runtime.cli import main\nmain()"
    done = python(program, "inspect", patch1.generator)
    assert done.returncode == 2
    assert "pip install 'bar-edge[export]'" in done.stderr
    assert "Traceback" not in done.stderr


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
    return found


SOURCES = [
    path
    for folder in sorted({*BANNED, "tests"})
    if (REPOSITORY / folder).is_dir()
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
]


def test_nothing_imports_a_folder_bare():
    """The same file would load twice, under two names."""
    assert len(SOURCES) > 40
    for path in SOURCES:
        assert not {name.split(".")[0] for name in imports_of(path)} & BANNED, path


def test_the_runtime_imports_neither_export_nor_benchmarks():
    for path in (REPOSITORY / "runtime").rglob("*.py"):
        assert not [n for n in imports_of(path) if n.startswith("bar_edge.") and not n.startswith("bar_edge.runtime")]


def test_every_public_name_is_there():
    for name in bar_edge.runtime.__all__:
        assert getattr(bar_edge.runtime, name) is not None
