"""Files, folders and hub ids; hub clones, splits by name, and choices that only the user can make."""

import gzip
import json
import logging

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from data.sources import load_rows, local_path
from data.split_files import files_of_split
from rlhf.config.data_config import SourceConfig

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d\ne"}]


def load(path, **settings):
    return [*load_rows(SourceConfig(path=str(path), **settings))]


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
        local_path(path)


def test_a_hub_id_that_cannot_be_reached_is_refused():
    assert local_path("someone/some-data.v2") is None
    with pytest.raises(ValueError, match="neither a file nor a folder here, and the hub did not give split 'train'"):
        load("someone/some-data.v2")


# ---- which files of a folder are read

CARD = """---
license: mit
configs:
- config_name: main
  data_files:
  - split: train
    path: main/train-*
  - split: test
    path:
    - main/test-*
- config_name: socratic
  data_files:
    train: chunks/*.jsonl
- config_name: by_name
  data_dir: rest
- config_name: bare
  data_files: chunks/1.jsonl
---
# A data set
"""


def folder(tmp_path, *names, card=None):
    for name in (
        *names,
        "README.md",
        ".git/config.json",
        ".gitattributes",
        ".cache/huggingface/x.json",
        "dataset_infos.json",
    ):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(card if name == "README.md" and card else "")
    return tmp_path


def found(path, split="train", name=None):
    return [str(file.relative_to(path)) for file in files_of_split(path, split, name=name)]


def refusal(path, split="train", name=None):
    with pytest.raises(ValueError, match=f"^data source {path}: ") as error:
        files_of_split(path, split, name=name)
    return str(error.value).removeprefix(f"data source {path}: ")


def test_the_files_of_a_folder_are_in_the_order_of_their_names(tmp_path):
    path = folder(tmp_path, "part-1.jsonl", "part-0.json", "notes.txt")
    assert found(path) == ["part-0.json", "part-1.jsonl"]
    assert refusal(path, "test") == "found splits ['train']; expected one of them as `split`, not 'test'."


def test_a_clone_of_a_hub_data_set_is_read(tmp_path):
    shards = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002-0a1b.parquet"]
    path = folder(tmp_path, *shards, "data/test-00000-of-00001.parquet")
    assert found(path) == shards
    assert found(path, "test") == ["data/test-00000-of-00001.parquet"]
    assert refusal(path, "dev").startswith("found splits ['test', 'train']; expected")


@pytest.mark.parametrize("below", ["", "data/"])
def test_splits_of_several_words_are_not_joined(tmp_path, below):
    names = [f"{below}{split}-00000-of-00001.jsonl" for split in ("test_sft", "train_gen", "train_sft")]
    path = folder(tmp_path, *names)
    assert (
        refusal(path)
        == "found splits ['test_sft', 'train_gen', 'train_sft']; expected one of them as `split`, not 'train'."
    )
    assert [found(path, split) for split in ("test_sft", "train_gen", "train_sft")] == [[name] for name in names]
    assert found(path, "test") == names[:1]  # the only one that can be meant


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["train.jsonl", "test.jsonl", "a/train.jsonl"], "train", ["train.jsonl"]),
        (["Train.jsonl.gz", "test.csv"], "train", ["Train.jsonl.gz"]),
        (["my_train_0.json", "my_train_1.json", "my_val.json"], "train", ["my_train_0.json", "my_train_1.json"]),
        (["train/0.csv", "train/1.csv", "validation/0.csv"], "train", ["train/0.csv", "train/1.csv"]),
        (["x/train/a.csv", "x/test/a.csv"], "test", ["x/test/a.csv"]),
        (["train.jsonl", "train_extra.jsonl"], "train", ["train.jsonl"]),
        (["data/0000.parquet", "data/0001.parquet"], "train", ["data/0000.parquet", "data/0001.parquet"]),
        (["restraint.jsonl", "constrain.jsonl"], "train", ["constrain.jsonl", "restraint.jsonl"]),
    ],
)
def test_names_of_files_and_folders_tell_splits_apart(tmp_path, names, split, expected):
    assert found(folder(tmp_path, *names), split) == expected


def test_a_split_in_several_folders_is_read_whole_and_said(tmp_path, caplog):
    path = folder(tmp_path, "main/train-0.jsonl", "socratic/train-0.jsonl")
    with caplog.at_level(logging.WARNING):
        assert found(path) == ["main/train-0.jsonl", "socratic/train-0.jsonl"]
    assert "reading the files of ['main', 'socratic']; `name` would choose one of them" in caplog.text
    assert found(path, name="main") == ["main/train-0.jsonl"]
    assert refusal(path, name="other").startswith("found no configuration 'other'")


def test_a_split_in_two_formats_is_refused(tmp_path):
    path = folder(tmp_path, "train.jsonl", "train.parquet")
    assert refusal(path).startswith("found files of one split in the formats ['.json', '.parquet']; expected one")


def test_what_the_card_says_comes_first(tmp_path):
    names = [
        "main/train-0.jsonl",
        "main/test-0.jsonl",
        "chunks/0.jsonl",
        "chunks/1.jsonl",
        "rest/train.csv",
        "rest/dev.csv",
    ]
    path = folder(tmp_path, *names, card=CARD)
    assert found(path, name="main") == ["main/train-0.jsonl"]
    assert found(path, "test", "main") == ["main/test-0.jsonl"]
    assert found(path, name="socratic") == ["chunks/0.jsonl", "chunks/1.jsonl"]
    assert found(path, "dev", "by_name") == ["rest/dev.csv"]
    assert found(path, name="bare") == ["chunks/1.jsonl"]
    assert refusal(path).startswith(
        "README.md has the configurations ['main', 'socratic', 'by_name', 'bare']; expected one"
    )
    assert refusal(path, "dev", "main").startswith("README.md has the splits ['train', 'test']; expected")
    (path / "chunks/1.jsonl").unlink()
    assert "found no" in refusal(path, name="bare")


def test_a_default_configuration_need_not_be_named(tmp_path):
    names = ["a/train.csv", "b/train.csv"]
    card = CARD[: CARD.index("- config_name: socratic")] + "- config_name: {}\n  data_files: a/*\n{}---\n"
    assert found(folder(tmp_path / "one", *names, card=card.format("default", ""))) == ["a/train.csv"]
    assert found(folder(tmp_path / "two", *names, card=card.format("other", "  default: true\n"))) == ["a/train.csv"]


@pytest.mark.parametrize(
    "configs", ["{a: 1}", "[1]", "[{data_files: [{path: x}]}]", "[{data_files: 3}]", "[{data_dir: gone}]"]
)
def test_a_card_that_makes_no_sense_is_named(tmp_path, configs):
    path = folder(tmp_path, "train.csv", card=f"---\nconfigs: {configs}\n---\n")
    assert "README.md" in refusal(path)


def test_a_card_that_is_not_yaml_is_named(tmp_path):
    assert "README.md is not YAML" in refusal(folder(tmp_path, "train.csv", card="---\na: [\n---\n"))


def test_files_of_no_split_are_said_where_others_have_one(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert found(folder(tmp_path, "train.csv", "more.csv")) == ["train.csv"]
    assert "['more.csv'] are of no split, and are not read" in caplog.text


def test_a_folder_without_data_is_refused(tmp_path):
    assert refusal(folder(tmp_path, "notes.txt")).startswith("found ['.cache', '.git', '.gitattributes', 'README.md'")


GENERATOR = """
def rows(split, size, odd=None):
    if size < 0:
        raise RuntimeError("a negative size")
    for number in range(size):
        yield {"prompt": f"{split} {number}", "completion": "yes", "answer": number}
    if odd is not None:
        yield odd
"""


def test_a_function_generates_rows_from_its_arguments_and_the_split(tmp_path):
    source = f"{write(tmp_path / 'mine.py', GENERATOR)}:rows"
    held_out = load(source, split="test", arguments={"size": 2})
    assert held_out == [
        {"prompt": "test 0", "completion": "yes", "answer": 0},
        {"prompt": "test 1", "completion": "yes", "answer": 1},
    ]
    config = SourceConfig(path=source, arguments={"size": 1}, columns={"text": "prompt"})
    assert [*load_rows(config, {"text", "answer"})] == [{"text": "train 0", "answer": 0}]


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("rows", {"size": -1}, "RuntimeError: a negative size"),
        ("rows", {"sizes": 1}, "unexpected keyword argument 'sizes'"),
        ("rows", {"size": 0}, "no rows"),
        ("rows", {"size": 1, "odd": "text"}, "found a row of str"),
        ("others", {"size": 1}, "no such function"),
    ],
)
def test_a_function_that_gives_no_rows_is_an_error_that_says_why(tmp_path, function, arguments, message):
    source = f"{write(tmp_path / 'mine.py', GENERATOR)}:{function}"
    with pytest.raises(ValueError, match=f"data source .*mine.py:{function}.*{message}"):
        load(source, arguments=arguments)


def test_a_generated_value_that_cannot_be_used_is_a_bad_row(tmp_path):
    source = f"{write(tmp_path / 'mine.py', GENERATOR)}:rows"
    bad = load(source, arguments={"size": 1, "odd": {"prompt": "\udc80"}})[1]
    assert bad.reason.startswith("`prompt` has half of a character")


def test_a_file_with_a_colon_in_its_name_is_a_file(tmp_path):
    assert load(write(tmp_path / "half:done.jsonl", lines(ROWS))) == ROWS
