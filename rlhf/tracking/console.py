"""Shows a running stage on the terminal: log lines, and a growing curve or plain lines. All of it goes to stderr."""

from __future__ import annotations

import io
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from tqdm import tqdm

from rlhf.config.run_config import ProgressDisplay
from rlhf.runtime.dist import World
from rlhf.tracking.metric_registry import metric
from rlhf.tracking.text_table import number, printable_lines

logger = logging.getLogger(__name__)

_OUR_LOGGERS = ("rlhf", "stages", "data", "run_pipeline", "__main__")
_SECONDS_BETWEEN_LINES = 10.0
_BAR = "{desc} {n_fmt}/{total_fmt} |{bar:0}CURVE| {elapsed}<{remaining} {rate_fmt}{postfix}"
"""Short, so that the headline metrics fit into 80 columns. A curve stands where others have a bar: it grows as far."""
_CURVES = ("train/loss", "objective/scores")
"""Metrics of that curve; a stage has one of them."""
_PARTS = 240  # of a stage, whose means are kept: the curve of a long one costs no more
_LEVELS, _ASCII_LEVELS = "▁▂▃▄▅▆▇█", "_.:-=+*#"


def setup_logging(world: World, *, quiet: bool = False) -> None:
    """Show our messages from INFO up on the main rank (`quiet`: warnings), and each warning of another rank once.

    Other libraries show warnings only. A second call replaces the console handler of the first.
    """
    handler = logging.StreamHandler(_AboveTheBar())
    handler.setFormatter(_LineFormat("" if world.is_main else f"[rank {world.rank}] "))
    if not world.is_main:
        handler.addFilter(_first_of_each())
    root = logging.getLogger()
    for old in [old for old in root.handlers if type(old) is logging.StreamHandler]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in _OUR_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO if world.is_main and not quiet else logging.WARNING)
    logging.captureWarnings(True)


class _AboveTheBar(io.TextIOBase):
    """stderr, with a progress bar moved out of the way; one write per record, so that ranks do not interleave."""

    def write(self, text: str) -> int:
        tqdm.write(text, file=sys.stderr, end="")
        return len(text)


class _LineFormat(logging.Formatter):
    """`12:34:56 message`, with the rank if it is not the main one, and the level from WARNING up.

    Messages and tracebacks may quote model output, so control characters are escaped.
    """

    def __init__(self, prefix: str) -> None:
        super().__init__(f"%(asctime)s {prefix}%(label)s%(message)s", datefmt="%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        record.label = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        return printable_lines(super().format(record))


def _first_of_each() -> Callable[[logging.LogRecord], bool]:
    """A filter that lets each message through once."""
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        count = len(seen)
        seen.add(record.getMessage())
        return len(seen) > count

    return is_new


def headlines(metrics: Mapping[str, float]) -> dict[str, str]:
    """The headline metrics among `metrics`, formatted, by a short name (`loss`, `kl`, but `eval/loss`)."""
    return {_short(key): number(metrics[key]) for key in metrics if metric(key).headline}


def _short(key: str) -> str:
    return key if key.startswith("eval/") else key.split("/")[-1]


def sparkline(values: Sequence[float], width: int, *, encoding: str | None) -> str:
    """A curve of at most `width` characters: means of equally many values, blank where none is finite.

    Plain ASCII where the terminal's `encoding` has no block characters.
    """
    count = min(width, len(values))
    parts = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0) or 1.0
    finite = [[value / largest for value in part if math.isfinite(value)] for part in parts]
    means = [fmean(part) if part else None for part in finite]
    known = [mean for mean in means if mean is not None]
    try:
        levels = _LEVELS if _LEVELS.encode(encoding or "ascii") else ""
    except (UnicodeEncodeError, LookupError):
        levels = _ASCII_LEVELS
    low, spread = min(known, default=0.0), max(known, default=0.0) - min(known, default=0.0)
    top = len(levels) - 1
    return "".join(" " if mean is None else levels[round((mean - low) / (spread or 1.0) * top)] for mean in means)


class StageProgress:
    """Shows how far a stage is: one bar with a curve on a terminal, elsewhere lines, or nothing.

    A line is printed for the first and the last step and for each evaluation, and otherwise at most every ten seconds.
    """

    def __init__(self, stage: str, total_steps: int, *, mode: ProgressDisplay) -> None:
        self._stage, self._total, self._mode = stage, total_steps, mode
        if mode is ProgressDisplay.auto:
            self._mode = ProgressDisplay.bar if sys.stderr.isatty() else ProgressDisplay.plain
        self._bar: tqdm[Any] | None = None
        self._headlines: dict[str, str] = {}
        self._history: dict[str, dict[int, tuple[float, int]]] = {}  # sum and count of each part of the stage
        self._first_step, self._start, self._last_line = 0, 0.0, 0.0

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` steps are finished, with the headline metrics."""
        if self._mode is ProgressDisplay.bar:
            self._remember(step, metrics)
            self._draw(step, headlines(metrics))
        elif self._mode is ProgressDisplay.plain:
            self._print(step, headlines(metrics))

    def close(self) -> None:
        """Leave the bar as it is, and below it on a terminal the curve of each headline metric."""
        if self._bar is not None:
            self._bar.close()
        for key in self._history:
            values = self._values(key)
            if len(values) > 2:
                curve = sparkline(values, 40, encoding=sys.stderr.encoding)
                logger.info(
                    "%s %-16s %s  %s to %s", self._stage, _short(key), curve, *map(number, (values[0], values[-1]))
                )

    def _remember(self, step: int, metrics: Mapping[str, float]) -> None:
        part = max(step - 1, 0) * min(_PARTS, self._total) // max(self._total, 1)
        for key in metrics:
            if metric(key).headline:
                total, count = self._history.setdefault(key, {}).get(part, (0.0, 0))
                self._history[key][part] = (total + metrics[key], count + 1)

    def _values(self, key: str) -> list[float]:
        """What was logged of a metric: all of a short stage, means over the parts of a long one."""
        return [total / count for total, count in self._history.get(key, {}).values()]

    def _draw(self, step: int, shown: dict[str, str]) -> None:
        # Each stays until it has a new value. Training metrics come first: what does not fit is cut off at the end.
        self._headlines |= shown
        ordered = dict(sorted(self._headlines.items(), key=lambda item: item[0].startswith("eval/")))
        if self._bar is None:  # created late, because a resumed stage does not begin at step 0
            about = {"desc": self._stage, "total": self._total, "unit": "step"}
            self._bar = tqdm(initial=step, dynamic_ncols=True, bar_format=_BAR.replace("CURVE", ""), **about)
        # As far as the stage has come: what is left of 80 columns beside the numbers, and more on a wide terminal.
        width = min(24, max(6, shutil.get_terminal_size().columns - 74))
        drawn = next(filter(None, map(self._values, _CURVES)), [])
        come = -(-step * width // self._total) if self._total else 0
        curve = sparkline(drawn, come, encoding=sys.stderr.encoding) if drawn and come else ""
        self._bar.bar_format = _BAR.replace("CURVE", curve.ljust(width))
        self._bar.set_postfix(ordered, refresh=step == self._bar.n)
        self._bar.update(step - self._bar.n)

    def _print(self, step: int, shown: dict[str, str]) -> None:
        now = time.monotonic()
        if not self._start:
            self._first_step, self._start = step, now
        evaluated = any(name.startswith("eval/") for name in shown)
        if step < self._total and not evaluated and now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        numbers = "  ".join(f"{name} {value}" for name, value in shown.items())
        speed = ""
        if step > self._first_step:
            seconds = (now - self._start) / (step - self._first_step)
            speed = f"  {number(seconds)} s/step, {tqdm.format_interval(seconds * (self._total - step))} left"
        logger.info("%s %d/%d  %s%s", self._stage, step, self._total, numbers, speed)
