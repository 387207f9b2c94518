"""The house: imports run downward only, modules stay short, and the command line starts without the heavy libraries."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import pocketlm
from pocketlm import errors

ROOT = Path(pocketlm.__file__).parent
# From the ground up. A module may import from lower rows and from its own room, never from its neighbours.
ROWS = (
    ("errors", "interval"),
    ("tensors",),
    ("model",),
    ("steps", "measure", "export", "run"),
    ("plan", "report"),
    ("pipeline",),
    ("fit",),
    ("commands",),
    ("api",),
    ("cli",),
    ("__main__",),
)
HEAVY = ("transformers", "xllamacpp", "huggingface_hub", "peft", "torch", "numpy", "gguf", "pydantic", "jinja2")
LEVELS = {room: level for level, row in enumerate(ROWS) for room in row}
MODULES = sorted(ROOT.rglob("*.py"))

every_module = pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(ROOT)) for path in MODULES])


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the full name and the line of everything that a module imports, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


@every_module
def test_imports_run_downward_only(path: Path):
    room = room_of(path)
    if room == "__init__":
        return
    assert room in LEVELS, f"{room} has no row yet"
    for name, line in imported(ast.parse(path.read_text(encoding="utf-8"))):
        package, _, inner = name.partition(".")
        other = inner.partition(".")[0]
        if package == "pocketlm" and other in LEVELS and other != room:
            assert LEVELS[other] < LEVELS[room], f"{path.name}:{line} imports {name}"


def test_no_modules_import_each_other():
    names = {path: ".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in MODULES}
    graph = {}
    for path, name in names.items():
        found = {each for each, _ in imported(ast.parse(path.read_text(encoding="utf-8")))}
        graph[name] = (found | {each.rpartition(".")[0] for each in found}) & set(names.values()) - {name}
    assert tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def test_every_room_exists():
    assert {room_of(path) for path in MODULES} - {"__init__"} == set(LEVELS)


@every_module
def test_no_module_is_longer_than_400_lines(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


@every_module
def test_error_messages_end_without_a_full_stop(path: Path):
    names = {name for name, value in vars(errors).items() if isinstance(value, type)}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names and node.args:
            last = node.args[0].values[-1] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if isinstance(last, ast.Constant):
                assert not last.value.endswith("."), f"line {node.lineno}"


def test_each_kind_of_error_has_its_own_exit_code():
    kinds = [value for value in vars(errors).values() if isinstance(value, type)]
    codes = [kind.exit_code for kind in kinds]
    assert all(issubclass(kind, errors.PocketlmError) for kind in kinds)
    assert len(set(codes)) == len(codes)
    assert 0 not in codes


def test_the_command_line_starts_without_the_heavy_libraries():
    program = f"import sys, pocketlm.cli.main; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
