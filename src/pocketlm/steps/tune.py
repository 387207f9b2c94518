"""Tune a quantized model end to end: what the file stores learns the original's next-token probabilities."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from pocketlm.errors import BadInputError
from pocketlm.model.compute import moved_to, training_devices
from pocketlm.model.crew import Crew, together
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.learning import Updates, batches
from pocketlm.model.respelling import Respeller, original_of, predictions, taught_by
from pocketlm.model.training import Course, Training, train
from pocketlm.steps.learner import Learner, learning_groups
from pocketlm.steps.report import StepReport
from pocketlm.tensors.formats import Packed, pack, unpack


@dataclass(frozen=True, kw_only=True)
class Tune:
    """What learns, for how long and how fast.

    Rates were tried on the reference model in 62 MB, held-out KL 0.364 before. From 65,536 tokens, in steps of 512:
    scales at 5e-4, 1e-3 and 2e-3 0.291, 0.291 and 0.303; codes too at 0.002 0.289, and in larger steps at 0.005 and
    0.02 0.319 and 0.626. From 205,000 tokens: scales 0.276, codes too at 0.002 0.269, in a fifth more time a token.
    """

    step: Literal["tune"] = "tune"
    tokens: int
    """Tokens to train on; the text is repeated where there is less."""
    train: Literal["scales", "weights"] = "scales"
    """`scales` (and norms), as in DWQ; `weights` learns the codes too, as in quantization-aware training."""
    scale_rate: float = 1e-3
    """Learning rate of scales, relative to their size, and of norms and biases as they are."""
    code_rate: float = 0.002
    """Learning rate of latent weights, in gaps between two levels."""
    windows_per_step: int = 4
    warm_up: float = 0.1
    evaluations: int = 4
    """How often the held-out divergence is measured; the best of these checkpoints is kept."""
    stop: int = 0
    """Steps after which it ends, at the learning rate of all `tokens`, as where its time was over; 0 for never."""
    seconds: float = 0.0
    """Time after which it ends with the step in hand; 0 for never."""
    seed: int = 0


def tune(
    teacher: LanguageModel | Respeller,
    student: LanguageModel,
    packed: Mapping[str, Packed],
    config: Tune,
    text: tuple[Tensor, Tensor],
    progress: Callable[[int, int, str], None] = lambda done, total, pace: None,
    folder: Path | None = None,
) -> tuple[LanguageModel, dict[str, Packed], StepReport]:
    """Train scales and norms, or the codes too, on KL(teacher ‖ student) over full next-token distributions.

    Scales alone as in DWQ (mlx-lm) and EfficientQAT's end-to-end phase (https://arxiv.org/abs/2407.11062); with codes,
    quantization-aware distillation with straight-through rounding. The state with the lowest held-out divergence is
    kept, and the start is one of the candidates: tuning never makes the file worse on that text.

    Args:
        teacher: The original; not changed. A `Respeller` where the student has fewer tokens; `text` is the teacher's
            ids.
        student: The unquantized weights of what is tuned, or the decoded ones; changed in place.
        packed: What is stored now, by parameter name.
        config: What learns, for how long and how fast.
        text: (windows, length) token ids to learn from, and to choose the state by.
        progress: Called after each step with steps done, steps in all, and the loss, speed and time left in words.
        folder: For checkpoints; a run that was killed goes on from what it finds there.

    Raises:
        BadInputError: There is no text, or nothing is quantized.
        PocketlmError: The loss is not a number.
    """
    settings = config.tokens, config.windows_per_step, config.evaluations
    if min(*settings, *map(len, text), len(packed)) < 1:
        raise BadInputError(
            "tune needs `tokens`, `windows_per_step` and `evaluations` of at least 1, some text, and a quantized model"
        )
    devices = training_devices(config.windows_per_step, original_of(teacher).network, student.network)
    models = teacher, student.network
    stored, done = together(devices, _tuned, models, packed, config, text, folder, progress=progress)
    summary = f"tuning {config.train}: held-out KL {done.held_out_kl[0][1]:.4f} -> {done.lowest:.4f} nats per token"
    return student, stored, StepReport("tune", summary + done.ending, done.details)


def _tuned(
    crew: Crew,
    models: tuple[LanguageModel | Respeller, nn.Module],
    packed: Mapping[str, Packed],
    config: Tune,
    text: tuple[Tensor, Tensor],
    folder: Path | None,
    progress: Callable[[int, int, str], None] = lambda done, total, pace: None,
) -> tuple[dict[str, Packed], Training]:
    """Train as one of a crew, on its device; return what is to be stored, and how it went."""
    (teacher, network), (windows, held_out) = models, text
    learners = {
        name: Learner(network.get_submodule(name.rpartition(".")[0]), unpack(tensor), config.train == "weights")
        for name, tensor in packed.items()
    }
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in packed or parameter.dim() == 1)
    steps = max(1, config.tokens // (config.windows_per_step * windows.shape[1]))
    course = Course(
        batches=lambda start: map(crew.share, batches(windows, config.windows_per_step, steps, config.seed, start)),
        steps=steps,
        evaluations=config.evaluations,
        stop=config.stop,
        seconds=config.seconds,
        folder=folder,
        crew=crew,
    )
    with moved_to(crew.device, original_of(teacher).network, network):
        norms = [value for name, value in network.named_parameters() if name not in packed and value.dim() == 1]
        groups = learning_groups(list(learners.values()), config.scale_rate, config.code_rate)
        update = Updates([*groups, {"params": norms, "lr": config.scale_rate}], steps, config.warm_up)
        step, measure = taught_by(teacher, network, held_out.to(crew.device))

        def show() -> None:
            for learner in learners.values():
                learner.show()

        def learn(batch: Tensor) -> float:
            show()
            loss = crew.average(network.parameters(), step(batch), predictions(teacher, network, batch))
            for learner in learners.values():
                learner.take_gradient()
            update()
            return loss

        def held_out_kl() -> float:
            show()
            return measure()

        done = train(course, update, learn, held_out_kl, progress)
        show()
    network.requires_grad_(True)
    return {name: pack(learner.quantized()) for name, learner in learners.items()}, done
