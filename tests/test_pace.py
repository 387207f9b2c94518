"""Time turned into tokens."""

import pytest
import torch
from tests.conftest import Tiny

from pocketlm.model.language_model import LanguageModel
from pocketlm.model.text import Tokens, as_tokens
from pocketlm.plan.pace import tokens_in, tuned_tokens_in

TEXT = as_tokens("", torch.randint(3, 300, (8, 32), generator=torch.Generator().manual_seed(0)))
BATCH = TEXT.first(4).numel()


def tuning(model: LanguageModel, text: Tokens, seconds: float) -> int:
    return tuned_tokens_in(model, text, seconds, {"*": "Q4_0"})


@pytest.mark.parametrize("fitting", [tokens_in, tuning])
@pytest.mark.parametrize("windows", [1, 3])
def test_of_little_text_a_step_reads_as_much(tiny_model: Tiny, fitting, windows: int):
    assert fitting(tiny_model("llama"), as_tokens("", TEXT.first(windows)), 0.0) == BATCH


@pytest.mark.parametrize("fitting", [tokens_in, tuning])
def test_no_time_is_one_batch_and_a_week_is_many_to_two_digits(tiny_model: Tiny, fitting):
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    assert fitting(model, TEXT, 0.0) == BATCH
    many = fitting(model, TEXT, 7 * 24 * 3600.0)
    assert many > 1000 * BATCH
    assert int(str(many)[2:]) == 0
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())
