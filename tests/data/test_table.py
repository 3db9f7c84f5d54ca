"""Rows of several files and of Arrow, as they were before they were stored."""

import json

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from data.rows import BrokenRow
from data.sources import load_rows
from data.table import Part, Rows, as_written, joined
from rlhf.config.data_config import SourceConfig

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
ROWS = [{"messages": calls, "tools": tools} for calls, tools in zip(CALLS, TOOLS, strict=True)]


def load(path, **settings):
    rows = load_rows(SourceConfig(path=str(path), **settings))
    return rows.take(np.arange(len(rows)))


def test_what_arrow_added_to_a_mapping_is_taken_away_again(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    assert "null" in json.dumps(table.to_pylist()[0])  # which is what is taken away
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    assert load(tmp_path / "a.parquet") == load(tmp_path / "saved") == ROWS


def test_nulls_that_merging_cannot_have_added_stay():
    kind = pa.struct({"list": pa.list_(pa.int64()), "map": pa.map_(pa.string(), pa.int64()), "gone": pa.int64()})
    value = pa.scalar({"list": [1, None], "map": [("a", None)], "gone": None}, kind).as_py()
    assert as_written(value, kind) == {"list": [1, None], "map": {"a": None}}


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
    assert isinstance(rows[1], BrokenRow)
    assert rows[1]["problem"].startswith("`prompt` cannot be read: 'utf-8' codec")


def test_rows_are_taken_from_their_parts_and_named_after_their_files():
    batch = pa.record_batch({"x": pa.array([2, 3, 4])})
    one = Rows(["x"], [Part("a.parquet", 0, [{"x": 0}, {"x": 1}]), Part("a.parquet", 2, batch)])
    two = Rows(["y", "x"], [Part("b.jsonl", 0, [{"x": 5}])])
    rows = joined([one, two])
    assert (rows.columns, len(rows)) == (["x", "y"], 6)
    numbers = np.array([1, 2, 4, 5])
    assert [row["x"] for row in rows.take(numbers)] == [1, 2, 4, 5]
    assert rows.places(numbers) == ["1 of a.parquet", "2 of a.parquet", "4 of a.parquet", "0 of b.jsonl"]
    assert one.places(numbers[:3]) == ["1", "2", "4"]
    assert rows.take(numbers[:0]) == []
