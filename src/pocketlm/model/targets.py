"""What a teacher says about a text, kept on disk in a few dozen bytes a token, to learn from without the teacher.

    sampled   the teacher's probabilities, each drawn in multiples of 1/draws:    p ~ counts / draws, unbiased
    top       its likeliest tokens with their probabilities, all others as one

Keeping only the likeliest and scaling them up to 1 would teach the student that nothing else ever comes next; samples
are right on average (Sparse Logit Sampling, https://arxiv.org/abs/2503.16870). They are taken at equal distances along
the cumulative distribution, from a random start: as unbiased as independent draws, with less than half their variance.

One file of `safetensors` per shard of windows, read by memory mapping; the index has their hashes and is written last.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pocketlm.errors import BadInputError
from pocketlm.model.compute import as_forward
from pocketlm.model.files import file_sha256, written_whole
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.sweep import final_hidden
from pocketlm.tensors.divergence import Sparse

INDEX = "index.json"
SHARD = 32  # windows in a file: what is lost at most when a run is killed
POSITIONS_AT_ONCE = 256
SHORT_IDS = 65536  # a vocabulary up to this needs two bytes for a token, a larger one three
TRIAL = 2  # windows on which the size is predicted


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What is kept of a teacher's distribution.

    Attributes:
        kind: `sampled` or `top`.
        count: Draws, at most 255, or how many of the likeliest.
    """

    kind: Literal["sampled", "top"] = "sampled"
    count: int = 40

    def check(self, vocabulary: int) -> None:
        """Refuse a count that does not fit.

        Raises:
            BadInputError: It does not.
        """
        most = 255 if self.kind == "sampled" else min(255, vocabulary - 1)
        if not 0 < self.count <= most:
            raise BadInputError(f"Cannot keep {self.count} per token with `{self.kind}` targets: give 1 to {most}")


def fitting(vocabulary: int, kind: Literal["sampled", "top"]) -> Sampling:
    """Return how much to keep in at most about 60 bytes a token of ordinary text."""
    short = vocabulary <= SHORT_IDS
    count = {("sampled", True): 40, ("sampled", False): 28, ("top", True): 14, ("top", False): 11}[kind, short]
    return Sampling(kind=kind, count=min(count, vocabulary - 1))


@dataclass(frozen=True)
class Targets:
    """A teacher's opinion on windows of text, on disk.

    Attributes:
        folder: Where it is.
        windows: Which of the windows in it, in order.
    """

    folder: Path
    windows: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, rows: slice | list[int]) -> "Targets":
        picked = self.windows[rows] if isinstance(rows, slice) else tuple(self.windows[row] for row in rows)
        return Targets(self.folder, picked)

    def read(self) -> Sparse:
        """Return the opinion on all positions of the windows, one after the other."""
        parts = [_read_window(self.folder, window) for window in self.windows]
        rest = torch.cat([part.rest for part in parts]) if parts[0].rest is not None else None
        return Sparse(*(torch.cat([getattr(part, name) for part in parts]) for name in Sparse.COLUMNS), rest)


def draw(probabilities: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw from each row of (positions, vocabulary) at equal distances from a random start.

    Returns:
        (positions,) how many different tokens each got, and for all of them, row by row, the ids and how often.
    """
    cumulative = probabilities.double().cumsum(-1)
    start = torch.rand(len(probabilities), 1, generator=generator, dtype=torch.float64)
    points = (start + torch.arange(count, dtype=torch.float64)) / count * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, points, right=True).clamp_max(probabilities.shape[1] - 1)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]  # points rise, so equal ids are neighbours
    begins = first.flatten().nonzero().squeeze(1)
    ends = torch.cat([begins[1:], torch.tensor([ids.numel()])])
    return first.sum(-1), ids.flatten()[begins], ends - begins


@torch.no_grad()
def opinion(
    teacher: LanguageModel, windows: Tensor, sampling: Sampling, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return what is kept of a teacher's opinion on windows, (windows, length), by name as it is stored."""
    network = teacher.network
    hidden, head = final_hidden(network, windows).flatten(0, 1), as_forward(network.lm_head.weight[: words_of(teacher)])
    columns: dict[str, list[Tensor]] = {"lengths": [], "ids": [], "weights": [], "entropy": []}
    for chunk in hidden.split(POSITIONS_AT_ONCE):
        log = torch.log_softmax((as_forward(chunk) @ head.T).float(), -1)
        probabilities = log.exp()
        columns["entropy"].append(-torch.linalg.vecdot(probabilities, log))
        if sampling.kind == "top":
            weights, ids = probabilities.topk(sampling.count)
            lengths = torch.full((len(chunk),), sampling.count)
            weights, ids = weights.flatten(), ids.flatten()
        else:
            lengths, ids, weights = draw(probabilities.cpu(), sampling.count, generator)
        for name, value in (("lengths", lengths), ("ids", ids), ("weights", weights)):
            columns[name].append(value.cpu())
    return _narrow({name: torch.cat(values) for name, values in columns.items()}, sampling.kind, len(head))


def _narrow(columns: dict[str, Tensor], kind: str, vocabulary: int) -> dict[str, Tensor]:
    """Return the columns in as few bytes as they are stored in."""
    ids = columns["ids"]
    high = {"high": (ids >> 16).to(torch.uint8)} if vocabulary > SHORT_IDS else {}
    return {
        **high,
        "ids": (ids & 0xFFFF).to(torch.uint16),
        "lengths": columns["lengths"].to(torch.uint8),
        "weights": columns["weights"].to(torch.float16 if kind == "top" else torch.uint8),
        "entropy": columns["entropy"].half().cpu(),
    }


def words_of(model: LanguageModel) -> int:
    """Return how many tokens a model has; rows of its head behind them are padding, and a student may have fewer."""
    return min(len(model.tokenizer), len(model.network.lm_head.weight))


def predicted_bytes(teacher: LanguageModel, windows: Tensor, sampling: Sampling) -> float:
    """Return about how many bytes a token will take, from a few of the windows."""
    sampling.check(words_of(teacher))
    trial = windows[:: max(1, len(windows) // TRIAL)][:TRIAL]
    kept = opinion(teacher, trial, sampling, torch.Generator().manual_seed(0))
    return sum(tensor.nbytes for tensor in kept.values()) / trial.numel()


def write_targets(
    teacher: LanguageModel,
    windows: Tensor,
    folder: Path,
    sampling: Sampling,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Targets:
    """Write a teacher's opinion on windows; what an earlier run left of the same is not done again.

    Args:
        teacher: Whose opinion it is.
        windows: (windows, length) token ids.
        folder: To fill, or to go on with.
        sampling: What is kept.
        seed: Of the draws.
        progress: Called after each shard with how many windows are done and how many there are.

    Raises:
        BadInputError: More is to be kept than there is.
    """
    sampling.check(words_of(teacher))
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(windows), SHARD):
        path = _shard(folder, start)
        if not path.exists():
            generator = torch.Generator().manual_seed((seed * 1_000_003 + start) % 2**63)
            kept = opinion(teacher, windows[start : start + SHARD], sampling, generator)
            with written_whole(path) as partial:
                save_file(kept, partial)
        progress(min(start + SHARD, len(windows)), len(windows))
    return _indexed(folder, len(windows), windows.shape[1], sampling)


def write_opinions(windows: list[list[dict[int, float]]], folder: Path, vocabulary: int) -> Targets:
    """Write opinions that were given from elsewhere.

    Args:
        windows: For each position of each window the probabilities of some tokens by id, all others as one; empty where
            nothing is learnt.
        folder: To fill.
        vocabulary: Tokens that there are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(windows), SHARD):
        positions = [position for window in windows[start : start + SHARD] for position in window]
        kept = {
            "lengths": torch.tensor([len(position) for position in positions]),
            "ids": torch.tensor([index for position in positions for index in position], dtype=torch.int64),
            "weights": torch.tensor([value for position in positions for value in position.values()]),
            "entropy": torch.zeros(len(positions)),  # a constant, which no gradient needs
        }
        with written_whole(_shard(folder, start)) as partial:
            save_file(_narrow(kept, "top", vocabulary), partial)
    return _indexed(folder, len(windows), len(windows[0]), Sampling(kind="top"))


def _indexed(folder: Path, windows: int, length: int, sampling: Sampling) -> Targets:
    files = {path.name: file_sha256(path) for path in sorted(folder.glob("*.safetensors"))}
    index = {"windows": windows, "length": length, "sampling": asdict(sampling), "files": files}
    with written_whole(folder / INDEX) as partial:
        partial.write_text(json.dumps(index, indent=1))
    return Targets(folder, tuple(range(windows)))


def open_targets(folder: Path) -> Targets:
    """Return targets on disk, after checking that every file is what was written.

    Raises:
        BadInputError: The folder has no finished targets, or a file was changed.
    """
    if not (folder / INDEX).is_file():
        raise BadInputError(f"{folder} has no finished targets: {INDEX} is missing. Make them again")
    index = json.loads((folder / INDEX).read_text())
    for name, expected in index["files"].items():
        if not (folder / name).is_file() or file_sha256(folder / name) != expected:
            raise BadInputError(f"{folder / name} is damaged or missing. Delete {folder} and make the targets again")
    return Targets(folder, tuple(range(index["windows"])))


def _shard(folder: Path, window: int) -> Path:
    return folder / f"{window // SHARD:05d}.safetensors"


@cache
def _index(folder: Path) -> dict:
    return json.loads((folder / INDEX).read_text())


@cache
def _lengths(path: Path, length: int) -> tuple[Tensor, Tensor]:
    """Return the entries of each position of a shard, (windows, length), and where each window's begin."""
    with safe_open(path, "pt") as file:
        lengths = file.get_tensor("lengths").view(-1, length)
    return lengths, nn.functional.pad(lengths.sum(1, dtype=torch.int64).cumsum(0), (1, 0))


def _read_window(folder: Path, window: int) -> Sparse:
    index, path, row = _index(folder), _shard(folder, window), window % SHARD
    length, sampled = index["length"], index["sampling"]["kind"] == "sampled"
    lengths, begins = _lengths(path, length)
    here = slice(int(begins[row]), int(begins[row + 1]))
    with safe_open(path, "pt") as file:
        ids = file.get_slice("ids")[here].to(torch.int64)
        if "high" in file.keys():  # noqa: SIM118  (not a dictionary)
            ids += file.get_slice("high")[here].to(torch.int64) << 16
        weights = file.get_slice("weights")[here].float()
        entropy = file.get_slice("entropy")[row * length : (row + 1) * length].float()
    counts = lengths[row].to(torch.int64)
    if sampled:
        return Sparse(counts, ids, weights / index["sampling"]["count"], entropy)
    rows = torch.arange(length).repeat_interleave(counts)
    rest = (1 - torch.zeros(length).index_add_(0, rows, weights)).clamp_min(0)
    return Sparse(counts, ids, weights, entropy, rest)
