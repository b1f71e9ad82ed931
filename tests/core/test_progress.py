"""Off a terminal, long work says how far it is, also from inside one call."""

import logging
import threading
import time

import pytest

from mptrain.core import progress as module
from mptrain.core.progress import progress, track


@pytest.fixture
def lines(monkeypatch, caplog):
    """Messages so far, with a line every hundredth of a second."""
    monkeypatch.setattr(module, "LINE_EVERY", 0.01)
    caplog.set_level(logging.INFO, "mptrain")
    return lambda: [r.message for r in caplog.records]


def wait_for(lines, text):
    until = time.monotonic() + 30
    while not any(text in line for line in lines()):
        assert time.monotonic() < until, f"no line with {text!r}: {lines()}"
        time.sleep(0.005)


def test_a_single_long_call_is_not_silent(lines):
    with progress("export ov_int8"):
        wait_for(lines, "export ov_int8: 0 s so far")


def test_counted_work_says_what_is_done_and_left(lines):
    for number in track([10, 20, 30, 40], "compress"):
        if number == 30:
            wait_for(lines, "compress: 2 of 4, 0 s left")


def test_a_run_that_continues_counts_on_and_a_note_stands_beside(lines):
    with progress("dense/train", 12, done=5, unit="step") as bar:
        bar.update(2)
        bar.say("loss 0.500")
        wait_for(lines, "dense/train: step 7 of 12, loss 0.500, 0.0")


def test_work_inside_work_speaks_for_both(lines):
    with progress("outer"):
        wait_for(lines, "outer")
        with progress("inner"):
            wait_for(lines, "inner")
            before = len([line for line in lines() if "outer" in line])
            seen = len(lines())
            until = time.monotonic() + 30
            while len(lines()) < seen + 5 and time.monotonic() < until:
                time.sleep(0.005)
            assert len([line for line in lines() if "outer" in line]) <= before + 1
        seen = len([line for line in lines() if "outer" in line])
        until = time.monotonic() + 30
        while len([line for line in lines() if "outer" in line]) == seen and time.monotonic() < until:
            time.sleep(0.005)
        assert len([line for line in lines() if "outer" in line]) > seen


def test_it_ends_with_the_work_also_when_that_fails(lines):
    with pytest.raises(ValueError, match="broken"), progress("failing"):
        raise ValueError("broken")
    until = time.monotonic() + 30
    while any(t.name == "progress" for t in threading.enumerate()) and time.monotonic() < until:
        time.sleep(0.005)
    assert not any(t.name == "progress" for t in threading.enumerate())


def test_short_work_says_nothing(caplog):
    caplog.set_level(logging.INFO, "mptrain")
    assert list(track(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    assert list(track([1], "hidden", shown=False)) == [1]
    assert not caplog.records


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    for _ in track(range(3), "testing"):
        pass
    with progress("converting"):
        pass
    assert "testing" in (said := capsys.readouterr().err) and "converting" in said
