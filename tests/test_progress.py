"""What is said of work that takes long: plain lines, the live view, the log, and the time left."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path

import pytest
from pool_work import die, fail, note
from rich.console import Console
from rich.text import Text

from qtale_lib import log, progress
from qtale_lib.log import logged
from qtale_lib.pool import Outcome, Task, run_tasks
from qtale_lib.progress import Forecast, LiveWatcher, PlainWatcher, Stopclock, span

NOTE = "epoch 3.5 of 10, step 350 of 1,000, loss 1.234, R 0.612, 0.61 GiB"


class Clock:
    """time.monotonic, as a test sets it."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (4800, "1 h 20 min")]
)
def test_spans_read_as_people_say_them(seconds, text):
    assert span(seconds) == text


# The forecast.


def test_the_forecast_learns_what_a_unit_of_cost_takes(clock):
    tasks = [Task(name, fail, cost=10) for name in "abcd"]
    forecast = Forecast(tasks, workers=2)
    assert forecast.seconds() == 20
    forecast.ended(tasks[0], Outcome("a", "done", 20.0))
    forecast.started(tasks[1])
    forecast.progressed(tasks[1], 0.5)
    assert forecast.seconds() == 2 * 25 / 2


def test_a_running_task_tells_by_its_own_progress_and_until_one_is_over_tells_of_the_others(clock):
    tasks = [Task(name, fail, cost=10) for name in "ab"]
    forecast = Forecast(tasks, workers=1)
    forecast.started(tasks[0])
    clock.now += 30  # loading, which tells nothing
    forecast.progressed(tasks[0], 0.5)  # it went on from a checkpoint
    assert forecast.running["a"].seconds_left() is None and forecast.seconds() == 5 + 10
    clock.now += 10
    forecast.progressed(tasks[0], 0.6)
    assert forecast.running["a"].seconds_left() == pytest.approx(40)
    assert forecast.seconds() == pytest.approx(40 + 100)
    clock.now += 15  # since its last report
    assert forecast.running["a"].seconds_left() == pytest.approx(25)
    clock.now += 100
    assert forecast.running["a"].seconds_left() == 0
    assert forecast.share_done() == pytest.approx(0.3)
    forecast.put_off(tasks[0])
    assert forecast.share_done() == 0 and not forecast.running


# Plain lines.


def test_plain_progress_says_once_that_another_process_is_at_a_task(capsys):
    task = Task("a", fail)
    with PlainWatcher([task], 1) as watcher:
        for _ in range(2):
            watcher.started(task)
            watcher.put_off(task)
        watcher.ended(task, Outcome("a", "done", 1.0))
    assert capsys.readouterr().out.splitlines()[1:] == [
        "a: another process is at it; it comes last here", "[1/1] a: 1 s",
    ]  # fmt: skip


def test_plain_progress_says_what_ended_what_is_left_and_where_the_log_is(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tasks = [Task(name, fail, cost=10) for name in "ab"]
    with logged(tmp_path) as own, PlainWatcher(tasks, 1, own) as watcher:
        watcher.ended(tasks[0], Outcome("a", "done", 65.0))
        watcher.ended(tasks[1], Outcome("b", "failed", 1.0, "no good"))
    assert capsys.readouterr().out.splitlines() == [
        f"2 jobs, 1 at a time; log: logs/{own.path.name}",
        "[1/2] a: 1 min 05 s; about 1 min 05 s left",
        "[2/2] b: FAILED, no good",
    ]


def test_plain_progress_says_now_and_then_where_a_long_task_is(capsys, clock):
    task = Task("a", fail)
    with PlainWatcher([task], 1) as watcher:
        watcher.started(task)
        for percent in range(1, 100):
            clock.now += 60
            watcher.progressed(task, percent / 100, f"step {percent}")
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"a: {10 * n} %, step {10 * n}, {span(60 * (100 - 10 * n))} left" for n in range(1, 10)
    ]


# The live view.


@pytest.fixture
def terminal() -> Console:
    return Console(force_terminal=True, file=io.StringIO(), width=80, color_system="standard")


def seen(watcher: LiveWatcher) -> list[str]:
    """The lines of the view now."""
    with watcher.live.console.capture() as captured:
        watcher.live.console.print(watcher.view())
    return [re.sub(r"\s+", " ", line).strip() for line in Text.from_ansi(captured.get()).plain.splitlines()]


def test_the_live_view_shows_stages_jobs_and_where_each_is(clock, terminal):
    tasks = [Task(f"fine-tune {name}", fail, cost=10, stage="fine-tunings") for name in "ab"]
    tasks.append(Task("evaluate a", fail, cost=10, stage="results at 4 bit"))
    watcher = LiveWatcher(tasks, 2, None, terminal)
    watcher.started(tasks[0])
    clock.now += 20
    watcher.ended(tasks[0], Outcome(tasks[0].name, "done", 20.0))
    for task in tasks[1:]:
        watcher.started(task)
    watcher.progressed(tasks[1], 0.25, "epoch 0")
    clock.now += 10
    watcher.progressed(tasks[1], 0.5, NOTE)
    stages, everything, evaluating, since, training, where = seen(watcher)
    assert stages == "fine-tunings 1 of 2 · results at 4 bit 0 of 1"
    assert re.fullmatch(r"all 1 of 3 [━╸╺]+ 50 % 20 s left", everything)
    assert re.fullmatch(r"evaluate a [━╸╺]+ 0 %", evaluating) and since == "10 s"
    assert re.fullmatch(r"fine-tune b [━╸╺]+ 50 % 20 s left", training) and where == f"10 s: {NOTE}"
    watcher.put_off(tasks[2])
    assert not any("evaluate a" in line for line in seen(watcher))


def test_the_live_view_is_drawn_and_gone_at_the_end_and_lines_stay(terminal):
    task = Task("a [b]", fail, stage="fine-tunings")
    with LiveWatcher([task], 1, None, terminal) as watcher:
        watcher.started(task)
        watcher.progressed(task, 0.5, NOTE)
        watcher.live.refresh()
        watcher.ended(task, Outcome(task.name, "done", 61.0))
    written = terminal.file.getvalue()
    assert "fine-tunings 0 of 1" in written and NOTE in written
    assert "[1/1] a [b]: 1 min 01 s\n" in written and "\x1b[2K" in written  # drawn over
    assert "\x1b[?25h" in written.rpartition("fine-tunings")[2]  # the cursor is back


@pytest.mark.parametrize(
    ("is_terminal", "kind", "watching"),
    [(True, "xterm", LiveWatcher), (True, "dumb", PlainWatcher), (False, "xterm", PlainWatcher)],
)
def test_who_watches_depends_on_the_terminal(is_terminal, kind, watching, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    monkeypatch.setenv("TERM", kind)
    with progress.watcher([Task("a", fail)], 1, tmp_path) as watcher:
        assert type(watcher) is watching


# The log.


def events(path: Path) -> list[tuple[str, str, str]]:
    return [(line.event, line.name, line.text) for line in log.read(path)]


def test_the_log_tells_all_that_workers_report(tmp_path, capsys):
    tasks = [
        Task("a", note, (tmp_path / "a", "x"), rank=0),
        Task("b", fail, rank=1),
        Task("c", die, rank=2),
    ]
    with progress.watcher(tasks, 1, tmp_path) as watching:
        run_tasks(tasks, [{}], watching)
    (path,) = tmp_path.glob("logs/*.log")
    begin, jobs, *told, end = events(path)
    assert begin[:2] == ("begin", begin[1]) and begin[1].startswith(f"process {os.getpid()} on ")
    assert jobs == ("jobs", "", "3 jobs, 1 at a time") and end == ("end", "", "finished")
    assert [(event, name) for event, name, _ in told] == [
        ("start", "a"), ("at", "a"), ("over", "a"),
        ("start", "b"), ("over", "b"), ("start", "c"), ("over", "c"),
    ]  # fmt: skip
    assert told[1][2] == "50 %, half way"
    assert re.fullmatch(r"\[1/3\] \d s; about \d+ s left", told[2][2])
    assert "FAILED, ValueError: no good" in told[4][2] and "exit code -9" in told[6][2]


def test_a_process_has_one_log_of_a_folder_however_often_it_asks(tmp_path):
    with logged(tmp_path) as outer:
        with logged(tmp_path) as inner:
            inner.write("at", "a", "half\tway,\nor so")
        assert inner is outer
        Stopclock(outer).lap("runs", "3 jobs")
    with pytest.raises(KeyboardInterrupt), logged(tmp_path):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="odd"), logged(tmp_path):
        raise ValueError("odd")
    (path,) = tmp_path.glob("logs/*.log")
    assert [(event, text) for event, _, text in events(path) if event != "begin"] == [
        ("at", "half way, or so"), ("stage", "0 s; 3 jobs"), ("end", "finished"),
        ("end", "stopped"), ("end", "ended by ValueError: odd"),
    ]  # fmt: skip


def test_no_token_reaches_the_log(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "a-long-and-secret-word")
    monkeypatch.setenv("HF_TOKEN", "short")  # no token, or every "short" would go
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallelism")
    with logged(tmp_path) as own:
        own.write("over", "a", "401 for a-long-and-secret-word, hf_abcdefghijklmnopqrst; short parallelism")
    text = own.path.read_text()
    assert "401 for ***, ***; short parallelism" in text and "secret-word" not in text


def test_work_does_not_end_for_its_log(tmp_path):
    (tmp_path / "logs").write_text("no folder")
    with logged(tmp_path) as own:
        own.write("at", "a", "half way")
    assert (tmp_path / "logs").read_text() == "no folder"
    with logged(tmp_path / "other") as own:
        own._file.close()
        own._file = full()
        own.write("at", "a", "half way")
    assert [event for event, _, _ in events(own.path)] == ["begin"]


def full() -> io.RawIOBase:
    """A file on a disk that is full."""

    class Full(io.RawIOBase):
        def write(self, content: bytes) -> int:
            raise OSError(28, "No space left on device")

    return Full()


def test_a_line_that_is_cut_off_is_left_out(tmp_path):
    with logged(tmp_path) as own:
        own.write("at", "a", "half way")
    text = own.path.read_text()
    for length in range(len(text)):
        own.path.write_text(text[:length])
        assert len(log.read(own.path)) <= text[:length].count("\n") + 1
    own.path.write_text(f"{text}2026-01-01T")
    assert [line.event for line in log.read(own.path)] == ["begin", "at", "end"]
