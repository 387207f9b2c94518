"""Work that would run out of memory is refused before it starts, and no more of it than that."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.conftest import Tiny
from tests.tiny import tiny_folder

from pocketlm.errors import OutOfResourcesError
from pocketlm.measure.device import machine
from pocketlm.model.compute import forward_dtype
from pocketlm.model.source import weights_of
from pocketlm.pipeline import preflight
from pocketlm.pipeline.preflight import check_learning, check_resources, check_solving, load_if_room


def test_training_and_candidates_need_more_disk(tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny_model("llama")
    weights = sum(parameter.numel() for parameter in model.network.parameters())
    needed = {(False, 0): 6, (True, 0): 14, (True, 6): 32}
    for (trained, candidates), copies in needed.items():
        for free in (2 * copies * weights, 2 * copies * weights - 1):
            monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
            if free == 2 * copies * weights:
                check_resources(model, tmp_path, trained, candidates)
            else:
                with pytest.raises(OutOfResourcesError, match="clean --yes"):
                    check_resources(model, tmp_path, trained, candidates)


def test_further_stages_and_files_need_more_disk(tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny_model("llama")
    copy, small = 2 * model.parameters, tmp_path / "small"
    for free, written, enough in ((9 * copy, 9, True), (9 * copy - 1, 2, False), (9 * copy, 10, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        if enough:
            check_resources(model, small, trained=False, more=3, written=written)
        else:
            with pytest.raises(OutOfResourcesError, match="-o" if written == 10 else "clean --yes"):
                check_resources(model, small, trained=False, more=3, written=written)


def test_solving_needs_memory_for_its_text(tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch):
    model = tiny_model("llama")
    width = model.network.config.hidden_size
    weights, slopes = 2 * 4 * model.parameters, forward_dtype("cpu").itemsize * 2 * (width + 96)
    for tokens, channels, needed in ((0, 0, 0), (100, 0, 3200 * width), (100, 96, 3200 * width + 100 * slopes)):
        for short in (0, 1):
            free = SimpleNamespace(memory_available_bytes=weights + needed - short)
            monkeypatch.setattr(preflight, "machine", lambda free=free: free)
            if short:
                with pytest.raises(OutOfResourcesError, match="Close other programs, or give less text with --data"):
                    check_solving(model, tokens, channels)
            else:
                check_solving(model, tokens, channels)


def test_files_that_are_read_once_have_a_disk_too(tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, crowded = tiny_model("llama"), tmp_path / "crowded"
    crowded.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(crowded))
    free = {crowded: 1}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free.get(Path(path), 2**40)))
    with pytest.raises(OutOfResourcesError, match=f"{crowded} has 0.0 kB free.*set TMPDIR"):
        check_resources(model, tmp_path, trained=False)


def test_the_disk_of_the_result_holds_the_result_alone(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, small = tiny_model("llama"), tmp_path / "small"
    weights = sum(parameter.numel() for parameter in model.network.parameters())
    for copies, enough in ((2, True), (1, False)):
        free = {tmp_path: 2 * copies * weights}
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free.get(path, 2**40)))
        if enough:
            check_resources(model, small, trained=True)
        else:
            with pytest.raises(OutOfResourcesError, match="another disk with -o"):
                check_resources(model, small, trained=True)


def test_quantizing_needs_less_memory_than_training(tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny_model("llama")
    model.network.to(torch.bfloat16)
    weights = sum(parameter.numel() for parameter in model.network.parameters())
    little = replace(machine(tmp_path), memory_available_bytes=2 * 2 * weights)  # two more copies in 16 bits
    monkeypatch.setattr(preflight, "machine", lambda: little)
    check_resources(model, tmp_path, trained=False)
    with pytest.raises(OutOfResourcesError, match=r"more memory, .* are available"):
        check_resources(model, tmp_path, trained=True)
    less = replace(little, memory_available_bytes=little.memory_available_bytes - 1)
    monkeypatch.setattr(preflight, "machine", lambda: less)
    with pytest.raises(OutOfResourcesError, match="take a smaller model"):
        check_resources(model, tmp_path, trained=False)


@pytest.mark.parametrize(
    ("work", "copies", "words"),
    [
        (load_if_room, 1, "take a smaller model"),
        (lambda folder: check_learning(folder, adapters=False), 5, "let --adapters learn"),
        (lambda folder: check_learning(folder, adapters=True), 1, "take a smaller student"),
    ],
    ids=["loading", "learning", "learning by adapters"],
)
def test_what_is_not_loaded_yet_is_refused_without_loading_it(
    work, copies: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = str(tiny_folder("llama", tmp_path / "tiny"))
    for short in (0, 1):
        free = SimpleNamespace(memory_available_bytes=copies * 4 * weights_of(folder) - short)
        monkeypatch.setattr(preflight, "machine", lambda free=free: free)
        if short:
            with pytest.raises(OutOfResourcesError, match=words):
                work(folder)
        else:
            work(folder)
