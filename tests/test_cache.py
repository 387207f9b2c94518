"""The cache of finished stages: what a stage depends on, who may make it, and what a killed run leaves."""

import shutil
from pathlib import Path

import pytest
from tests.tiny import tiny_folder

import pocketlm
from pocketlm.model.gguf_file import read_gguf
from pocketlm.model.source import load
from pocketlm.pipeline import cache
from pocketlm.pipeline.proof import original_file


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of these tests."""
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---- what a stage depends on ----


def test_no_stage_takes_a_models_weights_for_the_model():
    for path in Path(pocketlm.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "stage(" not in text or "origin.sha256" not in text, path


def test_a_corrected_chat_template_is_in_the_next_file(tmp_path: Path):
    source = tiny_folder("llama", tmp_path / "model")
    before = read_gguf(original_file(load(str(source)))).get("tokenizer.chat_template")
    (source / "chat_template.jinja").write_text("{{ 'corrected' }}")
    after = read_gguf(original_file(load(str(source)))).get("tokenizer.chat_template")
    assert before != after == "{{ 'corrected' }}"


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
