"""Recover what pruning lost: the smaller model learns the original's next-token probabilities."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from pocketlm.errors import BadInputError
from pocketlm.model.compute import fast_copy, moved_to, training_devices
from pocketlm.model.crew import Crew, together
from pocketlm.model.judge import divergence_of, judge
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.learning import Lessons, Updates, batches, distillation_step, held_out_loss, positions
from pocketlm.model.matching import matching
from pocketlm.model.on_policy import with_own_words
from pocketlm.model.respelling import Respeller, original_of, predictions, taught_by
from pocketlm.model.training import Course, Training, train
from pocketlm.steps.adapters import learning_parts
from pocketlm.steps.report import StepReport
from pocketlm.tensors.divergence import SHARES, Kind, Loss

# Tokenizers with the same tokens may still cut words, numbers, spaces or other scripts differently.
PROBE = "It's 2026: 12,345.67 naïve CAFÉS,  two\tspaces\n\n  def f(x): return x**2  # 日本語 😀 don't"


@dataclass(frozen=True, kw_only=True)
class Distil:
    """How the recovery is trained.

    The learning rate is for a few dozen steps from a mildly pruned model: on the demo model with FFNs of 1248 channels,
    8 steps at 6e-5 lowered the held-out KL from 0.087 to 0.084, 2e-5 to 0.085, and 24 steps at 2e-4 raised it.
    """

    step: Literal["distil"] = "distil"
    tokens: int
    """Tokens to train on; the text is repeated where there is less."""
    learning_rate: float = 6e-5
    windows_per_step: int = 4
    warm_up: float = 0.1
    """Share of the steps over which the learning rate rises."""
    evaluations: int = 3
    """How often the held-out divergence is measured; the best of these checkpoints is kept."""
    patience: int = 0
    """Evaluations without a new best after which the training stops; 0 for never."""
    stop: int = 0
    """Steps after which it ends, at the learning rate of all `tokens`, as where its time was over; 0 for never."""
    seconds: float = 0.0
    """Time after which it ends with the step in hand; 0 for never."""
    loss: Kind = "forward_kl"
    temperature: float = 1.0
    share: float | None = None
    """Of the teacher in the mixture of `jensen_shannon` (0.5 where None) and `skewed_kl` (0.1)."""
    cross_entropy: float = 0.0
    """Weight of the text's own next tokens beside the teacher's probabilities; 1 is training without a teacher."""
    hidden_states: float = 0.0
    """Weight of the distance between the two models' hidden states, each of the student's through a learned map."""
    relations: float = 0.0
    """Weight of the divergence of who is how alike among the last block's queries, keys and values."""
    on_policy: float = 0.0
    """Share of the windows that the student goes on by itself, for the teacher to judge."""
    adapters: int = 0
    """Rank of adapters (LoRA) that learn in place of the weights and are merged at the end; 0 for the weights."""
    seed: int = 0

    @property
    def objective(self) -> Loss:
        """The loss."""
        return Loss(kind=self.loss, temperature=self.temperature, share=self.share, cross_entropy=self.cross_entropy)

    def check(self) -> None:
        """Refuse a setting of the loss that is out of its range.

        Raises:
            BadInputError: There is one.
        """
        if not 0 < self.learning_rate < math.inf:
            raise BadInputError(f"A learning rate of {self.learning_rate:g} teaches nothing. Give one such as 1e-4")
        if not 0 < self.temperature < math.inf:
            raise BadInputError(f"distil needs a `temperature` above 0, given: {self.temperature:g}. 1 is usual")
        if not 0 <= self.cross_entropy <= 1:
            raise BadInputError(f"distil needs a `cross_entropy` from 0 to 1, given: {self.cross_entropy}")
        if self.loss in SHARES and not 0 < self.objective.teacher_share < 1:
            raise BadInputError(f"`{self.loss}` needs a `share` between 0 and 1, given: {self.share}")
        weights = 0 <= self.hidden_states < math.inf and 0 <= self.relations < math.inf
        if not weights or not 0 <= self.on_policy <= 1:
            raise BadInputError(
                "distil needs `hidden_states` and `relations` of at least 0 and `on_policy` from 0 to 1; "
                f"given: {self.hidden_states}, {self.relations}, {self.on_policy}"
            )
        if self.asks_more and self.cross_entropy == 1:
            raise BadInputError(
                "`hidden_states`, `relations` and `on_policy` need a teacher, and `cross_entropy: 1` is training "
                "without one. Lower it, or leave them out"
            )

    def check_for_targets(self) -> None:
        """Refuse what a teacher's opinion on disk cannot teach.

        Raises:
            BadInputError: There is such a setting.
        """
        if (self.loss, self.temperature) != ("forward_kl", 1):
            raise BadInputError("Targets on disk are for forward KL at temperature 1. Leave out the other loss")
        if self.asks_more:
            raise BadInputError(
                "`hidden_states`, `relations` and `on_policy` need the teacher itself. "
                "Leave them out, or the targets on disk"
            )

    def check_for_spellings(self) -> None:
        """Refuse what a teacher with other tokens than the student's cannot teach.

        Raises:
            BadInputError: There is such a setting.
        """
        if self.objective != Loss() or self.asks_more:
            raise BadInputError(
                "Across two vocabularies distil has forward KL at temperature 1 alone. "
                "Leave out its `loss`, `hidden_states`, `relations` and `on_policy`"
            )

    @property
    def asks_more(self) -> bool:
        """Whether more is asked of the teacher than its probabilities on the text."""
        return bool(self.hidden_states or self.relations or self.on_policy)


def distil(
    teacher: LanguageModel | Respeller,
    student: LanguageModel,
    config: Distil,
    windows: Tensor | Lessons,
    held_out: Tensor | Lessons,
    progress: Callable[[int, int, str], None] = lambda done, total, pace: None,
    folder: Path | None = None,
) -> tuple[LanguageModel, StepReport]:
    """Train `student` on its divergence from the teacher over full next-token distributions.

    By default on logits only, forward KL at temperature 1, as pruned models are best recovered (Minitron,
    https://arxiv.org/abs/2407.14679). The checkpoint with the lowest held-out KL(teacher ‖ student) is kept (without a
    teacher, cross-entropy), and the untrained student is one of the candidates.

    Args:
        teacher: The original; not changed. A `Respeller` where the student has fewer tokens; `windows` and `held_out`
            are the teacher's ids.
        student: Trained in place and returned.
        config: How long and how fast, and on which loss.
        windows: (windows, length) token ids to learn from, or lessons.
        held_out: The same, to choose the checkpoint by.
        progress: Called after each step with steps done, steps in all, and the loss, speed and time left in words.
        folder: For checkpoints; a run that was killed goes on from what it finds there.

    Raises:
        BadInputError: There is no text, a setting is out of range, or the tokenizers differ.
        MissingExtraError: There is no peft for adapters.
        PocketlmError: The loss is not a number.
    """
    config.check()
    loss, network = config.objective, student.network
    if isinstance(teacher, LanguageModel) and loss.cross_entropy < 1 and not alike(teacher, student):
        raise BadInputError(
            "Teacher and student have different vocabularies, or cut text differently into the same tokens, so "
            "probabilities cannot be compared. Take a student with the teacher's tokenizer, or train on the teacher's "
            "answers with `cross_entropy: 1`"
        )
    if isinstance(teacher, Respeller):
        config.check_for_spellings()
    if min(config.tokens, config.windows_per_step, config.evaluations, len(windows), len(held_out)) < 1:
        raise BadInputError("distil needs `tokens`, `windows_per_step` and `evaluations` of at least 1, and some text")
    if isinstance(windows, Lessons) and windows.targets is not None:
        config.check_for_targets()
    windows = windows if isinstance(windows, Lessons) or isinstance(teacher, Respeller) else Lessons(windows)
    devices = training_devices(config.windows_per_step, original_of(teacher).network, network)
    done = together(devices, _trained, teacher, network, config, (windows, held_out), folder, progress=progress)
    return student, _report(done, loss)


def _trained(
    crew: Crew,
    teacher: LanguageModel | Respeller,
    network: nn.Module,
    config: Distil,
    text: tuple[Tensor | Lessons, Tensor | Lessons],
    folder: Path | None,
    progress: Callable[[int, int, str], None] = lambda done, total, pace: None,
) -> Training:
    """Train as one of a crew, on its device."""
    (windows, held_out), objective = text, config.objective
    steps = max(1, config.tokens // (config.windows_per_step * (windows.numel() // len(windows))))

    def lessons(start: int) -> Iterator[Lessons | Tensor]:
        plain = map(crew.share, batches(windows, config.windows_per_step, steps, config.seed, start))
        numbers = count(start * crew.size + crew.rank, crew.size)
        return with_own_words(network, plain, config.on_policy, config.seed, numbers) if config.on_policy else plain

    course = Course(
        batches=lessons,
        steps=steps,
        evaluations=config.evaluations,
        patience=config.patience,
        stop=config.stop,
        seconds=config.seconds,
        folder=folder,
        crew=crew,
    )
    with (
        moved_to(crew.device, original_of(teacher).network, network),
        learning_parts(network, config.adapters, config.seed) as trained,
    ):
        step, held_out_kl, projections = _teaching(teacher, network, config, windows, held_out.to(crew.device))
        groups = [{"params": each, "lr": config.learning_rate} for each in (trained, projections) if each]
        update = Updates(groups, steps, config.warm_up)

        def learn(batch: Tensor | Lessons) -> float:
            lessons = isinstance(batch, Lessons)
            count = positions(batch, objective) if lessons else predictions(teacher, network, batch)
            value = crew.average(update.parameters, step(batch), count)
            nn.utils.clip_grad_norm_(trained, 1.0)  # projections apart: they must not slow the student down
            update()
            return value

        return train(course, update, learn, held_out_kl, progress)


def alike(teacher: LanguageModel, student: LanguageModel) -> bool:
    """Whether two models mean the same by every token id, and cut text alike.

    Rows of the embedding that no token has may differ.
    """
    ours, theirs = student.tokenizer, teacher.tokenizer
    if ours is theirs:
        return True
    ids = [tokenizer(PROBE, add_special_tokens=False).input_ids for tokenizer in (ours, theirs)]
    return ours.get_vocab() == theirs.get_vocab() and ids[0] == ids[1]


def _teaching(
    teacher: LanguageModel | Respeller,
    network: nn.Module,
    config: Distil,
    windows: Tensor | Lessons,
    held_out: Tensor | Lessons,
) -> tuple[Callable[[Tensor | Lessons], float], Callable[[], float], list[nn.Parameter]]:
    """Return what adds a batch's gradient, what measures the student on the held-out text, and what learns besides."""
    loss = config.objective
    if isinstance(teacher, Respeller):
        return *taught_by(teacher, network, held_out), []
    if loss.cross_entropy == 1:
        original, measured_by = None, loss
    else:
        original, measured_by = fast_copy(teacher.network), Loss()
    matched = None
    if config.hidden_states or config.relations:
        matched = matching(original, network, config.hidden_states, config.relations, windows.ids)
    projections = list(matched.projections) if matched else []
    step = partial(distillation_step, original, network, loss=loss, matched=matched)
    if original is None or isinstance(held_out, Lessons) or not _same_rows(teacher.network, network):
        return step, lambda: held_out_loss(original, network, held_out, measured_by), projections
    opinion = judge(teacher.network, held_out)
    return step, lambda: divergence_of(network, held_out, opinion), projections


def _same_rows(teacher: nn.Module, student: nn.Module) -> bool:
    return len(teacher.lm_head.weight) == len(student.lm_head.weight)


def _report(done: Training, loss: Loss) -> StepReport:
    before, best = done.held_out_kl[0][1], done.lowest
    what = "cross-entropy" if loss.cross_entropy == 1 else "KL to the original"
    if best < before:
        summary = f"held-out {what} fell from {before:.4f} to {best:.4f} nats per token"
    else:
        summary = f"distillation did not lower the held-out {what}, so the model is kept as it was"
    if done.rollbacks:
        summary += f"; the loss diverged {len(done.rollbacks)} times, undone with half the learning rate each time"
    return StepReport("distil", summary + done.ending, done.details | {"kept": best < before})
