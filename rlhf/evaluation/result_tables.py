"""Shows `results.json` of an evaluation as tables of text, for the terminal and for the report.

Numbers come with their 95% interval; one that is missing shows as a dash. See also: `compare.py`, which makes them.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf.tracking.jsonl_log import is_number
from rlhf.tracking.text_table import number, table

FOLDER = "eval"
RESULTS, SAMPLES, JUDGEMENTS = "results.json", "samples.jsonl", "judgements.jsonl"
Results = Mapping[str, Any]


class Table(NamedTuple):
    """Rows of text under headings."""

    title: str
    note: str
    """What the numbers mean, for those who see them for the first time."""
    columns: Sequence[str]
    rows: list[list[str]]


def tables(results: Results, *, meanings: bool) -> list[Table]:
    """The tables of `results.json` that have rows; with `meanings`, a column says what each measure is."""
    judges, quality = results.get("judges") or {}, results.get("reward_model")
    found = [_measures(results, meanings=meanings), _judges(judges), _positions(judges)]
    if quality:
        found += [_accuracy(quality), _calibration(quality["calibration"])]
    return [item for item in found if item.rows]


def text_tables(results: Results) -> Iterator[str]:
    """Each table and its note, for the terminal; too narrow for what the measures mean."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    for item in tables(results, meanings=False):
        note = textwrap.fill(item.note, width, break_long_words=False)
        yield f"{table(item.title, item.columns, rows=item.rows)}\n{note}"


def means(results: Results) -> dict[str, float]:
    """The means in `results.json` by a name such as `model/kl`, `difference/score`, `win_rate/reward`."""
    rows, quality = results["measures"], results["reward_model"] or {}
    sides = ("model", "baseline", "difference")
    found = {f"{side}/{row['name']}": row[side] for row in rows for side in sides if side in row}
    found |= {f"win_rate/{name}": judge["win_rate"] for name, judge in results["judges"].items()}
    found["reward_model/accuracy"] = quality.get("accuracy", {})
    found["reward_model/calibration_error"] = {"mean": quality.get("calibration", {}).get("error")}
    return {name: float(value["mean"]) for name, value in found.items() if is_number(value.get("mean"))}


def interval(value: Results | None) -> str:
    """`0.61 [0.55, 0.67]`, or less if there is less."""
    mean, low, high = ((value or {}).get(key) for key in ("mean", "low", "high"))
    ends = f" [{_shown(low)}, {_shown(high)}]" if is_number(mean) and is_number(low) else ""
    return f"{_shown(mean)}{ends}"


def _measures(results: Results, *, meanings: bool) -> Table:
    sides = [side for side in ("model", "baseline") if results.get(side)]
    columns = [*sides, *(["difference"] if len(sides) > 1 else [])]
    ends = ["unit", *(["meaning"] if meanings else [])]
    rows = [
        [row["name"], *(interval(row.get(side)) for side in columns), *(row[key] for key in ends)]
        for row in results.get("measures", ())
    ]
    named = "; ".join(f"{side} is {results[side]}" for side in sides)
    note = f"Answers to {results.get('prompts')} held-out prompts: {named}. In brackets the 95% interval."
    return Table("Answers to held-out prompts", note, ["measure", *columns, *ends], rows)


def _judges(judges: Mapping[str, Results]) -> Table:
    columns = ["judge", "win rate", "wins", "ties", "losses", "judged", "where longer", "where shorter", "longer wins"]
    rows = [
        [_short(name), interval(found["win_rate"]), *(_shown(found[key]) for key in ("wins", "ties", "losses"))]
        + [f"{_shown(found['judged'])} of {_shown(found['pairs'])}"]
        + [interval(found[key]) for key in ("win_rate_when_longer", "win_rate_when_shorter", "longer_wins")]
        for name, found in judges.items()
    ]
    note = (
        "How often the model's answer is better than the baseline's; a tie counts one half. Beside it the same for "
        "pairs in which the model's answer is longer and shorter, and how often the longer answer wins, whoever gave "
        "it: far from one half, the judge may go by length. The judge `reward` is what PPO has trained the model to "
        "please."
    )
    return Table("Which answer is better", note, columns, rows)


def _positions(judges: Mapping[str, Results]) -> Table:
    rows = [
        [_short(name), interval(found["first_wins"]), interval(found.get("inconsistent"))]
        for name, found in judges.items()
        if "first_wins" in found
    ]
    note = (
        "How often the answer that was shown first wins, one half for a judge without a position bias; and, for judges "
        "that saw both orders, in how many pairs the other answer wins when the two are swapped."
    )
    return Table("Position bias", note, ["judge", "first wins", "inconsistent"], rows)


def _accuracy(quality: Results) -> Table:
    parts = {"all": quality} | quality["subsets"]
    rows = [
        [name, interval(part["accuracy"]), interval(part["margin"]), _shown(part["accuracy"]["count"])]
        for name, part in parts.items()
    ]
    note = "How often the reward model prefers what people chose, and by how much, in its own units."
    return Table("The reward model on held-out pairs", note, ["subset", "accuracy", "margin", "pairs"], rows)


def _calibration(calibration: Results) -> Table:
    temperature = calibration["temperature"]
    correction = "no temperature would correct it: all pairs are right, or no better than chance"
    if temperature is not None:
        kind = "too sure of itself" if temperature > 1 else "not sure enough"
        correction = (
            f"it is {kind}: a temperature of {_shown(temperature)}, fitted to these pairs, leaves an error of "
            f"{_shown(calibration['error_at_temperature'])}"
        )
    note = (
        "Of two responses the model favours one, and claims to be right with probability sigmoid(difference of their "
        f"scores), its confidence. Expected calibration error {_shown(calibration['error'])}; {correction}."
    )
    columns = ["confidence", "mean confidence", "right", "pairs"]
    rows = [
        [f"{_shown(row['from'])} to {_shown(row['to'])}", _shown(row["confidence"])]
        + [interval(row["right"]), _shown(row["right"]["count"])]
        for row in calibration["bins"]
    ]
    return Table("Calibration of the reward model", note, columns, rows)


def _short(judge: str) -> str:
    """A judge without the module of its function."""
    return judge.rpartition(":")[2]


def _shown(value: float | None) -> str:
    """Three significant digits, as the interval says how many of them count; whole numbers and large ones whole."""
    if not is_number(value):
        return "–"
    return number(value) if isinstance(value, int) or abs(value) >= 1_000 else f"{value:.3g}"
