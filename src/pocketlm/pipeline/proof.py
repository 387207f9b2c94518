"""The proof of a run: the exported file beside the original and the obvious simpler choice, in the real engine."""

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from pocketlm.errors import VerificationError
from pocketlm.export.gguf import write_gguf
from pocketlm.export.verify import Check, check_choices, check_tokens, check_turn_ends, check_weights
from pocketlm.measure.device import Speeds, measure_speed
from pocketlm.measure.quality import Comparison, Logits, Quality, Reader, compare, compare_on_text
from pocketlm.measure.task_files import Task
from pocketlm.measure.tasks import TaskResult
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.source import load
from pocketlm.model.text import encode_from_start, plain_pieces
from pocketlm.pipeline.cache import stage
from pocketlm.pipeline.scoring import score_tasks
from pocketlm.pipeline.stages import Compressed, Progress, Texts
from pocketlm.pipeline.waterfall import damage_by_stage
from pocketlm.plan.sizes import Sizes, sizes_of
from pocketlm.report.answers import compare as compare_answers
from pocketlm.report.content import Answer
from pocketlm.run.chat import complete, has_chat_template, serving
from pocketlm.run.engine import Engine
from pocketlm.run.header import cache_types
from pocketlm.run.llamacpp import decode_row
from pocketlm.run.speed import WORKER
from pocketlm.steps.quantize import Quantize, quantize

PROMPTS = (
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "How do I boil an egg?",
    "List three uses of a paper clip.",
)
ANSWER_TOKENS = 160
VERIFIED_WINDOWS = 2
CACHE_WINDOWS = 2
ENGINE_WINDOWS = 2
TIMED = ("original", "compressed")  # roles of files
# A type of the cache is recommended where its KL is below this, or below this share of the file's own.
CACHE_KL = 0.001
CACHE_SHARE = 0.02


@dataclass(frozen=True)
class Proof:
    """What was verified and measured.

    Attributes:
        files: The measured files by role: original, plain, compressed.
        checks: What was verified about the exported file; all passed.
        answers: What original and exported file say to the fixed prompts; empty for a base model.
        quality: By role, on text that nothing else of the run has seen.
        speeds: Of original and exported file; the plain one is not timed.
        cache: What caching keys and values in other types than f16 costs the exported file: KL in nats per token.
        by_stage: The KL to the original behind each stage, the exported file in the engine last; see `damage_by_stage`.
        tasks: Scores of the exported file beside the original's.
    """

    files: dict[str, Path]
    checks: tuple[Check, ...]
    answers: tuple[Answer, ...]
    quality: Comparison
    speeds: Speeds
    cache: dict[str, float]
    by_stage: tuple[tuple[str, float], ...] = ()
    tasks: tuple[TaskResult, ...] = ()

    @property
    def cache_type(self) -> str:
        """The smallest type of the cache that costs hardly anything beside what the file has lost already."""
        lost = self.quality.qualities["compressed"].kl
        bound = CACHE_KL if lost is None else max(CACHE_KL, CACHE_SHARE * lost.value)
        bearable = [name for name, kl in self.cache.items() if kl <= bound]
        return bearable[-1] if bearable else "f16"


def prove(
    original: LanguageModel,
    compressed: Compressed,
    exported: Path,
    texts: Texts,
    plain: Path,
    progress: Progress,
    tasks: Sequence[Task] = (),
) -> Proof:
    """Verify an exported file and measure it against the original and the simpler choice, a file; also on tasks.

    Raises:
        VerificationError: The file does not do in the engine what was predicted.
    """
    files = {"original": original_file(original)}
    answers, ended = ask_both(files["original"], exported, progress)
    checks = verify(compressed, exported, compressed.texts, ended)
    files |= {"plain": plain, "compressed": exported}
    models = {"original": original, "plain": original, "compressed": compressed.model}
    quality = measure_models(files, models, texts.test.windows, progress)
    speeds = measure_speeds(files, texts, progress)
    cache = measure_cache(exported, compressed.texts.validation.first(CACHE_WINDOWS))
    by_stage = damage_by_stage(original, compressed, files, texts.test.windows, progress)
    both = {"reference": (files["original"], original), "model": (exported, compressed.model)}
    scores = score_tasks(both, tasks, progress)
    return Proof(files, checks, answers, quality, speeds, cache, by_stage, tuple(scores))


# ---- what to compare with ----


def original_file(model: LanguageModel) -> Path:
    """Return the original as a GGUF file: itself where it is one, else an F16 export that is kept."""
    if model.origin.kind == "gguf":
        return model.origin.path
    done = stage(
        "original-gguf",
        {"model": model.origin.key},
        lambda folder: write_gguf(model, {}, folder / "original-F16.gguf"),
    )
    return done.folder / "original-F16.gguf"


@dataclass(frozen=True)
class Simpler:
    """The obvious simpler choice: one format for everything, by rounding, no pruning."""

    formats: dict[str, str]
    name: str


def simpler_choice(sizes: Sizes, budget: int) -> Simpler:
    """Return the largest plain file that fits the budget, or the smallest there is."""
    plain = {name: _everywhere(name, sizes) for name in ("Q8_0", "Q5_0", "Q4_0")}
    name = next((name for name, formats in plain.items() if sizes.total(sizes.original, formats) <= budget), "Q4_0")
    return Simpler(plain[name], name)


def _everywhere(name: str, sizes: Sizes) -> dict[str, str]:
    return {group: name if name in sizes.allowed(group) else "F16" for group in sizes.group_names}


def _write_rounded(
    model: LanguageModel, formats: dict[str, str], windows: Tensor, path: Path, progress: Callable[[int, int], None]
) -> None:
    """Write a file of the original in formats, by rounding alone."""
    again = load(str(model.origin.path), model.network.dtype)  # not what was typed: a hub's may be another by now
    done, packed, _ = quantize(
        replace(again, origin=model.origin), Quantize(formats=formats, method="rtn"), windows, progress
    )
    write_gguf(done, packed, path)


def plain_file(model: LanguageModel, choice: Simpler, texts: Texts, progress: Progress) -> Path:
    """Return the simpler choice as a file, made once."""

    def produce(folder: Path) -> None:
        path, what = folder / f"plain-{choice.name}.gguf", f"plain {choice.name} to compare with"
        _write_rounded(model, choice.formats, texts.calibration.first(1), path, lambda i, n: progress(what, i, n))

    inputs = {"model": model.origin.key, "formats": choice.formats, "text": texts.calibration.sha256}
    done = stage("plain", inputs, produce)
    return done.folder / f"plain-{choice.name}.gguf"


def engine_damage(model: LanguageModel, texts: Texts, progress: Progress) -> float:
    """Return what quantizing costs before any weight is coarse: the KL, in nats per token, of a Q8_0 file.

    Its weights are as good as exact. But llama.cpp multiplies quantized weights with activations that it rounds to 8
    bits, which no measurement of weights in torch knows of.
    """

    def produce(folder: Path) -> dict[str, float]:
        path, windows = folder / "Q8_0.gguf", texts.validation.first(ENGINE_WINDOWS)
        formats = _everywhere("Q8_0", sizes_of(model))
        _write_rounded(model, formats, windows[:1], path, lambda i, n: progress("what the engine itself costs", i, n))
        quality = measure_quality({"original": original_file(model), "Q8_0": path}, windows, progress)
        path.unlink()
        return {"kl": quality.qualities["Q8_0"].kl.value}

    return stage("engine", {"model": model.origin.key, **texts.sha256}, produce).facts["kl"]


# ---- verifying ----


def verify(compressed: Compressed, path: Path, texts: Texts, ended: dict[str, int]) -> tuple[Check, ...]:
    """Check a written file in the engine.

    Args:
        compressed: What was exported.
        path: The file.
        texts: Windows to compare choices on.
        ended: How many answers ended by themselves, by role; empty for a base model.

    Raises:
        VerificationError: A check fails.
    """
    with Engine(path, context=texts.validation.windows.shape[1]) as engine:
        checks = [
            Check("the file loads in llama.cpp", True, engine.version),
            check_weights(path, compressed.model, compressed.packed, decode_row),
            check_choices(compressed.model, texts.validation.first(VERIFIED_WINDOWS), engine.logits),
            check_tokens(compressed.model, engine.tokenize),
        ]
        if ended:
            checks.append(check_turn_ends(compressed.model, engine.ends_generation, ended, len(PROMPTS)))
    failed = [check for check in checks if not check.passed]
    if failed:
        raise VerificationError(
            f"The exported file fails a check: {failed[0].name} ({failed[0].detail}). "
            "No output was written; please report this with the output of `pocketlm doctor`"
        )
    return tuple(checks)


def ask_both(original: Path, exported: Path, progress: Progress) -> tuple[tuple[Answer, ...], dict[str, int]]:
    """Let both files answer the fixed prompts greedily; say also how many answers ended by themselves, by role."""
    if not has_chat_template(exported):
        return (), {}
    said, ended = [], []
    for done, path in enumerate((original, exported)):
        progress("asking both models the same", done, 2)
        with serving(path, context=1024) as server:
            replies = [
                complete(server, [{"role": "user", "content": prompt}], max_tokens=ANSWER_TOKENS, greedy=True)
                for prompt in PROMPTS
            ]
        said.append([reply.text for reply in replies])
        ended.append(sum(reply.finish_reason == "stop" for reply in replies))
    pairs = tuple(compare_answers(*row) for row in zip(PROMPTS, *said, strict=True))
    return pairs, {"original": ended[0], "compressed": ended[1]}


# ---- measuring ----


def measure_quality(files: dict[str, Path], windows: Tensor, progress: Progress) -> Comparison:
    """Measure every file in the engine on the same windows, (windows, length); the first is the reference."""
    with ExitStack() as stack:
        engines = {role: stack.enter_context(Engine(path, context=windows.shape[1])) for role, path in files.items()}
        return compare(
            {role: engine.logits for role, engine in engines.items()},
            windows,
            lambda i, n: progress("measuring quality in llama.cpp", i, n),
        )


def measure_models(
    files: dict[str, Path], models: dict[str, LanguageModel], windows: Tensor, progress: Progress
) -> Comparison:
    """Measure files by their probabilities of tokens, or in bits per byte where their vocabularies differ.

    Args:
        files: By role; the first is the reference.
        models: By role, for their vocabularies.
        windows: (windows, length) token ids of the reference.
        progress: Called after each window or text.
    """
    first, *others = [(model.network.config.vocab_size, model.tokenizer.get_vocab()) for model in models.values()]
    if all(other == first for other in others):
        return measure_quality(files, windows, progress)
    return measure_on_text(files, models, windows, progress)


def measure_as_f16(
    original: LanguageModel, model: LanguageModel, windows: Tensor, progress: Progress
) -> tuple[Quality, Quality]:
    """Return the qualities of an original and of a model, whose F16 file is only there to be measured.

    Args:
        original: The reference.
        model: Of which no file is kept.
        windows: (windows, length) token ids of the original.
        progress: As `measure_models` calls it.
    """
    with tempfile.TemporaryDirectory() as beside:
        file = Path(beside) / "model-F16.gguf"
        write_gguf(model, {}, file)
        files, models = {"original": original_file(original), "model": file}, {"original": original, "model": model}
        qualities = measure_models(files, models, windows, progress).qualities
    return qualities["original"], qualities["model"]


def measure_on_text(
    files: dict[str, Path], models: dict[str, LanguageModel], windows: Tensor, progress: Progress
) -> Comparison:
    """Measure files of different vocabularies in the engine on the same text, as bits per byte.

    Args:
        files: By role; the first is the reference.
        models: By role, for their tokenizers.
        windows: (windows, length) token ids of the reference.
        progress: Called after each text.
    """
    with ExitStack() as stack:
        engines = {role: stack.enter_context(Engine(path, context=windows.shape[1])) for role, path in files.items()}
        logits = {role: engine.logits for role, engine in engines.items()}
        return compare_texts(logits, models, windows, lambda i, n: progress("measuring quality in llama.cpp", i, n))


def compare_texts(
    logits: dict[str, Logits],
    models: dict[str, LanguageModel],
    windows: Tensor,
    progress: Callable[[int, int], None],
) -> Comparison:
    """Compare models of different vocabularies on the text of windows.

    Args:
        logits: By role; the first is the reference.
        models: By role, for their tokenizers.
        windows: (windows, length) token ids of the reference; halved, so that more tokens of another vocabulary
            still fit the context.
        progress: Called after each text.
    """
    context, tokenizers = windows.shape[1], {role: models[role].tokenizer for role in logits}
    halves = windows.reshape(2 * len(windows), -1) if context % 2 == 0 else windows[:, : context // 2]
    texts = plain_pieces(halves, list(tokenizers.values()), tokenizers[next(iter(logits))], context)
    readers = {role: Reader(partial(encode_from_start, tokenizers[role]), read) for role, read in logits.items()}
    return compare_on_text(readers, texts, progress)


def measure_cache(path: Path, windows: Tensor) -> dict[str, float]:
    """Return the KL to f16's logits of each other type of the cache of keys and values, by name, largest type first.

    Types whose blocks do not divide the heads' width are left out: the engine refuses them.
    """
    context = windows.shape[1]
    with ExitStack() as stack:
        engines = {name: stack.enter_context(Engine(path, context=context, cache=name)) for name in cache_types(path)}
        found = compare({name: engine.logits for name, engine in engines.items()}, windows)
    return {name: quality.kl.value for name, quality in found.qualities.items() if quality.kl}


def measure_speeds(files: dict[str, Path], texts: Texts, progress: Progress) -> Speeds:
    """Time original and exported file in turns: rounds, each with a ratio, tell more than repeats in one process."""
    progress("measuring speed in llama.cpp", 0, 1)
    prompt = texts.test.windows.shape[1] // 2
    speeds = measure_speed(
        [files[role] for role in TIMED],
        WORKER,
        prompt=prompt,
        generate=min(48, prompt),
        repeat=1,
        rounds=3,
    )
    progress("measuring speed in llama.cpp", 1, 1)
    return speeds
