"""Budgets as people write them: `70MB`, `0.5GiB`, `40%`, `5m`."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from pocketlm.errors import BadInputError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SECONDS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Budget:
    """What the device allows.

    Attributes:
        text: As the person wrote it.
        bytes: The file may have at most so many.
        memory: Bytes that the model may add to a process while it runs; None for any.
        speed: Tokens per second that it must generate on this machine; None for any.
        context: Tokens of context that `memory` is for.
        sized: Whether bytes were asked for; else they are those of the largest file.
    """

    text: str
    bytes: int
    memory: int | None = None
    speed: float | None = None
    context: int = 2048
    sized: bool = True


def parse_size(text: str, whole: int) -> Budget:
    """Read a size.

    Args:
        text: A number with B, KB, MB, GB (powers of 1000), KiB, MiB, GiB (powers of 1024), or %.
        whole: Bytes that 100 % stands for.

    Raises:
        BadInputError: The text is not a positive size.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|[kmg]?i?b?)\s*", text, re.IGNORECASE)
    unit = match[2].upper() if match else ""
    if not match or (unit != "%" and unit not in UNITS):
        raise BadInputError(f"Cannot read the size `{text}`. Write it like 70MB, 0.5GiB or 40%")
    # Exactly: as a float, 2.01MB would be 2,009,999 bytes.
    size = Fraction(match[1]) * (Fraction(whole, 100) if unit == "%" else UNITS[unit])
    if size < 1:
        raise BadInputError(f"The size `{text}` is nothing. Write it like 70MB, 0.5GiB or 40%")
    return Budget(text.strip(), int(size))


def parse_quality(text: str) -> float:
    """Read a floor of quality such as `0.95` or `95%`: exp(-KL) to the original, between 0 and 1.

    Raises:
        BadInputError: The text is no share.
    """
    return _share(text, "quality", "exp(-KL)")


def highest_quality(kl: float) -> str:
    """Return the highest floor of quality that a KL, in nats per token, keeps to, as a person may write it."""
    decimals = 4 + int(kl / math.log(10))
    return f"{math.floor(10**decimals * math.exp(-kl)) / 10**decimals:.{decimals}f}"


def parse_accuracy(text: str) -> float:
    """Read a floor of accuracy such as `0.9` or `90%`: the share of a task's items that are right.

    Raises:
        BadInputError: The text is no share.
    """
    return _share(text, "accuracy", "the share of a task's items that are right")


def _share(text: str, what: str, means: str) -> float:
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%?)\s*", text)
    share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
    if not 0 < share < 1:
        raise BadInputError(f"Cannot read the {what} `{text}`. Write it like 0.95: {means}, between 0 and 1")
    return share


def parse_speed(text: str) -> float:
    """Read a speed such as `30tok/s` or `30`, in tokens per second.

    Raises:
        BadInputError: The text is not a positive speed.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(tok(ens)?/s)?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise BadInputError(f"Cannot read the speed `{text}`. Write it like 30tok/s")
    return float(match[1])


def parse_time(text: str) -> float:
    """Read a duration such as `30s`, `5m`, `1h` or `0`, in seconds.

    Raises:
        BadInputError: The text is not a duration.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([smh]?)\s*", text, re.IGNORECASE)
    if not match or (not match[2] and float(match[1]) != 0):
        raise BadInputError(f"Cannot read the time `{text}`. Write it like 30s, 5m or 1h; 0 switches it off")
    return float(match[1]) * SECONDS[(match[2] or "s").lower()]


def say_bytes(count: float) -> str:
    """Return bytes in decimal units, as file managers and shops do."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def say_time(seconds: float) -> str:
    """Return a duration as people say it: 50 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
