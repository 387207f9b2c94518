"""Text: split by content, packed without a gap, refused with the file and the line that is wrong."""

import copy
import itertools
import json
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import Tiny
from tests.tiny import FAMILIES, tiny_tokenizer

from pocketlm.errors import BadInputError
from pocketlm.model import text
from pocketlm.model.sampling import sample_documents
from pocketlm.model.text import Corpus, adds_beginning, pack_windows, python_topics, read_corpus

SPLITS = ("calibration", "validation", "test")
ANY_TEXT = st.text(st.sampled_from("ab .\n\u2028é漢"), max_size=60)


@given(st.lists(ANY_TEXT, max_size=40))
def test_every_document_is_in_one_split_that_its_content_alone_decides(documents: list[str]):
    corpus = Corpus("x", tuple(documents))
    parts = {name: corpus.split(name) for name in SPLITS}
    assert sorted(itertools.chain(*parts.values())) == sorted(documents)
    for first, second in (SPLITS[:2], SPLITS[1:], SPLITS[::2]):
        assert not set(parts[first]) & set(parts[second])
    random.Random(0).shuffle(documents)
    shuffled = Corpus("another name", (*documents, "one more"))
    for name in SPLITS:
        assert sorted(parts[name]) == sorted(d for d in shuffled.split(name) if d in documents)


def test_the_splits_have_their_shares_and_are_the_same_on_every_machine():
    corpus = Corpus("numbers", tuple(map(str, range(4000))))
    assert len(corpus.split("test")) == pytest.approx(0.15 * 4000, rel=0.1)
    assert len(corpus.split("validation")) == pytest.approx(0.10 * 4000, rel=0.15)
    assert sorted(map(int, corpus.split("test")))[:5] == [9, 39, 46, 49, 50]
    assert sorted(map(int, corpus.split("validation")))[:5] == [8, 13, 29, 41, 47]
    assert corpus.split("test")[:5] == ["3601", "2555", "3587", "3499", "519"]
    assert corpus.split("calibration")[:5] == ["3728", "196", "2749", "1218", "1112"]


@pytest.mark.parametrize("name", SPLITS)
def test_the_documents_of_all_files_are_mixed(name: str):
    """However they come in: the first windows of a split show something of every file."""
    files = [[f"{kind} {i}" for i in range(2000)] for kind in "abcd"]
    mixed = Corpus("x", tuple(itertools.chain(*files))).split(name)
    assert mixed == Corpus("x", tuple(itertools.chain(*reversed(files)))).split(name), "their order does not matter"
    first = [document[0] for document in mixed[: len(mixed) // 2]]
    for kind in "abcd":
        assert first.count(kind) == pytest.approx(len(first) / 4, rel=0.35)


def test_the_default_text_fills_every_split():
    corpus = python_topics()
    tokenizer = tiny_tokenizer("llama")
    windows = {name: corpus.tokens(name, tokenizer, 4).windows for name in SPLITS}
    assert all(part.shape == (4, 512) for part in windows.values())
    assert corpus.sha256 == python_topics().sha256
    again = corpus.tokens("test", tokenizer, 4)
    assert again.sha256 == corpus.tokens("test", tokenizer, 4).sha256
    assert again.sha256 != corpus.tokens("test", tokenizer, 5).sha256
    assert again.name == "pydoc_data.topics (test)"
    assert torch.equal(again.first(2), windows["test"][:2])
    assert torch.equal(again.first(100), windows["test"])


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_are_the_documents_end_to_end(family: str):
    tokenizer = tiny_tokenizer(family)
    documents = ["The first one.", "", "Ein zweites, längeres Dokument 漢字.\n\nWith 2 paragraphs.", "x" * 50] * 3
    stream = []
    for document in documents:
        stream += [*tokenizer(document, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    start = [tokenizer.bos_token_id] if adds_beginning(tokenizer) else []
    for length in (5, 16, 31):
        windows = pack_windows(documents, tokenizer, 1000, length)
        assert windows.dtype == torch.int64
        body = length - len(start)
        assert len(windows) == len(stream) // body, "only what does not fill a window is left out"
        for i, window in enumerate(windows.tolist()):
            assert window == start + stream[i * body : (i + 1) * body]
        few = pack_windows(documents, tokenizer, 2, length)
        assert torch.equal(few, windows[:2])


def test_only_families_that_begin_with_a_token_get_it_in_every_window():
    assert [family for family in FAMILIES if adds_beginning(tiny_tokenizer(family))] == [
        "llama",
        "mistral",
        "gemma3_text",
    ]
    tokenizer = tiny_tokenizer("gemma3_text")
    windows = pack_windows(["hello world " * 100], tokenizer, 5, 16)
    assert (windows[:, 0] == tokenizer.bos_token_id).all()
    assert (windows[:, 1:] != tokenizer.bos_token_id).all()


def test_no_text_is_no_window():
    assert pack_windows([], tiny_tokenizer("llama"), 4, 16).shape == (0, 16)
    assert pack_windows(["a"], tiny_tokenizer("llama"), 4, 16).shape == (0, 16)


def test_no_more_is_tokenized_than_the_limit_needs():
    def documents():
        yield "some words " * 40
        raise AssertionError("read on")

    assert pack_windows(documents(), tiny_tokenizer("llama"), 2, 16).shape == (2, 16)


def test_too_little_text_is_refused_with_the_amount_that_is_needed():
    words = re.escape("The text `note.txt` is too short: its test part has less than 2048 tokens. Give at least")
    with pytest.raises(BadInputError, match=words):
        Corpus("note.txt", ("a few words",)).tokens("test", tiny_tokenizer("llama"), 4)


@settings(deadline=None)
@given(st.text(st.sampled_from("abc  .\n"), max_size=400), st.integers(1, 60))
def test_cutting_a_text_into_pieces_loses_nothing(content: str, size: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "PIECE", size)
        pieces = text._pieces(content)
    assert "".join("".join(pieces).split()) == "".join(content.split()), "only blank pieces are left out"
    assert all(piece.strip() for piece in pieces)
    assert all(len(piece) <= 2 * size for piece in pieces)


@pytest.mark.parametrize("gap", ["\n\n", "\n", " ", ""])
def test_a_long_text_can_be_split_however_it_is_laid_out(gap: str):
    """Logs, tables, one endless line: where there are no paragraphs, lines and words end pieces too."""
    content = gap.join(f"word{i}" for i in range(20_000))
    pieces = text._pieces(content)
    assert "".join(pieces) == content
    assert len(pieces) > 15
    assert all(text.PIECE <= len(piece) <= 2 * text.PIECE for piece in pieces[:-1])
    assert all(piece.endswith(gap) for piece in pieces[:-1])


def test_pieces_end_with_paragraphs_where_there_are_some():
    paragraph = "A line of text.\nAnd another one. " * 20 + "\n\n"
    assert all(piece.endswith("\n\n") for piece in text._pieces(paragraph * 30)[:-1])


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_files_and_json_lines_are_read(tmp_path: Path):
    lines = [
        json.dumps({"text": "plain", "id": 3}),
        "",
        json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}),
        "   ",
        json.dumps({"text": ""}),
    ]
    paths = [
        written(tmp_path, "a.JSONL", "\n".join(lines)),
        written(tmp_path, "b.txt", "Some text.\r\nMore."),
        written(tmp_path, "c.md", "# Title"),
    ]
    corpus = read_corpus(paths)
    assert corpus.documents == ("plain", "Hi\n\nHello", "Some text.\nMore.", "# Title")
    assert corpus.name == "a.JSONL, b.txt, c.md"
    assert corpus.sha256 != read_corpus(paths[:2]).sha256


def test_a_json_line_ends_at_a_newline_and_nowhere_else(tmp_path: Path):
    """JSON strings may hold line separators of other kinds as they are."""
    content = "one\u2028two\x85three\u2029four\x1cfive"
    lines = json.dumps({"text": content}, ensure_ascii=False).replace("\\u001c", "\x1d")
    path = written(tmp_path, "a.jsonl", f"{lines}\n{lines}\r\n".replace("\x1d", "\\u001c"))
    assert read_corpus([path]).documents == (content, content)


def test_chat_messages_of_every_kind(tmp_path: Path):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image", "url": "x.png"}]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant"},
        {"role": "assistant", "content": "A cat."},
    ]
    (document,) = read_corpus([written(tmp_path, "a.jsonl", json.dumps({"messages": messages}))]).documents
    assert document.split() == ["Look:", "A", "cat."]


def test_chats_are_read_as_the_model_meets_them(tiny_model: Tiny, tmp_path: Path):
    tokenizer = copy.deepcopy(tiny_model("llama").tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system here') }}"
        "{% endif %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    )
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": []}]
    said += [{"role": "assistant", "content": [{"type": "text", "text": "Hello"}]}]
    path = written(tmp_path, "a.jsonl", json.dumps({"messages": said}))
    assert read_corpus([path], tokenizer).documents == ("<|user|>Hi<|assistant|>Hello",)
    tokenizer.chat_template = tokenizer.chat_template.replace("'system'", "'user'")
    with pytest.raises(BadInputError, match=r"line 1: the model's chat template does not take.*no system here"):
        read_corpus([path], tokenizer)
    tokenizer.chat_template = None
    assert read_corpus([path], tokenizer).documents == ("Hi\n\nHello",)


def test_a_chat_without_words_is_no_text_whatever_the_template_thinks_of_it(tiny_model: Tiny, tmp_path: Path):
    tokenizer = copy.deepcopy(tiny_model("llama").tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}"
    chats = [[], [{"role": "assistant", "content": None}], [{"role": "user", "content": "Hi"}]]
    path = written(tmp_path, "a.jsonl", "\n".join(json.dumps({"messages": said}) for said in chats))
    assert read_corpus([path], tokenizer).documents == ("Hi",)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", "", "empty.txt is empty. Give a file with text"),
        ("blank.txt", " \n\t\n ", "blank.txt is empty"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "latin.txt is not UTF-8 text: byte 3 cannot be read"),
        ("a.jsonl", '{"text": "ok"}\n\n{"text": oops}\n', "a.jsonl, line 3: not JSON"),
        ("a.jsonl", '{"text": "ok"}\n{"text": ', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"text": "ok"}\n{"text": "bad \\ud800 x"}', "a.jsonl, line 2: '\\ud800' is half of a character"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: not JSON"),
        ("a.jsonl", '{"content": "x"}', "a.jsonl, line 1: neither a `text` nor `messages`"),
        ("a.jsonl", '{"text": 3}', "line 1: neither a `text` nor `messages`"),
        ("a.jsonl", '["text"]', "line 1: neither a `text` nor `messages`"),
        ("a.jsonl", '{"messages": ["hi"]}', "line 1: neither a `text` nor `messages`"),
        ("a.jsonl", '{"messages": "hi"}', "line 1: neither a `text` nor `messages`"),
        ("a.jsonl", "null", "line 1: neither a `text` nor `messages`"),
    ],
)
def test_files_that_cannot_be_used(name: str, content: str | bytes, words: str, tmp_path: Path):
    with pytest.raises(BadInputError, match=re.escape(words)):
        read_corpus([written(tmp_path, name, content)])


def test_files_that_are_not_there(tmp_path: Path):
    with pytest.raises(BadInputError, match=r"Cannot read .*nowhere\.txt: No such file"):
        read_corpus([tmp_path / "nowhere.txt"])
    with pytest.raises(BadInputError, match=r"Cannot read .*: Is a directory"):
        read_corpus([tmp_path])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])  # a chat model, and two without a template
def test_a_model_writes_its_own_text(family: str, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pocketlm.model.sampling.ANSWER_TOKENS", 12)
    monkeypatch.setattr("pocketlm.model.sampling.QUESTION_TOKENS", 6)
    model = tiny_model(family)
    before = torch.random.get_rng_state()
    documents = sample_documents(model, 4, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before), "the random numbers of others are left alone"
    assert len(documents) == 4
    assert documents == sample_documents(model, 4, seed=1)
    assert documents != sample_documents(model, 4, seed=2)
    assert len(set(documents)) > 1
    if model.is_chat:
        assert all(document.startswith("<|im_start|>user\n") for document in documents)
        assert all("<|im_end|>\n<|im_start|>assistant\n" in document for document in documents)


def test_a_model_with_a_short_context_writes_no_more_than_fits(tiny_model: Tiny):
    model = tiny_model("gpt2", n_positions=16)  # one token more would have no position
    assert len(sample_documents(model, 3, seed=0)) == 3
