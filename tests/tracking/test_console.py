"""What reaches the terminal, from which rank, in which form."""

import io
import logging
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from rlhf.config.run_config import ProgressDisplay
from rlhf.runtime.dist import World
from rlhf.tracking.console import StageProgress, setup_logging, sparkline


def world(rank):
    return World(rank=rank, size=4, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def _logging_as_before():
    names = [None, "rlhf", "stages", "data", "run_pipeline", "__main__"]
    levels = [logging.getLogger(name).level for name in names]
    handlers = list(logging.getLogger().handlers)
    logging.getLogger().handlers[:] = [each for each in handlers if type(each) is not logging.StreamHandler]
    yield
    logging.captureWarnings(False)
    logging.getLogger().handlers[:] = handlers
    for name, level in zip(names, levels, strict=True):
        logging.getLogger(name).setLevel(level)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_main_rank_shows_our_information_and_the_warnings_of_others(capfd):
    setup_logging(world(0))
    logging.getLogger("rlhf.engine").info("64 = 4 ranks x 16")
    logging.getLogger("rlhf.engine").debug("detail")
    logging.getLogger("transformers.x").info("chatter")
    logging.getLogger("somebody").warning("careful")
    out, err = capfd.readouterr()
    assert out == ""
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in err.splitlines()] == [
        "64 = 4 ranks x 16",
        "WARNING: careful",
    ]


def test_another_rank_shows_each_warning_once_under_its_name(capfd):
    setup_logging(world(3))
    logger = logging.getLogger("stages.ppo")
    logger.info("not shown")
    for attempt in (1, 1, 2):
        logger.warning("attempt %d", attempt)
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["[rank 3] WARNING: attempt 1", "[rank 3] WARNING: attempt 2"]


def test_setting_up_twice_shows_a_line_once_and_quiet_hides_information(capfd):
    setup_logging(world(0))
    setup_logging(world(0))
    logging.getLogger("data").info("once")
    setup_logging(world(0), quiet=True)
    logging.getLogger("data").info("hidden")
    logging.getLogger("data").warning("shown")
    assert [line[9:] for line in capfd.readouterr().err.splitlines()] == ["once", "WARNING: shown"]


def test_a_log_line_cannot_steer_the_terminal(capfd):
    setup_logging(world(0))
    logging.getLogger("rlhf").info("the model said %s\nand ended", "\x1b[2J\r")
    assert capfd.readouterr().err.splitlines()[0].endswith(r"the model said \x1b[2J\r")


def test_a_record_is_one_write_so_that_ranks_do_not_interleave(monkeypatch):
    writes = []

    class Recorder(io.StringIO):
        def write(self, text):
            writes.append(text)
            return len(text)

    setup_logging(world(0))
    monkeypatch.setattr(sys, "stderr", Recorder())
    logging.getLogger("rlhf").info("a\nb")
    assert len([text for text in writes if text]) == 1


def plain_lines(caplog, shows, total):
    caplog.set_level(logging.INFO, logger="rlhf.tracking.console")
    progress = StageProgress("ppo", total, mode=ProgressDisplay.plain)
    for step, metrics in shows:
        progress.show(step, metrics)
    progress.close()
    return [record.getMessage() for record in caplog.records]


def test_plain_lines_come_for_the_first_the_last_and_the_evaluated_step(caplog, capfd):
    shows = [(step, {"objective/kl": step / 4, "actor/loss": 1.0}) for step in range(5, 9)]
    shows.insert(2, (6, {"eval/score": 0.5}))
    lines = plain_lines(caplog, shows, total=8)
    assert lines[0] == "ppo 5/8  kl 1.25"
    assert re.fullmatch(r"ppo 6/8  eval/score 0\.5  \S+ s/step, 00:00 left", lines[1])
    assert re.fullmatch(r"ppo 8/8  kl 2  \S+ s/step, 00:00 left", lines[2])
    assert len(lines) == 3
    assert "\r" not in capfd.readouterr().err


def test_the_time_left_follows_from_the_steps_since_the_start(caplog, monkeypatch):
    clock = iter([100.0, 130.0])
    monkeypatch.setattr("rlhf.tracking.console.time", SimpleNamespace(monotonic=lambda: next(clock)))
    lines = plain_lines(caplog, [(10, {}), (15, {"objective/kl": 1.0})], total=40)
    # 30 s for 5 steps are 6 s a step, 25 steps left are 150 s.
    assert lines[1] == "ppo 15/40  kl 1  6 s/step, 02:30 left"


def test_auto_is_a_bar_on_a_terminal(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="rlhf.tracking.console")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = StageProgress("sft", 4, mode=ProgressDisplay.auto)
    for step in range(1, 5):
        progress.show(step, {"train/loss": 2.0 / step, "train/lr": 0.1})
    progress.show(4, {"eval/loss": 0.75})
    progress.close()
    last = terminal.getvalue().split("\r")[-1]
    assert last.startswith("sft 4/4 |")
    assert "loss=0.5" in last
    assert "eval/loss=0.75" in last
    assert "lr=" not in last
    assert [record.getMessage() for record in caplog.records] == ["sft loss             #:._  2 to 0.5"]


def test_eighty_columns_show_what_training_is_about(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (80, 24))
    progress = StageProgress("reward", 1000, mode=ProgressDisplay.bar)
    progress.show(0, {"eval/loss": 0.6931, "eval/accuracy": 0.4781})
    for step in range(1, 101):
        progress.show(step, {"train/loss": 0.6512, "train/accuracy": 0.6312})
    progress.close()
    last = terminal.getvalue().split("\r")[-1].rstrip()
    assert len(last) <= 80
    assert "loss=0.6512" in last
    assert "accuracy=0.63" in last


@pytest.mark.parametrize(
    ("values", "width", "curve"),
    [
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 8, "▁▂▃▄▅▆▇█"),
        ([7.0, 7.0, 0.0, 0.0], 2, "█▁"),  # means of two each
        ([1.0, 1.0, 1.0], 8, "▁▁▁"),  # no more characters than values
        ([0.0, math.nan, 1.0, math.inf], 4, "▁ █ "),
        ([math.nan, 3.0], 1, "▁"),
        ([math.nan], 4, " "),
        ([-1e308, 1e308], 2, "▁█"),
        ([], 4, ""),
    ],
)
def test_a_sparkline_has_the_means_of_equally_many_values(values, width, curve):
    assert sparkline(values, width, encoding="utf-8") == curve


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", None, "unknown-8"])
def test_a_terminal_without_block_characters_has_a_curve_of_plain_ones(encoding):
    curve = sparkline([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], 8, encoding=encoding)
    assert curve == "_.:-=+*#"
    assert curve.isascii()


def test_the_bar_is_a_curve_that_grows_and_the_end_has_one_of_each_headline(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="rlhf.tracking.console")
    terminal = Terminal()
    monkeypatch.setattr(Terminal, "encoding", "utf-8")
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (98, 24))
    monkeypatch.setenv("COLUMNS", "98")
    progress = StageProgress("sft", 48, mode=ProgressDisplay.bar)
    progress.show(0, {"eval/loss": 3.0})
    for step in range(1, 49):
        progress.show(step, {"train/loss": float(step <= 24), "train/lr": 0.5})
        if step == 24:
            half = str(progress._bar)
    whole = str(progress._bar)
    progress.close()
    assert re.match(r"sft 24/48 \|▁{12} {12}\|", half)
    assert re.match(r"sft 48/48 \|█{12}▁{12}\|", whole)
    (line,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"sft loss +█{20}▁{20}  1 to 0", line)


def test_a_long_stage_keeps_no_more_than_means_of_its_parts(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="rlhf.tracking.console")
    monkeypatch.setattr(Terminal, "encoding", "utf-8")
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = StageProgress("sft", 2_400, mode=ProgressDisplay.bar)
    for step in range(1, 2_401):
        progress.show(step, {"train/loss": float(step % 2 + (step > 1_200))})
    assert len(progress._values("train/loss")) == 240
    progress.close()
    (line,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"sft loss +▁{20}█{20}  0\.5 to 1\.5", line)


def test_auto_is_plain_without_a_terminal_and_quiet_is_silent(caplog, capfd):
    caplog.set_level(logging.INFO, logger="rlhf.tracking.console")
    StageProgress("sft", 2, mode=ProgressDisplay.auto).show(1, {"train/loss": 2.0})
    assert [record.getMessage() for record in caplog.records] == ["sft 1/2  loss 2"]
    caplog.clear()
    progress = StageProgress("sft", 2, mode=ProgressDisplay.quiet)
    progress.show(1, {"train/loss": 2.0})
    progress.show(2, {"train/loss": 2.0})
    progress.close()
    assert caplog.records == []
    assert capfd.readouterr().err == ""


def test_a_log_line_does_not_break_the_bar(monkeypatch):
    terminal = Terminal()
    setup_logging(world(0))
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = StageProgress("sft", 2, mode=ProgressDisplay.bar)
    progress.show(1, {})
    logging.getLogger("rlhf").info("saved")
    progress.show(2, {})
    progress.close()
    line = next(line for line in terminal.getvalue().split("\n") if "saved" in line)
    assert re.fullmatch(r"\d\d:\d\d:\d\d saved", line.split("\r")[-1])
