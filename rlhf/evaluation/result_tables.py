"""Shows `results.json` of an evaluation as tables of text, for the terminal and for the report.

Numbers come with their 95% interval. A value that is missing, or of another type than expected, shows as a dash. See
also: `compare.py`, which makes the numbers.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.tracking.jsonl_log import is_number
from rlhf.tracking.text_table import number, table

FOLDER = "eval"
RESULTS, SAMPLES, JUDGEMENTS = "results.json", "samples.jsonl", "judgements.jsonl"
_NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """Rows of text under headings."""

    title: str
    note: str
    """What the numbers mean, for those who see them for the first time."""
    columns: Sequence[str]
    rows: list[list[str]]


def tables(results: Mapping[str, Any], *, meanings: bool) -> list[Table]:
    """The tables of `results.json` that have rows; with `meanings`, a column says what each measure is."""
    found = (_measures(results, meanings=meanings), _judges(results), _positions(results), *_reward_model(results))
    return [item for item in found if item.rows]


def text_tables(results: Mapping[str, Any]) -> Iterator[str]:
    """Each table and its note, for the terminal; too narrow for what the measures mean."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    for item in tables(results, meanings=False):
        note = textwrap.fill(item.note, width, break_long_words=False)
        yield f"{table(item.title, item.columns, rows=item.rows)}\n{note}"


def means(results: Mapping[str, Any]) -> dict[str, float]:
    """The means in `results.json` by a name such as `model/kl`, `difference/score`, `win_rate/reward`."""
    found = {
        f"{side}/{_at(row, 'name')}": _at(row, side, "mean")
        for row in _rows(results.get("measures"))
        for side in ("model", "baseline", "difference")
    }
    found |= {f"win_rate/{name}": _at(judge, "win_rate", "mean") for name, judge in _items(results.get("judges"))}
    found["reward_model/accuracy"] = _at(results, "reward_model", "accuracy", "mean")
    found["reward_model/calibration_error"] = _at(results, "reward_model", "calibration", "error")
    return {name: float(value) for name, value in found.items() if is_number(value)}


def interval(value: Any) -> str:
    """`0.61 [0.55, 0.67]`, or less if there is less."""
    mean, low, high = (_at(value, key) for key in ("mean", "low", "high"))
    if not is_number(mean):
        return _NOTHING
    return _rounded(mean) + (f" [{_rounded(low)}, {_rounded(high)}]" if is_number(low) and is_number(high) else "")


def _measures(results: Mapping[str, Any], *, meanings: bool) -> Table:
    sides = [side for side in ("model", "baseline") if results.get(side)]
    columns = [*sides, *(["difference"] if len(sides) > 1 else [])]
    ends = ["unit", *(["meaning"] if meanings else [])]
    rows = [
        [str(row.get("name", _NOTHING)), *(interval(row.get(side)) for side in columns)]
        + [str(row.get(key, "")) for key in ends]
        for row in _rows(results.get("measures"))
    ]
    named = "; ".join(f"{side} is {results[side]}" for side in sides)
    note = f"Answers to {results.get('prompts', _NOTHING)} held-out prompts: {named}. In brackets the 95% interval."
    return Table("Answers to held-out prompts", note, ["measure", *columns, *ends], rows)


def _judges(results: Mapping[str, Any]) -> Table:
    columns = ["judge", "win rate", "wins", "ties", "losses", "judged", "where longer", "where shorter", "longer wins"]
    rows = [
        [_short(name), interval(found.get("win_rate"))]
        + [_shown(found.get(key)) for key in ("wins", "ties", "losses")]
        + [f"{_shown(found.get('judged'))} of {_shown(found.get('pairs'))}"]
        + [interval(found.get(key)) for key in ("win_rate_when_longer", "win_rate_when_shorter", "longer_wins")]
        for name, found in _items(results.get("judges"))
    ]
    note = (
        "How often the model's answer is better than the baseline's; a tie counts one half. Beside it the same for "
        "pairs in which the model's answer is longer and shorter, and how often the longer answer wins, whoever gave "
        "it: far from one half, the judge may go by length. The judge `reward` is what PPO has trained the model to "
        "please."
    )
    return Table("Which answer is better", note, columns, rows)


def _positions(results: Mapping[str, Any]) -> Table:
    rows = [
        [_short(name), interval(found["first_wins"]), interval(found.get("inconsistent"))]
        for name, found in _items(results.get("judges"))
        if "first_wins" in found
    ]
    note = (
        "How often the answer that was shown first wins, one half for a judge without a position bias; and, for judges "
        "that saw both orders, in how many pairs the other answer wins when the two are swapped."
    )
    return Table("Position bias", note, ["judge", "first wins", "inconsistent"], rows)


def _reward_model(results: Mapping[str, Any]) -> Iterator[Table]:
    quality = results.get("reward_model")
    parts = ([("all", quality)] if isinstance(quality, Mapping) and quality else []) + _items(_at(quality, "subsets"))
    rows = [
        [name, *(interval(part.get(key)) for key in ("accuracy", "margin")), _shown(_at(part, "accuracy", "count"))]
        for name, part in parts
    ]
    note = "How often the reward model prefers what people chose, and by how much, in its own units."
    yield Table("The reward model on held-out pairs", note, ["subset", "accuracy", "margin", "pairs"], rows)
    calibration = _at(quality, "calibration")
    bins = [
        [f"{_shown(row.get('from'))} to {_shown(row.get('to'))}", _shown(row.get("confidence"))]
        + [interval(row.get("right")), _shown(_at(row, "right", "count"))]
        for row in _rows(_at(calibration, "bins"))
    ]
    columns = ["confidence", "mean confidence", "right", "pairs"]
    yield Table("Calibration of the reward model", _calibration_note(calibration), columns, bins)


def _calibration_note(calibration: Any) -> str:
    temperature = _at(calibration, "temperature")
    correction = "no temperature would correct it: all pairs are right, or no better than chance"
    if is_number(temperature):
        kind = "too sure of itself" if temperature > 1 else "not sure enough"
        correction = (
            f"it is {kind}: a temperature of {_rounded(temperature)}, fitted to these pairs, leaves an error of "
            f"{_shown(_at(calibration, 'error_at_temperature'))}"
        )
    return (
        "Of two responses the model favours one, and claims to be right with probability sigmoid(difference of their "
        f"scores), its confidence. Expected calibration error {_shown(_at(calibration, 'error'))}; {correction}."
    )


def _at(content: Any, *keys: str) -> Any:
    """The value under nested keys; None if anything on the way is missing."""
    for key in keys:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def _rows(value: Any) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def _items(value: Any) -> list[tuple[str, Mapping[str, Any]]]:
    found = value.items() if isinstance(value, Mapping) else ()
    return [(str(name), item) for name, item in found if isinstance(item, Mapping)]


def _short(judge: str) -> str:
    """A judge without the module of its function."""
    return judge.rpartition(":")[2]


def _rounded(value: float) -> str:
    """Three significant digits, as the interval says how many of them count."""
    return f"{value:.3g}" if abs(value) < 1_000 else number(float(value))


def _shown(value: Any) -> str:
    return (number(value) if isinstance(value, int) else _rounded(value)) if is_number(value) else _NOTHING
