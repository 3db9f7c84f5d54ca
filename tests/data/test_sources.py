"""Files, folders and hub ids."""

import gzip
import json

import datasets
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from data.sources import find, load_rows
from rlhf.config.data_config import SourceConfig

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d\ne"}]


def load(path, **settings):
    rows = load_rows(SourceConfig(path=str(path), **settings))
    return rows.take(np.arange(len(rows)))


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def lines(rows):
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def test_json_lines_and_lists_are_read_whatever_the_ending(tmp_path):
    assert load(write(tmp_path / "a.jsonl", lines(ROWS))) == ROWS
    assert load(write(tmp_path / "b.json", lines(ROWS))) == ROWS
    assert load(write(tmp_path / "c.json", json.dumps(ROWS, indent=2))) == ROWS
    assert load(write(tmp_path / "d.jsonl", "\ufeff" + lines(ROWS).replace("\n", "\r\n\r\n"))) == ROWS


def test_compressed_files_are_read(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode()))
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"prompt,completion\na,b\n"))
    assert load(tmp_path / "a.jsonl.gz") == ROWS
    assert load(tmp_path / "b.csv.gz") == [{"prompt": "a", "completion": "b"}]


def test_parquet_is_read(tmp_path):
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet") == ROWS


def test_csv_fields_stay_text_and_may_hold_line_breaks(tmp_path):
    file = write(tmp_path / "a.csv", 'prompt,completion\n1+1=,2\n"x ""y""","d\ne"\n,\n')
    assert load(file) == [
        {"prompt": "1+1=", "completion": "2"},
        {"prompt": 'x "y"', "completion": "d\ne"},
        {"prompt": "", "completion": ""},
    ]


def test_rows_may_lack_keys_and_hold_messages(tmp_path):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [{"name": "f"}]}]
    rows = load(write(tmp_path / "a.jsonl", lines([{"prompt": "a"}, {"messages": messages, "score": 2}])))
    assert rows == [{"prompt": "a"}, {"messages": messages, "score": 2}]


def test_unicode_line_separators_stay_inside_their_line(tmp_path):
    row = {"prompt": "a\u2028b\u0085c", "completion": "é"}
    assert load(write(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False))) == [row]


def test_saved_data_sets_are_read(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "two")
    assert load(tmp_path / "one") == ROWS
    assert load(tmp_path / "two", split="test") == ROWS[1:]
    columns = {"chosen": "completion", "completion": "prompt"}
    assert load(tmp_path / "one", columns=columns) == [
        {"completion": "a", "chosen": "b"},
        {"completion": "c", "chosen": "d\ne"},
    ]
    assert len(load_rows(SourceConfig(path=str(tmp_path / "one")), {"text"})) == 2
    with pytest.raises(ValueError, match=r"found splits \['train', 'test'\]; expected 'dev'"):
        load(tmp_path / "two", split="dev")


def test_columns_are_renamed_and_others_kept(tmp_path):
    file = write(tmp_path / "a.jsonl", lines([{"question": "q", "good": "g", "bad": "b", "prompt": "old", "id": 7}]))
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert load(file, columns=columns) == [{"prompt": "q", "chosen": "g", "rejected": "b", "id": 7}]


def test_columns_can_change_places(tmp_path):
    file = write(tmp_path / "a.jsonl", lines([{"chosen": "worse", "rejected": "better"}]))
    assert load(file, columns={"chosen": "rejected", "rejected": "chosen"}) == [
        {"chosen": "better", "rejected": "worse"}
    ]


def test_renaming_a_column_that_is_not_there_lists_those_that_are(tmp_path):
    file = write(tmp_path / "a.jsonl", lines(ROWS))
    with pytest.raises(ValueError, match=r"found columns \['prompt', 'completion'\].*Missing: \['question'\]"):
        load(file, columns={"prompt": "question"})


def test_bundled_files_are_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("data/reviews/prompts_eval.jsonl")[0].keys() == {"prompt"}


def test_the_working_directory_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/reviews").mkdir(parents=True)
    write(tmp_path / "data/reviews/prompts_eval.jsonl", '{"prompt": "mine"}')
    assert load("data/reviews/prompts_eval.jsonl") == [{"prompt": "mine"}]


@pytest.mark.parametrize("path", ["no/such/file.jsonl", "/no/such/folder", "typo.csv", "a/b.json.gz", "typo", "a/b/c"])
def test_a_path_that_is_not_there_is_refused_before_any_network(path):
    with pytest.raises(ValueError, match=f"data source {path}: no such file or folder"):
        find(path)


def test_a_hub_id_that_cannot_be_reached_is_refused():
    assert find("someone/some-data.v2") is None
    with pytest.raises(ValueError, match="neither a file nor a folder here, and the hub did not give split 'train'"):
        load("someone/some-data.v2")
