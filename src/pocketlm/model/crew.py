"""Several processes train one model: each learns from its share of every batch, and all take the same step.

    batch ─> a share for each process ─> gradients ─> their average ─> the same step everywhere

There are as many as there are GPUs for it. One process, the usual case, is a crew too, and shares nothing.
"""

import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, distributed, multiprocessing

from pocketlm.errors import OutOfResourcesError, PocketlmError
from pocketlm.model.learning import Lessons

JOB, MEETING = "job.pt", "meeting"
GOODBYE = 30  # seconds that others get to end by themselves
BACKENDS = "cpu:gloo,cuda:nccl"  # stored numbers are averaged on the CPU wherever the network is

Batch = TypeVar("Batch", Tensor, Lessons)
Job, Result = ParamSpec("Job"), TypeVar("Result")


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

    def average(self, parameters: Iterable[Tensor], loss: float, weight: float) -> float:
        """Give the parameters the average gradient of all processes and return the average loss.

        Args:
            parameters: With this one's gradient, where they have one; the same ones in every process.
            loss: This one's.
            weight: What this one's counts, such as the positions that it is a mean over.
        """
        if self.size == 1:
            return loss
        sums = torch.tensor([loss * weight, weight], dtype=torch.float64)
        distributed.all_reduce(sums)
        for parameter in parameters:
            if parameter.grad is not None:
                distributed.all_reduce(parameter.grad.mul_(weight / sums[1].item()))
        return (sums[0] / sums[1]).item()

    def agree(self, measure: Callable[[], float]) -> float:
        """Return what the first one measures."""
        if self.size == 1:
            return measure()
        value = torch.tensor([measure() if self.leads else 0.0], dtype=torch.float64)
        distributed.broadcast(value, 0)
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
    with TemporaryDirectory(prefix="pocketlm-") as folder:
        torch.save(job, Path(folder) / JOB)
        spawn = multiprocessing.get_context("spawn")
        crews = [Crew(device, rank, len(devices)) for rank, device in enumerate(devices)]
        others = [spawn.Process(target=_follow, args=(crew, work, folder), daemon=True) for crew in crews[1:]]
        for other in others:
            other.start()
        try:
            with _meeting(crews[0], folder):
                result = work(crews[0], *job, **settings)
            _wait_for(others)
            return result
        except RuntimeError as error:
            _wait_for(others)
            if any(other.exitcode for other in others):
                raise OutOfResourcesError(
                    f"One of {len(devices)} processes that trained together has ended, for lack of memory perhaps; it "
                    "says why above. CUDA_VISIBLE_DEVICES=0 trains in one. A training goes on from its last checkpoint"
                ) from error
            raise
        finally:
            for other in others:
                other.terminate()


def _wait_for(others: Iterable[multiprocessing.Process]) -> None:
    for other in others:
        other.join(GOODBYE)


def _follow(crew: Crew, work: Callable[..., object], folder: str) -> None:
    """Do what the first process does, in another one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first one ends the others
    if crew.device.type == "cuda":
        torch.cuda.set_device(crew.device)
    job = torch.load(Path(folder) / JOB, map_location="cpu", weights_only=False)
    with _meeting(crew, folder), suppress(PocketlmError):  # which the first one meets too, and tells
        work(crew, *job)


@contextmanager
def _meeting(crew: Crew, folder: str) -> Iterator[None]:
    distributed.init_process_group(
        BACKENDS if crew.device.type == "cuda" else "gloo",
        init_method=(Path(folder) / MEETING).absolute().as_uri(),
        rank=crew.rank,
        world_size=crew.size,
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()
