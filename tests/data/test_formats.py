"""What the readers make of files as people have them, sound and broken."""

import gzip
import json
import re

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from data.formats import read_file, without_added_nulls
from data.rows import BadRow, ColumnSelection
from data.sources import load_rows
from rlhf.config.data_config import SourceConfig

WANTED = ("prompt", "completion", "messages", "tools")


def load(path):
    return [*load_rows(SourceConfig(path=str(path)))]


def read(path, *, renamed=None):
    return [*read_file(path, ColumnSelection(renamed or {}, WANTED)).rows]


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def broken(pattern):
    """Equal to a broken row whose problem has `pattern` in it."""

    class Broken:
        def __eq__(self, row):
            return isinstance(row, BadRow) and re.search(pattern, row.reason) is not None

        def __repr__(self):
            return f"broken({pattern!r})"

        __hash__ = None

    return Broken()


A, B = {"prompt": "a"}, {"prompt": "b"}
ONE, TWO = json.dumps(A), json.dumps(B)
DEEP = '{"prompt": "a", "tools": ' + "[" * 101 + "]" * 101 + "}"
DEEPER = '{"prompt": "a", "id": ' + "[" * 100_000 + "]" * 100_000 + "}"
HUGE = '{"prompt": "a", "tools": [{"n": -%s}]}' % ("9" * 5_000)
HALF = '{"prompt": "a\\ud83d"}'

ROWS = [
    (
        f'{ONE}\n{{"prompt": "b"\n{TWO}',
        [A, broken(r'^line 2 is not one JSON object .*delimiter\): \{"prompt": "b"$'), B],
    ),
    (f'{ONE}\n\n["b"]\n{TWO}', [A, broken(r'^found \["b"\]; expected an object$'), B]),
    (f"{ONE}\n{ONE}{TWO}\n", [A, broken("^line 2 is not one JSON object .it goes on after the object")]),
    (f"{ONE}\n{HALF}\n{TWO}", [A, broken("^`prompt` has half of a character.*at character 1$"), B]),
    (f"{ONE}\n{DEEP}\n{TWO}", [A, broken("^`tools` is nested more than 100 deep"), B]),
    (f"{ONE}\n{DEEPER}\n{TWO}", [A, broken("^line 2 is .*nested more than 100 deep"), B]),
    (f"{ONE}\n{HUGE}\n{TWO}", [A, broken("^`tools` holds a number of more than 4300 digits"), B]),
    (f"[{ONE},\n{{}},\n3, {TWO}]\n", [A, {}, broken("found 3; expected an object"), B]),
    (f"[{ONE},\n{HUGE},\n{HALF}, {TWO}]", [A, broken("more than 4300 digits"), broken("half of a character"), B]),
    (f'\n[{ONE},\n{{"prompt": }}, {TWO}]', [A, broken("^line 3: not JSON .*, and what follows cannot be read")]),
    (f"[{ONE},\n{DEEPER}, {TWO}]", [A, broken("^line 2: not JSON .nested")]),
    (f"[{ONE}\n{TWO}]", [A, broken("^line 1: not the next row or the end of the list, and what follows")]),
    (f"[{ONE}, {TWO}", [A, B, broken("^line 1: not the next row or the end")]),
    (f"[{ONE}]\n{TWO}", [A, broken("^line 2: not the next row or the end")]),
    (f"[{ONE},]", [A, broken("^line 1: not JSON")]),
    ("[]", []),
    ("[", [broken("^line 1: not JSON")]),
    ("\n\n", []),
    ('{\n"prompt": "a"\n}', [broken("^line 1 is not one"), broken("^line 2 is not one"), broken("^line 3 is not one")]),
]


@pytest.mark.parametrize(("text", "rows"), ROWS)
def test_a_broken_row_stands_where_it_was_and_the_others_stay(tmp_path, text, rows):
    assert read(write(tmp_path / "a.jsonl", text)) == rows


def test_what_nobody_wants_is_not_looked_at(tmp_path):
    row = f'{{"prompt": "a", "id": [{HUGE}, {HALF}, {"[" * 200 + "]" * 200}]}}'
    assert read(write(tmp_path / "a.jsonl", f'{row}\n{{"prompt": "b", "id": 1180591620717411303424}}')) == [A, B]


def test_values_of_a_row_are_those_of_json_whatever_the_other_rows_have(tmp_path):
    rows = [
        {"tools": [{"a": {"x": 1, "y": None}, "b": []}, {}], "prompt": "a"},
        {"tools": [{"b": "text", "a": [1, "2", {"z": 3.5}, None]}], "prompt": ["b"]},
        {"tools": "[]", "prompt": None, "completion": {"role": {}}},
        {"tools": None, "prompt": 10**30},
    ]
    text = "\n".join(map(json.dumps, rows))
    assert read(write(tmp_path / "a.jsonl", text)) == read(write(tmp_path / "b.json", json.dumps(rows))) == rows
    assert json.dumps(read(tmp_path / "a.jsonl")) == json.dumps(rows)  # the order of keys too


def test_half_a_character_is_found_in_keys_and_inside(tmp_path):
    rows = ['{"tools": [{"a": {"\\ud800": 1}}]}', '{"messages": [{"role": "user", "content": "\\udfff"}]}']
    file = write(tmp_path / "a.jsonl", "\n".join([*rows, '{"prompt": "\\ud83d\\ude00"}']))
    assert read(file) == [broken("^`tools` has half"), broken("^`messages` has half"), {"prompt": "😀"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_row_that_is_not_utf8_is_broken_alone(tmp_path, name):
    stored = b'{"prompt": "a"}\n{"prompt": "\xe9"}\n{"prompt": "b", "id": "\xe9"}\n'
    file = write(tmp_path / name, gzip.compress(stored) if name.endswith("gz") else stored)
    assert read(file) == [A, broken("^`prompt` has half of a character, or bytes that are not UTF-8"), B]


def test_a_file_of_another_encoding_says_so_in_its_first_row(tmp_path):
    rows = read(write(tmp_path / "a.jsonl", f"{ONE}\n{TWO}\n".encode("utf-16")))
    assert rows[0] == broken("^line 1 is not one JSON object .has half of a character, or bytes that are not UTF-8")


def test_a_long_line_is_shortened_in_its_problem(tmp_path):
    (row,) = read(write(tmp_path / "a.jsonl", '{"prompt": "' + "x" * 1000))
    assert re.search(r"x{60,70}\.\.\.$", row.reason)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_damaged_gzip_gives_the_rows_before_the_damage(tmp_path, kind):
    words = np.random.default_rng(0).integers(0, 10**9, 4000).astype(str)
    listed = gzip.compress(json.dumps([{"prompt": word} for word in words]).encode())
    *rows, last, damage = read(write(tmp_path / "list.json.gz", listed[: len(listed) // 2]))
    assert 100 < len(rows) < 4000
    assert rows == [{"prompt": word} for word in words[: len(rows)]]
    assert [last, damage] == [broken("^line 1: not "), broken("^the file is damaged here .*end")]
    text = (
        "\n".join(json.dumps({"prompt": word}) for word in words) if kind == "jsonl" else "prompt\n" + "\n".join(words)
    )
    stored = gzip.compress(text.encode())
    rows = read(write(tmp_path / f"cut.{kind}.gz", stored[: len(stored) // 2]))
    assert 100 < len(rows) < 4000
    assert rows == [{"prompt": word} for word in words[: len(rows) - 1]] + [broken("^the file is damaged here .*end")]
    rows = read(write(tmp_path / f"sum.{kind}.gz", stored[:-8] + b"\0" * 8))
    assert rows[-1] == broken("^the file is damaged here .CRC check failed")
    assert read(write(tmp_path / "no.jsonl.gz", "not gzip")) == [
        broken("^the file is damaged here .Not a gzipped file")
    ]


CSV = [
    ("prompt,completion\n1+1=,2\n\n,\n", [{"prompt": "1+1=", "completion": "2"}, {"prompt": "", "completion": ""}]),
    ('prompt,id\r\n"x ""y""\r\n",1\r\n', [{"prompt": 'x "y"\r\n'}]),
    ("prompt,id\na,b,c\nb,\n", [broken("^line 2: found 3 fields; expected 2"), B]),
    ("prompt,id\na\nb,\n", [broken("^line 2: found 1 fields; expected 2"), B]),
    ('prompt,id\n"a"x,1\nb,\n', [broken("^line 2: ',' expected after '\"'"), B]),
    ('prompt,id\nb,\n"a,1\n', [B, broken("^line 3: unexpected end of data")]),
    (b"prompt,id\n\xe9,1\nb,\xe9\n", [broken("^`prompt` has half of a character, or bytes that are not UTF-8"), B]),
    ("\ufeffprompt\rb\r", [B]),
    ("id,id,prompt,,\n1,2,b,,\n", [B]),
    (f"prompt,id\n{'x' * 5_000_000},1\n", [{"prompt": "x" * 5_000_000}]),
    ("prompt\n", []),
]


@pytest.mark.parametrize(("text", "rows"), CSV, ids=range(len(CSV)))
def test_csv(tmp_path, text, rows):
    assert read(write(tmp_path / "a.csv", text)) == rows


FILES = [
    ("a.csv", "", "the header is empty"),
    ("a.csv", b"prompt,\xe9\n", "the header has half of a character, or bytes"),
    ("a.csv", "prompt,id,prompt\na,b,c\n", r"found columns .*; \['prompt'\] is there more than once"),
    ("a.csv.gz", "not gzip", "the header cannot be read"),
    ("a.parquet", "not parquet", "cannot be read"),
    ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
    ("a.txt", "hello", "found a .txt file; expected one of"),
    ("a", "hello", "found a nameless file; expected one of"),
]


@pytest.mark.parametrize(("name", "text", "message"), FILES)
def test_a_file_that_cannot_be_read_at_all_is_named(tmp_path, name, text, message):
    file = write(tmp_path / name, text)
    with pytest.raises(ValueError, match=f"data source {re.escape(str(file))}: .*{message}"):
        read(file)


def test_parquet_columns_are_chosen_before_anything_is_asked_of_them(tmp_path):
    odd = {"id": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())), "prompt": pa.array(["b"])}
    parquet.write_table(pa.table(odd), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [B]
    parquet.write_table(
        pa.Table.from_arrays([pa.array([1]), pa.array([2]), pa.array(["b"])], ["id", "id", "question"]),
        tmp_path / "b.parquet",
    )
    assert read(tmp_path / "b.parquet", renamed={"prompt": "question"}) == [B]
    assert read(tmp_path / "b.parquet") == [{}]
    with pytest.raises(ValueError, match=r"\['id'\] is there more than once"):
        read(tmp_path / "b.parquet", renamed={"prompt": "id"})


# ---- what Arrow makes of rows with different keys

TOOLS = [
    [{"function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}, {"function": {"name": "now"}}],
    [{"function": {"name": "add", "parameters": {"a": {"type": "number"}, "b": {"enum": [1.5, None]}}}}],
    [],
]
CALLS = [
    [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [{"arguments": {"city": "Oslo"}}]}],
    [{"role": "assistant", "content": "x", "tool_calls": [{"arguments": {"a": 1, "b": 2}}, {"arguments": {}}]}],
    [{"role": "tool", "content": "3", "name": "add"}],
]
MERGED = [{"messages": calls, "tools": tools} for calls, tools in zip(CALLS, TOOLS, strict=True)]


def test_what_arrow_added_to_a_mapping_is_taken_away_again(tmp_path):
    table = pa.Table.from_pylist(MERGED)
    assert "null" in json.dumps(table.to_pylist()[0])  # which is what is taken away
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    assert load(tmp_path / "a.parquet") == load(tmp_path / "saved") == MERGED


def test_nulls_that_merging_cannot_have_added_stay():
    kind = pa.struct({"list": pa.list_(pa.int64()), "map": pa.map_(pa.string(), pa.int64()), "gone": pa.int64()})
    value = pa.scalar({"list": [1, None], "map": [("a", None)], "gone": None}, kind).as_py()
    assert without_added_nulls(value, kind) == {"list": [1, None], "map": {"a": None}}


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="a newer version of datasets stores JSON")
def test_json_columns_are_read_with_their_nulls(tmp_path):
    features = datasets.Features({"tools": datasets.List(datasets.Json()), "prompt": datasets.Value("string")})
    rows = [{"tools": [{"default": None, "a": 1}], "prompt": "x"}, {"tools": [{"a": "text"}], "prompt": "y"}]
    saved = datasets.Dataset.from_list(rows, features=features)
    saved.save_to_disk(tmp_path / "saved")
    saved.to_parquet(tmp_path / "a.parquet")
    assert load(tmp_path / "saved") == load(tmp_path / "a.parquet") == rows


def test_a_row_of_arrow_that_is_no_text_is_broken_alone(tmp_path):
    binary = pa.array([b"a", b"\xe9", b"c"]).cast(pa.binary())
    text = pa.StringArray.from_buffers(3, *binary.buffers()[1:])
    parquet.write_table(pa.table({"prompt": text}), tmp_path / "a.parquet")
    rows = load(tmp_path / "a.parquet")
    assert [rows[0], rows[2]] == [{"prompt": "a"}, {"prompt": "c"}]
    assert isinstance(rows[1], BadRow)
    assert rows[1].reason.startswith("`prompt` cannot be read: 'utf-8' codec")
