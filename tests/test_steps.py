"""Pruning and quantizing: what comes out is a stock model whose weights are what the step says they are."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import Tiny
from tests.test_reconstruction import halves
from tests.tiny import FAMILIES
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pocketlm.errors import BadInputError
from pocketlm.model.abreast import DAMPINGS
from pocketlm.model.anatomy import anatomy_of, blocks_of, ffn_width, read_weight, write_weight
from pocketlm.model.ends import rescale_end
from pocketlm.model.judge import judge
from pocketlm.model.language_model import LanguageModel, save
from pocketlm.model.source import load
from pocketlm.model.sweep import sweep
from pocketlm.steps.prune_depth import PruneDepth, prune_depth
from pocketlm.steps.prune_width import SPACE, PruneWidth, kept_channels, prune_width
from pocketlm.steps.quantize import Quantize, embedding_name, quantize
from pocketlm.tensors.formats import FORMATS, unpack
from pocketlm.tensors.gauss_newton import Tangent, solve_changes
from pocketlm.tensors.reconstruction import removal_order, solve_missing, solve_readers

every_family = pytest.mark.parametrize("family", FAMILIES)
droppable = pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma3_text"])
WINDOWS = torch.randint(3, 300, (8, 32), generator=torch.Generator().manual_seed(0))
GROUPS = ("embedding", "head", "query_key", "value", "query_key_value", "attention_out", "ffn_in", "ffn_out")
MIXED = dict(zip(GROUPS, ("Q8_0", "Q5_0", "IQ4_NL", "Q8_0", "Q5_0", "Q4_0", "IQ4_NL", "Q5_0"), strict=True))


@torch.no_grad()
def logits_of(network: nn.Module, windows: Tensor = WINDOWS) -> Tensor:
    return network(windows, use_cache=False).logits


def assert_reloads(model: LanguageModel, folder: Path):
    """Saved, loaded by plain transformers: same logits, same greedy text, with the cache and without."""
    save(model, folder, torch.float32)
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.allclose(logits_of(again), logits_of(model.network), atol=1e-4)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    for network in (model.network, again):
        cached, plain = (
            network.generate(WINDOWS[:2, :9], use_cache=use_cache, **settings) for use_cache in (True, False)
        )
        assert torch.equal(cached, plain)
    assert torch.equal(again.generate(WINDOWS[:2, :9], **settings), cached)
    assert load(str(folder)).network.config.num_hidden_layers == model.network.config.num_hidden_layers


def pass_through(block: nn.Module):
    """Turn a block into the identity."""
    forward = block.forward

    def identity(states: Tensor, *args: object, **kwargs: object):
        out = forward(states, *args, **kwargs)
        return (states, *out[1:]) if isinstance(out, tuple) else states

    block.forward = identity


@droppable
@pytest.mark.parametrize("drop", [{0}, {1}, {0, 2}])
def test_dropping_blocks_is_skipping_them(family: str, drop: set[int], tiny_model: Tiny, tmp_path: Path):
    skipping = tiny_model(family).network
    for index in drop:
        pass_through(blocks_of(skipping)[index])
    model, report = prune_depth(tiny_model(family), PruneDepth(drop=tuple(drop)))
    assert torch.allclose(logits_of(model.network), logits_of(skipping), atol=1e-5)
    left = 3 - len(drop)
    assert model.network.config.num_hidden_layers == left == len(blocks_of(model.network))
    indices = [
        {module.layer_idx for module in block.modules() if hasattr(module, "layer_idx")}
        for block in blocks_of(model.network)
    ]
    assert indices == [{position} for position in range(left)]
    assert report.details == {"dropped": sorted(drop)}
    assert_reloads(model, tmp_path)


def test_blocks_of_two_kinds_keep_their_kind(tiny_model: Tiny, tmp_path: Path):
    model = tiny_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    assert model.network.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    model, _ = prune_depth(model, PruneDepth(drop=(0,)))
    assert model.network.config.layer_types == ["full_attention", "sliding_attention"]
    assert_reloads(model, tmp_path)


def test_dropping_in_two_steps_is_dropping_at_once(tiny_model: Tiny):
    once, _ = prune_depth(tiny_model("llama"), PruneDepth(drop=(0, 2)))
    twice, _ = prune_depth(tiny_model("llama"), PruneDepth(drop=(2,)))
    twice, _ = prune_depth(twice, PruneDepth(drop=(0,)))
    assert torch.equal(logits_of(once.network), logits_of(twice.network))


def test_a_block_named_twice_goes_once(tiny_model: Tiny):
    model, report = prune_depth(tiny_model("llama"), PruneDepth(drop=(1, 1)))
    assert len(blocks_of(model.network)) == 2
    assert report.summary == "dropped 1 of 3 blocks: 1"
    assert report.details == {"dropped": [1]}


@pytest.mark.parametrize(
    ("family", "drop", "words"),
    [
        ("llama", (3,), "Cannot drop block 3: the model has blocks 0 to 2"),
        ("llama", (-1,), "Cannot drop block -1"),
        ("llama", (0, 1, 2), "Cannot drop all 3 blocks. Keep at least one"),
        ("gemma3_text", (2,), "Blocks of `gemma3_text` alternate in kind, so none can be dropped"),
    ],
)
def test_blocks_that_cannot_be_dropped(family: str, drop: tuple[int, ...], words: str, tiny_model: Tiny):
    model = tiny_model(family)
    before = logits_of(model.network)
    with pytest.raises(BadInputError, match=words):
        prune_depth(model, PruneDepth(drop=drop))
    assert torch.equal(logits_of(model.network), before)


def silence_channels(network: nn.Module, dead: Tensor):
    """Make some FFN channels zero on every input."""
    anatomy = anatomy_of(network)
    for block in blocks_of(network):
        for path in anatomy.writers(SPACE):
            linear = block.get_submodule(path)
            weight = read_weight(linear).clone()
            weight[dead] = 0
            write_weight(linear, weight)
            if linear.bias is not None:
                linear.bias.data[dead] = 0


@every_family
def test_removing_dead_channels_changes_nothing(family: str, tiny_model: Tiny, tmp_path: Path):
    model = tiny_model(family)
    dead = torch.tensor([0, 5, 6, *range(32, 60), 127])
    silence_channels(model.network, dead)
    for block in blocks_of(model.network):  # nor read: the damping alone would weigh what reads silence
        linear = block.get_submodule(*anatomy_of(model.network).readers(SPACE))
        write_weight(linear, read_weight(linear).index_fill(1, dead, 0))
    before = logits_of(model.network)
    calls: list[tuple[int, int]] = []
    model, report = prune_width(model, PruneWidth(ffn=96), WINDOWS, lambda *done: calls.append(done))
    assert torch.allclose(logits_of(model.network), before, atol=2e-3 * before.abs().max().item())
    assert ffn_width(model.network) == 96
    assert getattr(model.network.config, anatomy_of(model.network).ffn_width) == 96
    assert min(report.details["energy_kept"]) > 0.9999
    blocks = len(blocks_of(model.network))
    assert calls == [(i + 1, blocks) for i in range(blocks)]
    assert_reloads(model, tmp_path)


@pytest.mark.parametrize(("family", "changes"), [("llama", {"mlp_bias": True}), ("gpt2", {})])
def test_biases_are_cut_with_their_channels(family: str, changes: dict, tiny_model: Tiny, tmp_path: Path):
    model = tiny_model(family, **changes)
    anatomy = anatomy_of(model.network)
    first = blocks_of(model.network)[0]
    biases = {
        path: first.get_submodule(path).bias.detach().clone()
        for path in anatomy.writers(SPACE) + anatomy.readers(SPACE)
    }
    gram = next(sweep(model.network, WINDOWS, spaces=(SPACE,)))
    keep = kept_channels(gram, [64])[64]
    model, _ = prune_width(model, PruneWidth(ffn=64), WINDOWS)
    for path in anatomy.writers(SPACE):
        assert torch.equal(first.get_submodule(path).bias, biases[path][keep])
    for path in anatomy.readers(SPACE):
        assert torch.equal(first.get_submodule(path).bias, biases[path])
    assert_reloads(model, tmp_path)


def heard(network: nn.Module, path: str, output: bool) -> Tensor:
    """Run the text and return what a module reads or puts out, (tokens, width) float64."""
    found = []
    handle = network.get_submodule(path).register_forward_hook(
        lambda module, args, out: found.append(out if output else args[0])
    )
    logits_of(network)
    handle.remove()
    (value,) = found
    return (value[0] if isinstance(value, tuple) else value).flatten(0, 1).double()


def slopes_of(network: nn.Module, maker: str, reader: str) -> Tensor:
    """Return how fast what a linear reads changes with what another puts out, by differences, (tokens, channels)."""
    read = []
    for change in (1e-2, -1e-2):
        handle = network.get_submodule(maker).register_forward_hook(lambda m, a, out, change=change: out + change)
        read.append(heard(network, reader, output=False))
        handle.remove()
    return (read[0] - read[1]) / 2e-2


@pytest.mark.usefixtures("exact")
@every_family
def test_narrowed_ffns_and_what_writes_beside_them_make_good_what_is_missing(family: str, tiny_model: Tiny):
    """The obvious way: both networks run whole for every matrix, removed channels are zeroed, sums are in float64."""
    original, network = tiny_model(family).network, tiny_model(family).network
    anatomy, opinion, resolved = anatomy_of(network), judge(original, WINDOWS), []
    attention, ffn = anatomy.writers("residual")
    for index in range(len(blocks_of(network))):
        block = f"{anatomy.blocks}.{index}"
        for path in (attention, ffn):
            behind, output = (f"{block}.{anatomy.norms['mlp_in']}", False) if path == attention else (block, True)
            linear = f"{block}.{path}"
            if anatomy.norms_behind:  # what the linear itself put out is what there should be
                behind, output = linear, True
            read = heard(network, linear, output=False)
            missing = heard(original, behind, output) - heard(network, behind, output)
            module = network.get_submodule(linear)
            weight = read_weight(module).double()
            keep = torch.arange(weight.shape[1])
            if path == ffn:
                gram = read.T @ read
                keep = torch.ones(128, dtype=torch.bool)
                keep[removal_order(weight, gram, 64)] = False
                keep = keep.nonzero().squeeze(1)
                narrow = torch.zeros_like(weight)
                narrow[:, keep] = solve_readers(weight, gram, keep)
                missing, weight = missing + read @ (weight - narrow).T, narrow
            weight[:, keep] += solve_missing(*halves(read[:, keep], missing), DAMPINGS)
            write_weight(module, weight.float())
        makers = [f"{block}.{path}" for path in anatomy.writers(SPACE)]
        inputs, slopes = heard(network, makers[0], output=False), [slopes_of(network, each, linear) for each in makers]
        missing = heard(original, behind, output) - heard(network, behind, output)
        tangent = Tangent(inputs.float(), tuple(each.float() for each in slopes), missing.float())
        changes = solve_changes(weight.float(), [tangent])
        resolved += [index] if any(change.any() for change in changes) else []
        for maker, change in zip(makers, changes, strict=True):
            maker = network.get_submodule(maker)
            write_weight(maker, (read_weight(maker).double() + change).float())
        read, missing = heard(network, linear, False), heard(original, behind, output) - heard(network, behind, output)
        weight[:, keep] += solve_missing(*halves(read[:, keep], missing), DAMPINGS)
        write_weight(module, weight.float())
    rescale_end(network, WINDOWS, opinion)
    model, report = prune_width(tiny_model(family), PruneWidth(ffn=64, channels=True), WINDOWS)
    assert report.details.get("channels_resolved", []) == resolved
    truth = logits_of(network)
    assert torch.allclose(logits_of(model.network), truth, atol=2e-3 * truth.abs().max().item())


def test_kept_channels_of_a_narrower_ffn_are_among_those_of_a_wider_one(tiny_model: Tiny):
    layer = next(sweep(tiny_model("llama").network, WINDOWS, spaces=(SPACE,)))
    kept = kept_channels(layer, [96, 32, 64, 128])
    assert {width: len(keep) for width, keep in kept.items()} == {32: 32, 64: 64, 96: 96, 128: 128}
    assert set(kept[32].tolist()) < set(kept[64].tolist()) < set(kept[96].tolist())
    assert all(torch.equal(keep, keep.sort().values) for keep in kept.values())


def test_an_ffn_that_does_nothing_can_be_pruned(tiny_model: Tiny):
    model = tiny_model("llama")
    silence_channels(model.network, torch.arange(128))
    model, report = prune_width(model, PruneWidth(ffn=32), WINDOWS)
    assert report.details["energy_kept"] == [1.0, 1.0, 1.0]
    assert torch.isfinite(logits_of(model.network)).all()


@pytest.mark.parametrize("width", [0, -32, 129])
def test_widths_that_do_not_exist(width: int, tiny_model: Tiny):
    with pytest.raises(BadInputError, match=f"Cannot make FFNs {width} wide: they are 128 wide now. Give 1 to 128"):
        prune_width(tiny_model("llama"), PruneWidth(ffn=width), WINDOWS)


def test_gpt2_whose_config_leaves_the_width_out_can_be_pruned(tiny_model: Tiny, tmp_path: Path):
    model = tiny_model("gpt2", n_inner=None)
    model, report = prune_width(model, PruneWidth(ffn=128), WINDOWS)
    assert (report.details["from"], report.details["to"]) == (256, 128)
    assert_reloads(model, tmp_path)


def modules_by_group(network: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    """Return every matrix of a network by the group whose format it gets."""
    anatomy, groups = anatomy_of(network), {}
    for index, block in enumerate(blocks_of(network)):
        for edge in anatomy.edges:
            name = f"{anatomy.blocks}.{index}.{edge.path}.weight"
            groups.setdefault(edge.group, []).append((name, block.get_submodule(edge.path)))
    embedding = network.get_input_embeddings()
    groups["embedding"] = [(f"{name}.weight", m) for name, m in network.named_modules() if m is embedding]
    if not network.config.tie_word_embeddings:
        groups["head"] = [("lm_head.weight", network.lm_head)]
    return groups


def formats_for(model: LanguageModel, formats: dict[str, str] | str) -> dict[str, str]:
    """Return the formats of the groups that a model has, or one for all of them."""
    groups = modules_by_group(model.network)
    return dict.fromkeys(groups, formats) if isinstance(formats, str) else {group: formats[group] for group in groups}


@every_family
@pytest.mark.parametrize("method", ["descent", "gptaq", "gptq", "rtn"])
def test_the_bytes_decode_to_exactly_the_weights_of_the_network(family: str, method: str, tiny_model: Tiny):
    model = tiny_model(family)
    original = {name: value.clone() for name, value in model.network.state_dict().items()}
    tied = model.network.config.tie_word_embeddings
    calls: list[tuple[int, int]] = []
    config = Quantize(formats=formats_for(model, MIXED), method=method)
    model, packed, report = quantize(model, config, WINDOWS, lambda *done: calls.append(done))
    network, remaining = model.network, set(packed)
    for group, members in modules_by_group(network).items():
        for name, module in members:
            assert packed[name].format.name == MIXED[group]
            decoded = unpack(packed[name]).decode()
            assert torch.equal(decoded, read_weight(module))
            stored = original[name].T if type(module).__name__ == "Conv1D" else original[name]
            assert 0 < (decoded - stored).norm() < 0.4 * stored.norm()
            remaining.remove(name)
    assert not remaining
    assert (network.lm_head.weight is network.get_input_embeddings().weight) == tied
    assert set(report.details["output_error"]) == set(modules_by_group(network))
    assert all(0 < error < 0.05 for error in report.details["output_error"].values())
    untouched = set(network.state_dict()) - set(packed) - ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(network.state_dict()[name], original[name]) for name in untouched)
    stops = len(blocks_of(network)) + 1
    assert calls == [(i + 1, stops) for i in range(stops)]


@every_family
def test_every_group_in_every_format(family: str, tiny_model: Tiny):
    for name in (name for name, form in FORMATS.items() if form.fits(64)):
        model = tiny_model(family)
        config = Quantize(formats=formats_for(model, name), method="rtn")
        model, packed, _ = quantize(model, config, WINDOWS)
        assert {tensor.format.name for tensor in packed.values()} == {name}
        assert torch.isfinite(logits_of(model.network)).all()


WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 16, "num_hidden_layers": 1}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("method", ["descent", "gptaq", "gptq", "rtn"])
def test_formats_of_long_rows_decode_to_the_weights_of_the_network(method: str, name: str, tiny_model: Tiny):
    model = tiny_model("llama", **WIDE)
    model, packed, _ = quantize(model, Quantize(formats=formats_for(model, name), method=method), WINDOWS)
    assert len(packed) == 8
    for tensor_name, tensor in packed.items():
        module = model.network.get_submodule(tensor_name.removesuffix(".weight"))
        assert torch.equal(unpack(tensor).decode(), read_weight(module))


@every_family
def test_gptq_errs_less_than_rounding_in_every_group(family: str, tiny_model: Tiny):
    errors = {}
    for method in ("gptq", "rtn"):
        model = tiny_model(family)
        config = Quantize(formats=formats_for(model, "Q4_0"), method=method)
        errors[method] = quantize(model, config, WINDOWS)[2].details["output_error"]
    for group, error in errors["gptq"].items():
        lookup = group == "embedding" and not tiny_model(family).network.config.tie_word_embeddings
        assert error == errors["rtn"][group] if lookup else error < errors["rtn"][group]


@every_family
def test_a_pattern_decides_for_the_tensors_that_it_matches(family: str, tiny_model: Tiny):
    model = tiny_model(family)
    names = modules_by_group(model.network)
    (first, _), (second, _), *_ = names["ffn_in"] if family == "gpt2" else names["attention_out"]
    blocks = anatomy_of(model.network).blocks
    formats = formats_for(model, "F16") | {f"{blocks}.1.*": "Q8_0", second: "Q4_0"}
    _, packed, report = quantize(model, Quantize(formats=formats), WINDOWS)
    assert first not in packed
    assert set(packed) == {second} | {name for each in names.values() for name, _ in each if f"{blocks}.1." in name}
    assert {tensor.format.name for name, tensor in packed.items() if name != second} == {"Q8_0"}
    assert packed[second].format.name == "Q4_0", "of several that match, the last one counts"
    assert "Q4_0 (1)" in report.summary


@every_family
def test_groups_in_f16_are_left_as_they_are(family: str, tiny_model: Tiny):
    formats = formats_for(tiny_model(family), "F16") | {"ffn_out": "Q4_0"}
    before = tiny_model(family).network.state_dict()
    model, packed, report = quantize(tiny_model(family), Quantize(formats=formats), WINDOWS)
    changed = {name for name, value in model.network.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(packed) == {name for name, _ in modules_by_group(model.network)["ffn_out"]}
    assert list(report.details["output_error"]) == ["ffn_out"]


@pytest.mark.usefixtures("exact")
def test_gptaq_differs_from_gptq_only_where_earlier_errors_arrive(tiny_model: Tiny):
    by_method = [
        quantize(
            tiny_model("qwen2"), Quantize(formats=formats_for(tiny_model("qwen2"), "Q4_0"), method=method), WINDOWS
        )
        for method in ("gptaq", "gptq")
    ]
    same = {name: torch.equal(part.rows, by_method[1][1][name].rows) for name, part in by_method[0][1].items()}
    reads_first = ("q_proj", "k_proj", "v_proj")
    assert all(same[f"model.layers.0.self_attn.{path}.weight"] for path in reads_first)
    assert not any(same[f"model.layers.2.self_attn.{path}.weight"] for path in reads_first)


def test_quantizing_twice_gives_the_same_bytes(tiny_model: Tiny):
    config = Quantize(formats=formats_for(tiny_model("llama"), MIXED))
    first, second = (quantize(tiny_model("llama"), config, WINDOWS)[1] for _ in range(2))
    assert all(torch.equal(first[name].rows, second[name].rows) for name in first)


def test_linears_of_one_input_give_the_same_bytes_together_and_apart(tiny_model: Tiny):
    """The value is quantized with query and key where their formats agree, by itself where they do not."""
    apart = formats_for(tiny_model("llama"), "F16") | {"value": "Q4_0"}
    together = apart | {"query_key": "Q4_0"}
    name = "model.layers.0.self_attn.v_proj.weight"
    rows = [
        quantize(tiny_model("llama"), Quantize(formats=formats), WINDOWS)[1][name].rows for formats in (apart, together)
    ]
    assert (rows[0] == rows[1]).float().mean() > 0.99  # sums may round differently


LLAMA = {group: form for group, form in MIXED.items() if group not in ("head", "query_key_value")}


def without(group: str, formats: dict[str, str] = LLAMA) -> dict[str, str]:
    return {name: form for name, form in formats.items() if name != group}


@pytest.mark.parametrize(
    ("family", "formats", "words"),
    [
        ("llama", without("embedding"), "The recipe gives no format for `embedding`. Add it under `formats`"),
        ("qwen2", LLAMA, "The recipe gives no format for `head`"),
        ("llama", without("ffn_out"), "The recipe gives no format for `ffn_out`"),
        ("llama", LLAMA | {"value": "Q3_X"}, "Unknown format `Q3_X` for `value`. Known: F16, Q1_0"),
        ("llama", LLAMA | {"embedding": "int4"}, "Unknown format `int4` for `embedding`"),
        (
            "llama",
            LLAMA | {"head": "Q8_0"},
            "`head` is neither a group nor does any tensor's name match it. Groups: emb",
        ),
        (
            "llama",
            LLAMA | {"*.q_porj.*": "Q8_0"},
            r"`\*.q_porj.\*` is neither a group nor does any tensor's name match",
        ),
        ("llama", LLAMA | {"model.layers.1.*": "Q4_K"}, "Q4_K needs rows that divide by 256; those of model.layers.1."),
    ],
)
def test_recipes_that_do_not_fit_are_refused_before_the_work(
    family: str, formats: dict[str, str], words: str, tiny_model: Tiny
):
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    with pytest.raises(BadInputError, match=words):
        quantize(model, Quantize(formats=formats), WINDOWS)
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())


def test_rows_that_do_not_divide_are_refused_with_the_way_out(tiny_model: Tiny):
    model = tiny_model("llama", intermediate_size=100)
    words = r"Q5_0 needs rows that divide by 32; those of \S+down_proj.weight have 100 weights. Formats that fit: F16$"
    with pytest.raises(BadInputError, match=words):
        quantize(model, Quantize(formats=LLAMA), WINDOWS)
    words = (
        r"Q4_K needs rows that divide by 256; those of \S+ have 64 weights. Formats that fit: F16, Q2_0, MXFP4, NVFP4,"
    )
    with pytest.raises(BadInputError, match=words):
        quantize(model, Quantize(formats=LLAMA | {"value": "Q4_K"}), WINDOWS)
    _, packed, _ = quantize(model, Quantize(formats=LLAMA | {"ffn_out": "F16"}), WINDOWS)
    assert "model.layers.0.mlp.up_proj.weight" in packed
    assert "model.layers.0.mlp.down_proj.weight" not in packed


@every_family
def test_the_embedding_is_found_by_its_parameter_name(family: str, tiny_model: Tiny):
    network = tiny_model(family).network
    assert network.get_parameter(embedding_name(tiny_model(family))).shape == (network.config.vocab_size, 64)


@every_family
def test_a_pruned_and_quantized_model_is_a_stock_model(family: str, tiny_model: Tiny, tmp_path: Path):
    model = tiny_model(family)
    if family != "gemma3_text":
        model, _ = prune_depth(model, PruneDepth(drop=(1,)))
    model, _ = prune_width(model, PruneWidth(ffn=96), WINDOWS)
    model, _, _ = quantize(model, Quantize(formats=formats_for(model, MIXED)), WINDOWS)
    assert_reloads(model, tmp_path)


def dead_block(network: nn.Module) -> Callable[[], Tensor]:
    """Silence 32 neighbouring FFN channels; return what reads them."""
    silence_channels(network, torch.arange(32, 64))
    return lambda: read_weight(blocks_of(network)[0].mlp.down_proj)[:, 32:64]


@pytest.mark.parametrize("method", ["descent", "gptaq", "gptq", "rtn"])
def test_channels_silent_on_the_calibration_text_keep_their_weights(method: str, tiny_model: Tiny):
    """Other text may wake them up: what reads them must not be wiped out."""
    model = tiny_model("llama")
    reads = dead_block(model.network)
    before = reads().clone()
    quantize(model, Quantize(formats=formats_for(model, "Q4_0"), method=method), WINDOWS)
    assert (reads() - before).norm() < 0.15 * before.norm()
