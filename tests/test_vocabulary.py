"""A trimmed vocabulary spells every string as the whole one did, and the model's other numbers stay."""

import json
import unicodedata
from itertools import pairwise
from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.command_line import pocketlm
from tests.tiny import FAMILIES, SENTENCEPIECE, tiny_folder
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pocketlm.errors import BadInputError
from pocketlm.export.gguf import write_gguf
from pocketlm.measure.quality import Reader, compare_on_text
from pocketlm.model.gguf_file import read_gguf
from pocketlm.model.gguf_tokenizer import merge_pairs
from pocketlm.model.language_model import save
from pocketlm.model.source import load
from pocketlm.model.surgery import renumber_tokens
from pocketlm.model.text import encode_from_start, plain_pieces
from pocketlm.model.vocabulary import (
    choose_tokens,
    closure,
    count_tokens,
    indispensable,
    parts_of_tokens,
    tokens_by_id,
    trim_tokenizer,
    trimmed_state,
    with_wholes,
)
from pocketlm.plan.recipe import from_dict
from pocketlm.plan.sizes import sizes_of
from pocketlm.steps.trim_vocabulary import TrimVocabulary, needed_ids, outline, trim_vocabulary

DOCUMENTS = [text for _, text in sorted(topics.items())][:12]
STRINGS = (
    "",
    "Hello world's 1234 foo's  bar\n\n\tx=3.14159; IT'LL don'T",
    "ünïcödé naïve Straße, 漢字かな交じり文, 한국어, Ελληνικά, русский текст, עברית, العربية, नमस्ते, ไทย, ქართული",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 \u00a0\u200b\u2028 e\u0301 ﬁ Å",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|></s><eos>",
    "def f(x):\r\n    return x**2  # comment   \r\n\r\n   ",
    "   leading and trailing   ",
    "\u2581\u2581 literal \u2581marks \x00\x7f",
)
COMPOSED = [unicodedata.normalize("NFC", text) for text in STRINGS]  # llama.cpp composes nothing
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
SIZE = 330


def state_of(tokenizer: PreTrainedTokenizerFast) -> dict:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def trimmed(model, size=SIZE, documents=DOCUMENTS):
    return trim_vocabulary(model, TrimVocabulary(size=size), documents)


def read_back(tokenizer, text: str) -> str:
    return tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)


def unigram(byte_fallback: bool) -> PreTrainedTokenizerFast:
    """A SentencePiece Unigram tokenizer, with `<0x00>` to `<0xFF>` or without, as T5's."""
    learner = Tokenizer(models.Unigram())
    learner.normalizer = normalizers.Replace(" ", "\u2581")
    learner.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    learner.train_from_iterator(DOCUMENTS, trainers.UnigramTrainer(vocab_size=300, show_progress=False))
    pieces = json.loads(learner.to_str())["model"]["vocab"]
    byte = [(f"<0x{value:02X}>", -20.0) for value in range(256)] if byte_fallback else []
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), *byte, *map(tuple, pieces)]
    core = Tokenizer(models.Unigram([tuple(entry) for entry in vocabulary], 0, byte_fallback))
    core.normalizer = normalizers.Replace(" ", "\u2581")
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="</s>", clean_up_tokenization_spaces=False
    )


def cut_unigram(tokenizer: PreTrainedTokenizerFast, size: int) -> PreTrainedTokenizerFast:
    return trim_tokenizer(tokenizer, choose_tokens(state_of(tokenizer), DOCUMENTS, [], size).kept)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Each kind of tokenizer, whole and trimmed, by name."""
    found = {}
    for family in FAMILIES:
        model = load(str(tiny_folder(family, tmp_path_factory.mktemp(family))))
        found[family] = (model.tokenizer, trimmed(model)[0].tokenizer)
    whole = unigram(byte_fallback=True)
    found["unigram with bytes"] = (whole, cut_unigram(whole, SIZE))
    whole = unigram(byte_fallback=False)
    found["unigram"] = (whole, cut_unigram(whole, 200))
    return found


UNIGRAMS = ("unigram with bytes", "unigram")
KINDS = (*FAMILIES, *UNIGRAMS)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_family = pytest.mark.parametrize("family", FAMILIES)


# ---- the tokenizer ----


@every_kind
@pytest.mark.parametrize("text", STRINGS)
def test_strings_of_many_scripts_come_back_as_they_did(pairs, kind, text):
    whole, cut = pairs[kind]
    assert read_back(cut, text) == read_back(whole, text)


@every_kind
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=ANY)
def test_any_string_comes_back_as_it_did(pairs, kind, text):
    whole, cut = pairs[kind]
    assert read_back(cut, text) == read_back(whole, text)


@every_kind
def test_every_kept_token_is_formed_as_before(pairs, kind):
    whole, cut = pairs[kind]
    old, new = tokens_by_id(state_of(whole)), tokens_by_id(state_of(cut))
    assert list(new) == list(range(len(new)))
    assert set(new.values()) < set(old.values())
    whole_core, cut_core = (
        Tokenizer.from_str(json.dumps(state_of(each) | {"normalizer": None, "pre_tokenizer": None}))
        for each in (whole, cut)
    )
    if "ByteLevel" in json.dumps(state_of(whole)["pre_tokenizer"]) or kind in SENTENCEPIECE:
        for token in new.values():
            alone = whole_core.encode(token, add_special_tokens=False).tokens
            if alone == [token]:
                assert cut_core.encode(token, add_special_tokens=False).tokens == [token]


@pytest.mark.parametrize("kind", FAMILIES)
def test_merges_are_closed_and_keep_their_order(pairs, kind):
    whole, cut = (state_of(each) for each in pairs[kind])
    tokens = set(tokens_by_id(cut).values())
    merges = [tuple(pair) for pair in merge_pairs(cut)]
    expected = [tuple(pair) for pair in merge_pairs(whole) if tokens.issuperset(pair) and "".join(pair) in tokens]
    assert merges == expected
    formed, parts = {"".join(pair) for pair in merge_pairs(whole)}, parts_of_tokens(whole)
    assert closure(tokens, parts) == tokens
    assert all("".join(pair) in tokens for pair in merges)
    assert tokens & formed == {"".join(pair) for pair in merges}


@every_kind
def test_bytes_and_special_tokens_stay(pairs, kind):
    whole, cut = (state_of(each) for each in pairs[kind])
    assert indispensable(whole) <= set(tokens_by_id(cut).values())
    assert [token["content"] for token in cut["added_tokens"]] == [token["content"] for token in whole["added_tokens"]]


@pytest.mark.parametrize("kind", UNIGRAMS)
def test_scores_stay(pairs, kind):
    whole, cut = (state_of(each)["model"] for each in pairs[kind])
    assert dict(map(tuple, cut["vocab"])).items() <= dict(map(tuple, whole["vocab"])).items()
    assert cut["vocab"][cut["unk_id"]] == whole["vocab"][whole["unk_id"]]


def test_a_unigram_tokenizer_keeps_the_text_in_its_characters(pairs):
    whole, cut = pairs["unigram"]
    text = "".join(DOCUMENTS)[:5000]
    assert read_back(cut, text) == read_back(whole, text)
    assert cut.unk_token_id not in cut(text).input_ids


def test_counts_include_those_of_the_wholes():
    parts = {"abc": ("ab", "c"), "ab": ("a", "b")}
    counts = with_wholes({"abc": 3, "ab": 2, "c": 5}, lambda token: parts.get(token, ()))
    assert counts == {"abc": 3, "ab": 5, "c": 8, "a": 5, "b": 5}


def test_the_parts_of_a_token_are_those_that_merging_ends_in():
    """`abc` can be formed in two ways; the better merge comes first, so only one of them ever happens."""
    state = state_of(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())))
    merges = [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]
    state["model"] |= {"vocab": {t: i for i, t in enumerate(["a", "b", "c", "bc", "ab", "abc"])}, "merges": merges}
    assert parts_of_tokens(state)("abc") == ("a", "bc")
    cut = trimmed_state(state, [0, 1, 2, 3, 5])
    assert Tokenizer.from_str(json.dumps(cut)).encode("abc").tokens == ["abc"]


def test_a_text_gets_the_tokens_it_needs(tiny_model):
    model = tiny_model("llama")
    counts = [
        count_tokens(state_of(trimmed(tiny_model("llama"), documents=[text] * 50)[0].tokenizer), [DOCUMENTS[3]]).total()
        for text in (DOCUMENTS[3], "zzz qqq")
    ]
    assert counts[0] < counts[1]
    assert counts[0] >= count_tokens(state_of(model.tokenizer), [DOCUMENTS[3]]).total()


def test_larger_vocabularies_need_fewer_tokens(tiny_model):
    totals = [count_tokens(state_of(trimmed(tiny_model("gpt2"), size)[0].tokenizer), DOCUMENTS).total() for size in
              (270, 300, 340, 381)]  # fmt: skip
    assert all(before > after for before, after in pairwise(totals))


# ---- the model ----


@every_family
def test_logits_of_kept_tokens_stay(family, tiny_model, tmp_path):
    model = tiny_model(family)
    old, padded = tiny_model(family), model.network.config.vocab_size
    cut, report = trimmed(model)
    assert padded > SIZE
    save(cut, tmp_path / "cut", dtype=torch.float32)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "cut")
    assert network.config.vocab_size == network.get_input_embeddings().weight.shape[0] == SIZE == len(tokenizer)
    assert network.get_output_embeddings().weight.shape[0] == SIZE
    assert (network.get_output_embeddings().weight is network.get_input_embeddings().weight) == (
        old.network.get_output_embeddings().weight is old.network.get_input_embeddings().weight
    )
    ids = torch.tensor([cut.tokenizer(DOCUMENTS[0][:60], add_special_tokens=False).input_ids])
    names = cut.tokenizer.convert_ids_to_tokens(range(SIZE))
    back = torch.tensor(old.tokenizer.convert_tokens_to_ids(names))
    with torch.no_grad():
        expected = old.network(back[ids]).logits[..., back]
        assert torch.equal(network(ids).logits, expected)
    assert report.details["kept"] == SIZE
    assert report.details["removed"] == len(old.tokenizer) - SIZE


@pytest.mark.parametrize("tied", [False, True])
def test_tied_and_untied_heads_are_cut_alike(tied, tiny_model):
    cut, _ = trimmed(tiny_model("llama", tie_word_embeddings=tied))
    embedding, head = cut.network.get_input_embeddings(), cut.network.get_output_embeddings()
    assert (embedding.weight is head.weight) == tied
    assert embedding.num_embeddings == head.out_features == SIZE


@every_family
def test_special_ids_are_renumbered(family, tiny_model):
    old, (cut, _) = tiny_model(family), trimmed(tiny_model(family))
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(cut.tokenizer, role) == getattr(old.tokenizer, role)
    before, after = old.network.generation_config, cut.network.generation_config
    assert isinstance(after.eos_token_id, list)
    assert cut.tokenizer.convert_ids_to_tokens(after.eos_token_id) == old.tokenizer.convert_ids_to_tokens(
        before.eos_token_id
    )
    assert cut.tokenizer.convert_ids_to_tokens(after.bos_token_id) == old.tokenizer.convert_ids_to_tokens(
        before.bos_token_id
    )
    assert [cut.tokenizer.convert_ids_to_tokens(i) for i in cut.tokenizer("a").input_ids] == [
        old.tokenizer.convert_ids_to_tokens(i) for i in old.tokenizer("a").input_ids
    ]


def test_ids_without_a_token_fall_out(tiny_model):
    config = tiny_model("llama").network.generation_config
    config.eos_token_id, config.pad_token_id, config.bos_token_id = [3, 9], 9, 5
    renumber_tokens(config, [1, 3, 5])
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == ([1], None, 2)


def test_what_the_chat_template_says_stays(tiny_model):
    model = tiny_model("llama")
    chat = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "0"}], tokenize=False, add_generation_prompt=True
    )
    tokens = model.tokenizer.tokenize(chat)
    least = len(closure(indispensable(state_of(model.tokenizer)), lambda token: ()))
    cut, report = trimmed(model, size=least + 40, documents=["zzz"])
    assert cut.tokenizer.tokenize(chat) == tokens
    assert set(cut.tokenizer.convert_tokens_to_ids(tokens)) <= needed_ids(cut)
    assert report.details["least"] <= least + 40


def test_sizes_out_of_range_are_refused(tiny_model):
    model = tiny_model("qwen3")
    with pytest.raises(BadInputError, match="must stay"):
        trimmed(model, 100)
    with pytest.raises(BadInputError, match=f"it has {len(model.tokenizer)}"):
        trimmed(model, len(model.tokenizer) + 1)
    with pytest.raises(BadInputError, match="needs text"):
        trimmed(model, documents=[])
    least = len(closure(indispensable(state_of(model.tokenizer)), lambda token: ()))
    assert len(trimmed(model, least)[0].tokenizer) == least


def test_a_word_piece_tokenizer_is_refused():
    state = state_of(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece({"[UNK]": 0}))))
    with pytest.raises(BadInputError, match="WordPiece"):
        choose_tokens(state, ["a"], [], 1)


@every_family
def test_bytes_are_predicted_before_the_cut(family, tiny_model, tmp_path):
    predicted = sizes_of(outline(tiny_model(family), TrimVocabulary(size=SIZE), DOCUMENTS)).total_f16
    cut, _ = trimmed(tiny_model(family))
    write_gguf(cut, {}, tmp_path / "cut.gguf")
    assert (tmp_path / "cut.gguf").stat().st_size == predicted


@every_family
def test_a_file_has_the_trimmed_tokenizer(family, tiny_model, tmp_path):
    cut, _ = trimmed(tiny_model(family))
    write_gguf(cut, {}, tmp_path / "cut.gguf")
    file = read_gguf(tmp_path / "cut.gguf")
    assert file.get("tokenizer.ggml.tokens") == cut.tokenizer.convert_ids_to_tokens(range(SIZE))
    assert file.get("tokenizer.ggml.eos_token_id") == cut.tokenizer.eos_token_id
    again = load(str(tmp_path / "cut.gguf"))
    for text in COMPOSED:
        assert again.tokenizer(text).input_ids == cut.tokenizer(text).input_ids


@pytest.mark.slow
@every_family
def test_llama_cpp_cuts_text_alike(family, tiny_model, tmp_path):
    from pocketlm.run.engine import Engine

    cut, _ = trimmed(tiny_model(family))
    write_gguf(cut, {}, tmp_path / "cut.gguf")
    with Engine(tmp_path / "cut.gguf", context=64) as engine:
        assert engine.vocabulary_size == SIZE
        for text in (*COMPOSED, *(document[:300] for document in DOCUMENTS)):
            if text and not text.startswith("\u2581"):
                ours = cut.tokenizer(text, add_special_tokens=False).input_ids
                assert engine.tokenize(text, special=True) == ours, text


# ---- the whole run ----

RECIPE = """
steps:
- {{step: trim_vocabulary, size: {size}}}
- {{step: prune_width, ffn: 96}}
- {{step: distil, tokens: 1024, evaluations: 1}}
- {{step: quantize, formats: {{embedding: Q8_0, head: Q8_0, query_key: Q5_0, value: Q8_0, attention_out: IQ4_NL,
    ffn_in: Q4_0, ffn_out: Q5_0}}}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_a_recipe_trims_first_and_is_judged_by_bits_per_byte(family, tmp_path):
    recipe = RECIPE.format(size=SIZE)
    if family != "qwen2":  # tied
        recipe = recipe.replace("head: Q8_0, ", "")
    if family == "gemma3_text":  # files hold its norms plus one, and what training leaves near zero is rounded then
        recipe = recipe.replace("- {step: distil, tokens: 1024, evaluations: 1}\n", "")
    (tmp_path / "recipe.yaml").write_text(recipe)
    text = "".join(f"Paragraph {n}: the {n % 7} small models went to market number {n * n}.\n\n" for n in range(3000))
    (tmp_path / "words.txt").write_text(text)
    folder = tiny_folder(family, tmp_path / family)
    out = tmp_path / "out"
    done = pocketlm(
        *("fit", folder, "--recipe", tmp_path / "recipe.yaml", "--data", tmp_path / "words.txt", "-o", out, "--json"),
        cache=tmp_path / "cache",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (out / "model.gguf").stat().st_size == report["budget"]["predicted_bytes"]
    assert all(check["passed"] for check in report["verification"])
    assert len(AutoTokenizer.from_pretrained(out / "hf")) == SIZE
    files = {file["role"]: file for file in report["files"]}
    assert files["compressed"]["divergence"] is files["compressed"]["agreement"] is None
    assert files["plain"]["divergence"] is not None
    for file in files.values():
        assert file["bits_per_byte"]["low"] <= file["bits_per_byte"]["value"] <= file["bits_per_byte"]["high"]
    assert report["model"]["vocabulary"]["after"] == SIZE < report["model"]["vocabulary"]["before"]
    steps, damages = zip(*(stage.values() for stage in report["waterfall"]["stages"]), strict=True)
    assert (steps[0], steps[-2], steps[-1]) == ("trim_vocabulary", "quantize", "llama.cpp")
    # What the text costs beyond what it costs the original: the engine reads what torch reads from the same weights.
    assert damages[-1] == pytest.approx(damages[-2], abs=0.05)
    page = (out / "report.md").read_text()
    assert "The text's cost beyond what it costs the original behind each stage" in page
    assert "Bits per byte" in page
    assert "not available (another vocabulary)" in page
    assert any("vocabulary was trimmed" in note for note in report["notes"])
    done = pocketlm("evaluate", out / "hf", "--reference", folder, "--data", tmp_path / "words.txt", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "bits per byte" in done.stdout


def test_trimming_must_come_first():
    steps = [
        {"step": "prune_width", "ffn": 8},
        {"step": "trim_vocabulary", "size": 300},
        {"step": "quantize", "formats": {}},
    ]
    with pytest.raises(BadInputError, match="first step"):
        from_dict({"steps": steps}, "here")
    assert from_dict({"steps": [steps[1], steps[2]]}, "here").steps[0] == TrimVocabulary(size=300)


def test_bits_per_byte_do_not_depend_on_the_tokenizer():
    """Two models that find all bytes equally likely cost 8 bits per byte, whatever their tokens hold."""
    single = Reader(lambda text: [0, *text.encode()], lambda ids: torch.zeros(len(ids), 256))
    pair = Reader(
        lambda text: [0, *(int.from_bytes(text.encode()[i : i + 2]) for i in range(0, len(text), 2))],
        lambda ids: torch.zeros(len(ids), 65536),
    )
    measured = compare_on_text({"reference": single, "other": pair, "same": single}, ["abcd", "efghij"])
    reference, other, same = (measured.qualities[name] for name in ("reference", "other", "same"))
    assert other.bits_per_byte.value == pytest.approx(8)
    assert reference.bits_per_byte.value == pytest.approx(8)
    assert other.ratio.value == pytest.approx(1)
    assert other.perplexity.value == pytest.approx(256)
    assert other.kl is other.agreement is reference.kl is None
    assert same.kl.value == pytest.approx(0, abs=1e-6)


def test_texts_are_shortened_until_every_tokenizer_fits(pairs):
    whole, cut = pairs["llama"]
    windows = torch.tensor([whole(DOCUMENTS[0]).input_ids[:64], whole(DOCUMENTS[1]).input_ids[:64]])
    texts = plain_pieces(windows, [whole, cut], whole, 50)
    assert len(texts) == 2
    for text in texts:
        assert 30 < max(len(encode_from_start(tokenizer, text)) for tokenizer in (whole, cut)) <= 50
    assert DOCUMENTS[0].startswith(texts[0].strip())
