"""Trimmed vocabularies: what a text costs in tokens and in bits per byte, without training and after some.

    python benchmarks/vocabulary.py --model MODEL --text FILE... [--held-out FILE...] [--strings FILE...] \
        [--sizes 32768 16384] [--heal TOKENS] [--windows 96] [--out benchmarks/results/DATE-vocabulary.md]

MODEL is a Hugging Face folder. The text's calibration part chooses the tokens; its test part and the files of
--held-out judge them, in llama.cpp, on F16 files. 10,000 strings (lines of --strings, and random ones of many scripts)
must come back from each tokenizer as they do from the original's, and llama.cpp must cut them as transformers does.
With --heal each trimmed model also learns from the original, so many of whose tokens, on the calibration part.
"""

import argparse
import datetime
import random
import tempfile
import unicodedata
from dataclasses import replace
from pathlib import Path

from common import command_line, write_results

from pocketlm.cli.terminal import Screen
from pocketlm.export.gguf import write_gguf
from pocketlm.measure.device import machine, versions
from pocketlm.model.language_model import LanguageModel, save
from pocketlm.model.respelling import Respeller
from pocketlm.model.source import load
from pocketlm.model.text import Corpus, pack_windows, read_corpus
from pocketlm.model.vocabulary import spellings
from pocketlm.pipeline.proof import measure_on_text
from pocketlm.plan.sizes import sizes_of
from pocketlm.run.chat import complete, has_chat_template, serving
from pocketlm.run.engine import Engine
from pocketlm.steps.distil import Distil, distil
from pocketlm.steps.trim_vocabulary import TrimVocabulary, outline, trim_vocabulary

STRINGS = 10_000
HEALING_RATE = 2e-4  # of all weights; rare words in new pieces are much to learn
QUESTION = "What is the capital of France?"
# First and last characters of scripts, symbols and emoji.
SCRIPTS = (
    " ~",
    "À\u024f",
    "Ͱ\u03ff",
    "Ѐ\u04ff",
    "֑״",
    "،ۿ",
    "ऀॿ",
    "กๅ",
    "Ⴀჿ",
    "ሀ፼",
    "ぁヿ",
    "一鿿",
    "가힣",
    "\u2000⯿",
    "🌀🫿",
)


def strings_of(files: list[Path]) -> list[str]:
    """Return STRINGS strings: the files' lines, then random ones, half of one script and half of all, composed."""
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    draw = random.Random(0)
    draw.shuffle(lines)
    texts = lines[: STRINGS // 2]
    while len(texts) < STRINGS:
        scripts = [draw.choice(SCRIPTS)] if len(texts) % 2 else SCRIPTS
        characters = (chr(draw.randint(*map(ord, draw.choice(scripts)))) for _ in range(draw.randint(1, 40)))
        text = "".join(c for c in characters if unicodedata.category(c) not in ("Cn", "Cs", "Co"))
        texts.append(unicodedata.normalize("NFC", text) or "a")
    return texts


def check_strings(original: LanguageModel, cut: LanguageModel, file: Path, strings: list[str]) -> dict[str, int]:
    """Return how many strings come back as from the original, and how many llama.cpp cuts as transformers does."""

    def ids(model: LanguageModel, text: str) -> list[int]:
        return model.tokenizer(text, add_special_tokens=False).input_ids

    came_back = sum(
        original.tokenizer.decode(ids(original, text)) == cut.tokenizer.decode(ids(cut, text)) for text in strings
    )
    with Engine(file, context=64) as engine:
        alike = sum(engine.tokenize(text) == ids(cut, text) for text in strings)
    return {"strings": len(strings), "came back": came_back, "cut alike": alike}


def trim(args: argparse.Namespace, size: int, corpus: Corpus, folder: Path) -> tuple[LanguageModel, Path, dict]:
    """Trim to `size` tokens, by way of a saved folder; return the model, its F16 file and figures."""
    documents, step = corpus.split("calibration"), TrimVocabulary(size=size)
    predicted = sizes_of(outline(load(args.model), step, documents)).total_f16
    model, report = trim_vocabulary(load(args.model), step, documents)
    save(model, folder / str(size))
    # The file names where the model came from, not the folder that it was kept in on the way.
    model = replace(load(str(folder / str(size))), origin=model.origin)
    file = folder / f"{size}.gguf"
    write_gguf(model, {}, file)
    return model, file, {"size": size, "bytes": file.stat().st_size, "predicted": predicted, **report.details}


def heal(original: LanguageModel, model: LanguageModel, corpus: Corpus, tokens: int, screen: Screen) -> LanguageModel:
    """Distil across the vocabularies for so many tokens; the model is changed in place."""
    windows = pack_windows(corpus.split("calibration"), original.tokenizer, 1 + tokens // 512)
    held_out = corpus.tokens("validation", original.tokenizer, 4).windows
    teacher = Respeller(original, spellings(original.tokenizer, model.tokenizer))
    config = Distil(tokens=tokens, learning_rate=HEALING_RATE)

    def show(done: int, total: int, pace: str) -> None:
        screen.progress(f"healing ({pace})", done, total)

    return distil(teacher, model, config, windows, held_out, show)[0]


def answer(file: Path) -> str:
    """Return what a file's model answers to a question, greedily."""
    if not has_chat_template(file):
        return "(no chat template)"
    with serving(file, context=256) as server:
        return complete(server, [{"role": "user", "content": QUESTION}], max_tokens=40, greedy=True).text


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--held-out", type=Path, nargs="*", default=[])
    parser.add_argument("--strings", type=Path, nargs="*", default=[])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32768, 16384])
    parser.add_argument("--heal", type=int, default=0, help="tokens")
    parser.add_argument(
        "--windows",
        type=int,
        default=96,
        help="of 512 tokens, per text; removed tokens lie unevenly, so a few windows tell little",
    )
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / f"{today}-vocabulary.md")
    return parser.parse_args()


def main() -> None:
    """Trim to every size, measure, write the table."""
    args = arguments()
    original, corpus, strings = load(args.model), read_corpus(args.text), strings_of(args.strings)
    texts = {"the text's test part": corpus.split("test")}
    texts |= {file.stem: list(read_corpus([file]).documents) for file in args.held_out}
    rows = []
    with tempfile.TemporaryDirectory() as temporary, Screen() as screen:
        folder = Path(temporary)
        models, files = {"original": original}, {"original": folder / "original.gguf"}
        write_gguf(original, {}, files["original"])
        rows.append({"size": len(original.tokenizer), "bytes": files["original"].stat().st_size})
        rows[0] |= check_strings(original, original, files["original"], strings) | {"answer": answer(files["original"])}
        for size in args.sizes:
            screen.progress(f"{size} tokens", 0, 1)
            models[str(size)], files[str(size)], row = trim(args, size, corpus, folder)
            row |= check_strings(original, models[str(size)], files[str(size)], strings)
            rows.append(row | {"answer": answer(files[str(size)])})
            if args.heal:
                name = f"{size} healed"
                models[name] = heal(original, load(str(folder / str(size))), corpus, args.heal, screen)
                files[name] = folder / f"{name}.gguf"
                write_gguf(models[name], {}, files[name])
                healed = {"healed": args.heal, "bytes": files[name].stat().st_size, "answer": answer(files[name])}
                rows.append(rows[-1] | healed)
        for name, documents in texts.items():
            windows = pack_windows(documents, original.tokenizer, args.windows)
            qualities = measure_on_text(files, models, windows, screen.progress).qualities
            for row, (role, quality) in zip(rows, qualities.items(), strict=True):
                cut = models[role].tokenizer
                tokens = sum(len(cut(document, verbose=False).input_ids) for document in documents)
                words = sum(len(document.split()) for document in documents)
                row[name] = {"tokens per word": round(tokens / words, 4), "ratio": vars(quality.ratio)}
                row[name] |= {"bits per byte": vars(quality.bits_per_byte)}
    write_results(args.out, page(args, rows, list(texts)), rows)
    print("\n".join(page(args, rows, list(texts))))


def page(args: argparse.Namespace, rows: list[dict], texts: list[str]) -> list[str]:
    """Return the results as the lines of a Markdown page."""
    here = machine(args.out.parent)
    lines = [
        "# Trimmed vocabularies",
        "",
        f"`{command_line()}`",
        "",
        f"{here.cpu}, {here.cores} cores; torch {versions()['torch']}. Bits per byte in llama.cpp on F16 files, "
        f"{args.windows} windows of 512 of the original's tokens per text, in halves.",
        "",
        "| tokens | file bytes | predicted | came back | llama.cpp cuts alike | "
        + " | ".join(f"{text}: tokens/word | bits/byte" for text in texts)
        + " |",
        "|---" * (5 + 2 * len(texts)) + "|",
    ]
    for row in rows:
        cells = [name_of(row), f"{row['bytes']:,}", f"{row.get('predicted', row['bytes']):,}"]
        cells += [f"{row[key]:,} of {row['strings']:,}" for key in ("came back", "cut alike")]
        for text in texts:
            bits = row[text]["bits per byte"]
            gain = f" ({100 * (bits['value'] / rows[0][text]['bits per byte']['value'] - 1):+.1f} %)"
            cells += [f"{row[text]['tokens per word']:.3f}", f"{bits['value']:.4f}" + (gain if row != rows[0] else "")]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"Asked “{QUESTION}”, greedily:", ""]
    return lines + [f"- {name_of(row)}: {row['answer']!r}" for row in rows]


def name_of(row: dict) -> str:
    """Return what a row of the table is about."""
    return f"{row['size']:,}" + (f", healed on {row['healed']:,}" if "healed" in row else "")


if __name__ == "__main__":
    main()
