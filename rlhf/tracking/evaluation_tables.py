"""The results of `stage=eval` as tables of text, for the terminal and for the report.

Numbers stand with their 95% interval. Whatever is missing in a results file, or of another type than expected, shows
as a dash: a report says what is there. Left out: how the numbers are made (`compare.py`), and any layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.tracking.answer_statistics import is_number
from rlhf.tracking.text_table import number

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
    """What `results.json` says; tables without rows are left out.

    Args:
        results: the content of the file.
        meanings: have a column that says what each measure is, for which a terminal is too narrow.
    """
    found = [
        _measures(results, meanings=meanings),
        _judges(results),
        _places(results),
        *_reward_model(_mapping(results, "reward_model")),
    ]
    return [item for item in found if item.rows]


def _measures(results: Mapping[str, Any], *, meanings: bool) -> Table:
    sides = [side for side in ("model", "baseline") if results.get(side)]
    columns = [*sides, *(["difference"] if len(sides) > 1 else [])]
    rows = [
        [str(row.get("name", _NOTHING)), *(interval(row.get(side)) for side in columns), str(row.get("unit", ""))]
        + ([str(row.get("meaning", ""))] if meanings else [])
        for row in _listed(results, "measures")
    ]
    named = "; ".join(f"{side} is {results[side]}" for side in sides)
    note = f"Answers to {results.get('prompts', _NOTHING)} held-out prompts: {named}. In brackets the 95% interval."
    headings = ["measure", *columns, "unit", *(["meaning"] if meanings else [])]
    return Table("Answers to held-out prompts", note, headings, rows)


def _judges(results: Mapping[str, Any]) -> Table:
    columns = ["judge", "win rate", "wins", "ties", "losses", "judged", "where longer", "where shorter", "longer wins"]
    shares = ("win_rate_when_longer", "win_rate_when_shorter", "longer_wins")
    rows = [
        [_short(name), interval(found.get("win_rate"))]
        + [_shown(found.get(key)) for key in ("wins", "ties", "losses")]
        + [f"{_shown(found.get('judged'))} of {_shown(found.get('pairs'))}"]
        + [interval(found.get(key)) for key in shares]
        for name, found in _named(results, "judges")
    ]
    note = (
        "How often the model's answer is better than the other's; a tie counts one half. Beside it the same for pairs "
        "in which the model's answer is longer and shorter, and how often the longer answer wins, whoever gave it: far "
        "from one half, the judge may go by length. The judge `reward` is what PPO has trained the model to please."
    )
    return Table("Which answer is better", note, columns, rows)


def _places(results: Mapping[str, Any]) -> Table:
    rows = [
        [_short(name), interval(found.get("first_wins")), interval(found.get("inconsistent"))]
        for name, found in _named(results, "judges")
        if "first_wins" in found
    ]
    note = (
        "How often the answer that was shown first wins, which for a judge without a bias for places is one half; and, "
        "of judges that were asked in both orders, in how many pairs the other answer wins when the two are turned."
    )
    return Table("What the place of an answer does", note, ["judge", "first wins", "inconsistent"], rows)


def _reward_model(quality: Mapping[str, Any]) -> Iterator[Table]:
    parts = ([("all", quality)] if quality else []) + list(_named(quality, "subsets"))
    rows = [
        [
            name,
            interval(part.get("accuracy")),
            interval(part.get("margin")),
            _shown(_mapping(part, "accuracy").get("count")),
        ]
        for name, part in parts
    ]
    note = "How often the reward model prefers what people chose, and by how much, in its own units."
    yield Table("The reward model on held-out pairs", note, ["subset", "accuracy", "margin", "pairs"], rows)
    calibration = _mapping(quality, "calibration")
    bins = [
        [f"{_shown(row.get('from'))} to {_shown(row.get('to'))}", _shown(row.get("confidence"))]
        + [interval(row.get("right")), _shown(_mapping(row, "right").get("count"))]
        for row in _listed(calibration, "bins")
    ]
    columns = ["confidence", "mean confidence", "right", "pairs"]
    yield Table("Whether the reward model is as sure as it is right", _about_calibration(calibration), columns, bins)


def _about_calibration(calibration: Mapping[str, Any]) -> str:
    temperature = calibration.get("temperature")
    mended = "no temperature would mend it: all pairs are right, or no better than chance"
    if is_number(temperature):
        kind = "too sure of itself" if temperature > 1 else "not sure enough"
        mended = (
            f"divided by a temperature of {_rounded(temperature)} its scores would claim what they keep ({kind}; "
            f"fitted to these pairs), with an error of {_shown(calibration.get('error_at_temperature'))}"
        )
    return (
        "Of two responses the model favours one, and claims to be right with probability sigmoid(difference of their "
        f"scores), its confidence. Expected calibration error {_shown(calibration.get('error'))}; {mended}."
    )


def _short(judge: str) -> str:
    """A judge without the module of its function."""
    return judge.rpartition(":")[2]


def interval(value: Any) -> str:
    """`0.61 [0.55, 0.67]`, or less where there is less."""
    if not isinstance(value, Mapping):
        return _NOTHING
    mean, low, high = (value.get(key) for key in ("mean", "low", "high"))
    if not is_number(mean):
        return _NOTHING
    ends = f" [{_rounded(low)}, {_rounded(high)}]" if is_number(low) and is_number(high) else ""
    return f"{_rounded(mean)}{ends}"


def _rounded(value: float) -> str:
    """Three significant digits: an interval says how many of them count."""
    return f"{value:.3g}" if abs(value) < 1_000 else number(float(value))


def _shown(value: Any) -> str:
    return (number(value) if isinstance(value, int) else _rounded(value)) if is_number(value) else _NOTHING


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key)
    return value if isinstance(value, Mapping) else {}


def _listed(content: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = content.get(key)
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []


def _named(content: Mapping[str, Any], key: str) -> list[tuple[str, Mapping[str, Any]]]:
    return [(str(name), found) for name, found in _mapping(content, key).items() if isinstance(found, Mapping)]


def summary_of(results: Mapping[str, Any]) -> dict[str, float]:
    """The means in `results.json` by a name such as `model/kl`, `difference/score`, `win_rate/reward`."""
    found = {
        f"{side}/{row.get('name')}": _mean(row.get(side))
        for row in _listed(results, "measures")
        for side in ("model", "baseline", "difference")
    }
    found |= {f"win_rate/{name}": _mean(judge.get("win_rate")) for name, judge in _named(results, "judges")}
    quality = _mapping(results, "reward_model")
    found |= {
        "reward_model/accuracy": _mean(quality.get("accuracy")),
        "reward_model/calibration_error": _mapping(quality, "calibration").get("error"),
    }
    return {name: float(value) for name, value in found.items() if is_number(value)}


def _mean(value: Any) -> Any:
    return value.get("mean") if isinstance(value, Mapping) else None
