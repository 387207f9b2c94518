"""Several processes train as one does: here on the CPU, where one would do."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import Tiny
from tests.crew_work import Missing, fails, refuses, refuses_with
from torch import Tensor

from pocketlm.errors import OutOfResourcesError, PocketlmError
from pocketlm.model.crew import together
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.learning import Lessons
from pocketlm.model.respelling import Respeller
from pocketlm.model.vocabulary import spellings
from pocketlm.steps.distil import Distil, distil
from pocketlm.steps.quantize import Quantize, quantize
from pocketlm.steps.trim_vocabulary import TrimVocabulary, trim_vocabulary
from pocketlm.steps.tune import Tune, tune

CPU = torch.device("cpu")
WINDOWS, HELD_OUT = (torch.randint(3, 300, (rows, 32), generator=torch.Generator().manual_seed(0)) for rows in (8, 2))
ANSWERS = Lessons(
    WINDOWS, torch.arange(32).expand(8, 32).contiguous(), torch.arange(8)[:, None] * 30 < WINDOWS
)  # of any length
GROUPS = ("embedding", "query_key", "value", "attention_out", "ffn_in", "ffn_out")

Apart = Callable[[Callable[[], LanguageModel]], list[dict[str, Tensor]]]


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch, exact: None) -> Apart:
    """Return what trains a model in one process and in two, and returns the weights of both.

    All in float32: bfloat16 rounds the gradient of a batch otherwise than those of its halves.
    """
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # the second process then finds none that is native

    def trained(work: Callable[[], LanguageModel]) -> list[dict[str, Tensor]]:
        made = []
        for count in (1, 2):
            for step in ("distil", "tune"):
                monkeypatch.setattr(f"pocketlm.steps.{step}.training_devices", lambda *given, n=count: (CPU,) * n)
            made.append({name: value.detach().clone() for name, value in work().network.named_parameters()})
        return made

    return trained


def difference(one: dict[str, Tensor], two: dict[str, Tensor], start: LanguageModel) -> float:
    """Return how far two trained models are from each other, in what the first one has moved."""
    before = dict(start.network.named_parameters())
    moved = sum((one[name] - before[name]).square().sum() for name in one).sqrt()
    assert moved > 0.01
    return (sum((one[name] - two[name]).square().sum() for name in one).sqrt() / moved).item()


def test_two_processes_learn_what_one_does(tiny_model: Tiny, apart: Apart):
    config = Distil(tokens=4 * 128, windows_per_step=4, learning_rate=1e-3, evaluations=2, cross_entropy=0.5)

    def work() -> LanguageModel:
        return distil(tiny_model("llama"), tiny_model("llama", seed=1), config, ANSWERS, HELD_OUT)[0]

    assert difference(*apart(work), tiny_model("llama", seed=1)) < 0.02


def test_two_processes_tune_what_one_does(tiny_model: Tiny, apart: Apart):
    formats = dict.fromkeys(GROUPS, "Q4_0")
    start, rows, _ = quantize(tiny_model("llama"), Quantize(formats=formats, method="rtn"), WINDOWS)
    config = Tune(tokens=4 * 128, windows_per_step=4, evaluations=1, train="weights")

    def work() -> LanguageModel:
        return tune(tiny_model("llama"), tiny_model("llama"), rows, config, (WINDOWS, HELD_OUT))[0]

    assert difference(*apart(work), start) < 0.02


def test_two_processes_learn_new_spellings_as_one_does(tiny_model: Tiny, apart: Apart):
    """Half of the windows have far more tokens in the student's spelling than the others."""
    teacher = tiny_model("llama")
    student, _ = trim_vocabulary(tiny_model("llama"), TrimVocabulary(size=300), ["0 1 2"])
    spelling = spellings(teacher.tokenizer, student.tokenizer)
    length = torch.tensor([len(spelling[index]) for index in range(len(teacher.tokenizer))])
    short, long = (length == 1).nonzero().flatten(), (length > 2).nonzero().flatten()
    windows = torch.cat([tokens[torch.arange(128) % len(tokens)].view(4, 32) for tokens in (short, long)])
    config = Distil(tokens=4 * 128, windows_per_step=4, learning_rate=1e-3, evaluations=1)

    def work() -> LanguageModel:
        smaller, _ = trim_vocabulary(tiny_model("llama"), TrimVocabulary(size=300), ["0 1 2"])
        return distil(Respeller(teacher, spelling), smaller, config, windows, windows[:2])[0]

    assert difference(*apart(work), student) < 0.02


def test_two_processes_learn_from_own_words(tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pocketlm.steps.distil.training_devices", lambda *given: (CPU, CPU))
    config = Distil(tokens=2 * 128, windows_per_step=4, evaluations=1, on_policy=0.5, hidden_states=1.0, adapters=2)
    teacher, student = tiny_model("llama"), tiny_model("llama", seed=1)
    _, report = distil(teacher, student, config, Lessons(WINDOWS), Lessons(HELD_OUT))
    assert len(report.details["losses"]) == 2


# ---- when something goes wrong ----


@pytest.mark.parametrize(
    ("how", "said"), [("killed", "killed, for lack"), ("memory", "OutOfResourcesError: no memory")]
)
def test_the_end_of_another_process_is_told(how: str, said: str):
    with pytest.raises(OutOfResourcesError, match=f"One of 2 processes .*{said}"):
        together((CPU, CPU), fails, 1, how)


def test_a_defect_is_told_as_it_is_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    threads = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="a defect"):
        together((CPU, CPU), fails, 0, "defect")
    assert not list(tmp_path.iterdir())
    assert torch.get_num_threads() == threads


def test_what_all_refuse_is_said_once(
    capfd: pytest.CaptureFixture, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
):
    odd = tmp_path_factory.mktemp("a folder with spaces")
    monkeypatch.setattr(tempfile, "tempdir", str(odd))
    with pytest.raises(PocketlmError, match="what every process finds"):
        together((CPU, CPU), refuses)
    assert not capfd.readouterr().err


def test_a_job_that_cannot_be_read_is_told():
    with pytest.raises(OutOfResourcesError, match="ModuleNotFoundError: No module named 'nowhere'"):
        together((CPU, CPU), refuses_with, Missing())
