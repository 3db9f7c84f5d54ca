"""Tables fit the terminal, and what a model says stays text."""

import unicodedata

import pytest

from rlhf.tracking.text_table import number, printable, table


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, naïve, 日本語, 👩\u200d🔬", "plain, naïve, 日本語, 👩\u200d🔬"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\nb\rc\td\x7f", r"a\nb\rc\td\x7f"),
        ("\x9b31m", r"\x9b31m"),  # the one-byte form of ESC [
        ("\u202eevil\u2066\u2028\u2029", r"\u202eevil\u2066\u2028\u2029"),
        ("\ud800\U000e0001", r"\ud800\U000e0001"),
    ],
)
def test_what_could_steer_a_terminal_is_spelled_out(text, shown):
    assert printable(text) == shown


def test_no_character_of_unicode_lets_a_control_through():
    shown = printable("".join(map(chr, range(0x110000))))
    kinds = {unicodedata.category(char) for char in shown.replace("\u200c", "").replace("\u200d", "")}
    assert kinds.isdisjoint({"Cc", "Cf", "Cs", "Zl", "Zp"})
    shown.encode()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3, "3"),
        (1234567, "1,234,567"),
        (0.0000123, "1.23e-05"),
        (2.345678, "2.346"),
        (12345.6, "12,346"),
        (-0.5, "-0.5"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


def test_what_is_not_finite_says_so():
    assert [number(float(name)) for name in ("nan", "inf", "-inf")] == ["nan", "inf", "-inf"]


def test_a_small_table_looks_like_this(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = table("Before and after", ["metric", "before", "after"], rows=[["score", 1.5, 12], ["kl", None, 0.25]])
    assert text.splitlines() == [
        "Before and after",
        "metric  before  after",
        "------  ------  -----",
        "score      1.5     12",
        "kl           -   0.25",
    ]


def test_a_table_without_rows_is_its_header():
    assert table("Empty", ["a", "b"], rows=[]).splitlines() == ["Empty", "a  b", "-  -"]


def cells_of(line):
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in line)
    return len(line) + wide - sum(unicodedata.combining(char) > 0 for char in line)


@pytest.mark.parametrize("columns", [60, 100])
def test_long_text_is_wrapped_to_the_terminal_and_none_of_it_is_lost(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    prose, wide, glued = "every good boy deserves fudge " * 10, "日本語のテキスト" * 12, "x" * 150
    lines = table("Samples", ["step", "prompt", "response", "glued"], rows=[[7, prose, wide, glued]]).splitlines()
    assert max(map(cells_of, lines)) <= columns
    body = " ".join(lines[3:])
    assert body.count("x") == 150
    assert sum(body.count(char) for char in set(wide)) == len(wide)
    words = [word for word in body.split() if word.isascii() and "x" not in word and word != "7"]
    assert sorted(words) == sorted(prose.split())


def test_columns_stay_aligned_beside_wide_and_combining_characters(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = table("T", ["said", "score"], rows=[["日本", 1], ["e\u0301e\u0301", 2], ["abcd", 3]])
    assert [cells_of(line) for line in text.splitlines()[1:]] == [11] * 5


def test_a_newline_or_escape_in_a_cell_makes_no_line_of_its_own(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = table("T\x1b[0m", ["said\n"], rows=[["a\nb\x1b[31m"]])
    assert text.splitlines() == [r"T\x1b[0m", r"said\n", "------------", r"a\nb\x1b[31m"]
