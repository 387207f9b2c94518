"""The loop that every training runs in: it measures, keeps the best, goes back when it diverges, survives a kill."""

import csv
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketlm.errors import PocketlmError
from pocketlm.model.compute import reusing_memory
from pocketlm.model.crew import ALONE, Crew
from pocketlm.model.files import written_whole
from pocketlm.model.learning import Updates

CHECKPOINT_SECONDS = 180
CHECKPOINT_SHARE = 20  # a checkpoint is not written before this many times what the last one took to write
ROLLBACKS = 3  # each with half the learning rate
FIRST = 10  # steps whose losses say what is normal
EXPLODED, MARGIN = 2.0, 0.5  # times the largest of those, and nats above that: the training has diverged
CHECKPOINT, LOSSES = "checkpoint.pt", "loss.csv"


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a training goes through.

    Attributes:
        batches: From how many steps are done to the batches of those that follow: in a crew, of its shares.
        steps: How many there are.
        evaluations: How often to measure, evenly spread, the last time at the end.
        patience: Evaluations without a new best after which it stops; 0 for never.
        stop: Steps after which it ends all the same; 0 for never. The learning rate is that of all `steps`.
        seconds: After which it ends with the step in hand; 0 for never.
        folder: For checkpoints and the losses so far; a training that finds its own there goes on from it.
        crew: Who trains.
    """

    batches: Callable[[int], Iterator[Any]]
    steps: int
    evaluations: int
    patience: int = 0
    stop: int = 0
    seconds: float = 0.0
    folder: Path | None = None
    crew: Crew = ALONE

    @property
    def last(self) -> int:
        """The step after which it ends, if not before."""
        return min(self.stop or self.steps, self.steps)

    def evaluated_at(self) -> set[int]:
        """Return the steps after which to measure."""
        return {min(self.last, round(self.steps * (i + 1) / self.evaluations)) for i in range(self.evaluations)}


@dataclass
class Training:
    """What came of a training so far.

    Attributes:
        held_out_kl: (step, nats per token) at the start and at each evaluation.
        losses: Nats per trained position of each step.
        tokens: Of each step.
        rollbacks: (step, loss) of each divergence that was undone.
        seconds: Evaluations included.
        measuring: Seconds of all evaluations.
        out_of_time: Whether its time was over before its last step.
    """

    held_out_kl: list[tuple[int, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    rollbacks: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    measuring: float = 0.0
    out_of_time: bool = False

    @property
    def best(self) -> tuple[int, float]:
        """The step with the lowest held-out KL, and that."""
        return min(self.held_out_kl, key=lambda measured: measured[1])

    @property
    def lowest(self) -> float:
        """The held-out KL of the best state."""
        return self.best[1]

    @property
    def details(self) -> dict[str, Any]:
        """The figures for a report."""
        speed = sum(self.tokens) / self.seconds if self.seconds else 0.0
        figures = {"losses": self.losses, "held_out_kl": self.held_out_kl, "tokens_per_second": round(speed, 1)}
        figures |= {"seconds_measuring": self.measuring}
        figures |= {"ended_at_step": len(self.losses)} if self.out_of_time else {}
        return figures | ({"rollbacks": self.rollbacks} if self.rollbacks else {})

    @property
    def ending(self) -> str:
        """What a summary says where it did not get through."""
        return f"; its time was over after {sum(self.tokens):,} tokens" if self.out_of_time else ""

    def diverged(self, loss: float) -> bool:
        """Whether a loss says that the training has gone wrong."""
        first = self.losses[:FIRST]
        return not math.isfinite(loss) or (bool(first) and loss > EXPLODED * max(first) + MARGIN)

    def forget_after(self, step: int) -> None:
        """Leave out what came after a step."""
        self.held_out_kl = [measured for measured in self.held_out_kl if measured[0] <= step]
        del self.losses[step:], self.tokens[step:]

    def write_csv(self, path: Path) -> None:
        """Write one line per step: its number, tokens so far, its loss, and the held-out KL where it was measured."""
        measured, seen = dict(self.held_out_kl), 0
        with written_whole(path) as partial, partial.open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(("step", "tokens", "loss", "held_out_kl"))
            table.writerow((0, 0, "", measured.get(0, "")))
            for step, (loss, tokens) in enumerate(zip(self.losses, self.tokens, strict=True), 1):
                seen += tokens
                table.writerow((step, seen, loss, measured.get(step, "")))


def train(
    course: Course,
    update: Updates,
    learn: Callable[[Any], float],
    held_out_kl: Callable[[], float],
    progress: Callable[[int, int, str], None] = lambda done, total, pace: None,
) -> Training:
    """Run a training and leave the parameters in their best state; the state before it is one of the candidates.

    A loss that is not a number, or far above those of the first steps, takes it back to its best state with half the
    learning rate, a few times at most. Nothing depends on the clock but when checkpoints are written and where a time
    ends: without one, a training that was killed and goes on ends in the same weights.

    Args:
        course: What it goes through.
        update: Holds the parameters.
        learn: Does one step on a batch, `update` included, and returns its loss.
        held_out_kl: Measures the present state.
        progress: Called after each step with steps done, steps in all, and the loss, speed and time left in words.

    Raises:
        PocketlmError: The loss is still not a number with the lowest learning rate, and nothing was learnt before.
    """
    crew = course.crew
    crew.align(update.parameters)
    done, best = _found(course, update) or (Training(), update.weights())

    def measured() -> float:
        began = time.monotonic()
        value = crew.agree(held_out_kl)
        done.measuring += time.monotonic() - began
        return value

    done.held_out_kl = done.held_out_kl or [(0, measured())]
    evaluated_at, due = course.evaluated_at(), time.monotonic() + CHECKPOINT_SECONDS
    before, began, read = max(done.seconds, done.measuring), time.monotonic(), 0

    def seconds() -> float:
        return before + time.monotonic() - began

    with reusing_memory():
        while not _over(done, course):
            for batch in course.batches(len(done.losses)):
                loss, step = learn(batch), len(done.losses) + 1
                over = course.seconds > 0 and crew.agree(seconds) >= course.seconds
                done.out_of_time = over and step < course.last
                evaluates = done.out_of_time or step in evaluated_at
                held_out = measured() if evaluates else 0.0
                tokens = batch.numel() * crew.size
                done.seconds, read = seconds(), read + tokens
                if done.diverged(loss) or not math.isfinite(held_out):
                    _go_back(done, best, update, step, loss)
                    break
                done.losses.append(loss)
                done.tokens.append(tokens)
                if evaluates:
                    best = update.weights() if held_out < done.lowest else best
                    done.held_out_kl.append((step, held_out))
                pace = _pace(loss, read / (time.monotonic() - began), course.last - step, tokens)
                progress(step, course.last, pace)
                if course.folder and crew.leads and time.monotonic() >= due:
                    due = _save(course.folder, done, best, update)
                if _over(done, course):
                    break
    update.put_weights(best)
    if course.folder and crew.leads:
        course.folder.mkdir(parents=True, exist_ok=True)
        done.write_csv(course.folder / LOSSES)
    return done


def _over(done: Training, course: Course) -> bool:
    """Whether all steps are done, the time is over, or there is no hope in more."""
    best = [step for step, _ in done.held_out_kl].index(done.best[0])
    stalled = course.patience and len(done.held_out_kl) - 1 - best >= course.patience
    ended = done.out_of_time or len(done.losses) >= course.last
    return ended or len(done.rollbacks) > ROLLBACKS or bool(stalled)


def _go_back(done: Training, best: list[Tensor], update: Updates, step: int, loss: float) -> None:
    """Undo a divergence: the best state again, with half the learning rate."""
    back = done.best[0]
    done.rollbacks.append((step, loss))
    if len(done.rollbacks) > ROLLBACKS and back == 0 and not math.isfinite(loss):
        raise PocketlmError(
            f"The loss became {loss} at step {step}, and so it did with an eighth of the learning rate. "
            "Use a lower one, or check that the model's weights are numbers"
        )
    done.forget_after(back)
    update.restart(best, back, 0.5)


def _pace(loss: float, speed: float, steps_left: int, tokens: int) -> str:
    seconds = steps_left * tokens / speed
    left = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
    return f"loss {loss:.3f}, {speed:,.0f} tokens/s, {left} left"


def _save(folder: Path, done: Training, best: list[Tensor], update: Updates) -> float:
    """Write a checkpoint; return when the next one is due."""
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / CHECKPOINT) as partial:
        torch.save({"done": asdict(done), "best": best, "update": update.state()}, partial)
    done.write_csv(folder / LOSSES)
    now = time.monotonic()
    return now + max(CHECKPOINT_SECONDS, CHECKPOINT_SHARE * (now - began))


def _found(course: Course, update: Updates) -> tuple[Training, list[Tensor]] | None:
    """Return where an earlier run of the same training was, having put the parameters there, or None."""
    path = course.folder and course.folder / CHECKPOINT
    if not path or not path.exists():
        return None
    found = torch.load(path, map_location=update.parameters[0].device, weights_only=True)
    update.restore(found["update"])
    return Training(**found["done"]), found["best"]
