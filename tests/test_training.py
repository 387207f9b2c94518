"""The loop: what diverges is undone, what stalls stops, and what was killed ends as if it had not been."""

import csv
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.tiny import tiny_folder
from torch import Tensor, nn

from pocketlm.errors import PocketlmError
from pocketlm.model import training
from pocketlm.model.files import written_whole
from pocketlm.model.learning import Updates
from pocketlm.model.training import CHECKPOINT, LOSSES, Course, Training, train

KILLED = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_model
from pocketlm.model import training
from pocketlm.model.source import load
from pocketlm.steps import distil as module
from pocketlm.steps.distil import Distil, distil

teacher, student, folder, every, processes = sys.argv[1:]
module.training_devices = lambda windows, *networks: (torch.device("cpu"),) * int(processes)
torch.set_num_threads(1)
training.CHECKPOINT_SECONDS = float(every)
training.CHECKPOINT_SHARE = 0
windows = torch.randint(3, 300, (30, 32), generator=torch.Generator().manual_seed(0))
config = Distil(tokens=40 * 64, windows_per_step=2, learning_rate=1e-3, evaluations=4, seed=3)
def progress(done, total, pace):
    print(done, flush=True)
made, _ = distil(load(teacher), load(student), config, windows[4:], windows[:4], progress, Path(folder))
save_model(made.network, str(Path(folder) / "made.safetensors"))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher and a student of another seed."""
    return tuple(tiny_folder("llama", tmp_path_factory.mktemp("model"), seed) for seed in (0, 1))


def run(
    folders: tuple[Path, Path], folder: Path, kill_at: int | None = None, processes: int = 1
) -> tuple[dict[str, Tensor], list[int]]:
    """Train in a process of its own, killed after a step where asked to; return the weights and the steps it did."""
    command = [sys.executable, "-c", KILLED, *map(str, folders), str(folder), "0", str(processes)]
    steps = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            steps.append(int(line))
            if steps[-1] == kill_at:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == (0 if kill_at is None else -signal.SIGKILL)
    return (load_file(folder / "made.safetensors") if kill_at is None else {}), steps


@pytest.mark.parametrize("processes", [1, 2])
def test_a_training_that_was_killed_ends_in_the_same_weights(
    folders: tuple[Path, Path], tmp_path: Path, processes: int
):
    whole, steps = run(folders, tmp_path / "whole", processes=processes)
    assert steps == list(range(1, 41))
    first = int(torch.randint(2, 20, ()))
    second = int(torch.randint(first + 2, 39, ()))
    for kill_at in (first, second)[processes - 1 :]:  # twice, or once where several processes take their time
        run(folders, tmp_path / "killed", kill_at, processes)
        assert (tmp_path / "killed" / CHECKPOINT).exists()
    resumed, rest = run(folders, tmp_path / "killed", processes=processes)
    assert rest[0] >= second, "what was done before the kill is not done again"
    assert rest[-1] == 40
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), f"{name}, killed after steps {first} and {second}"
    assert (tmp_path / "whole" / LOSSES).read_text() == (tmp_path / "killed" / LOSSES).read_text()
    with (tmp_path / "whole" / LOSSES).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(step) for step in range(41)]
    assert [row["step"] for row in rows if row["held_out_kl"]] == ["0", "10", "20", "30", "40"]
    assert rows[-1]["tokens"] == str(40 * 64)


class Valley:
    """A problem with a known answer: walk from 4 to 0; past steps can be made to fail."""

    def __init__(self, rate: float, steps: int = 40) -> None:
        self.place = nn.Parameter(torch.tensor([4.0]))
        self.update = Updates([{"params": [self.place], "lr": rate}], steps, 0.1)
        self.steps, self.seen = steps, []
        self.spoil: dict[int, float] = {}

    def batches(self, start: int) -> Iterator[Tensor]:
        yield from (torch.tensor([step]) for step in range(start, self.steps))

    def learn(self, batch: Tensor) -> float:
        loss = self.place.square().sum()
        loss.backward()
        self.update()
        self.seen.append(batch.item())
        return self.spoil.pop(batch.item(), loss.item())

    def height(self) -> float:
        return self.place.square().item()

    def walk(self, evaluations: int = 4, patience: int = 0, folder: Path | None = None) -> Training:
        course = Course(
            batches=self.batches, steps=self.steps, evaluations=evaluations, patience=patience, folder=folder
        )
        return train(course, self.update, self.learn, self.height)


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf"), 1e4])
def test_a_divergence_is_undone_from_the_best_state_at_half_the_rate(spoiled: float):
    valley = Valley(0.2)
    valley.spoil = {27: spoiled}
    done = valley.walk()
    assert valley.seen == [*range(28), *range(20, 40)], "it goes on from the best evaluation, step 20"
    assert len(done.losses) == len(done.tokens) == 40
    assert done.rollbacks[0][0] == 28
    assert [step for step, _ in done.held_out_kl] == [0, 10, 20, 30, 40]
    assert valley.height() == done.lowest < 4.0
    assert valley.update.state()["factor"] == 0.5


def test_nothing_learnt_and_no_number_is_an_error_with_the_way_out():
    valley = Valley(0.2)
    valley.learn = lambda batch: float("nan")
    with pytest.raises(PocketlmError, match=r"loss became nan at step 1.*Use a lower one"):
        valley.walk()


def test_a_training_that_stays_divergent_keeps_what_it_had():
    valley = Valley(0.2)
    honest = valley.learn
    valley.learn = lambda batch: honest(batch) if batch.item() < 25 else 1e9
    done = valley.walk()
    assert len(done.rollbacks) == training.ROLLBACKS + 1
    assert valley.height() == done.lowest == dict(done.held_out_kl)[20]


@pytest.mark.parametrize("patience", [1, 2])
def test_a_training_that_stalls_stops_and_keeps_its_best(patience: int):
    valley = Valley(0.2)
    heights = iter([5.0, 4.0, 3.0, 6.0, 2.9, 3.1, 3.2, 1.0, *[1.0] * 9])
    course = Course(batches=valley.batches, steps=40, evaluations=10, patience=patience)
    done = train(course, valley.update, valley.learn, lambda: next(heights))
    assert len(done.losses) == {1: 12, 2: 24}[patience]
    assert done.lowest == {1: 3.0, 2: 2.9}[patience]


def test_evaluations_are_part_of_a_trainings_time(monkeypatch: pytest.MonkeyPatch):
    valley, now = Valley(0.2), [0.0]

    def height() -> float:
        now[0] += 10.0
        return valley.height()

    def learn(batch: Tensor) -> float:
        now[0] += 1.0
        return valley.learn(batch)

    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: now[0]))
    done = train(Course(batches=valley.batches, steps=40, evaluations=4), valley.update, learn, height)
    assert (done.measuring, done.seconds) == (50.0, 90.0), "the first one, too"


@given(ends=st.integers(1, 45), evaluations=st.integers(1, 10), spoil=st.integers(2, 44))
@settings(max_examples=40, deadline=None)
def test_a_time_ends_a_training_with_its_best_and_the_same_stop_repeats_it(ends: int, evaluations: int, spoil: int):
    def walked(**how: float) -> tuple[Valley, Training, list[int]]:
        valley, said = Valley(0.3), []
        honest, learnt = valley.learn, []

        def learn(batch: Tensor) -> float:
            learnt.append(batch.item())
            loss = honest(batch)
            first = valley.update.state()["factor"] == 1
            return 1e9 if batch.item() == spoil and first else loss

        course = Course(batches=valley.batches, steps=40, evaluations=evaluations, **how)
        with pytest.MonkeyPatch.context() as patch:  # a step takes a second, all else nothing
            patch.setattr(training, "time", SimpleNamespace(monotonic=lambda: float(len(learnt))))
            done = train(course, valley.update, learn, valley.height, lambda step, *_: said.append(step))
        assert valley.height() == done.lowest
        return valley, done, said

    timed, done, _ = walked(seconds=float(ends))
    if not done.out_of_time:
        assert ends >= 40
        assert "ended_at_step" not in done.details
        return
    step = done.details["ended_at_step"]
    assert step == len(done.losses) <= ends
    assert done.held_out_kl[-1][0] == step, "where it ended is one of the candidates"
    assert done.ending == f"; its time was over after {step} tokens"
    if step and not done.rollbacks:
        again, repeated, said = walked(stop=step)
        assert torch.equal(timed.place, again.place)
        assert (repeated.held_out_kl, repeated.losses) == (done.held_out_kl, done.losses)
        assert (repeated.out_of_time, said[-1]) == (False, step)


@given(stop=st.integers(1, 39), evaluations=st.integers(1, 40), spoil=st.integers(2, 38))
@settings(max_examples=40, deadline=None)
def test_going_on_from_any_step_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, stop: int, evaluations: int, spoil: int
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "CHECKPOINT_SECONDS", 0)
        patch.setattr(training, "CHECKPOINT_SHARE", 0)
        folder = tmp_path_factory.mktemp("stopped")
        whole, stopped, resumed = (Valley(0.3) for _ in range(3))
        for valley in (whole, stopped, resumed):
            honest = valley.learn
            # Diverges at one step as long as the rate is the first one.
            valley.learn = lambda batch, valley=valley, honest=honest: (
                1e9 if (honest(batch), batch.item())[1] == spoil and valley.update.state()["factor"] == 1 else 1.0
            )
        done = whole.walk(evaluations)
        calls = iter(range(stop))
        honest_learn = stopped.learn

        def learn(batch: Tensor) -> float:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return honest_learn(batch)

        stopped.learn = learn
        with pytest.raises(KeyboardInterrupt):
            stopped.walk(evaluations, folder=folder)
        again = resumed.walk(evaluations, folder=folder)
        assert torch.equal(whole.place, resumed.place)
        assert again.held_out_kl == done.held_out_kl
        assert again.losses == done.losses


def test_a_file_is_there_as_a_whole_or_as_it_was(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("before")

    def write_half() -> None:
        with written_whole(path) as partial:
            partial.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_the_pace_says_loss_speed_and_time_left():
    said = []
    valley = Valley(0.2)
    course = Course(batches=valley.batches, steps=40, evaluations=1)
    train(course, valley.update, valley.learn, valley.height, lambda done, total, pace: said.append(pace))
    assert len(said) == 40
    assert said[0].startswith("loss 16.000, ")
    assert said[0].endswith(" s left")
    assert "tokens/s" in said[0]
