"""What a report holds, as data: every page, card and JSON file is made from one `Report`.

Bytes are bytes, times are seconds unless the name says otherwise, and an `Interval` is a value with its 95 %
interval. What was not measured is None and is shown as such.
"""

import json
import math
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal

from pocketlm.errors import BadInputError
from pocketlm.interval import Interval

SCHEMA = 1

Role = Literal["original", "plain", "compressed"]


@dataclass(frozen=True)
class Rate:
    """The mean of repeated runs and their standard deviation."""

    mean: float
    deviation: float
    runs: int = 1


@dataclass(frozen=True)
class Change:
    """A count in the original and in the compressed model."""

    before: int
    after: int


@dataclass(frozen=True)
class ModelFacts:
    """Which model was compressed, and what became of its shape."""

    name: str  # the name under which people know the original
    source: str  # what the person typed
    kind: str  # "folder", "hub" or "gguf"
    license: str | None
    family: str
    sha256: str
    is_chat: bool
    parameters: Change
    blocks: Change
    ffn_width: Change
    vocabulary: Change


@dataclass(frozen=True)
class LimitFacts:
    """A limit besides bytes, and what was measured of the file."""

    text: str  # as asked for: "200MB of memory at 2,048 tokens of context", "quality 0.95"
    measured: str  # in words: "121 MB", "0.957 (0.941 to 0.968)"
    met: bool


@dataclass(frozen=True)
class BudgetFacts:
    """What was asked for, predicted and reached; `met` follows from bytes and limits."""

    text: str  # as typed: "70MB"
    bytes: int | None  # None where no size was asked for
    predicted_bytes: int
    actual_bytes: int
    limits: tuple[LimitFacts, ...] = ()
    met: bool = field(init=False)

    def __post_init__(self) -> None:
        fits = self.bytes is None or self.actual_bytes <= self.bytes
        object.__setattr__(self, "met", fits and all(limit.met for limit in self.limits))


@dataclass(frozen=True)
class PartSize:
    """What one kind of tensor takes: embedding, attention, ffn, norms, head or metadata."""

    name: str
    parameters: Change
    bytes: Change
    formats: tuple[str, ...]  # of the compressed file, such as ("IQ4_NL", "Q5_K")


@dataclass(frozen=True)
class StageRun:
    """One stage of the work.

    In `details` a list of floats, or of (x, y) pairs, is drawn as a curve, a mapping of names to numbers as
    bars, and anything else (a list of integers is one of indices) is printed. Keys are strings in words, such
    as "loss" or "damage by block".
    """

    name: str
    seconds: float
    reused: bool  # True: taken from the cache of an earlier run, which took `seconds`
    summary: str  # one sentence
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Speed:
    """What a file does in the engine, on the machine of the report."""

    prefill_tokens_per_second: Rate
    decode_tokens_per_second: Rate
    time_to_first_token_milliseconds: float | None
    load_seconds: float | None
    peak_memory_bytes: int | None
    joules_per_token: float | None  # None where the machine has no meter
    decode_ratio: Interval | None = None  # of decoding, to the original in the same round; None for the original


@dataclass(frozen=True)
class MeasuredFile:
    """One file, measured as it ships; `plain` is the obvious simpler choice at the same or nearest bytes.

    It is plain rounding, or formats alone where pruning won.
    """

    role: Role
    label: str  # what it is, in words: "plain Q5_0"
    file_name: str
    bytes: int
    perplexity: Interval | None
    perplexity_ratio: Interval | None  # to the original, paired window by window; None for the original
    divergence: Interval | None  # KL(original || this), nats per token; None for the original
    agreement: Interval | None  # fraction of tokens with the original's first choice; None for the original
    speed: Speed | None
    bits_per_byte: Interval | None = None  # where the vocabularies differ; divergence and agreement are None then
    tokens: int | None = None  # that it learnt from to become what it is; None for the original


@dataclass(frozen=True)
class StageDamage:
    """The KL to the original behind a stage, nats per token; of a trimmed vocabulary, how much more the text costs."""

    name: str
    divergence: float


@dataclass(frozen=True)
class Waterfall:
    """How the damage came about: the KL behind each stage on the same held-out windows, the file in the engine last."""

    windows: int
    stages: tuple[StageDamage, ...]


@dataclass(frozen=True)
class UnitCost:
    """What it costs to store a part: the matrices of a group in one block, or of the whole model.

    KL to the original in nats per token with all else exact: `expected` as it is stored, `alike` in the format of
    the `Sensitivity` that it belongs to.
    """

    group: str
    block: int | None  # of the compressed model
    format: str
    bytes: int
    expected: float
    alike: float


@dataclass(frozen=True)
class Sensitivity:
    """The measured damages that a mix of formats was chosen from; all parts are compared in one `format`."""

    format: str
    units: tuple[UnitCost, ...]


@dataclass(frozen=True)
class TaskScore:
    """Original and compressed file on a task; `difference` is paired item by item, and all three are shares."""

    name: str
    measure: str  # acc or acc_norm
    items: int
    original: Interval
    compressed: Interval
    difference: Interval
    lost: int  # items that only the original has right
    won: int
    faults: dict[str, int]  # of the compressed file's written answers


@dataclass(frozen=True)
class TextUsed:
    """A text that was measured on or calibrated with."""

    name: str
    sha256: str
    tokens: int
    windows: int
    window_length: int
    held_out: bool  # True: no stage of the work has seen it


@dataclass(frozen=True)
class Answer:
    """What the original and the compressed model say to the same prompt."""

    prompt: str
    original: str
    compressed: str
    notes: tuple[str, ...]  # what is wrong with them; `answers.compare` finds it


@dataclass(frozen=True)
class TrialRun:
    """A candidate that was built and measured on validation text before one was chosen."""

    name: str
    bytes: int
    expected_kl: float  # before it was built; nats per token
    kl: float | None  # None where vocabularies differ
    perplexity_ratio: Interval  # to the original, per token of the original's
    tokens: int  # that it learnt from
    seconds: float
    won: bool


@dataclass(frozen=True)
class Check:
    """One thing that was verified about the exported file."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """Everything a run has to say about itself."""

    command: str  # that makes the same file again
    created: str  # ISO date
    pocketlm: str  # version
    versions: dict[str, str]  # python and the libraries that bear on the result
    machine: dict[str, str | int | float]
    seed: int
    settings: dict[str, Any]
    model: ModelFacts
    budget: BudgetFacts
    parts: tuple[PartSize, ...]
    stages: tuple[StageRun, ...]
    files: tuple[MeasuredFile, ...]
    measured_text: TextUsed | None
    calibration_text: TextUsed | None
    answers: tuple[Answer, ...]
    verification: tuple[Check, ...]
    recipe: str  # YAML
    notes: tuple[str, ...]  # what was not done, fallbacks, warnings
    hashes: dict[str, str]  # what is hashed, and its SHA-256
    perplexity_ratio_to_plain: Interval | None = None  # compressed over plain, paired window by window
    trials: tuple[TrialRun, ...] = ()
    waterfall: Waterfall | None = None
    sensitivity: Sensitivity | None = None
    tasks: tuple[TaskScore, ...] = ()
    seconds: float | None = None  # of the run since it began or went on, with all that was tried and measured

    def file(self, role: Role) -> MeasuredFile | None:
        """Return the measured file that plays `role`, None where there is none."""
        return next((file for file in self.files if file.role == role), None)

    @property
    def product(self) -> MeasuredFile:
        """The compressed file.

        Raises:
            BadInputError: The report has none.
        """
        product = self.file("compressed")
        if product is None:
            raise BadInputError(
                "The report has no measured file with the role `compressed`. Measure the exported file first"
            )
        return product


def to_json(data: Any, ascii_only: bool = False) -> str:
    """Return data as JSON that every program reads: it has no word for numbers that are not finite, which become null.

    What it does not know, such as a path, becomes its text.
    """
    return json.dumps(_plain(data), indent=2, ensure_ascii=ascii_only, allow_nan=False)


def to_dict(report: Report) -> dict[str, Any]:
    """Return `report` as plain data for JSON; numbers that are not finite become None.

    What JSON does not know, such as a path among the settings, becomes its text.
    """
    return {"schema": SCHEMA, **_plain(asdict(report))}


def from_dict(data: dict[str, Any]) -> Report:
    """Return the report that `to_dict` wrote, also after a trip through JSON.

    Raises:
        BadInputError: The data are of another schema or lack a field.
        TypeError: A value is of another type than its field.
    """
    if data.get("schema") != SCHEMA:
        raise BadInputError(
            f"The report has schema {data.get('schema')!r}, this pocketlm reads {SCHEMA}. "
            "Read it with the version that wrote it"
        )
    try:
        return _build(Report, data)
    except KeyError as error:
        raise BadInputError(f"The report lacks the field {error}. Make it again with `pocketlm fit`") from None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _build(kind: Any, value: Any) -> Any:
    """Return `value`, plain data, as the annotated type `kind`."""
    if isinstance(kind, types.UnionType):
        members = [member for member in typing.get_args(kind) if is_dataclass(member)]
        return _build(members[0], value) if members and value is not None else value
    if typing.get_origin(kind) is tuple:
        return tuple(_build(typing.get_args(kind)[0], item) for item in value)
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        wanted = [item.name for item in fields(kind) if item.init and (item.default is MISSING or item.name in value)]
        return kind(**{name: _build(hints[name], value[name]) for name in wanted})
    if (kind in (int, float) and isinstance(value, str | list | dict)) or (kind is str and not isinstance(value, str)):
        raise TypeError(f"{value!r} stands where {kind.__name__} should")
    return value
