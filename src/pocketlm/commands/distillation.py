"""Distillation by itself: a student learns from a teacher, and both are measured.

teacher ─> text ─> student (cut from the teacher, or a model of its own) ─> [targets on disk] ─> distil ─> measure
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from pocketlm.commands.pruning import Prune, check_shape
from pocketlm.commands.students import Start, cut, read_shape, stock
from pocketlm.errors import BadInputError
from pocketlm.export.gguf import write_gguf
from pocketlm.measure.quality import Quality
from pocketlm.model.examples import Example, pack_examples, read_examples, split_examples, that_fit
from pocketlm.model.files import file_sha256
from pocketlm.model.language_model import LanguageModel, save
from pocketlm.model.learning import Lessons
from pocketlm.model.opinions import Opinion, keep_opinions
from pocketlm.model.source import load
from pocketlm.model.targets import fitting, open_targets, predicted_bytes, words_of, write_targets
from pocketlm.model.training import LOSSES
from pocketlm.pipeline.artefact import facts_of_text, new_folder
from pocketlm.pipeline.cache import latest, remove_leftovers, stage, unfinished
from pocketlm.pipeline.preflight import COPIES, check_disk, check_learning, check_memory, load_if_room
from pocketlm.pipeline.proof import measure_as_f16
from pocketlm.pipeline.stages import Progress, Texts, gather_texts, silent
from pocketlm.plan.pace import tokens_in
from pocketlm.report.content import TextUsed, to_json
from pocketlm.report.distilled import distilled_page
from pocketlm.report.write import replace_text, write_manifest
from pocketlm.run.remote import Answer, ask, read_answers, served_model
from pocketlm.steps.distil import Distil, distil

TEXT_WINDOWS = 20_000  # of text at most: ten million tokens
CUT_RATE, OWN_RATE = 3e-4, 1e-4  # learning rates, of students that were cut or have adapters, and of others

ANSWERS = "answers.jsonl"

Kept = Literal["live", "sampled", "top"]


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """What a person asks for."""

    teacher: str  # a folder, a hub id, a GGUF file, or `demo`
    student: str  # a shape to cut from the teacher, such as depth=12,ffn=768, or a model of its own
    how: Distil | None = None  # `distil_settings` where None; its tokens count only where `seconds` is None
    seconds: float | None = None  # of training
    targets: Kept = "live"  # who is listened to: the teacher itself, or what is kept of its opinion on disk
    task: Path | None = None  # prompts and answers to learn instead of text
    remote: str | None = None  # a server whose answers to the prompts are learnt, and how likely it says they are
    gguf: bool = False  # whether the folder has model.gguf in F16 too
    out: Path = Path("pocketlm-out")
    data: tuple[Path, ...] = ()  # text files; the teacher's samples and Python's help topics where empty
    force: bool = False  # replace `out`


def distil_settings(student: str, learning_rate: float | None = None, **given: Any) -> Distil:
    """Return how a student learns where nothing else is said; `Distil` alone is for healing a mild pruning.

    Args:
        student: As a `Distillation` has it.
        learning_rate: The usual one where None.
        given: Other fields of `Distil`.

    Raises:
        BadInputError: The student looks like a shape and is none.
    """
    if learning_rate is None:
        learning_rate = CUT_RATE if read_shape(student) or given.get("adapters") else OWN_RATE
    return Distil(**{"tokens": 0, "warm_up": 0.05, "evaluations": 8} | given, learning_rate=learning_rate)


@dataclass(frozen=True)
class Distilled:
    """What was made.

    Attributes:
        summaries: What was done, in order.
        parameters: Of teacher and student.
        qualities: Of the teacher, the student before and behind training, F16 files read in llama.cpp on text that
            nothing else has seen.
        tokens: That were trained on.
        details: Losses, held-out divergence, speed; bytes per token of targets on disk.
        text: That the qualities were read on.
        inputs: The teacher with its hash, the student, the settings, and the hashes of what was learnt from.
    """

    summaries: tuple[str, ...]
    parameters: tuple[int, int]
    qualities: dict[str, Quality]
    tokens: int
    details: dict[str, Any]
    text: TextUsed
    inputs: dict[str, Any]


def distill(job: Distillation, progress: Progress = silent) -> Distilled:
    """Train a student on what its teacher says, and write the folder `job.out`, whole or not at all.

    The folder has `hf`, which plain transformers loads, every step's loss as CSV, and a page of what came of it.

    Raises:
        BadInputError: The student is neither a shape nor a model, its tokenizer is another, the task cannot be read, or
            what is asked for does not go together.
    """
    remove_leftovers()
    job = replace(job, how=job.how or distil_settings(job.student))
    _check(job)
    with new_folder(job.out, job.force, (job.teacher, job.student, *job.data, job.task)) as folder:
        teacher = load_if_room(job.teacher)
        shape = read_shape(job.student)
        if shape:
            check_shape(teacher, Prune(model=job.teacher, **shape))
        check_disk(teacher, job.out, trained=True, more=1)  # the file that is measured
        check_memory(teacher, COPIES)
        # What a person can have got wrong comes before what takes minutes.
        own = None if shape else stock(job.student, teacher)
        examples, opinions = _examples(job, progress)
        texts = gather_texts(teacher, list(job.data), job.how.seed, progress, TEXT_WINDOWS)
        lessons, held_out, of_text = _lessons(job, examples, opinions, teacher, texts, progress)
        start = own or cut(teacher, shape, texts, progress)
        check_learning(start.source, adapters=job.how.adapters > 0)
        config = replace(job.how, tokens=_tokens(job, teacher, start, texts))
        if job.remote and lessons.targets is None:  # it said words, and no probabilities
            config = replace(config, cross_entropy=1.0)
        inputs = {"teacher": teacher.origin.key, "student": start.key, "text": of_text, "how": asdict(config)}
        facts: dict[str, Any] = {}
        if job.targets != "live":
            lessons, facts = _from_disk(job, teacher, lessons, of_text, progress)
        done = stage(
            "distill",
            inputs | {"targets": job.targets},
            lambda work: _train(teacher, start, config, (lessons, held_out), progress, work),
        )
        shutil.copytree(done.folder / "hf", folder / "hf")
        shutil.copy(done.folder / LOSSES, folder)
        student = load(str(folder / "hf"))
        made = Distilled(
            summaries=(*start.summaries, done.facts["summary"]),
            parameters=(teacher.parameters, student.parameters),
            qualities=_measured(teacher, start, student, texts, progress),
            tokens=config.tokens,
            details=done.facts["details"] | facts,
            text=facts_of_text(texts.test, held_out=True),
            inputs=_inputs(job, teacher, config, of_text),
        )
        if job.gguf:
            write_gguf(student, {}, folder / "model.gguf")
        (folder / "report.md").write_text(
            distilled_page(teacher.origin.base_model, job.student, made), encoding="utf-8"
        )
        replace_text(folder / "distillation.json", to_json(asdict(made)) + "\n")
        write_manifest(folder)
    return made


def _inputs(job: Distillation, teacher: LanguageModel, config: Distil, of_text: dict[str, str]) -> dict[str, Any]:
    origin = asdict(teacher.origin)
    return {
        "teacher": {fact: origin[fact] for fact in ("base_model", "source", "sha256")},
        "student": job.student,
        "settings": asdict(config) | {"targets": job.targets, "remote": job.remote},
        "learnt": {"data": [*map(str, job.data)], "task": job.task and str(job.task), "sha256": of_text},
    }


def _check(job: Distillation) -> None:
    """Refuse what does not go together, before any work."""
    if (job.how.tokens if job.seconds is None else job.seconds) <= 0:
        raise BadInputError("In no time nothing is learnt. Give a --time such as 30m, or --tokens")
    if job.remote and not job.task:
        raise BadInputError(
            "A remote teacher answers prompts. Give some with --task: a .jsonl with a `prompt` per line"
        )
    if job.task and job.targets != "live":
        raise BadInputError("Targets on disk are for text. Leave out --targets where a --task is learnt")
    job.how.check()
    if job.targets != "live":
        job.how.check_for_targets()
    if job.remote and job.how.asks_more:
        raise BadInputError(
            "A remote teacher says words and their probabilities. "
            "Leave out --hidden-states, --relations and --on-policy"
        )
    if job.remote and (job.how.loss, job.how.temperature) != ("forward_kl", 1):
        raise BadInputError("A remote teacher is learnt by forward KL at temperature 1. Leave out the other loss")


def _tokens(job: Distillation, teacher: LanguageModel, start: Start, texts: Texts) -> int:
    """Return how many tokens to train on; a time is turned into tokens once, so that a resumed run does the same."""
    if job.seconds is None:
        return job.how.tokens
    inputs = {"teacher": teacher.origin.key, "student": start.key, "seconds": job.seconds, "how": asdict(job.how)}
    inputs |= texts.sha256

    def produce(_: Path) -> dict[str, int]:
        return {"tokens": tokens_in(teacher, texts.calibration, job.seconds, load(start.source), job.how)}

    return stage("distill-tokens", inputs, produce).facts["tokens"]


def _examples(job: Distillation, progress: Progress) -> tuple[list[Example], dict[str, Opinion]]:
    """Return the task's examples, none where text is learnt.

    Where there is a remote teacher they are answered by it, and what it said of its tokens is there by prompt.
    """
    if job.task is None:
        return [], {}
    if not job.remote:
        return read_examples(job.task), {}
    answers = _asked(job, progress)
    opinions = {answer.prompt: answer.opinion for answer in answers if answer.opinion}
    return [Example(answer.prompt, answer.answer) for answer in answers], opinions


def _lessons(
    job: Distillation,
    examples: list[Example],
    opinions: dict[str, Opinion],
    teacher: LanguageModel,
    texts: Texts,
    progress: Progress,
) -> tuple[Lessons, Tensor | Lessons, dict[str, str]]:
    """Return what is learnt, what chooses the checkpoint, and the hashes of both."""
    if job.task is None:
        return Lessons(texts.calibration.windows), texts.validation.windows, texts.sha256
    length = texts.calibration.windows.shape[1]
    examples = that_fit(examples, teacher.tokenizer, length) if job.remote else examples
    learnt, choosing = (_packed(part, opinions, teacher, length, progress) for part in split_examples(examples))
    return learnt, choosing, {"task": _hash_of(examples, opinions)}


def _packed(
    examples: list[Example], opinions: dict[str, Opinion], teacher: LanguageModel, length: int, progress: Progress
) -> Lessons:
    """Return examples as lessons, with a server's opinion of its answers' tokens where it gave one."""
    lessons = pack_examples(examples, teacher.tokenizer, length)
    if not opinions:
        return lessons

    def produce(folder: Path) -> dict[str, int]:
        _, used = keep_opinions(lessons, examples, opinions, teacher.tokenizer, folder)
        return {"examples": len(examples), "with_probabilities": used}

    inputs = {"teacher": teacher.origin.key, "length": length, "said": _hash_of(examples, opinions)}
    done = stage("opinions", inputs, produce)
    progress("answers learnt with the server's probabilities", done.facts["with_probabilities"], done.facts["examples"])
    return replace(lessons, targets=open_targets(done.folder))


def _hash_of(examples: list[Example], opinions: dict[str, Opinion]) -> str:
    text = json.dumps([[example.prompt, example.answer, opinions.get(example.prompt)] for example in examples])
    return hashlib.sha256(text.encode()).hexdigest()


def _asked(job: Distillation, progress: Progress) -> list[Answer]:
    """Return a server's answers to the task's prompts, got once; a server that has gone since is not missed."""
    prompts = [example.prompt for example in read_examples(job.task, answered=False)]
    asked, served = {"server": job.remote, "task": file_sha256(job.task)}, served_model(job.remote)
    model = served and served["id"]
    if served is None and (earlier := latest("answers", asked)):
        return read_answers(earlier / ANSWERS)

    def produce(folder: Path) -> dict[str, int]:
        work = unfinished(folder)
        work.mkdir(parents=True, exist_ok=True)
        what = f"asking {model or 'the teacher'}"
        answers = ask(job.remote, model, prompts, work / ANSWERS, lambda i, n: progress(what, i, n))
        if not answers:
            raise BadInputError(f"The server at {job.remote} had nothing to say to any prompt of {job.task}")
        (folder / ANSWERS).write_text("".join(json.dumps(vars(answer)) + "\n" for answer in answers))
        return asked

    return read_answers(stage("answers", asked | {"model": served}, produce).folder / ANSWERS)


def _from_disk(
    job: Distillation, teacher: LanguageModel, lessons: Lessons, of_text: dict[str, str], progress: Progress
) -> tuple[Lessons, dict[str, Any]]:
    """Return lessons with the teacher's opinion from disk, written once, and what it takes."""
    sampling = fitting(words_of(teacher), job.targets)

    def produce(folder: Path) -> dict[str, float]:
        predicted = predicted_bytes(teacher, lessons.ids, sampling)
        what = f"keeping the teacher's opinion ({predicted:.0f} bytes a token)"
        work = unfinished(folder)
        write_targets(teacher, lessons.ids, work, sampling, job.how.seed, lambda i, n: progress(what, i, n))
        shutil.copytree(work, folder, dirs_exist_ok=True)
        actual = sum(path.stat().st_size for path in folder.iterdir()) / lessons.numel()
        return {"target_bytes_predicted": round(predicted, 1), "target_bytes": round(actual, 1)}

    inputs = {"teacher": teacher.origin.key, "text": of_text, "sampling": asdict(sampling), "seed": job.how.seed}
    kept = stage("targets", inputs, produce)
    return replace(lessons, targets=open_targets(kept.folder)), kept.facts


def _train(
    teacher: LanguageModel,
    start: Start,
    config: Distil,
    text: tuple[Lessons, Tensor | Lessons],
    progress: Progress,
    folder: Path,
) -> dict[str, Any]:
    student, report = distil(
        teacher,
        load(start.source),
        config,
        *text,
        lambda i, n, pace: progress(f"distilling ({pace})", i, n),
        unfinished(folder),
    )
    save(student, folder / "hf")
    shutil.copy(unfinished(folder) / LOSSES, folder)
    return asdict(report)


def _measured(
    teacher: LanguageModel, start: Start, student: LanguageModel, texts: Texts, progress: Progress
) -> dict[str, Quality]:
    """Read teacher, student before and student after in llama.cpp, on text that nothing else has seen."""
    windows = texts.test.windows
    original, before = measure_as_f16(teacher, load(start.source), windows, progress)
    _, after = measure_as_f16(teacher, student, windows, progress)
    return {"teacher": original, "student before": before, "student": after}
