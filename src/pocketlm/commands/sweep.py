"""The frontier: one size after another from the same measurements, and the results beside each other."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pocketlm.errors import BadInputError, ImpossibleBudgetError
from pocketlm.fit import fit
from pocketlm.pipeline.artefact import check_replaceable
from pocketlm.pipeline.planning import Fit, Planned
from pocketlm.pipeline.stages import Progress, silent
from pocketlm.plan.budget import parse_size
from pocketlm.report.content import Report, to_json
from pocketlm.report.frontier import frontier_data, frontier_markdown, frontier_page
from pocketlm.report.write import is_whole, read_report, replace_text

DATA, OTHERS = "frontier.json", ("frontier.md", "frontier.html")
LARGE = 10**12  # bytes, of which any share that is a size is some


@dataclass(frozen=True)
class Frontier:
    """What a sweep made.

    Attributes:
        reports: By the name of the folder, in the order of the sizes; each is a whole result of `fit`.
        refused: Sizes that cannot be met, and why.
    """

    reports: dict[str, Report]
    refused: dict[str, str]


def sweep(
    job: Fit,
    sizes: tuple[str, ...],
    progress: Progress = silent,
    announce: Callable[[Planned], None] = lambda planned: None,
) -> Frontier:
    """Fit a model to several sizes, into a folder each under `job.out`, and write what that bought.

    Text, statistics and measured damages are shared through the cache. A sweep that was stopped goes on: sizes whose
    folder this very command line made, of files that are as they were, are not done again, and it says so; from Python,
    where there is none, stages are.

    Args:
        job: As for `fit`; its size is ignored.
        sizes: Such as 50MB, 40%.
        progress: Called as the work goes on.
        announce: Called with each plan before it is run.

    Raises:
        BadInputError: No sizes are given, a size is no size, the folder of one holds something else, the frontier's
            files are a person's, or the job has a time, which is of one run. All of that before any work.
        ImpossibleBudgetError: None of the sizes can be met.
    """
    _check(job, sizes)
    names = {size.replace("%", "percent").replace(" ", ""): size for size in sizes}
    jobs = {name: replace(job, size=size, out=job.out / name) for name, size in names.items()}
    made = {name: None if job.force else _made_before(each) for name, each in jobs.items()}
    for name, each in jobs.items():
        if not made[name]:  # the last one's folder is looked at before hours go into the first
            check_replaceable(each.out, job.force, each.reads)
    reports: dict[str, Report] = {}
    refused: dict[str, str] = {}
    for name, each in jobs.items():
        if made[name]:
            progress(f"{each.size} is kept from an earlier run of this command; --force makes it anew", 1, 1)
        try:
            reports[name] = made[name] or fit(each, progress, announce)
        except ImpossibleBudgetError as error:
            refused[names[name]] = str(error)
        if reports:  # behind each size: what breaks a later one takes nothing of the finished ones
            _write(job, reports, refused)
    if not reports:
        raise ImpossibleBudgetError(next(iter(refused.values())))
    return Frontier(reports, refused)


def _write(job: Fit, reports: dict[str, Report], refused: dict[str, str]) -> None:
    data = frontier_data(reports) | {"refused": refused, "command": job.command}
    replace_text(job.out / DATA, to_json(data) + "\n")
    for name, text in zip(OTHERS, (frontier_markdown, frontier_page), strict=True):
        replace_text(job.out / name, text(reports, refused))


def _check(job: Fit, sizes: tuple[str, ...]) -> None:
    """Refuse what makes no sweep, and to replace a person's files that are named like a frontier's."""
    if not sizes:
        raise BadInputError("A sweep needs sizes, such as --sweep 40MB,60MB,80MB")
    if job.time:
        raise BadInputError("--time is for one size: leave it out of a sweep. --preset fast is the quick one")
    for size in sizes:
        parse_size(size, LARGE)  # what cannot be read is said before any is made
    there = [job.out / name for name in (DATA, *OTHERS) if (job.out / name).exists()]
    if not there or job.force:
        return
    try:
        ours = {"points", "choice", "refused"} <= json.loads((job.out / DATA).read_text(encoding="utf-8")).keys()
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise BadInputError(
            f"{there[0]} exists already, and no sweep made it. Give another folder with -o, or --force to replace it"
        )


def _made_before(job: Fit) -> Report | None:
    """Return the report that an earlier run of the same command made of what it reads, if all of it is still there."""
    made = job.out / "report.json"
    if not made.is_file() or not is_whole(job.out):
        return None
    paths = [Path(each) for each in job.reads if each and Path(each).exists()]
    read = [file for path in paths for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file()]
    if any(file.stat().st_mtime > made.stat().st_mtime for file in read):
        return None
    report = read_report(job.out)
    return report if job.command and report.command == job.command else None
