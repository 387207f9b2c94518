"""Folders in the compressed-tensors format: read back by its own library and by transformers, weights are the same."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pocketlm.errors import BadInputError, MissingExtraError
from pocketlm.export.compressed_tensors import (
    compressed,
    predicted_bytes,
    quantization_config,
    write_compressed_tensors,
)
from pocketlm.model.language_model import LanguageModel, save
from pocketlm.tensors.formats import FORMATS, Packed, Quantized, pack, round_to_nearest
from pocketlm.tensors.formats.integer import DTYPE, NAMES, integer_format, scheme_of

Tiny = Callable[..., LanguageModel]
CHOICES: dict[str, dict[str, str]] = {
    **{name: {"": name} for name in ("int4-g32", "int4-g32-asym", "int8-row", "fp8-row", "int8-row-asym", "int3-g64")},
    "int4 and int8": {"self_attn": "int4-g32", "mlp": "int8-row"},
    "int4 and fp8": {"self_attn": "fp8-row", "mlp": "int4-g64"},
    "one kind of linear": {"down_proj": "int4-g32"},
}
every_choice = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def quantize(model: LanguageModel, choice: dict[str, str], ending: str = "proj.weight") -> dict[str, Packed]:
    """Quantize the linears whose name has a key of `choice`; the model gets the decoded weights."""
    packed = {}
    with torch.no_grad():
        for name, weight in model.network.named_parameters():
            form = next((form for part, form in choice.items() if part in name and name.endswith(ending)), None)
            if form:
                chosen = round_to_nearest(weight.detach(), integer_format(form, weight.shape[1]))
                weight.copy_(chosen.decode())
                packed[name] = pack(chosen)
    return packed


def logits(network: Any) -> Tensor:
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return network(input_ids=ids).logits


# ---- tensors ----


def by_the_library(packed: Packed, dtype: torch.dtype) -> Tensor:
    """Decode the exported tensors with compressed-tensors, in `dtype`."""
    scheme = scheme_of(packed.format.name)
    tensors = {f"weight{end}": tensor for end, tensor in compressed(packed).items()}
    tensors["weight_scale"] = tensors["weight_scale"].to(dtype)
    words = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=scheme.bits,
            type=scheme.kind,
            symmetric=scheme.symmetric,
            group_size=scheme.group,
            strategy="group" if scheme.group else "channel",
        ),
    )
    compressor = BaseCompressor.get_value_from_registry("pack-quantized" if scheme.kind == "int" else "float-quantized")
    return compressor.decompress(tensors, words)["weight"]


def assert_decodes_alike(quantized: Quantized):
    """Bit for bit, but for the sign of zeros."""
    packed, decoded = pack(quantized), quantized.decode()
    for dtype in (torch.float32, DTYPE):
        theirs = by_the_library(packed, dtype)
        assert theirs.dtype == dtype
        assert torch.equal(theirs, decoded.to(dtype))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_the_library_decodes_every_code_scale_and_zero_alike(name: str, rows: int):
    form, generator = integer_format(name, 128), torch.Generator().manual_seed(rows)
    codes = torch.randint(0, len(form.levels), (rows, 128), generator=generator).to(torch.uint8)
    scales = (
        torch.randn(rows, 128 // form.span, 1, generator=generator)
        * 10.0 ** torch.arange(-30, 30, 60 / rows)[:rows, None, None]
    )
    steps = torch.ones(rows, 128 // form.span, 2 if form.offset else 1, dtype=torch.int16)
    if form.offset:
        low = form.offset_steps[0]
        steps[..., 1] = torch.randint(low, 1, steps.shape[:2], generator=generator)
    assert_decodes_alike(Quantized(form, codes, form.storable(scales)[0], steps))


@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(NAMES), data=arrays(np.float32, (3, 128), elements=FLOATS))
def test_the_library_decodes_any_rounded_weights_alike(name: str, data: np.ndarray):
    assert_decodes_alike(round_to_nearest(torch.from_numpy(data), integer_format(name, 128)))


# ---- folders ----


@every_choice
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_transformers_loads_the_folder_and_computes_with_the_decoded_weights(
    tiny_model: Tiny, tmp_path: Path, family: str, choice: dict[str, str]
):
    model = tiny_model(family)
    packed = quantize(model, choice)
    write_compressed_tensors(model, packed, tmp_path / "out")
    save(model, tmp_path / "plain")  # the decoded weights as bfloat16
    ours, plain = (AutoModelForCausalLM.from_pretrained(tmp_path / each) for each in ("out", "plain"))
    assert ours.dtype == DTYPE
    assert torch.equal(logits(ours), logits(plain))
    if not any(name.endswith("asym") for name in choice.values()):  # those are decoded in bfloat16
        state = {name: value.float() for name, value in plain.state_dict().items()}
        network = model.network
        network.load_state_dict(state | {name: network.get_parameter(name).clone() for name in packed})
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert (logits(whole) - logits(network)).abs().max() < 1e-5


def test_a_gemma_loads_too(tiny_model: Tiny, tmp_path: Path):
    model = tiny_model("gemma3_text")
    write_compressed_tensors(model, quantize(model, {"": "int4-g32"}), tmp_path / "out")
    save(model, tmp_path / "plain")
    ours, plain = (AutoModelForCausalLM.from_pretrained(tmp_path / each) for each in ("out", "plain"))
    assert torch.equal(logits(ours), logits(plain))


def test_a_head_of_its_own_can_be_quantized(tiny_model: Tiny, tmp_path: Path):
    model = tiny_model("llama", tie_word_embeddings=False)
    packed = quantize(model, {"lm_head": "int8-row"}, ending="lm_head.weight")
    assert list(packed) == ["lm_head.weight"]
    write_compressed_tensors(model, packed, tmp_path / "out")
    save(model, tmp_path / "plain")
    ours, plain = (AutoModelForCausalLM.from_pretrained(tmp_path / each) for each in ("out", "plain"))
    assert torch.equal(logits(ours), logits(plain))


def test_the_folder_has_what_else_a_model_needs(tiny_model: Tiny, tmp_path: Path):
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.network.named_parameters()}
    write_compressed_tensors(model, quantize(tiny_model("llama"), {"": "int4-g32"}), tmp_path / "out")
    text = "def f(x): return x"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]
    assert tokenizer.chat_template == model.tokenizer.chat_template
    ends = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert ends == model.network.generation_config.eos_token_id
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    for name, value in model.network.named_parameters():
        assert torch.equal(value, before[name])
    assert model.network.dtype == torch.float32
    assert not hasattr(model.network.config, "quantization_config")


@every_choice
def test_tensors_have_the_predicted_bytes(tiny_model: Tiny, tmp_path: Path, choice: dict[str, str]):
    model = tiny_model("qwen2")
    packed = quantize(model, choice)
    write_compressed_tensors(model, packed, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    shapes = {name: tuple(value.shape) for name, value in model.network.named_parameters()}
    formats = {name: each.format.name for name, each in packed.items()}
    predicted = predicted_bytes(shapes, formats)
    assert predicted == sum(tensor.nbytes for tensor in tensors.values())
    rows = sum(each.rows.numel() for each in packed.values())
    plain = sum(2 * value.numel() for name, value in model.network.named_parameters() if name not in packed)
    integers = sum("int" in name for name in formats.values())
    assert predicted == plain + rows + 16 * integers, "the rows are the stored bytes but for the shapes"


# ---- what vLLM asks for ----


@every_choice
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_config_and_the_shapes_are_what_vllm_takes(tiny_model: Tiny, tmp_path: Path, family: str, choice: dict):
    model = tiny_model(family)
    packed = quantize(model, choice)
    write_compressed_tensors(model, packed, tmp_path / "out")
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = QuantizationConfig.model_validate(stated)
    assert stated["quant_method"] == "compressed-tensors"
    assert stated["quantization_status"] == "compressed"
    formats = {group.format for group in config.config_groups.values()}
    assert config.format == (formats.pop() if len(formats) == 1 else "mixed-precision")
    for name, each in packed.items():
        path = name.removesuffix(".weight")
        (group,) = [
            group
            for group in config.config_groups.values()
            if path in group.targets or (group.targets == ["Linear"] and path not in config.ignore)
        ]
        weights, (rows, columns) = group.weights, each.shape
        assert group.input_activations is None
        assert weights.strategy in ("group", "channel")
        assert (weights.group_size or -1) in (-1, 32, 64, 128)
        assert not weights.dynamic
        groups = columns // (weights.group_size or columns)
        assert tensors[f"{name}_scale"].shape == (rows, groups)
        assert tensors[f"{name}_scale"].dtype == torch.bfloat16
        if group.format == "float-quantized":
            assert (weights.type, weights.num_bits, weights.symmetric) == ("float", 8, True)
            assert (tensors[name].dtype, tensors[name].shape) == (torch.float8_e4m3fn, (rows, columns))
            continue
        assert group.format == "pack-quantized"
        packing = columns * weights.num_bits // 32
        assert (tensors[f"{name}_packed"].dtype, tensors[f"{name}_packed"].shape) == (torch.int32, (rows, packing))
        assert tensors[f"{name}_shape"].tolist() == [rows, columns]
        assert (f"{name}_zero_point" in tensors) == (not weights.symmetric)
        if not weights.symmetric:
            zeros = tensors[f"{name}_zero_point"]
            assert (zeros.dtype, zeros.shape) == (torch.int32, (rows * weights.num_bits // 32, groups))
    linears = {name for name, module in model.network.named_modules() if isinstance(module, torch.nn.Linear)}
    quantized = {name.removesuffix(".weight") for name in packed}
    assert set(config.ignore) == linears - quantized
    assert "lm_head" in config.ignore


@pytest.mark.parametrize(
    ("choice", "joined"),
    [
        ({"q_proj": "int4-g32", "k_proj": "int4-g32", "v_proj": "int8-g32"}, "q_proj, k_proj, v_proj"),
        ({"q_proj": "int4-g32", "k_proj": "int4-g32"}, "q_proj, k_proj, v_proj"),
        ({"up_proj": "int4-g32"}, "gate_proj, up_proj"),
    ],
)
def test_linears_that_vllm_joins_need_one_format(tiny_model: Tiny, tmp_path: Path, choice: dict, joined: str):
    model = tiny_model("llama")
    with pytest.raises(BadInputError, match=f"vLLM joins {joined} of model.layers.0"):
        write_compressed_tensors(model, quantize(model, choice), tmp_path / "out")


# ---- refusals ----


def test_zero_points_beside_another_format_are_refused(tiny_model: Tiny, tmp_path: Path):
    model = tiny_model("llama")
    packed = quantize(model, {"self_attn": "int4-g32-asym", "mlp": "int8-row"})
    with pytest.raises(BadInputError, match="only where all linears have that one format"):
        write_compressed_tensors(model, packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_embeddings_tied_heads_and_convolutions_are_refused(tiny_model: Tiny):
    tied = tiny_model("llama")
    for model, name in (
        (tied, "model.embed_tokens.weight"),
        (tied, "lm_head.weight"),
        (tied, "model.layers.9.mlp.down_proj.weight"),
        (tiny_model("gpt2"), "transformer.h.0.mlp.c_fc.weight"),
    ):
        with pytest.raises(BadInputError, match=f"linears only, and {name}"):
            quantization_config(model, {name: "int4-g32"})


def test_formats_of_gguf_are_refused(tiny_model: Tiny, tmp_path: Path):
    model = tiny_model("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    packed = {name: pack(round_to_nearest(model.network.get_parameter(name).detach(), FORMATS["Q4_0"]))}
    with pytest.raises(BadInputError, match="Unknown integer format `Q4_0`"):
        write_compressed_tensors(model, packed, tmp_path / "out")


def test_nothing_quantized_is_refused(tiny_model: Tiny, tmp_path: Path):
    with pytest.raises(BadInputError, match="No weights are quantized"):
        write_compressed_tensors(tiny_model("llama"), {}, tmp_path / "out")


def test_a_shape_that_is_not_the_model_s_is_a_mistake_of_the_program(tiny_model: Tiny, tmp_path: Path):
    model = tiny_model("llama")
    packed = {
        "model.layers.0.mlp.down_proj.weight": pack(round_to_nearest(torch.ones(4, 32), integer_format("int4-g32", 32)))
    }
    with pytest.raises(ValueError, match="packed"):
        write_compressed_tensors(model, packed, tmp_path / "out")


def test_a_folder_that_exists_stays_as_it_is(tiny_model: Tiny, tmp_path: Path):
    (tmp_path / "out").mkdir()
    model = tiny_model("llama")
    with pytest.raises(BadInputError, match="exists already"):
        write_compressed_tensors(model, quantize(model, {"": "int4-g32"}), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_write_that_fails_leaves_nothing(tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("pocketlm.export.compressed_tensors.save_file", full)
    model = tiny_model("llama")
    with pytest.raises(OSError, match="no space"):
        write_compressed_tensors(model, quantize(model, {"": "int4-g32"}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_the_line_that_installs_it(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = tiny_model("llama")
    packed = quantize(model, {"": "int4-g32"})
    for name in [name for name in sys.modules if name.partition(".")[0] == "compressed_tensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'pocketlm\[compressed-tensors\]'"):
        write_compressed_tensors(model, packed, tmp_path / "out")
