"""How far a reproduction is: what the store holds, what its processes log. Computes nothing."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime

from qtale_lib import log, report_stamp
from qtale_lib.jobs import Job, all_jobs, wanted_by
from qtale_lib.lab import Lab
from qtale_lib.log import Told
from qtale_lib.notebooks import choose
from qtale_lib.progress import short, span


def describe(labs: list[Lab]) -> list[str]:
    """Lines on a profile, or on a study's settings (the labs of one folder): stages, processes, places."""
    lab = labs[0]
    lines = [f"{stage:<20} {done} of {count}" for stage, (done, count) in stages(labs).items()]
    for told in log.tell(lab.directory):
        lines += at_work(told) if told.alive else [ended(told)]
        lines.append(f"log: {short(told.path)}")
    page = report_stamp.folder(lab) / "index.html"
    lines.append(f"report: {short(page)}{'' if page.is_file() else ', not written yet'}")
    return [*lines, f"figures: {short(lab.figures)}", f"store: {short(lab.store.root)}"]


def stages(labs: list[Lab]) -> dict[str, tuple[int, int]]:
    """(done, all) of each stage's jobs, and of the notebooks, which count as done once executed."""
    done, count = Counter(), Counter()
    for lab in labs:
        for job in _jobs(lab, is_study=len(labs) > 1):
            count[job.stage] += 1
            done[job.stage] += lab.seems_done(job)
    found = {stage: (done[stage], count[stage]) for stage in count}
    if len(labs) == 1:
        stamps = [labs[0].directory / "notebooks" / f"{book.stem}.json" for book in choose()]
        found["notebooks"] = sum(stamp.is_file() for stamp in stamps), len(stamps)
    return found


def _jobs(lab: Lab, is_study: bool) -> list[Job]:
    wanted = all_jobs(lab.profile)
    if not is_study:
        wanted = wanted_by(lab.profile, [book.name for book in choose()])
    return sorted(wanted, key=lambda job: (job.extra or "", job.bits is not None, -(job.bits or 0)))


def at_work(told: Told) -> list[str]:
    """Lines on a living process: since when, how far, at which jobs."""
    since = span((datetime.now(UTC) - told.first.at).total_seconds())
    lines = [f"running for {since}, since {_when(told.first.at)}: {_who(told)}"]
    if told.over or not told.running:
        line = told.over or told.last
        lines.append(f"  {_when(line.at)}  {': '.join(filter(None, (line.name, line.text)))}")
    for name, (begun, line) in told.running.items():
        lines.append(f"  {_when(line.at)}  {name}: {line.text or 'begun'} (since {_when(begun)})")
    return lines


def ended(told: Told) -> str:
    """A line on a process that is gone."""
    how = told.last.text if told.last.event == "end" else "killed"
    return f"last run: {how} {_when(told.last.at)}, begun {_when(told.first.at)}: {_who(told)}"


def _who(told: Told) -> str:
    return f"{told.first.text} ({told.first.name})" if told.first.text else told.first.name


def _when(at: datetime) -> str:
    """In the clock's time here; with the date, where it is another than today's."""
    here, today = at.astimezone(), datetime.now().astimezone().date()
    return f"{here:%H:%M:%S}" if here.date() == today else f"{here:%Y-%m-%d %H:%M:%S}"
