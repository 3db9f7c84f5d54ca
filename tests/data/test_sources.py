"""Files, folders and hub ids."""

import gzip
import json
import re

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from data.sources import find, load_rows
from rlhf.config import SourceConfig

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d\ne"}]


def load(path, **settings):
    return load_rows(SourceConfig(path=str(path), **settings)).to_list()


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
    assert rows[0] == {"prompt": "a", "messages": None, "score": None}
    assert rows[1]["messages"][0]["content"] == "a"
    assert rows[1]["messages"][1] == messages[1]


def test_unicode_line_separators_stay_inside_their_line(tmp_path):
    row = {"prompt": "a\u2028b\u0085c", "completion": "é"}
    assert load(write(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False))) == [row]


def test_saved_data_sets_are_read(tmp_path):
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "two")
    assert load(tmp_path / "one") == ROWS
    assert load(tmp_path / "two", split="test") == ROWS[1:]
    with pytest.raises(ValueError, match=r"found splits \['train', 'test'\]; expected 'dev'"):
        load(tmp_path / "two", split="dev")


def test_the_files_of_a_folder_are_joined_in_the_order_of_their_names(tmp_path):
    write(tmp_path / "part-1.jsonl", lines(ROWS[1:]))
    write(tmp_path / "part-0.json", lines(ROWS[:1]))
    write(tmp_path / "README.md", "not data")
    assert load(tmp_path) == ROWS


def test_files_named_after_splits_are_told_apart(tmp_path):
    write(tmp_path / "train-00000.jsonl", lines(ROWS[:1]))
    write(tmp_path / "test.jsonl", lines(ROWS[1:]))
    assert load(tmp_path) == ROWS[:1]
    assert load(tmp_path, split="test") == ROWS[1:]
    with pytest.raises(ValueError, match="files of split 'dev'"):
        load(tmp_path, split="dev")


def test_a_folder_without_data_is_refused(tmp_path):
    write(tmp_path / "notes.txt", "hello")
    with pytest.raises(ValueError, match=r"found \['notes.txt'\]; expected"):
        load(tmp_path)


def test_files_of_a_folder_that_do_not_fit_together_are_named(tmp_path):
    write(tmp_path / "a.jsonl", '{"prompt": "a"}')
    write(tmp_path / "b.jsonl", '{"prompt": ["b"]}')
    with pytest.raises(ValueError, match=r"\['a.jsonl', 'b.jsonl'\] do not join"):
        load(tmp_path)


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


BAD = [
    ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', r"line 2: not one JSON object .*: \{\"prompt\": \"b\"$"),
    ("a.jsonl", '{"prompt": "a"}\n["b"]\n', r"line 2: found \[\"b\"\]; expected an object"),
    ("a.json", '[{"prompt": "a"},\n{"prompt": }]', r"line 2: not JSON"),
    ("a.json", '[{"prompt": "a"}, 3]', r"row 1: found 3; expected an object"),
    ("a.json", '{\n"prompt": "a"\n}', r"line 1: not one JSON object"),
    ("a.jsonl", "", r"no rows"),
    ("a.jsonl", "\n\n", r"no rows"),
    ("a.json", "[]", r"no rows"),
    ("a.csv", "", r"cannot be read: Empty CSV file"),
    ("a.csv", "prompt,completion\n", r"no rows"),
    ("a.csv", "prompt,completion\na,b\na,b,c\n", r"cannot be read: .*Expected 2 columns, got 3"),
    ("a.parquet", "not parquet", r"cannot be read"),
    ("a.jsonl.gz", "not gzip", r"cannot be read"),
    ("a.txt", "hello", r"found a .txt file; expected one of"),
    ("a.jsonl", '{"prompt": "a"}\n{"prompt": ["b"]}\n', r"column prompt: its rows differ in type"),
    ("a.jsonl", '{"prompt": "a", "id": 1180591620717411303424}\n', r"column id"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD)
def test_what_cannot_be_read_is_named_with_its_place(tmp_path, name, text, message):
    file = write(tmp_path / name, text)
    with pytest.raises(ValueError, match=f"data source {re.escape(str(file))}.*{message}"):
        load(file)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_another_encoding_is_refused(tmp_path, name):
    text = '{"prompt": "é"}\n' if name == "a.jsonl" else "prompt\né\n"
    with pytest.raises(ValueError, match=r"(?i)utf-?8"):
        load(write(tmp_path / name, text, encoding="latin-1"))


def test_a_long_line_is_shortened_in_the_error(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"prompt": "' + "x" * 1000)
    with pytest.raises(ValueError, match=r"x{60,70}\.\.\.$"):
        load(file)
