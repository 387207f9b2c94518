"""Several processes train one model: each learns from its share of every batch, and all take the same step.

    batch ─> a share for each process ─> gradients ─> their average ─> the same step everywhere

There are as many as there are GPUs for it. One process, the usual case, is a crew too, and shares nothing.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, distributed

from pocketlm.errors import OutOfResourcesError
from pocketlm.model.attention import know_slices
from pocketlm.model.learning import Lessons

JOB, MEETING, READY, FAILURE = "job.pt", "meeting", "ready-{}", "failure-{}"
POLL = 0.1  # seconds
GOODBYE = 30  # seconds that others get to end by themselves

Batch = TypeVar("Batch", Tensor, Lessons)
Job, Result = ParamSpec("Job"), TypeVar("Result")


class _LostError(Exception):
    """Another process does not answer any more."""


@dataclass(frozen=True)
class Crew:
    """The processes that train together, as one of them sees it.

    Attributes:
        device: Where this one's networks are.
        rank: Which one it is; the first leads: it measures, shows progress and writes files.
        size: How many there are.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the one that measures and writes."""
        return self.rank == 0

    def share(self, batch: Batch) -> Batch:
        """Return what this one learns from of a batch, where its networks are."""
        mine = batch if self.size == 1 else batch[list(range(self.rank, len(batch), self.size))]
        return mine.to(self.device)

    def align(self, parameters: Iterable[Tensor]) -> None:
        """Give all processes the first one's parameters."""
        for parameter in parameters if self.size > 1 else ():
            _together(distributed.broadcast, parameter.data, 0)

    def average(self, parameters: Iterable[Tensor], loss: float, weight: float) -> float:
        """Give the parameters the average gradient of all processes and return the average loss.

        Args:
            parameters: With this one's gradient, where they have one; the same ones in every process.
            loss: This one's.
            weight: What this one's counts, such as the positions that it is a mean over.
        """
        if self.size == 1:
            return loss
        sums = torch.tensor([loss * weight, weight], dtype=torch.float64, device=self.device)
        _together(distributed.all_reduce, sums)
        total, weights = sums.tolist()
        for parameter in parameters:
            if parameter.grad is not None:
                _together(distributed.all_reduce, parameter.grad.mul_(weight / weights))
        return total / weights

    def agree(self, measure: Callable[[], float]) -> float:
        """Return what the first one measures."""
        if self.size == 1:
            return measure()
        value = torch.tensor([measure() if self.leads else 0.0], dtype=torch.float64, device=self.device)
        _together(distributed.broadcast, value, 0)
        return value.item()


ALONE = Crew(torch.device("cpu"))


def together(
    devices: Sequence[torch.device],
    work: Callable[Concatenate[Crew, Job], Result],
    *job: Job.args,
    **settings: Job.kwargs,
) -> Result:
    """Run a work in one process per device and return what it returned in the first, which is this one.

    The others get copies of its arguments by way of a file, without the settings, and what they return is dropped.

    Args:
        devices: One per process.
        work: A function of a module, which does the same in each but for its crew's rank.
        job: Its arguments behind the crew.
        settings: Arguments for this process alone.

    Raises:
        OutOfResourcesError: Another process ended too early.
    """
    if len(devices) == 1:
        return work(Crew(devices[0]), *job, **settings)
    crews = [Crew(device, rank, len(devices)) for rank, device in enumerate(devices)]
    threads = torch.get_num_threads()
    with TemporaryDirectory(prefix="pocketlm-") as name:
        folder = Path(name)
        torch.save((work, crews, max(1, threads // len(crews)), job), folder / JOB)
        command = [sys.executable, "-m", "pocketlm.model.crew", name]
        # Their input is a pipe that nothing is written to: its end tells them that this process is gone.
        others = [subprocess.Popen([*command, str(crew.rank)], stdin=subprocess.PIPE) for crew in crews[1:]]
        try:
            torch.set_num_threads(max(1, threads // len(crews)))
            _wait_until_ready(folder, others)
            _meet(crews[0], folder)
            return work(crews[0], *job, **settings)
        except _LostError as error:
            _wait(others)
            said = [path.read_text(encoding="utf-8") for path in sorted(folder.glob(FAILURE.format("*")))]
            raise OutOfResourcesError(
                f"One of {len(crews)} processes that trained together has ended "
                f"({said[0] if said else 'killed, for lack of memory perhaps'}). "
                "CUDA_VISIBLE_DEVICES=0 trains in one; a training goes on from its last checkpoint"
            ) from error
        finally:
            torch.set_num_threads(threads)
            _part()
            _wait(others)
            for other in others:
                other.kill()
                other.wait()
                other.stdin.close()


def follow(folder: Path, rank: int) -> None:
    """Do what the first process does, in another one."""
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    try:
        work, crews, threads, job = torch.load(folder / JOB, map_location="cpu", weights_only=False, mmap=True)
        know_slices()
        torch.set_num_threads(threads)
        (folder / READY.format(rank)).touch()
        _meet(crews[rank], folder)
        work(crews[rank], *job)
    except _LostError:
        sys.exit(1)  # the first one tells why
    except BaseException as error:
        (folder / FAILURE.format(rank)).write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        sys.exit(1)
    finally:
        _part()


def _end_with_the_first() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


def _wait_until_ready(folder: Path, others: Sequence[subprocess.Popen]) -> None:
    """Wait until all have read the job, and remove it: it may be large."""
    while len(list(folder.glob(READY.format("*")))) < len(others):
        if any(other.poll() is not None for other in others):
            raise _LostError
        time.sleep(POLL)
    (folder / JOB).unlink()


def _meet(crew: Crew, folder: Path) -> None:
    store = distributed.FileStore(str(folder / MEETING), crew.size)
    backend = "nccl" if crew.device.type == "cuda" else "gloo"
    _together(distributed.init_process_group, backend, store=store, rank=crew.rank, world_size=crew.size)


def _part() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _together(do: Callable[..., object], *given: Any, **settings: Any) -> None:
    """Do what all processes have to do at the same time."""
    try:
        do(*given, **settings)
    except RuntimeError as error:  # gloo's and NCCL's own are kinds of it
        raise _LostError from error


def _wait(others: Iterable[subprocess.Popen]) -> None:
    deadline = time.monotonic() + GOODBYE
    while any(other.poll() is None for other in others) and time.monotonic() < deadline:
        time.sleep(POLL)


if __name__ == "__main__":
    from pocketlm.model import crew as this  # what is pickled is of the module by its name, not of `__main__`

    this.follow(Path(sys.argv[1]), int(sys.argv[2]))
