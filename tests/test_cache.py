"""The cache of finished stages: what a stage depends on, who may make it, and what a killed run leaves."""

import shutil
from pathlib import Path

import pytest

import pocketlm
from pocketlm.pipeline import cache


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of these tests."""
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---- what a stage depends on ----


@pytest.mark.parametrize("module", ["tensors/elimination.py", "pipeline/stages.py", "commands/distillation.py"])
def test_other_code_makes_other_stages(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    copy = shutil.copytree(Path(pocketlm.__file__).parent, tmp_path / "pocketlm")
    monkeypatch.setattr("pocketlm.__file__", str(copy / "__init__.py"))
    before = cache.code_hash.__wrapped__()
    assert before == cache.code_hash()
    (copy / module).write_text((copy / module).read_text() + "MORE_WINDOWS = 1\n")
    assert cache.code_hash.__wrapped__() != before


def test_other_libraries_make_other_stages(monkeypatch: pytest.MonkeyPatch):
    before, now = cache.code_hash(), cache.versions()
    assert cache.code_hash.__wrapped__() == before
    for library in ("torch", "transformers", "xllamacpp"):
        monkeypatch.setattr(cache, "versions", lambda name=library: now | {name: "0.1"})
        assert cache.code_hash.__wrapped__() != before
