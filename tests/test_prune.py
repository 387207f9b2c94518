"""Cutting heads, directions and blocks: what is left is a stock model that takes over; and `pocketlm prune`."""

import copy
import gc
import json
import math
import re
import tempfile
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tests.command_line import pocketlm
from tests.conftest import Tiny
from tests.test_steps import WINDOWS, assert_reloads, droppable, every_family, logits_of
from tests.tiny import FAMILIES, tiny_folder
from torch import Tensor, nn

from pocketlm.cli.terminal import pruned_lines
from pocketlm.commands import pruning
from pocketlm.commands.pruning import Cut, Prune, Pruned, healing_tokens, prune
from pocketlm.errors import BadInputError, OutOfResourcesError
from pocketlm.export.gguf import write_gguf
from pocketlm.export.sparse_bitmask import read_sparse_bitmask
from pocketlm.interval import Interval
from pocketlm.measure.quality import Quality
from pocketlm.model import abreast as abreast_module
from pocketlm.model.abreast import DAMPINGS, abreast
from pocketlm.model.anatomy import anatomy_of, blocks_of, overwrite_weight, read_weight, write_weight
from pocketlm.model.ends import rescale_end
from pocketlm.model.judge import Judge, judge
from pocketlm.model.source import load
from pocketlm.model.surgery import head_width, key_value_heads, narrow_ends, narrow_stream
from pocketlm.pipeline import preflight, proof, stages
from pocketlm.pipeline.stages import gather_texts, run_recipe, silent
from pocketlm.plan.decide import healing_rate
from pocketlm.plan.importance import block_influence, perplexity_without
from pocketlm.plan.recipe import Recipe, read_recipe
from pocketlm.plan.sizes import recipe_bytes, sizes_of
from pocketlm.report.content import TextUsed
from pocketlm.run.engine import Engine
from pocketlm.steps.prune_depth import PruneDepth, prune_depth
from pocketlm.steps.prune_width import PruneWidth, choose_basis, group_damage, prune_width
from pocketlm.steps.quantize import Quantize
from pocketlm.tensors.gauss_newton import Tangent
from pocketlm.tensors.reconstruction import solve_missing

MANY = torch.randint(3, 300, (64, 32), generator=torch.Generator().manual_seed(1))
every_grouped_family = pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
every_rotating_family = pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
SHAPES = ({"kv_groups": 1}, {"heads": 2}, {"hidden": 32}, {"ffn": 96, "kv_groups": 1, "heads": 1, "hidden": 32})


def silence_groups(network: nn.Module, dead: int):
    """Make the output of one head of keys and values, and its query heads, unread in every block."""
    heads = key_value_heads(network)
    for block in blocks_of(network):
        (path,) = anatomy_of(network).readers("attention_out")
        linear = block.get_submodule(path)
        weight = read_weight(linear).clone()
        weight.view(len(weight), heads, -1)[:, dead] = 0
        write_weight(linear, weight)


@pytest.mark.usefixtures("exact")
@every_grouped_family
def test_removing_heads_that_nobody_reads_changes_nothing(family: str, tiny_model: Tiny, tmp_path: Path):
    model = tiny_model(family)
    silence_groups(model.network, 1)
    before = logits_of(model.network)
    model, report = prune_width(model, PruneWidth(kv_groups=1), WINDOWS)
    config = model.network.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 16)
    assert torch.allclose(logits_of(model.network), before, atol=1e-3 * before.abs().max().item())
    assert report.details["kv_groups_kept"] == [[0]] * len(blocks_of(model.network))
    assert_reloads(model, tmp_path)


@pytest.mark.usefixtures("exact")
@every_grouped_family
def test_groups_are_chosen_by_what_the_network_says_without_them(family: str, tiny_model: Tiny):
    model = tiny_model(family)
    network, blocks = model.network, blocks_of(model.network)
    state = {name: weight.clone() for name, weight in network.state_dict().items()}
    damage = group_damage(network, WINDOWS)
    assert all(torch.equal(weight, state[name]) for name, weight in network.state_dict().items())
    assert [len(row) for row in damage] == [2] * len(blocks)

    tried = WINDOWS[-((len(WINDOWS) + 1) // 2) :]
    (path,) = anatomy_of(network).readers("attention_out")
    linear, seen = blocks[1].get_submodule(path), []
    with linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, 1).double())):
        logits_of(network, WINDOWS[: len(WINDOWS) - len(tried)])
    truth, weight, (x,) = logits_of(network, tried).log_softmax(-1), read_weight(linear).double(), seen
    half = weight.shape[1] // 2
    for group, kept in enumerate((slice(half, None), slice(0, half))):
        gram = x.T @ x
        gram = gram + 0.03 * gram.diagonal().diag()
        alone = torch.zeros_like(weight)
        alone[:, kept] = torch.linalg.solve(gram[kept, kept], weight @ gram[:, kept], left=False)
        overwrite_weight(linear, alone.float())
        said = logits_of(network, tried).log_softmax(-1)
        overwrite_weight(linear, weight.float())
        expected = (truth.exp() * (truth - said)).sum(-1).mean().item()
        assert damage[1][group] == pytest.approx(expected, rel=1e-2, abs=1e-6)

    _, report = prune_width(model, PruneWidth(kv_groups=1, measured=True), WINDOWS)
    assert report.details["kv_groups_kept"] == [[row.index(max(row))] for row in damage]
    assert report.details["kv_group_scores_are_kl"]
    assert "kept 1 of 2 KV groups by their KL" in report.summary


@pytest.mark.usefixtures("exact")
@every_grouped_family
def test_removing_query_heads_that_nobody_reads_changes_nothing(family: str, tiny_model: Tiny, tmp_path: Path):
    model = tiny_model(family)
    for block in blocks_of(model.network):  # one of each group: heads 0 and 3
        (path,) = anatomy_of(model.network).readers("attention_out")
        weight = read_weight(block.get_submodule(path)).clone()
        weight.view(len(weight), 4, -1)[:, [0, 3]] = 0
        write_weight(block.get_submodule(path), weight)
    before = logits_of(model.network)
    model, report = prune_width(model, PruneWidth(heads=2), WINDOWS)
    config = model.network.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 2, 16)
    assert torch.allclose(logits_of(model.network), before, atol=1e-3 * before.abs().max().item())
    assert report.details["heads_kept"] == [[1, 2]] * len(blocks_of(model.network))
    assert "kept 2 of 4 query heads" in report.summary
    assert_reloads(model, tmp_path)


def test_a_group_takes_its_biases_and_query_heads_along(tiny_model: Tiny):
    model = tiny_model("qwen2")
    silence_groups(model.network, 0)
    before = blocks_of(model.network)[0].self_attn
    query, key = before.q_proj.bias.detach().clone(), before.k_proj.bias.detach().clone()
    model, _ = prune_width(model, PruneWidth(kv_groups=1), WINDOWS)
    after = blocks_of(model.network)[0].self_attn
    assert torch.equal(after.q_proj.bias, query[32:])
    assert torch.equal(after.k_proj.bias, key[16:])


@every_rotating_family
def test_a_rotation_of_all_directions_changes_nothing(family: str, tiny_model: Tiny):
    network = tiny_model(family, tie_word_embeddings=False).network.double()
    before = logits_of(network)
    basis = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    for block in blocks_of(network):
        narrow_stream(block, anatomy_of(network), basis)
    narrow_ends(network, basis)
    assert torch.allclose(logits_of(network), before, atol=1e-4)  # RMSNorm computes in float32


def silence_directions(network: nn.Module, dead: Tensor):
    """Let nothing write some channels of the residual stream."""
    anatomy = anatomy_of(network)
    for module in network.modules():
        if isinstance(module, nn.Embedding):
            module.weight.data[:, dead] = 0
    for block in blocks_of(network):
        for writer in map(block.get_submodule, anatomy.writers("residual")):
            write_weight(writer, read_weight(writer).index_fill(0, dead, 0))
        for norm in map(block.get_submodule, anatomy.norms_behind):
            norm.weight.data[dead] = -anatomy.norm_offset


@pytest.mark.usefixtures("exact")
@every_grouped_family
def test_removing_directions_that_nobody_writes_changes_nothing(family: str, tiny_model: Tiny, tmp_path: Path):
    model = tiny_model(family)
    if model.network.config.tie_word_embeddings:  # a tied head keeps its norm exactly only where that is uniform
        norm = model.network.get_submodule(anatomy_of(model.network).final_norm)
        norm.weight.data[:] = norm.weight.mean()
    silence_directions(model.network, torch.arange(1, 64, 2))
    before = logits_of(model.network)
    model, report = prune_width(model, PruneWidth(hidden=32), WINDOWS)
    assert torch.allclose(logits_of(model.network), before, atol=5e-3 * before.abs().max().item())
    assert model.network.config.hidden_size == 32
    assert (report.details["hidden_from"], report.details["hidden_to"]) == (64, 32)
    assert_reloads(model, tmp_path)


@every_family
@pytest.mark.parametrize("widths", SHAPES, ids=["groups", "heads", "hidden", "all"])
def test_every_shape_loads_generates_and_has_the_predicted_bytes(
    family: str, widths: dict, tiny_model: Tiny, tmp_path: Path
):
    if family == "gpt2":
        widths = {name: width for name, width in widths.items() if name not in ("kv_groups", "heads")} or {"hidden": 48}
    model = tiny_model(family)
    recipe = Recipe(steps=(PruneWidth(**widths), Quantize(formats={"*": "F16"})))
    predicted = recipe_bytes(sizes_of(model), recipe)
    model, _ = prune_width(model, PruneWidth(**widths), WINDOWS)
    write_gguf(model, {}, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").stat().st_size == predicted
    assert_reloads(model, tmp_path / "hf")


@pytest.mark.slow
@every_family
@pytest.mark.parametrize("fewer", [{"kv_groups": 1}, {"heads": 2}], ids=["groups", "heads"])
def test_the_engine_computes_what_torch_computes(family: str, fewer: dict, tiny_model: Tiny, tmp_path: Path):
    widths = {"hidden": 32} | ({} if family == "gpt2" else fewer)
    model, _ = prune_width(tiny_model(family), PruneWidth(ffn=96, **widths), WINDOWS)
    write_gguf(model, {}, tmp_path / "model.gguf")
    with Engine(tmp_path / "model.gguf", context=32) as engine:
        found = engine.logits(WINDOWS[0].tolist())
    truth = logits_of(model.network, WINDOWS[:1])[0]
    assert (found - truth).norm() < 0.03 * truth.norm()


def test_a_llama_whose_heads_do_not_divide_its_width_becomes_a_mistral(tiny_model: Tiny, tmp_path: Path):
    model = tiny_model("llama", hidden_size=96, num_attention_heads=6, num_key_value_heads=2)
    model, _ = prune_width(model, PruneWidth(hidden=64), WINDOWS)
    assert model.network.config.model_type == "mistral"
    assert (model.network.config.hidden_size, model.network.config.head_dim) == (64, 16)
    assert_reloads(model, tmp_path)


@every_family
def test_widths_that_stay_are_left_alone(family: str, tiny_model: Tiny):
    model = tiny_model(family)
    before = logits_of(model.network)
    groups = key_value_heads(model.network)
    model, report = prune_width(model, PruneWidth(ffn=128, kv_groups=groups, hidden=64), WINDOWS)
    assert torch.equal(logits_of(model.network), before)
    assert report.summary == "nothing to narrow: all widths are there already"


@pytest.mark.usefixtures("exact")
def test_writers_are_resolved_towards_the_stream_of_the_original(tiny_model: Tiny):
    """The obvious way: collect inputs and streams of block 1 after block 0 was damaged, and sum in float64."""
    network = tiny_model("llama").network
    original = copy.deepcopy(network)
    pairs = abreast(network, WINDOWS)
    first = next(pairs)
    write_weight(first.block.mlp.down_proj, 0.5 * read_weight(first.block.mlp.down_proj))
    first.touched = True
    pair = next(pairs)
    heard, wanted = {}, {}
    network.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda m, a: heard.update(x=a[0]))
    network.model.layers[1].post_attention_layernorm.register_forward_pre_hook(lambda m, a: heard.update(t=a[0]))
    original.model.layers[1].post_attention_layernorm.register_forward_pre_hook(lambda m, a: wanted.update(t=a[0]))
    logits_of(network), logits_of(original)
    x = heard["x"].double().flatten(0, 1)
    missing = (wanted["t"] - heard["t"]).double().flatten(0, 1)
    taught, held = pair.moments("self_attn.o_proj")
    cut = len(x) * 3 // 4
    for part, rows in ((taught, slice(cut)), (held, slice(cut, None))):
        assert torch.allclose(part.gram.double(), x[rows].T @ x[rows], atol=1e-2)
        assert torch.allclose(part.cross.double(), missing[rows].T @ x[rows], atol=1e-2)
    before = read_weight(pair.block.self_attn.o_proj).clone()
    pair.resolve_writer("self_attn.o_proj", (taught, held))
    assert torch.allclose(
        read_weight(pair.block.self_attn.o_proj), before + solve_missing(taught, held, DAMPINGS).float(), atol=1e-5
    )


@pytest.mark.usefixtures("exact")
@every_family
def test_slopes_tell_what_a_change_of_what_makes_channels_does_to_them(family: str, tiny_model: Tiny):
    network = tiny_model(family).network
    pair = next(abreast(network, WINDOWS))
    path = pair.writers[-1]
    makers = pair.anatomy.writers("mlp_hidden")
    inputs, _ = next(pair._arrivals(makers[0]))
    channels, slopes = pair._channels(makers, path, inputs)
    generator, foreseen = torch.Generator().manual_seed(0), torch.zeros_like(channels)
    for maker, slope in zip(makers, slopes, strict=True):
        linear = pair.block.get_submodule(maker)
        change = 1e-3 * torch.randn(read_weight(linear).shape, generator=generator)
        foreseen += slope * (inputs @ change.T)
        write_weight(linear, read_weight(linear) + change)
    moved = pair._channels(makers, path, inputs)[0] - channels
    assert foreseen.norm() > 1e-4 * channels.norm()
    assert (moved - foreseen).norm() < 0.02 * foreseen.norm()


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("family", "narrow"), [("llama", False), ("gemma3_text", False), ("gpt2", False), ("llama", True)]
)
def test_what_makes_channels_is_brought_back(family: str, narrow: bool, tiny_model: Tiny):
    """What makes the channels of block 0 was disturbed: it is found again, as far as text tells."""
    network, windows = tiny_model(family).network, MANY
    basis = choose_basis(network, windows, 48) if narrow else None
    pair = next(abreast(network, windows, basis=basis))
    if narrow:
        narrow_stream(pair.block, pair.anatomy, basis)
    path, generator = pair.writers[-1], torch.Generator().manual_seed(0)

    def lost() -> float:
        arrived = enumerate(pair._arrivals(path))
        return sum(pair._missing(path, at, *each)[0].square().sum().item() for at, each in arrived)

    whole = lost()  # nothing but what a narrower stream cannot hold
    for maker in pair.anatomy.writers("mlp_hidden"):
        linear = pair.block.get_submodule(maker)
        weight = read_weight(linear)
        write_weight(linear, weight + 0.5 * weight.std() * torch.randn(weight.shape, generator=generator))
    disturbed = lost()
    assert pair.resolve_channels()
    assert lost() - whole < 0.3 * (disturbed - whole)


@every_family
def test_what_was_found_for_the_makers_of_channels_is_added(
    family: str, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
):
    found = []

    def some(reader: Tensor, text: list[Tangent]) -> list[Tensor]:
        found.append([torch.full((each.shape[1], text[0].inputs.shape[1]), 1e-3) for each in text[0].slopes])
        return found[-1] if len(found) == 1 else [torch.zeros_like(each) for each in found[-1]]

    monkeypatch.setattr(abreast_module, "solve_changes", some)
    model, report = prune_width(tiny_model(family), PruneWidth(ffn=96, channels=True), WINDOWS)
    monkeypatch.undo()
    plain, _ = prune_width(tiny_model(family), PruneWidth(ffn=96), WINDOWS)
    assert report.details["channels_resolved"] == [0], "nothing was gained behind it"
    total = len(blocks_of(model.network))
    assert report.summary.endswith(f"; what makes FFN channels re-solved in 1 of {total} blocks")
    for maker in anatomy_of(model.network).writers("mlp_hidden"):
        before, after = (blocks_of(each.network)[0].get_submodule(maker) for each in (plain, model))
        assert torch.allclose(read_weight(after), read_weight(before) + 1e-3, atol=1e-6)


@pytest.mark.usefixtures("exact")
@droppable
def test_repair_brings_the_stream_closer_to_the_original(family: str, tiny_model: Tiny, tmp_path: Path):
    truth = logits_of(tiny_model(family).network)
    plain, _ = prune_depth(tiny_model(family), PruneDepth(drop=(1,)))
    repaired, report = prune_depth(tiny_model(family), PruneDepth(drop=(1,), repair=True), WINDOWS)
    assert (logits_of(repaired.network) - truth).norm() < 0.9 * (logits_of(plain.network) - truth).norm()
    assert report.summary == "dropped 1 of 3 blocks: 1, the others re-solved"
    assert_reloads(repaired, tmp_path)


def test_repair_leaves_what_stands_before_the_first_gap_alone(tiny_model: Tiny):
    model = tiny_model("llama", num_hidden_layers=4)
    before = copy.deepcopy(blocks_of(model.network)[0].state_dict())
    model, _ = prune_depth(model, PruneDepth(drop=(2,), repair=True), WINDOWS)
    after = blocks_of(model.network)[0].state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.usefixtures("exact")
@every_family
def test_a_model_that_is_too_sure_is_made_as_sure_as_the_original(family: str, tiny_model: Tiny):
    network = tiny_model(family).network
    truth, opinion = logits_of(network), judge(network, WINDOWS)
    anatomy = anatomy_of(network)
    norm = network.get_submodule(anatomy.final_norm)
    norm.weight.data = 1.5 * (norm.weight.data + anatomy.norm_offset) - anatomy.norm_offset
    if getattr(norm, "bias", None) is not None:
        norm.bias.data *= 1.5
    assert torch.allclose(logits_of(network), 1.5 * truth, rtol=1e-3, atol=1e-3)
    rescale_end(network, WINDOWS, opinion)
    assert torch.allclose(logits_of(network), truth, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("same_head", [True, False])
def test_the_scale_is_the_best_of_a_fine_grid(same_head: bool):
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    hidden, head = draw(60, 16), draw(50, 16) / 2
    opinion = Judge(hidden, head, (hidden @ head.T).softmax(-1) @ head, (hidden @ head.T).logsumexp(-1))
    other, weight = 1.3 * hidden + 0.5 * draw(60, 16), head if same_head else head + 0.1 * draw(50, 16)
    truth = (hidden.double() @ head.double().T).log_softmax(-1)

    def divergence(scale: float) -> float:
        mine = (scale * (other.double() @ weight.double().T)).log_softmax(-1)
        return (truth.exp() * (truth - mine)).sum().item()

    best = min((step / 1000 for step in range(300, 1500)), key=divergence)
    assert 0.4 < best < 0.95
    assert opinion.best_scale(other, weight) == pytest.approx(best, abs=2e-3)


def test_repair_needs_text(tiny_model: Tiny):
    with pytest.raises(BadInputError, match="needs text to solve on"):
        prune_depth(tiny_model("llama"), PruneDepth(drop=(1,), repair=True))


@pytest.mark.usefixtures("exact")
def test_a_block_that_does_nothing_has_no_influence_and_is_not_missed(tiny_model: Tiny):
    network = tiny_model("llama").network
    block = blocks_of(network)[1]
    for linear in (block.self_attn.o_proj, block.mlp.down_proj):
        linear.weight.data.zero_()
    influence, without = block_influence(network, WINDOWS), perplexity_without(network, WINDOWS)
    assert abs(influence[1]) < 1e-5 < min(influence[0], influence[2])
    loss = nn.functional.cross_entropy(logits_of(network)[:, :-1].flatten(0, 1), WINDOWS[:, 1:].flatten())
    assert without[1] == pytest.approx(loss.exp().item(), rel=1e-4)


def test_the_basis_is_orthonormal_and_picks_channels_where_norms_forbid_a_rotation(tiny_model: Tiny):
    rotated = choose_basis(tiny_model("llama").network, WINDOWS, 32)
    assert torch.allclose(rotated.T @ rotated, torch.eye(32), atol=1e-5)
    picked = choose_basis(tiny_model("gemma3_text").network, WINDOWS, 32)
    assert set(picked.flatten().tolist()) == {0.0, 1.0}
    assert torch.equal(picked.sum(0), torch.ones(32))


@pytest.mark.parametrize(
    ("family", "widths", "words"),
    [
        ("llama", {"kv_groups": 3}, "Cannot keep 3 KV groups: there are 2 now. Give 1 to 2"),
        ("llama", {"heads": 3}, "Cannot keep 3 query heads with 2 KV groups, .* What fits: 2, 4"),
        ("llama", {"kv_groups": 1, "heads": 4}, "What fits: 1, 2"),
        ("gpt2", {"heads": 2}, "heads of a GPT-2 are together as wide as its residual stream"),
        ("llama", {"hidden": 96}, "Cannot make the residual stream 96 wide: it is 64 wide now. Give 1 to 64"),
        ("gpt2", {"kv_groups": 2}, "heads of a GPT-2 are together as wide as its residual stream"),
        ("gpt2", {"hidden": 40}, "a multiple of 16"),
    ],
)
def test_widths_that_no_stock_shape_has(family: str, widths: dict, words: str, tiny_model: Tiny):
    model = tiny_model(family)
    before = logits_of(model.network)
    with pytest.raises(BadInputError, match=words):
        prune_width(model, PruneWidth(**widths), WINDOWS)
    assert torch.equal(logits_of(model.network), before)


def test_a_gemma_keeps_a_width_that_its_heads_divide(tiny_model: Tiny):
    model = tiny_model("gemma3_text", hidden_size=96, num_attention_heads=6, head_dim=16)
    with pytest.raises(BadInputError, match="multiple of its 6 query heads: 64 is not"):
        prune_width(model, PruneWidth(hidden=64), WINDOWS)


def test_head_width_of_a_gpt2_follows_from_its_heads(tiny_model: Tiny):
    assert head_width(tiny_model("gpt2").network.config) == 16


def test_more_to_remove_takes_more_tokens_to_heal():
    assert [healing_tokens(share) for share in (0.1, 0.2, 0.3)] == [30_000_000, 300_000_000, 3_000_000_000]
    assert healing_tokens(0.9) == healing_tokens(0.5)


def test_what_removes_nothing_heals_nothing():
    one = Interval(1, 1, 1)
    cuts = tuple(Cut(step, "", {}, 100, Quality(one, one, one, one)) for step in ("original", "trim_vocabulary"))
    made = Pruned(cuts, 1, 1, healing_tokens(0), TextUsed("text", "0", 1, 1, 1, True))
    assert not [line for line in pruned_lines(made, Path("out")) if "gone" in line or "distillation" in line]


def test_prune_makes_a_folder_that_says_what_each_step_cost(tmp_path: Path):
    source = tiny_folder("llama", tmp_path / "tiny", num_hidden_layers=4)
    options = ("--depth", 3, "--ffn", 96, "--kv-groups", 1, "--hidden", 32, "--data", _text(tmp_path))
    out = tmp_path / "out"
    done = pocketlm("prune", source, *options, "-o", out, "--json", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["predicted_bytes"] == made["actual_bytes"] == (out / "model.gguf").stat().st_size
    assert [cut["step"] for cut in made["cuts"]] == ["original", "prune_depth", "prune_width"]
    config = json.loads((out / "hf" / "config.json").read_text())
    shape = ("num_hidden_layers", "intermediate_size", "num_key_value_heads", "num_attention_heads", "hidden_size")
    assert [config[name] for name in shape] == [3, 96, 1, 2, 32]
    assert config["head_dim"] == 16
    page = (out / "choices.html").read_text()
    assert page.count("<svg") == 3
    depth, width, _ = read_recipe(out / "recipe.yaml").steps
    assert (depth.windows, width.windows, width.channels) == (128, 256, True)
    text = made["text"]
    assert (text["name"], text["held_out"]) == ("text.txt", True)
    assert f"{text['windows']} windows of 256 tokens, text.txt, sha256 {text['sha256']}" in page
    assert re.search(r"<td>[\d.,]+ \[[\d.,]+–[\d.,]+\]</td>", page)
    again = pocketlm("prune", source, *options, "-o", tmp_path / "again", cache=tmp_path / "cache")
    assert again.returncode == 0, again.stderr
    assert "tokens of distillation usually heal that" in again.stdout
    assert (tmp_path / "again" / "model.gguf").read_bytes() == (out / "model.gguf").read_bytes()
    assert "narrowing blocks" not in again.stderr  # taken from the cache
    redone = pocketlm(
        "fit", source, "--recipe", out / "recipe.yaml", "--data", options[-1], "--dry-run", "--json",
        cache=tmp_path / "cache",
    )  # fmt: skip
    assert json.loads(redone.stdout)["predicted_bytes"] == made["predicted_bytes"]


def test_tokens_and_connections_go_in_one_run_with_blocks(tmp_path: Path):
    source, out = tiny_folder("llama", tmp_path / "tiny"), tmp_path / "out"
    options = ("--vocab", 320, "--depth", 2, "--pattern", "2:4", "--heal", "2s", "--data", _text(tmp_path))
    done = pocketlm("prune", source, *options, "-o", out, "--json", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert [cut["step"] for cut in made["cuts"]] == ["original", "trim_vocabulary", "prune_depth", "distil", "sparsify"]
    page, words = (out / "choices.html").read_text(), made["cuts"][1]["details"]["tokens_per_word"]
    assert page.count("<svg") == 3  # blocks, tokens, connections
    assert "Tokens per word of the text, of all 384 tokens and of the 320 kept" in page
    assert all(f">{value:.3f}</text>" in page for value in words.values())
    healing = read_recipe(out / "recipe.yaml").steps[2]
    assert healing.learning_rate == healing_rate(healing.tokens, trimmed=True)
    assert f"highest {max(made['cuts'][-1]['details']['output_error']):.3g}<" in page
    assert made["predicted_bytes"] == made["actual_bytes"]
    assert all(cut["quality"]["bits_per_byte"]["value"] > 0 for cut in made["cuts"])
    model = load(str(out / "hf"))
    assert model.network.config.vocab_size == len(model.tokenizer) == 320
    assert len(blocks_of(model.network)) == 2
    up = model.network.model.layers[0].mlp.up_proj.weight
    assert ((up.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all()
    bitmasks = out / "bitmask" / "model.safetensors"
    assert made["bitmask_bytes"] == bitmasks.stat().st_size
    whole = dict(model.network.named_parameters())
    found = read_sparse_bitmask(bitmasks)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name].float(), weight.float()) for name, weight in whole.items())


def test_a_cut_is_solved_on_as_many_windows_as_its_step_says(tiny_model: Tiny, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path / "cache"))
    seen = []

    def watched(step):
        def run(model, config, windows, progress):
            seen.append(len(windows))
            return step(model, config, windows, progress)

        return run

    for name in ("prune_depth", "prune_width"):
        monkeypatch.setattr(stages, name, watched(getattr(stages, name)))
    model = tiny_model("llama")
    texts = gather_texts(model, [_text(tmp_path)], 0, silent)
    steps = (PruneDepth(drop=(1,), repair=True, windows=3), PruneWidth(ffn=96), PruneWidth(ffn=64, windows=10**6))
    run_recipe(model, Recipe(steps=(*steps, Quantize(formats={"*": "F16"}))), texts, silent)
    there = len(texts.calibration.windows)
    assert seen == [3, 32, there]
    assert there > 32


def test_one_step_at_a_time_is_in_memory_and_its_file_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    networks: list[weakref.ref] = []
    files: list[int] = []

    def seen(model):
        networks.append(weakref.ref(model.network))
        return model

    def loaded(source: str):
        gc.collect()
        assert not any(network() for network in networks), "what was measured before is still in memory"
        return load(source) if source == str(job.model) else seen(load(source))

    def made(*run):
        compressed = run_recipe(*run)
        seen(compressed.model)
        return compressed

    def counted(*measured):
        files.append(len(list((tmp_path / "tmp").rglob("*.gguf"))))
        return measure_models(*measured)

    measure_models = proof.measure_models
    monkeypatch.setattr(pruning, "load", loaded)
    monkeypatch.setattr(pruning, "run_recipe", made)
    monkeypatch.setattr(proof, "measure_models", counted)
    source = tiny_folder("llama", tmp_path / "tiny", num_hidden_layers=4)
    job = Prune(model=str(source), depth=3, kv_groups=1, sparsity=0.5, out=tmp_path / "out", data=(_text(tmp_path),))
    found = prune(job)
    assert [cut.step for cut in found.cuts] == ["original", "prune_depth", "prune_width", "sparsify"]
    assert found.cuts[0].quality.kl is None
    assert all(cut.quality.kl.value > 0 for cut in found.cuts[1:])
    assert files == [1, 1, 1]
    assert len(networks) == 4
    assert not list((tmp_path / "tmp").iterdir())


def test_a_model_that_broke_leaves_json_that_every_program_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    broken = Interval(math.inf, math.nan, math.inf)
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pruning, "measure_as_f16", lambda *_: [Quality(broken, broken, broken, broken)] * 2)
    source = tiny_folder("llama", tmp_path / "tiny")
    prune(Prune(model=str(source), ffn=96, out=tmp_path / "out", data=(_text(tmp_path),)))
    found = json.loads((tmp_path / "out" / "pruning.json").read_text(), parse_constant=pytest.fail)
    assert found["cuts"][1]["quality"]["perplexity"] == {"value": None, "low": None, "high": None}


def test_room_is_asked_for_every_step_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def asked(model, out, trained, more, written):
        raise OutOfResourcesError(f"{trained}, {more}, {written}")

    monkeypatch.setattr(pruning, "check_resources", asked)
    source, data = str(tiny_folder("llama", tmp_path / "tiny")), (_text(tmp_path),)
    for options, found in (
        ({"ffn": 96, "hidden": 32}, "False, 1, 2"),
        ({"vocab": 320, "depth": 2, "heads": 2, "heal": 1.0}, "True, 4, 2"),
        ({"depth": 2, "pattern": "2:4"}, "False, 2, 3"),
    ):
        with pytest.raises(OutOfResourcesError, match=f"^{found}$"):
            prune(Prune(model=source, out=tmp_path / "out", data=data, **options))


def test_a_cut_that_memory_has_no_room_for_is_refused_before_it_is_measured(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path / "cache"))
    source, data = str(tiny_folder("llama", tmp_path / "tiny")), (_text(tmp_path),)
    model = load(source)
    tokens = gather_texts(model, list(data), 0, silent).calibration.first(128).numel()
    held = 2 * 4 * model.parameters + tokens * 8 * 4 * 64
    monkeypatch.setattr(preflight, "machine", lambda: SimpleNamespace(memory_available_bytes=held - 1))
    monkeypatch.setattr(pruning, "depth_damage", None)
    with pytest.raises(OutOfResourcesError, match="give less text with --data"):
        prune(Prune(model=source, depth=2, out=tmp_path / "out", data=data))


@pytest.mark.parametrize("others", [(), ("--depth", 2)])
def test_too_few_tokens_are_refused_before_blocks_are_tried(others: tuple, tmp_path: Path):
    source = tiny_folder("llama", tmp_path / "tiny")
    options = ("--vocab", 100, *others, "--data", _text(tmp_path))
    done = pocketlm("prune", source, *options, "-o", tmp_path / "out", cache=tmp_path / "cache")
    assert done.returncode == 2
    assert "Cannot trim the vocabulary to 100 tokens" in done.stderr
    assert not list((tmp_path / "cache").glob("text-*")), "no text was read either"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            (),
            "Nothing to prune. Give one or more of --depth, --ffn, --kv-groups, --heads, --hidden, --vocab, --sparsity",
        ),
        (("--vocab", 100), "Cannot trim the vocabulary to 100 tokens"),
        (("--vocab", 0), "Cannot keep 0 tokens: the model has 384"),
        (("--vocab", 385), "Cannot keep 385 tokens: the model has 384"),
        (("--vocab", 384), "Nothing to prune: the model has that shape already"),
        (("--vocab", 320), "Give some with --data, or leave --vocab out"),
        (("--sparsity", 1.5), "The sparsity is a share of the weights, and 1.5 is none"),
        (("--sparsity", 0), "The sparsity is a share of the weights, and 0 is none"),
        (("--pattern", "4:2"), "`4:2` is no pattern"),
        (("--sparsity", 0.5, "--method", "magic"), "Unknown method `magic` to cut connections"),
        (
            ("--ffn", 96, "--method", "wanda"),
            "--method is how connections are chosen: give --sparsity or --pattern too",
        ),
        (("--depth", 3), "Nothing to prune: the model has that shape already"),
        (("--depth", 9), "Cannot keep 9 blocks: the model has 3. Give --depth 2 to 3"),
        (("--depth", 1), "Cannot keep fewer than 2 of 3 blocks: the first and the last always stay"),
        (("--ffn", 100), "--ffn 100 is no multiple of 32, which number formats need. Nearest that fit: 96 or 128"),
        (("--ffn", 0), "--ffn 0 is no multiple of 32, which number formats need. Nearest that fit: 32"),
        (("--hidden", 8), "--hidden 8 is no multiple of 32, which number formats need. Nearest that fit: 32"),
        (("--heal", "soon", "--ffn", 96), "Cannot read the time `soon`"),
    ],
)
def test_prune_refuses_in_one_line(options: tuple, words: str, tmp_path: Path):
    source = tiny_folder("llama", tmp_path / "tiny")
    done = pocketlm("prune", source, *options, "-o", tmp_path / "out", cache=tmp_path / "cache")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert words in done.stderr
    assert not (tmp_path / "out").exists()


def _text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("\n\n".join(f"Paragraph {i}. The sea is wide and the boat is small, said number {i}. " * 40
                                for i in range(60)))  # fmt: skip
    return path
