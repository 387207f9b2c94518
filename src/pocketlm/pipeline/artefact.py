"""The folder that a run leaves: files, measurements, reports, and the hashes of all of them."""

import datetime
import itertools
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pocketlm
from pocketlm.errors import BadInputError
from pocketlm.interval import mean_ratio
from pocketlm.measure.device import Figure, FileSpeed, Machine, Speeds, machine, versions
from pocketlm.measure.tasks import TaskResult
from pocketlm.model.anatomy import ffn_width
from pocketlm.model.gguf_file import read_gguf
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.parts import parts_of
from pocketlm.model.source import local_path
from pocketlm.model.text import Tokens
from pocketlm.pipeline.cache import Finished, held
from pocketlm.pipeline.proof import TIMED, Proof
from pocketlm.pipeline.stages import Compressed, Texts
from pocketlm.pipeline.waterfall import STAGE_WINDOWS
from pocketlm.plan.budget import say_bytes
from pocketlm.plan.search import Damages, Plan
from pocketlm.report import content
from pocketlm.report.write import strangers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@contextmanager
def new_folder(out: Path, force: bool, reads: Iterable[str | Path | None] = ()) -> Iterator[Path]:
    """Give a folder to fill that becomes `out` as a whole at the end, or leaves nothing.

    Args:
        out: The folder's name at the end.
        force: Whether a result that has this name may be replaced.
        reads: What the work reads: names of models that may be no paths, files.

    Raises:
        BadInputError: `out` exists and `force` is not given, or it is nothing to replace, or cannot be written, or
            another run is writing it. Where somebody fills it during the work, the result gets another name, which the
            message has.
    """
    partial, replaced, lock = (out.parent / f".{out.name}.{state}" for state in ("partial", "replaced", "lock"))
    with ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            mine = stack.enter_context(held(lock, wait=False))
            if mine is False:
                raise BadInputError(f"Another run is writing {out}. Wait for it, or give another folder with -o")
            stack.callback(lock.unlink, missing_ok=True)
            if replaced.exists() and not out.exists():  # a run was killed between the two renames
                replaced.rename(out)
            check_replaceable(out, force, reads)
            shutil.rmtree(partial, ignore_errors=True)  # of a killed run
            stack.callback(shutil.rmtree, partial, ignore_errors=True)  # first: a signal may come right behind the next
            partial.mkdir()
        except OSError as error:
            raise BadInputError(f"Cannot write {out}: {error.strerror}. Give another folder with -o") from error
        yield partial
        try:  # hours may have gone by
            check_replaceable(out, force, reads)
        except BadInputError as error:
            beside = next(
                path for path in (out.with_name(f"{out.name}-{n}") for n in itertools.count(2)) if not path.exists()
            )
            partial.rename(beside)
            raise BadInputError(f"{out} is not as it was when the work began: the result is in {beside}") from error
        shutil.rmtree(replaced, ignore_errors=True)
        if out.exists():
            out.rename(replaced)
        try:
            partial.rename(out)
        except BaseException:  # one of the two always has the name
            if replaced.exists():
                replaced.rename(out)
            raise
        shutil.rmtree(replaced, ignore_errors=True)


def check_replaceable(out: Path, force: bool, reads: Iterable[str | Path | None]) -> None:
    """Refuse to replace what is not a result of this program, and what the work needs itself.

    Raises:
        BadInputError: As `new_folder`.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise BadInputError(f"{out} exists already. Give another folder with -o, or --force to replace it")
    read = [local_path(name) for name in reads if name]
    inside = [path for path in read if path.resolve().is_relative_to(out.resolve())]
    if inside:
        raise BadInputError(f"{out} has {inside[0]} in it, which is read. Give another folder with -o")
    if out.is_mount():
        raise BadInputError(f"{out} is where a disk is mounted and cannot be replaced. Give a folder in it with -o")
    others = strangers(out) if out.is_dir() and any(out.iterdir()) else []
    if others:
        raise BadInputError(
            f"{out} has {others[0]} in it, which pocketlm did not write: --force does not replace it. "
            "Give another folder with -o"
        )
    if out.is_symlink() or not out.is_dir() or others is None or Path.cwd().is_relative_to(out.resolve()):
        raise BadInputError(
            f"{out} is not a folder that pocketlm wrote, or you are in it: --force does not replace it. "
            "Give another folder with -o"
        )


@dataclass(frozen=True)
class Run:
    """What a report needs to know of a run besides its figures."""

    command: str
    settings: dict[str, Any]
    seed: int
    budget: content.BudgetFacts
    recipe: str
    notes: tuple[str, ...]
    trials: tuple[content.TrialRun, ...] = ()
    sensitivity: content.Sensitivity | None = None
    seconds: float | None = None
    learnt: dict[str, int] = field(default_factory=dict)  # tokens, by role of the file


def make_report(
    run: Run,
    original: LanguageModel,
    compressed: Compressed,
    proof: Proof,
    texts: Texts,
    hashes: dict[str, str],
) -> content.Report:
    """Put a run's facts and figures together."""
    here = machine(proof.files["compressed"].parent)
    before, after = original.network.config, compressed.model.network.config
    return content.Report(
        command=run.command,
        created=datetime.datetime.now(datetime.UTC).date().isoformat(),
        pocketlm=pocketlm.__version__,
        versions=versions(),
        machine=_machine(here),
        seed=run.seed,
        settings=run.settings,
        model=content.ModelFacts(
            name=original.origin.base_model,
            source=original.origin.source,
            kind=original.origin.kind,
            license=original.origin.license,
            family=original.family,
            sha256=original.origin.sha256,
            is_chat=original.is_chat,
            parameters=content.Change(original.parameters, compressed.model.parameters),
            blocks=content.Change(before.num_hidden_layers, after.num_hidden_layers),
            ffn_width=content.Change(ffn_width(original.network), ffn_width(compressed.model.network)),
            vocabulary=content.Change(before.vocab_size, after.vocab_size),
        ),
        budget=run.budget,
        parts=_parts(proof.files["original"], proof.files["compressed"]),
        stages=tuple(_stage_run(finished) for finished in compressed.stages),
        files=tuple(_measured_file(role, path, proof, run.learnt.get(role)) for role, path in proof.files.items()),
        measured_text=facts_of_text(texts.test, held_out=True),
        calibration_text=facts_of_text(texts.calibration, held_out=False),
        answers=proof.answers,
        verification=tuple(content.Check(check.name, check.passed, check.detail) for check in proof.checks),
        recipe=run.recipe,
        notes=(*run.notes, _cache_note(proof), _speed_note(proof.speeds), *_vocabulary_note(before, after)),
        hashes=hashes,
        perplexity_ratio_to_plain=proof.quality.ratio("compressed", "plain"),
        trials=run.trials,
        waterfall=_waterfall(proof),
        sensitivity=run.sensitivity,
        tasks=tuple(task_score(result) for result in proof.tasks),
        seconds=run.seconds,
    )


def sensitivity_of(plan: Plan, damages: Damages) -> content.Sensitivity | None:
    """Return what a plan's parts cost as they are stored, and in the one format that most of its bytes have.

    None where no format was measured for all parts.
    A plan counts the blocks that are left, damages those of the original.
    """
    bytes_in: Counter[str] = Counter()
    for form, count, _ in plan.units.values():
        bytes_in[form] += count
    kept = [block for block in range(plan.shape.blocks + len(plan.drop)) if block not in plan.drop]

    def measured(unit: str) -> dict[str, float]:
        block, _, group = unit.rpartition(".")
        return damages.formats[f"{kept[int(block)]}.{group}" if block else unit]

    common = [form for form, _ in bytes_in.most_common() if all(form in measured(unit) for unit in plan.units)]
    if not common:
        return None
    units = []
    for unit, (form, count, expected) in plan.units.items():
        block, _, group = unit.rpartition(".")
        place = int(block) if block else None
        units.append(content.UnitCost(group, place, form, count, expected, measured(unit)[common[0]]))
    return content.Sensitivity(common[0], tuple(units))


def _waterfall(proof: Proof) -> content.Waterfall | None:
    if not proof.by_stage:
        return None
    return content.Waterfall(STAGE_WINDOWS, tuple(content.StageDamage(*stage) for stage in proof.by_stage))


def task_score(result: TaskResult) -> content.TaskScore:
    """Return a task's result as a report has it: what the task is judged by, original beside compressed."""
    original, compressed = (getattr(result.scores[role], result.measure) for role in ("reference", "model"))
    return content.TaskScore(
        name=result.task,
        measure=result.measure,
        items=result.scores["model"].count,
        original=original,
        compressed=compressed,
        difference=result.paired.difference,
        lost=result.paired.lost,
        won=result.paired.won,
        faults=result.scores["model"].faults,
    )


def _vocabulary_note(before: "PreTrainedConfig", after: "PreTrainedConfig") -> tuple[str, ...]:
    if before.vocab_size == after.vocab_size:
        return ()
    return (
        f"The vocabulary was trimmed from {before.vocab_size:,} to {after.vocab_size:,} tokens, so probabilities of "
        "tokens cannot be compared: quality is that of the same text, in bits per byte, and perplexity counts the "
        "original's tokens for every file",
    )


def _cache_note(proof: Proof) -> str:
    costs = ", ".join(f"{name} costs KL {kl:.4f}" for name, kl in proof.cache.items())
    why = f"{costs}, against f16" if costs else "the engine has no other for such heads"
    return f"Recommended type of the cache of keys and values: {proof.cache_type} ({why})"


def _speed_note(speeds: Speeds) -> str:
    return (
        f"Speed and time to the first token are those of {speeds.generate} tokens behind a prompt of {speeds.prompt}, "
        f"on {speeds.threads} threads; memory is what the model adds to a process at its peak meanwhile"
    )


def _machine(here: Machine) -> dict[str, str | int]:
    memory = "not stated" if here.memory_bytes is None else say_bytes(here.memory_bytes)
    return {"processor": here.cpu, "cores": here.cores, "memory": memory, "system": here.system}


def _parts(original: Path, exported: Path) -> tuple[content.PartSize, ...]:
    before, after = (parts_of(read_gguf(path), path.stat().st_size) for path in (original, exported))
    return tuple(
        content.PartSize(
            old.name,
            content.Change(old.parameters, new.parameters),
            content.Change(old.bytes, new.bytes),
            new.formats,
        )
        for old, new in zip(before, after, strict=True)
        if old.bytes or new.bytes
    )


def _stage_run(finished: Finished) -> content.StageRun:
    facts = finished.facts
    return content.StageRun(
        name=facts["step"],
        seconds=finished.seconds,
        reused=finished.reused,
        summary=facts["summary"],
        details={key.replace("_", " "): value for key, value in facts["details"].items()},
    )


def _measured_file(role: str, path: Path, proof: Proof, learnt: int | None) -> content.MeasuredFile:
    quality = proof.quality.qualities[role]
    speed = dict(zip(TIMED, proof.speeds.files, strict=True)).get(role)
    labels = {"original": "original", "plain": path.stem.replace("-", " "), "compressed": "pocketlm"}
    return content.MeasuredFile(
        role=role,
        label=labels[role],
        file_name=path.name,
        bytes=path.stat().st_size,
        perplexity=quality.perplexity,
        perplexity_ratio=None if role == "original" else quality.ratio,
        divergence=quality.kl,
        agreement=quality.agreement,
        bits_per_byte=quality.bits_per_byte,
        speed=None if speed is None else _speed(speed, role),
        tokens=learnt,
    )


def _speed(speed: FileSpeed, role: str) -> content.Speed:
    return content.Speed(
        prefill_tokens_per_second=_rate(speed.prefill),
        decode_tokens_per_second=_rate(speed.decode),
        time_to_first_token_milliseconds=1000 * speed.first_token.mean,
        load_seconds=speed.load_seconds.mean,
        peak_memory_bytes=int(speed.memory_bytes.mean),
        joules_per_token=None if speed.joules_per_token is None else speed.joules_per_token.mean,
        decode_ratio=None if role == "original" else mean_ratio(speed.decode_ratio.values),
    )


def _rate(figure: Figure) -> content.Rate:
    return content.Rate(figure.mean, figure.deviation, len(figure.values))


def facts_of_text(tokens: Tokens, held_out: bool) -> content.TextUsed:
    """Return what a report says of a text."""
    rows, length = tokens.windows.shape
    return content.TextUsed(tokens.name, tokens.sha256, rows * length, rows, length, held_out)
