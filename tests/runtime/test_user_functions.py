"""A call is interrupted after its time, and wherever the signal arrives, nothing is left behind."""

import json
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from rlhf.runtime import user_functions
from rlhf.runtime.user_functions import TimeLimitError, call_within, described


def test_a_call_gives_what_it_returns_or_raises():
    assert call_within(60, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        call_within(60, lambda: 1 / 0)


def test_a_call_is_interrupted_and_the_next_one_is_not():
    with pytest.raises(TimeLimitError):
        call_within(0.05, lambda: time.sleep(60))
    assert call_within(60, lambda: 3) == 3
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def test_a_call_that_swallows_the_interruption_is_an_error_once_it_ends():
    def stubborn():
        try:
            time.sleep(60)
        except BaseException:  # noqa: BLE001 - as some libraries do
            return 3

    with pytest.raises(TimeLimitError):
        call_within(0.05, stubborn)


def _interrupted_at(place):
    """What `call_within` does if the signal comes at the `place`-th instruction of it; None once it has fewer."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if frame.f_code.co_name != "call_within" or frame.f_code.co_filename != user_functions.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            if count == place:
                signal.raise_signal(signal.SIGVTALRM)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        outcome = call_within(60, lambda: "result")
    except TimeLimitError:
        outcome = "error"
    finally:
        sys.settrace(before)
    return outcome if count >= place else None


def test_the_signal_does_no_harm_wherever_it_comes():
    own = signal.signal(signal.SIGVTALRM, lambda *_: None)  # what was there before the call
    mine = signal.getsignal(signal.SIGVTALRM)
    try:
        outcomes = []
        while (outcome := _interrupted_at(len(outcomes) + 1)) is not None:
            outcomes.append(outcome)
            assert signal.getsignal(signal.SIGVTALRM) is mine
            assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
            signal.raise_signal(signal.SIGVTALRM)  # one that comes still later
    finally:
        signal.signal(signal.SIGVTALRM, own if callable(own) else signal.SIG_DFL)
    assert len(outcomes) > 50
    assert {*outcomes} == {"result", "error"}


def test_an_error_is_shown_in_one_line_with_its_place_and_not_with_a_whole_page():
    try:
        raise ValueError("<html>\n<body>" + "x" * 1000)
    except ValueError as error:
        text = described(error)
    assert text.startswith("ValueError: <html> <body>xxx")
    assert "... (test_user_functions.py, line " in text
    assert len(text) < 400


def test_the_place_is_a_line_of_the_user_and_not_of_a_library():
    with pytest.raises(ValueError, match="Expecting value") as found:
        json.loads("<html>")
    assert "(test_user_functions.py, line " in described(found.value)


def test_a_file_beside_a_folder_of_ours_is_the_users():
    ours = Path(user_functions.__file__).parents[1]
    assert user_functions._is_library(f"{ours}/rewards.py")
    assert not user_functions._is_library(f"{ours}_rewards.py")
    assert user_functions._is_library("/usr/lib/python3/dist-packages/requests/api.py")
