"""How fast a file runs on this machine, in how much memory, and what this machine is.

Speed is measured by a worker process that the caller names, one process per file and round, the files taking
turns: a machine that slows down slows all of them. Ratios are taken within a round for the same reason.
"""

import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from pocketlm.errors import BadInputError, OutOfResourcesError, PocketlmError

GROUP = Path("/sys/fs/cgroup")  # what a container's control group says of it
# The flags of /proc/cpuinfo for which inference kernels exist, on x86 and on ARM.
_KERNEL_FEATURES = (
    "avx avx2 fma f16c avx_vnni avx512f avx512_vnni avx512_bf16 avx512_fp16 amx_tile amx_int8 amx_bf16 "
    "neon asimd asimddp asimdhp i8mm bf16 sve sve2 sme"
)


@dataclass(frozen=True, slots=True)
class Machine:
    """The facts of this machine that bear on speed; None where the system does not say."""

    cpu: str
    features: tuple[str, ...]
    cores: int
    memory_bytes: int | None
    memory_available_bytes: int | None
    disk_free_bytes: int
    system: str
    python: str
    torch: str
    engine: str | None
    gpu: str | None


@dataclass(frozen=True, slots=True)
class Figure:
    """Repeated measurements of one quantity; `deviation` is the sample's standard one, 0 for one value."""

    mean: float
    deviation: float
    median: float
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class FileSpeed:
    """One file on this machine.

    Attributes:
        path: The file.
        file_bytes: Its size.
        load_seconds: From the path to a usable model.
        prefill: Reading a prompt, tokens per second.
        first_token: From the prompt to the first token of the answer, seconds.
        decode: Generating, tokens per second.
        prefill_ratio: `prefill` over that of the first file, a value per round, from the rounds' medians.
        decode_ratio: The same for `decode`.
        memory_bytes: What the model adds to a process's resident memory at its peak: weights, cache, buffers.
        joules_per_token: Energy of the processor packages while generating; None where it cannot be read.
    """

    path: Path
    file_bytes: int
    load_seconds: Figure
    prefill: Figure
    first_token: Figure
    decode: Figure
    prefill_ratio: Figure
    decode_ratio: Figure
    memory_bytes: Figure
    joules_per_token: Figure | None


@dataclass(frozen=True, slots=True)
class Speeds:
    """Several files, measured side by side; each ratio is to the first."""

    machine: Machine
    engine: str
    threads: int
    prompt: int
    generate: int
    files: tuple[FileSpeed, ...]


def measure_speed(
    files: Sequence[Path],
    worker: Sequence[str],
    *,
    threads: int | None = None,
    prompt: int = 512,
    generate: int = 64,
    repeat: int = 3,
    rounds: int = 3,
) -> Speeds:
    """Measure `files` in turns: A B A B A B.

    Args:
        files: What to measure; the first is what the others are compared to.
        worker: The command that measures one file, such as `(sys.executable, "-m", "some.module")`. It gets
            the file, `--threads`, `--prompt`, `--generate` and `--repeat`, and prints one JSON object.
        threads: CPU threads; one per usable core if None.
        prompt: Tokens to read.
        generate: Tokens to generate after them.
        repeat: Measurements per process, after a warm-up.
        rounds: Processes per file.

    Raises:
        BadInputError: A file is missing or the worker cannot use it.
        PocketlmError: The worker crashes.
    """
    for file in files:
        if not file.is_file():
            raise BadInputError(f"Cannot measure {file}: there is no such file")
    threads = threads or usable_cores()
    options = [
        f"--{name}={value}"
        for name, value in (
            ("threads", threads),
            ("prompt", prompt),
            ("generate", generate),
            ("repeat", repeat),
        )
    ]
    timings: list[list[dict]] = [[] for _ in files]
    for _ in range(rounds):
        for file, collected in zip(files, timings, strict=True):
            collected.append(_run_worker([*worker, str(file), *options], file))
    return Speeds(
        machine=machine(files[0].parent),
        engine=timings[0][0]["engine"],
        threads=threads,
        prompt=prompt,
        generate=generate,
        files=tuple(_summarize(file, mine, timings[0], generate) for file, mine in zip(files, timings, strict=True)),
    )


def _run_worker(command: list[str], file: Path) -> dict:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return json.loads(result.stdout)
    last_line = (result.stderr.strip() or "it says nothing").splitlines()[-1]
    for kind in (BadInputError, OutOfResourcesError):
        if result.returncode == kind.exit_code:
            raise kind(last_line)
    kind = PocketlmError
    if result.returncode < 0:
        name = signal.Signals(-result.returncode).name
        kind = OutOfResourcesError if name == "SIGKILL" else kind  # which systems send to who takes the most memory
        ending, hint = f"was ended by {name}", "Too little memory, or a defect of the engine"
    else:
        ending, hint = f"failed with exit code {result.returncode}", "Try fewer threads or a shorter prompt"
    raise kind(f"The process that measures {file} {ending}: {last_line}. {hint}")


def _summarize(file: Path, mine: list[dict], first: list[dict], generate: int) -> FileSpeed:
    def pooled(name: str) -> Figure:
        return figure(value for run in mine for value in run[name])

    def ratio(name: str) -> Figure:
        return figure(
            statistics.median(run[name]) / statistics.median(base[name]) for run, base in zip(mine, first, strict=True)
        )

    has_energy = all(run["decode_joules"] for run in mine)
    return FileSpeed(
        path=file,
        file_bytes=file.stat().st_size,
        load_seconds=figure(run["load_seconds"] for run in mine),
        prefill=pooled("prefill_tokens_per_second"),
        first_token=pooled("first_token_seconds"),
        decode=pooled("decode_tokens_per_second"),
        prefill_ratio=ratio("prefill_tokens_per_second"),
        decode_ratio=ratio("decode_tokens_per_second"),
        memory_bytes=figure(run["peak_memory_bytes"] - run["memory_before_bytes"] for run in mine),
        joules_per_token=figure(joules / generate for run in mine for joules in run["decode_joules"])
        if has_energy
        else None,
    )


def figure(values: Iterable[float]) -> Figure:
    """Summarize repeated measurements, at least one."""
    values = tuple(values)
    return Figure(
        mean=statistics.fmean(values),
        deviation=statistics.stdev(values) if len(values) > 1 else 0.0,
        median=statistics.median(values),
        values=values,
    )


def machine(folder: Path = Path()) -> Machine:
    """Return the facts of this machine; free disk space is that of `folder`'s disk."""
    import torch

    cpu_lines = _cpu_lines()
    flags = (cpu_lines.get("flags") or cpu_lines.get("Features") or "").split()
    memory, available = _memory()
    try:
        engine = f"xllamacpp {metadata.version('xllamacpp')}"
    except metadata.PackageNotFoundError:
        engine = None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name(0)
    else:
        gpu = "Apple Metal" if torch.backends.mps.is_available() else None
    return Machine(
        cpu=_cpu_name(cpu_lines),
        features=tuple(feature for feature in _KERNEL_FEATURES.split() if feature in flags),
        cores=usable_cores(),
        memory_bytes=memory,
        memory_available_bytes=available,
        disk_free_bytes=shutil.disk_usage(folder).free,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        engine=engine,
        gpu=gpu,
    )


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    names = ("torch", "transformers", "tokenizers", "gguf", "xllamacpp", "scipy")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in names}


def _cpu_lines() -> dict[str, str]:
    """Return the fields of the first processor in /proc/cpuinfo, none where there is no such file."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _cpu_name(cpu_lines: dict[str, str]) -> str:
    if "model name" in cpu_lines:
        return cpu_lines["model name"]
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    try:  # boards such as the Raspberry Pi say their name here, not in /proc/cpuinfo's first block
        return Path("/proc/device-tree/model").read_text().strip("\0 \n")
    except OSError:
        return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return how many physical cores this process may use, a container's limit included."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    processors = os.sched_getaffinity(0)
    siblings = [Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list") for number in processors]
    try:
        cores = len({path.read_text() for path in siblings})
    except OSError:
        cores = len(processors)
    return max(1, math.ceil(min(cores, _group_limit("cpu.max"))))


def _memory() -> tuple[int | None, int | None]:
    """Return total and available memory in bytes, at most what a container may use."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        names = getattr(os, "sysconf_names", {})
        return (os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in names else None), None
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in text.splitlines()}
    limit = _group_limit("memory.max")
    total, available = sizes["MemTotal"], sizes["MemAvailable"]
    if limit < total:
        used = _group_limit("memory.current") - _file_pages()
        total, available = int(limit), min(available, int(limit - used))
    return total, available


def _file_pages() -> int:
    """Return the bytes of files that this container's control group keeps in memory and gives up when it needs to."""
    try:
        lines = (GROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def _group_limit(name: str) -> float:
    """Read a limit of this container's control group (version 2), bytes or cores; infinite without one."""
    try:
        words = (GROUP / name).read_text().split()
    except OSError:
        return math.inf
    if words[0] == "max":
        return math.inf
    return int(words[0]) / (int(words[1]) if len(words) > 1 else 1)
