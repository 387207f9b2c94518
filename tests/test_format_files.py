"""A file of every format loads in the engine, which then says what torch says on the decoded weights."""

import pytest
import torch

from pocketlm.errors import VerificationError
from pocketlm.export.gguf import write_gguf
from pocketlm.export.verify import check_choices, check_tokens, check_weights
from pocketlm.model.gguf_file import read_gguf
from pocketlm.model.text import as_tokens
from pocketlm.pipeline.proof import verify
from pocketlm.pipeline.stages import Compressed, Texts
from pocketlm.run.engine import Engine
from pocketlm.run.llamacpp import decode_row
from pocketlm.steps.quantize import Quantize, quantize
from pocketlm.tensors.formats import FORMATS

GROUPS = ("embedding", "query_key", "value", "attention_out", "ffn_in", "ffn_out")
SHAPE = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 512, "num_hidden_layers": 2}  # rows of 256 and more


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_in_one_format_gives_the_logits_of_its_decoded_weights(name, tiny_model, tmp_path, exact):
    model = tiny_model("llama", **SHAPE)
    windows = torch.randint(4, 380, (2, 64), generator=torch.Generator().manual_seed(0))
    model, packed, _ = quantize(model, Quantize(formats=dict.fromkeys(GROUPS, name), method="rtn"), windows)
    assert {tensor.format.name for tensor in packed.values()} == {name}
    assert len(packed) == 1 + 7 * SHAPE["num_hidden_layers"]
    path = tmp_path / "model.gguf"
    write_gguf(model, packed, path)
    weights = check_weights(path, model, packed, decode_row)
    assert weights.passed, weights.detail
    with Engine(path, context=64) as engine:
        choices = check_choices(model, windows, engine.logits)
    assert choices.passed, choices.detail


def test_a_file_with_another_models_weights_or_words_is_refused(tiny_model, tmp_path):
    model, path = tiny_model("llama"), tmp_path / "model.gguf"
    write_gguf(model, {}, path)
    text = as_tokens("text", torch.randint(4, 380, (2, 64), generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        model.network.model.layers[1].mlp.down_proj.weight.neg_()
    with Engine(path, context=64) as engine:
        assert not check_choices(model, text.windows, engine.logits).passed
        assert check_tokens(model, engine.tokenize).passed
        assert not check_tokens(tiny_model("gemma3_text"), engine.tokenize).passed
    compressed = Compressed(model, {}, tmp_path, (), Texts(text, text, text, {}))
    with pytest.raises(VerificationError, match=r"fails a check: decoded weights .*down_proj"):
        verify(compressed, path, compressed.texts, {})


def test_norms_near_zero_lose_bits_in_the_file_and_are_expected_to(tiny_model, tmp_path):
    model = tiny_model("gemma3_text")
    with torch.no_grad():
        model.network.model.norm.weight.normal_(std=1e-5, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "model.gguf"
    write_gguf(model, {}, path)
    assert check_weights(path, model, {}, decode_row).passed
    with torch.no_grad():
        model.network.model.norm.weight[0] += 1e-3
    assert not check_weights(path, model, {}, decode_row).passed


def test_a_matrix_that_f16_cannot_hold_passes_verification_in_bf16(tiny_model, tmp_path):
    """Of the file as a run verifies it; the channel that the large weight reads is always 0, so nothing overflows."""
    model = tiny_model("llama")
    with torch.no_grad():
        mlp = model.network.model.layers[2].mlp
        mlp.gate_proj.weight[5] = 0
        mlp.down_proj.weight[3, 5] = 1e6
    path = tmp_path / "model.gguf"
    write_gguf(model, {}, path)
    assert read_gguf(path).tensors["blk.2.ffn_down.weight"].type == "BF16"
    text = as_tokens("text", torch.randint(4, 380, (2, 64), generator=torch.Generator().manual_seed(0)))
    texts = Texts(text, text, text, {})
    assert all(check.passed for check in verify(Compressed(model, {}, tmp_path, (), texts), path, texts, {}))
    with torch.no_grad():
        mlp.down_proj.weight[3, 6] += 1
    assert not check_weights(path, model, {}, decode_row).passed
