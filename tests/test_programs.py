"""The programs in benchmarks/ and examples/ ask the package for nothing that it does not have."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted([*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py")])


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_name_that_a_program_imports_is_there(program: Path):
    for node in ast.walk(ast.parse(program.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        sibling = program.with_name(f"{node.module}.py")
        if sibling.is_file():
            there = _names_in(sibling)
        elif node.module.partition(".")[0] == "pocketlm":
            there = set(dir(importlib.import_module(node.module)))
        else:
            continue
        missing = {each.name for each in node.names} - there
        assert not missing, f"{node.module} has no {missing}"


def _names_in(program: Path) -> set[str]:
    """Return what a program defines or imports at its top level; it may need packages that are not installed."""
    names = set()
    for node in ast.parse(program.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {each.asname or each.name for each in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names
