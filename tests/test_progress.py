import io
import sys

import pytest

from jxfer.progress import Status, Tracker, progress


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def tracker(every_secs=10.0):
    clock, shown = Clock(), []
    return Tracker(shown.append, every_secs=every_secs, clock=clock), clock, shown


def test_reports_between_two_looks_are_not_shown():
    track, clock, shown = tracker()
    for step in range(100):
        clock.now = step / 2
        track("probe", step, 100)
    assert [status.done for status in shown] == [0, 20, 40, 60, 80]


def test_a_line_names_what_was_reported_last_and_not_what_was_shown_last():
    track, clock, shown = tracker()
    track("scratch · seed 0", 1, 8)
    clock.now = 5.0
    track("scratch · seed 1", 8, 8)
    clock.now = 15.0
    track("runs", 1, 10)
    assert (shown[-1].what, shown[-1].done, shown[-1].runs_done) == ("scratch · seed 1", 8, 1)


def test_the_time_left_counts_only_runs_that_were_run_here():
    track, clock, shown = tracker(every_secs=0.0)
    for done in range(6):
        track("runs", done, 10)  # five were kept from before
    track("pre-training · train", 1, 2)
    clock.now = 100.0
    track("pre-training · train", 2, 2)
    track("scratch", 1, 2)
    clock.now = 104.0
    track("runs", 6, 10)
    assert shown[-1].secs_left == 16.0


def test_a_status_reads_as_a_sentence():
    assert str(Status(what="planning scratch")) == "planning scratch"
    assert str(Status(3, 200, "scratch", 5, 10, 190.0)) == "3/200 runs, about 3 min left: scratch, 5/10"
    assert str(Status(3, 200, "scratch")) == "3/200 runs, time left not known yet: scratch"
    assert str(Status(200, 200, "scratch", 5, 10, 0.0)) == "200/200 runs"


@pytest.mark.parametrize(("terminal", "expected"), [(False, ["scratch · [all] shots, 1/8\n"]), (True, ["runs", "1/8"])])
def test_a_file_gets_lines_and_a_terminal_gets_bars(monkeypatch, terminal, expected):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    with progress() as track:
        track("scratch · [all] shots", 1, 8)
    assert "scratch · [all] shots" in stream.getvalue()
    assert all(text in stream.getvalue() for text in expected)
