"""A teacher's insides: distances and gradients are those of float64 autograd, and training obeys them."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import Tiny
from tests.tiny import FAMILIES
from torch import Tensor, nn

from pocketlm.errors import BadInputError
from pocketlm.model import learning, matching
from pocketlm.model.anatomy import blocks_of
from pocketlm.model.learning import Lessons, distillation_step
from pocketlm.steps.distil import Distil, distil
from pocketlm.tensors.divergence import Loss
from pocketlm.tensors.insides import projection_onto, relation_divergence, stream_distance

GENERATOR = torch.Generator().manual_seed(0)
WINDOWS, HELD_OUT = (torch.randint(3, 300, (rows, 32), generator=GENERATOR) for rows in (24, 3))


def obvious_streams(mine: Tensor, theirs: Tensor) -> Tensor:
    return ((mine - theirs).square().sum(-1) / theirs.square().sum(-1)).mean()


def obvious_relations(mine: Tensor, theirs: Tensor, heads: int, seen: Tensor) -> Tensor:
    """KL of relations, one head, window and token at a time."""
    found = []
    for window in range(len(mine)):
        for head in range(heads):
            a, b = (each[window].chunk(heads, -1)[head] for each in (mine, theirs))
            for token in range(len(a)):
                visible = seen[window, token]
                q, p = (torch.softmax(x[visible] @ x[token] / math.sqrt(x.shape[-1]), -1) for x in (a, b))
                found.append((p * (p.log() - q.log())).sum())
    return torch.stack(found).mean()


def in_examples(places: Tensor) -> Tensor:
    """Whom each token sees where several examples share a window."""
    windows, length = places.shape
    seen = torch.zeros(windows, length, length, dtype=torch.bool)
    for window in range(windows):
        for token in range(length):
            seen[window, token, token - places[window, token] : token + 1] = True
    return seen


@given(
    seed=st.integers(0, 10**6), heads=st.sampled_from([1, 2, 3]), wider=st.integers(1, 3), spread=st.floats(0.1, 4.0)
)
@settings(max_examples=25, deadline=None)
def test_distances_and_gradients_are_those_of_autograd_in_float64(seed: int, heads: int, wider: int, spread: float):
    generator = torch.Generator().manual_seed(seed)
    mine, same = (spread * torch.randn(2, 7, 4 * heads, generator=generator) for _ in range(2))
    theirs = spread * torch.randn(2, 7, 4 * heads * wider, generator=generator)
    seen = in_examples(torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 1, 0, 1, 2, 0, 0]]))
    for ours, obvious, other in (
        (stream_distance, obvious_streams, (same,)),
        (relation_divergence, obvious_relations, (theirs, heads, seen)),
    ):
        exact = mine.double().requires_grad_()
        truth = obvious(exact, other[0].double(), *other[1:])
        truth.backward()
        value, slope = ours(mine, *other)
        assert value.item() == pytest.approx(truth.item(), rel=1e-4, abs=1e-6)
        assert (slope - exact.grad).norm() <= 1e-4 * exact.grad.norm() + 1e-7


def test_a_projection_starts_as_the_nearest():
    generator = torch.Generator().manual_seed(0)
    mine, true = torch.randn(500, 6, generator=generator), torch.randn(9, 6, generator=generator)
    found = projection_onto(mine, mine @ true.T, damping=1e-9)
    assert torch.allclose(found, true, atol=1e-4)


def narrower(family: str) -> dict[str, int]:
    """The config of a student with fewer blocks, half the width and half the heads."""
    if family == "gpt2":
        return {"n_embd": 32, "n_head": 2, "n_layer": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return {"hidden_size": 32, "num_hidden_layers": 5 if family == "gemma3_text" else 2} | heads


def obvious_insides(network: nn.Module, lessons: Lessons) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Logits, the stream behind each block, and the last one's queries, keys and values, by the network's own code."""
    last = []
    handle = blocks_of(network)[-1].register_forward_hook(
        lambda _, __, out: last.append(out if isinstance(out, Tensor) else out[0])
    )
    out = network(input_ids=lessons.ids, position_ids=lessons.places, use_cache=False, output_hidden_states=True)
    handle.remove()
    block, states = blocks_of(network)[-1], [*out.hidden_states[1:-1], last[0]]
    before = out.hidden_states[-2]
    if network.config.model_type == "gpt2":
        return out.logits, states, list(block.attn.c_attn(block.ln_1(before)).chunk(3, -1))
    before = block.input_layernorm(before)
    attention = block.self_attn
    return out.logits, states, [each(before) for each in (attention.q_proj, attention.k_proj, attention.v_proj)]


def obvious_loss(
    teacher: nn.Module, student: nn.Module, lessons: Lessons, plain: matching.Matching, projections: list[Tensor]
) -> Tensor:
    with torch.no_grad():
        truth, streams, vectors = obvious_insides(teacher, lessons)
    guess, my_streams, my_vectors = obvious_insides(student, lessons)
    following = torch.ones_like(lessons.ids, dtype=torch.bool) if lessons.counted is None else lessons.counted.roll(-1)
    if lessons.counted is not None:
        following[:, -1] = False
    kl = nn.functional.kl_div(guess.log_softmax(-1), truth.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    apart = [
        obvious_streams(mine @ projection.T, streams[block])
        for mine, projection, block in zip(my_streams, projections, plain.blocks, strict=True)
    ]
    seen = in_examples(torch.arange(32).expand_as(lessons.ids) if lessons.places is None else lessons.places)
    related = [
        obvious_relations(mine, theirs, heads, seen)
        for mine, theirs, heads in zip(my_vectors, vectors, plain.heads, strict=True)
    ]
    return kl[following].mean() + plain.hidden_states * sum(apart) / len(apart) + plain.relations * sum(related) / 3


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_step_is_the_obvious_one_for_a_narrower_student(
    family: str, packed: bool, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(learning.TOKENS_AT_ONCE, "cpu", 32)  # one window at a time: gradients are summed up
    monkeypatch.setattr(learning, "CHECKPOINT_PARAMETERS", 0 if packed else 10**9)
    teacher, student = tiny_model(family).network, tiny_model(family, **narrower(family)).network
    places = torch.tensor([[*range(20), *range(12)], [*range(5), *range(27)]])
    lessons = Lessons(WINDOWS[:2], places, places > 3) if packed else Lessons(WINDOWS[:2])
    matched = matching.matching(teacher, student, 0.7, 0.4, WINDOWS)
    assert matched.heads == (2, 2, 2) if family == "gpt2" else (2, 1, 1)
    assert matched.blocks[-1] == len(blocks_of(teacher)) - 1
    exact = [copy.deepcopy(network).double() for network in (teacher, student)]
    projections = [each.detach().double().requires_grad_() for each in matched.projections]
    truth = obvious_loss(*exact, lessons, matched, projections)
    truth.backward()
    value = distillation_step(teacher, student, lessons, matched=matched)
    assert value == pytest.approx(truth.item(), rel=1e-3)
    ours = [*student.parameters(), *matched.projections]
    for mine, theirs in zip(ours, [*exact[1].parameters(), *projections], strict=True):
        assert (mine.grad - theirs.grad).norm() <= 1e-3 * theirs.grad.norm() + 1e-6


def test_blocks_are_mapped_evenly_and_equal_widths_start_as_they_are(tiny_model: Tiny):
    deep = tiny_model("llama", num_hidden_layers=6).network
    for depth, expected in ((6, (0, 1, 2, 3, 4, 5)), (3, (1, 3, 5)), (4, (1, 2, 3, 5)), (1, (5,))):
        found = matching.matching(deep, tiny_model("llama", num_hidden_layers=depth).network, 1.0, 0.0, WINDOWS)
        assert found.blocks == expected
        assert all(torch.equal(each, torch.eye(64)) for each in found.projections)
    assert matching.matching(deep, deep, 0.0, 1.0, WINDOWS).projections == ()


@pytest.mark.parametrize("width", [64, 32])
def test_matching_brings_the_insides_closer_than_the_loss_alone(width: int, tiny_model: Tiny):
    teacher = tiny_model("llama")
    _, truth, _ = obvious_insides(teacher.network, Lessons(WINDOWS[:4]))

    def trained(**weights: float) -> tuple[float, set[str]]:
        """How far the last stream is off through the best map there is: the projections that learnt are gone."""
        student = tiny_model("llama", num_hidden_layers=2, hidden_size=width)
        config = Distil(windows_per_step=4, tokens=16 * 128, learning_rate=3e-3, **weights)
        student, report = distil(teacher, student, config, WINDOWS[:4], HELD_OUT)
        assert report.details["kept"]
        with torch.no_grad():
            _, streams, _ = obvious_insides(student.network, Lessons(WINDOWS[:4]))
            best = projection_onto(streams[-1].flatten(0, 1), truth[-1].flatten(0, 1))
            return obvious_streams(streams[-1] @ best.T, truth[-1]).item(), set(student.network.state_dict())

    (plain, names), (matched, others) = trained(), trained(hidden_states=3.0, relations=1.0)
    assert matched < 0.95 * plain
    assert others == names, "what learnt besides is not in the model"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": -1.0}, "`hidden_states` and `relations` of at least 0"),
        ({"on_policy": 1.5}, "`on_policy` from 0 to 1"),
        ({"relations": 1.0, "cross_entropy": 1.0}, "need a teacher"),
        ({"on_policy": 0.5, "cross_entropy": 1.0}, "need a teacher"),
    ],
    ids=str,
)
def test_what_cannot_be_matched_is_refused(changes: dict, message: str, tiny_model: Tiny):
    with pytest.raises(BadInputError, match=message):
        distil(tiny_model("llama"), tiny_model("llama"), Distil(tokens=256, **changes), WINDOWS, HELD_OUT)


@pytest.mark.usefixtures("exact")
def test_a_loss_beside_matching_is_any(tiny_model: Tiny):
    """The weighted distance is added to whatever the loss on logits is."""
    teacher, student = tiny_model("qwen2").network, tiny_model("qwen2", num_hidden_layers=2).network
    matched = matching.matching(teacher, student, 0.5, 0.5, WINDOWS)
    added = [
        distillation_step(teacher, student, WINDOWS[:2], loss, matched)
        - distillation_step(teacher, student, WINDOWS[:2], loss)
        for loss in (Loss(), Loss(kind="jensen_shannon", cross_entropy=0.5))
    ]
    assert added[0] > 0
    assert added[1] == pytest.approx(added[0], rel=1e-4)
