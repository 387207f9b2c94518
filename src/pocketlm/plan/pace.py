"""How fast this machine is with a model: its forward passes, and how many tokens it learns from in a given time."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pocketlm.model.compute import forward_dtype
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.sweep import final_hidden
from pocketlm.model.text import Tokens
from pocketlm.steps.distil import Distil, distil
from pocketlm.steps.quantize import Quantize, quantize
from pocketlm.steps.tune import Tune, tune

TIMED_STEPS = 3  # behind the first, which also allocates
SHARE = 0.9  # of the time for steps; the rest is for measuring in between
# A step learns from a window: the teacher's pass, the student's, and the way back, which is two, took four in all;
# where bfloat16 makes passes faster but not all that is between them, five.
LEARNING_PASSES = 5
Mark = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Pace:
    """Seconds that a forward pass of one window takes on this machine.

    Attributes:
        plain: In the precision of its weights, which is float32 but for large models.
        fast: In the precision that models are read in.
        length: Tokens in the window.
    """

    plain: float
    fast: float
    length: int

    def learning(self, tokens: int) -> float:
        """Return about how many seconds learning from so many tokens takes."""
        return self.fast * LEARNING_PASSES * tokens / self.length


@torch.no_grad()
def pace_of(model: LanguageModel, text: Tokens) -> Pace:
    """Time a forward pass of a text's first window, in both precisions."""
    window, network = text.first(1), model.network

    def seconds(read: Callable[[], object]) -> float:
        read()  # the first one also allocates
        began = time.monotonic()
        read()
        return time.monotonic() - began

    fast = seconds(lambda: final_hidden(network, window))
    same = forward_dtype(window.device.type) is torch.float32
    plain = fast if same else seconds(lambda: network.base_model(input_ids=window, use_cache=False))
    return Pace(plain, fast, window.shape[1])


def tokens_in(
    model: LanguageModel,
    calibration: Tokens,
    seconds: float,
    student: LanguageModel | None = None,
    how: Distil | None = None,
) -> int:
    """Return how many tokens of distillation fit into a time on this machine, to two digits.

    Args:
        model: The teacher.
        calibration: What will be learnt from.
        seconds: The time.
        student: Who learns, and is spoilt by the trial; a copy of the teacher where None.
        how: It learns; its tokens and evaluations do not matter.
    """
    how = how or Distil(tokens=1)
    batch = calibration.first(how.windows_per_step)
    config = replace(how, tokens=_trial_tokens(how, batch), evaluations=1)
    trial = student or _copied(model)
    return _tokens_in(seconds, config, lambda mark: distil(model, trial, config, batch, batch[:1], mark))


def tuned_tokens_in(model: LanguageModel, calibration: Tokens, seconds: float, formats: dict[str, str]) -> int:
    """Return how many tokens of tuning fit into a time on this machine, to two digits.

    Args:
        model: The original; not changed.
        calibration: What will be learnt from.
        seconds: The time.
        formats: That the tuned model is stored in, by group or pattern.
    """
    how = Tune(tokens=1)
    batch = calibration.first(how.windows_per_step)
    config = replace(how, tokens=_trial_tokens(how, batch), evaluations=1)
    trial, packed, _ = quantize(_copied(model), Quantize(formats=formats, method="rtn"), batch[:1])
    return _tokens_in(seconds, config, lambda mark: tune(model, trial, packed, config, (batch, batch[:1]), mark))


def _trial_tokens(how: Distil | Tune, batch: Tensor) -> int:
    """Return the tokens of the steps that are timed; of little text, a step reads some windows more than once."""
    return (1 + TIMED_STEPS) * how.windows_per_step * batch.shape[1]


def _tokens_in(seconds: float, trial: Distil | Tune, learn: Callable[[Mark], object]) -> int:
    """Return how many tokens fit into a time, from a training of a few steps."""
    ends: list[float] = []
    learn(lambda done, total, pace: ends.append(time.monotonic()))
    per_step = trial.tokens // (1 + TIMED_STEPS)
    tokens = int(SHARE * seconds * per_step * (len(ends) - 1) / (ends[-1] - ends[0]))
    digits = max(0, len(str(tokens)) - 2)
    return max(per_step, tokens // 10**digits * 10**digits)


def _copied(model: LanguageModel) -> LanguageModel:
    return replace(model, network=copy.deepcopy(model.network))
