"""What makes a row unusable."""

import pytest

from data.rows import DEMONSTRATION_COLUMNS as DEMONSTRATION
from data.rows import PREFERENCE_COLUMNS as PREFERENCE
from data.rows import PROMPT_COLUMNS as PROMPT
from data.rows import BadRow, FileRows, SourceRows, bad_rows_report, check_row, margin_of, require_columns

USER = {"role": "user", "content": "hello"}
HI = {"role": "assistant", "content": "hi"}


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"messages": [USER, HI]}, DEMONSTRATION),
        ({"prompt": "a", "completion": "b"}, DEMONSTRATION),
        ({"prompt": [USER], "completion": [HI], "text": None}, DEMONSTRATION),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, DEMONSTRATION),
        ({"text": "a", "messages": None, "id": 3}, DEMONSTRATION),
        ({"chosen": [USER, HI], "rejected": [USER, USER], "margin": 1}, PREFERENCE),
        ({"prompt": "a"}, PROMPT),
        ({"messages": [{"role": "system", "content": ""}, USER]}, PROMPT),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]}, DEMONSTRATION),
    ],
)
def test_good_rows_pass(row, columns):
    check_row(row, columns)


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"prompt": " ", "completion": "b"}, DEMONSTRATION, "`prompt` is empty; expected text"),
        ({"prompt": "a", "completion": "\n"}, DEMONSTRATION, "`completion` is empty"),
        (
            {"prompt": "a", "completion": None},
            DEMONSTRATION,
            r"only \['prompt'\] hold something; expected messages, or",
        ),
        ({"prompt": 3, "completion": "b"}, DEMONSTRATION, "`prompt` is 3; expected text or a list of messages"),
        ({"text": [USER]}, DEMONSTRATION, "`text` is .*; expected text"),
        ({"messages": "hello"}, DEMONSTRATION, "`messages` is 'hello'; expected a list of messages"),
        ({"messages": []}, DEMONSTRATION, "`messages` is an empty list"),
        ({"messages": [USER, {**HI, "content": " "}]}, DEMONSTRATION, "`messages` ends with an empty message"),
        (
            {"messages": [{"from": "human", "value": "a"}]},
            DEMONSTRATION,
            r"`messages\[0\]` is .*expected {'role'",
        ),
        ({"messages": [USER, {"role": "assistant"}]}, DEMONSTRATION, r"`messages\[1\].content` is None"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            PROMPT,
            r"content` is \[.*expected text",
        ),
        ({"messages": ["hello"]}, DEMONSTRATION, r"`messages\[0\]` is 'hello'"),
        ({"chosen": "a", "rejected": "a"}, PREFERENCE, "`chosen` and `rejected` are identical"),
        ({"chosen": [USER, HI], "rejected": [USER, HI]}, PREFERENCE, "identical"),
        ({"chosen": "a", "rejected": ""}, PREFERENCE, "`rejected` is empty"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, PREFERENCE, "`prompt` is empty"),
        (
            {"chosen": "a", "rejected": "b", "margin": "much"},
            PREFERENCE,
            "`margin` is 'much'; expected a number",
        ),
        ({"chosen": "a", "rejected": "b", "margin": float("nan")}, PREFERENCE, "expected a finite number"),
        ({"prompt": {"role": "user"}}, PROMPT, "`prompt` is {'role': 'user'}"),
    ],
)
def test_bad_rows_say_what_is_wrong(row, columns, message):
    with pytest.raises(ValueError, match=message):
        check_row(row, columns)


def test_a_margin_is_zero_where_the_data_does_not_say():
    assert [margin_of(row) for row in ({}, {"margin": None}, {"margin": ""}, {"margin": "1.5"}, {"margin": 2})] == [
        *(0.0, 0.0, 0.0),
        *(1.5, 2.0),
    ]


def test_missing_columns_list_what_is_there_and_how_to_rename():
    require_columns(["prompt", "completion", "id"], DEMONSTRATION, where="data.sft.train[0]")
    with pytest.raises(ValueError) as error:  # noqa: PT011
        require_columns(["question", "answer"], PREFERENCE, where="data.reward.train[1]")
    assert str(error.value) == (
        "data.reward.train[1]: found columns ['question', 'answer']; expected chosen and rejected. Where yours have "
        "other names, give the source as {path: FILE, columns: {chosen: ITS_NAME, rejected: ITS_NAME}}, in quotes."
    )
    with pytest.raises(ValueError, match="messages, or prompt and completion, or chosen and rejected, or text"):
        require_columns(["prompt"], DEMONSTRATION, where="data.sft.train[0]")


def test_all_bad_rows_are_reported_by_reason_with_their_numbers():
    bad = [(str(100 + n), BadRow("even" if n < 20 else "large")) for n in range(0, 22, 2)]
    assert bad_rows_report(bad, where="data.sft.train[0] (a.jsonl)", num_rows=22) == (
        "data.sft.train[0] (a.jsonl): 11 of 22 rows cannot be used (from row 0); "
        "repair them or set data.sft.bad_rows=drop:\n"
        "  row 100, 102, 104, 106, 108 and 5 more: even\n"
        "  row 120: large"
    )


def test_many_different_reasons_are_cut_short():
    bad = [(str(n), BadRow(f"reason {n}")) for n in range(8)]
    assert bad_rows_report(bad, where="x", num_rows=8).endswith("row 4: reason 4\n  and 3 more reasons")


def test_rows_are_numbered_through_their_files_and_named_after_them():
    one = FileRows("a.parquet", ["x"], [{"x": n} for n in range(5)])
    two, three = FileRows("b.jsonl", ["y", "x"], [{"x": 5}]), FileRows("empty", [], [])
    rows = SourceRows([three, one, three, two])
    assert (rows.found, len(rows)) == (["x", "y"], 6)
    assert [rows[n]["x"] for n in range(6)] == [0, 1, 2, 3, 4, 5]
    assert [rows.place(n) for n in (1, 4, 5)] == ["1 of a.parquet", "4 of a.parquet", "0 of b.jsonl"]
    assert SourceRows([one]).place(4) == "4"
