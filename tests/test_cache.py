"""The cache of finished stages: what a stage depends on, who may make it, and what a killed run leaves."""

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from tests.tiny import tiny_folder

import pocketlm
from pocketlm.errors import BadInputError, OutOfResourcesError
from pocketlm.model.gguf_file import read_gguf
from pocketlm.model.source import load
from pocketlm.model.text import as_tokens
from pocketlm.pipeline import cache
from pocketlm.pipeline.cache import empty, remove_leftovers, stage
from pocketlm.pipeline.proof import original_file
from pocketlm.pipeline.stages import Texts, run_recipe
from pocketlm.plan.recipe import Recipe
from pocketlm.steps.distil import Distil
from pocketlm.steps.quantize import Quantize
from pocketlm.steps.tune import Tune


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


def test_text_beyond_the_windows_is_in_a_key_too():
    """Candidates are ranked on more of the validation text than trainings are watched on."""
    tokens = as_tokens("words", torch.zeros(2, 8, dtype=torch.long))
    found = [
        Texts(tokens, tokens, tokens, {"calibration": ["a"], "validation": [validation], "test": [test]}).sha256
        for validation, test in (("b", "c"), ("other", "c"), ("b", "other"))
    ]
    assert found[0] != found[1]
    assert found[0] == found[2], "nothing but the proof reads the test part"


@pytest.mark.parametrize("module", ["tensors/elimination.py", "pipeline/stages.py", "commands/distillation.py"])
def test_other_code_makes_other_stages(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    copy = shutil.copytree(Path(pocketlm.__file__).parent, tmp_path / "server" / "pocketlm")
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


# ---- several runs at once ----

# Makes a stage within a stage, which ends when somebody writes a file.
RUN = """
import sys, time
from pathlib import Path
from pocketlm.pipeline.cache import stage

def inner(work):
    return {"step": "inner"}

def outer(work):
    stage("inner", {}, inner)
    deadline = time.monotonic() + 20
    while not Path(sys.argv[1]).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    (work / "made").touch()

done = stage("outer", {}, outer)
print(done.reused, (done.folder / "made").exists())
"""


def start(go: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(go)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(pattern: str, folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not list(folder.glob(pattern)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_a_killed_run_leaves_is_in_nobodys_way(folder: Path, tmp_path: Path):
    """Whoever waited for it makes the stage, though the next process may have the number of the killed one."""
    killed = start(tmp_path / "go")
    wait_for(".outer-*.partial", folder)
    waiting = start(tmp_path / "go")
    assert "at work on outer-" in waiting.stderr.readline()
    (left,) = folder.glob(".outer-*.partial")
    (left / "damaged").touch()
    killed.kill()
    killed.communicate()
    (tmp_path / "go").touch()
    assert waiting.communicate(timeout=60)[0] == "False True\n"
    assert not list(folder.rglob("damaged"))
    assert not list(folder.glob(".*"))


def test_leftovers_of_the_dead_are_deleted_and_folders_of_the_living_are_not(folder: Path):
    def produce(work: Path) -> dict[str, bool]:
        dead = [folder / name for name in (".text-0.partial", f".text-1.{os.getpid()}.partial")]
        for each in dead:
            each.mkdir()
        remove_leftovers()
        return {"alive": work.exists(), "dead": any(each.exists() for each in dead)}

    assert stage("text", {}, produce).facts == {"alive": True, "dead": False}
    empty()
    assert not list(folder.iterdir())


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_leftovers_in_a_cache_that_can_only_be_read_stay(folder: Path):
    (folder / ".text-0.partial").mkdir(parents=True)
    folder.chmod(0o500)
    try:
        remove_leftovers()
    finally:
        folder.chmod(0o700)
    assert (folder / ".text-0.partial").is_dir()


def test_of_two_runs_one_makes_a_stage_and_the_other_waits_for_it(folder: Path, tmp_path: Path):
    first = start(tmp_path / "go")
    wait_for(".outer-*.partial", folder)
    second = start(tmp_path / "go")
    assert "at work on outer-" in second.stderr.readline()
    (tmp_path / "go").touch()
    assert [run.communicate(timeout=60) for run in (first, second)] == [("False True\n", ""), ("True True\n", "")]
    assert sorted(path.name.partition("-")[0] for path in folder.iterdir()) == ["inner", "outer"]


def test_the_cache_of_a_live_run_is_not_emptied(folder: Path, tmp_path: Path):
    run = start(tmp_path / "go")
    wait_for(".outer-*.partial", folder)
    with pytest.raises(BadInputError, match="Another run uses the cache"):
        empty()
    (tmp_path / "go").touch()
    assert run.communicate(timeout=60) == ("False True\n", "")
    empty()
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError(
            "[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file: write failed"
        ),
    ],
    ids=["system", "safetensors", "torch"],
)
def test_a_full_disk_is_told_whoever_finds_it(error: Exception, folder: Path):
    def produce(work: Path) -> None:
        (work / "half").touch()
        raise error

    with pytest.raises(OutOfResourcesError, match=r"is full. Free some space, or run `pocketlm clean --yes`"):
        stage("text", {}, produce)
    assert not list(folder.glob("*.partial"))
    with pytest.raises(ZeroDivisionError):
        stage("text", {}, lambda work: 1 / 0)


def test_the_disk_that_is_full_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A stage may also fill the one that temporary files are on."""
    crowded = tmp_path / "crowded"
    monkeypatch.setattr("tempfile.tempdir", str(crowded))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0 if path == crowded else 2**40))

    def produce(work: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutOfResourcesError, match=f"The disk of {crowded} is full"):
        stage("text", {}, produce)


def test_a_cache_that_can_only_be_read_gives_what_is_finished(folder: Path, monkeypatch: pytest.MonkeyPatch):
    stage("text", {"of": 1}, lambda work: {"made": True})
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert stage("text", {"of": 1}, lambda work: {}).facts == {"made": True}
    with pytest.raises(BadInputError, match=r"cannot be written\. Set POCKETLM_CACHE"):
        stage("text", {"of": 2}, lambda work: {})
    assert not list(folder.glob(".*"))


def test_a_system_without_locks_has_stages_too(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "fcntl", None)
    assert stage("text", {}, lambda work: {"made": 1}).facts == {"made": 1}
    (folder / ".text-0.partial").mkdir()
    remove_leftovers()
    assert (folder / ".text-0.partial").exists(), "whether somebody is at work there cannot be known"


@pytest.mark.parametrize("step", [Tune(tokens=8 * 4 * 32), Distil(tokens=8 * 4 * 32)], ids=["tune", "distil"])
def test_a_training_that_was_stopped_goes_on_from_its_checkpoint(
    step: Tune | Distil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pocketlm.model.training.CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr("pocketlm.model.training.CHECKPOINT_SHARE", 0)
    model = load(str(tiny_folder("llama", tmp_path / "tiny")))
    windows = torch.randint(3, 300, (40, 32), generator=torch.Generator().manual_seed(0))
    learnt, held_out = as_tokens("learnt", windows[3:]), as_tokens("held out", windows[:3])
    texts = Texts(learnt, held_out, held_out, {})
    stored = Quantize(formats={"*": "Q4_0"}, method="rtn")
    recipe = Recipe(steps=(stored, step) if isinstance(step, Tune) else (step, stored))
    done: list[int] = []

    def stopping(what: str, at: int, total: int) -> None:
        if what.startswith(("tuning", "distilling")):
            done.append(at)
            if len(done) == 6:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(model, recipe, texts, stopping)
    reached = done[-1]
    run_recipe(model, recipe, texts, stopping)
    assert done[6] == reached > 1, "what was done before the stop is not done again"
