"""Folders are read as `datasets` reads them: rows of every split, over layouts that hub repositories have."""

import bz2
import gzip
import json
import lzma

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from data.sources import load_rows
from data.split_files import files_of_split
from rlhf.config.data_config import SourceConfig

ZSTD = pa.Codec("zstd")
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": lambda text: zstd(text)}

CARD = """---
license: mit
configs:
- config_name: {first}
  data_files:
  - split: train_sft
    path: data/train_sft-*
  - split: test_sft
    path:
    - data/test_sft-*
- config_name: deep
  {rest}
---
# A data set
"""
SHARDS = [
    "data/train_sft-00000-of-00002.parquet",
    "data/train_sft-00001-of-00002.parquet",
    "data/train_gen-00000-of-00001.parquet",
    "data/test_sft-00000-of-00001.parquet",
]
JSON_SHARDS = [shard.replace("parquet", "jsonl") for shard in SHARDS]  # one library reads all configurations
CSV_SHARDS = [shard.replace("parquet", "csv") for shard in SHARDS]
DEEP = ["deep/a/x.jsonl", "deep/b/c/y.jsonl", "deep/.hidden.jsonl", "deep/__pycache__/z.jsonl"]
LAYOUTS = {
    "one file": (["rows.jsonl"], None, None),
    "shards": (SHARDS, None, None),
    "shards beside metadata": ([*SHARDS, "dataset_infos.json", "README.txt"], None, None),
    "split in the name": (["a/train.csv", "a/test.csv"], None, None),
    "split and number": (["my_train_0.json", "my_train_1.json", "my_val.json"], None, None),
    "folders named as splits": (["train/0.parquet", "train/1.parquet", "validation/0.parquet"], None, None),
    "the hub's parquet branch": (["default/train/0000.parquet", "default/test/0000.parquet"], None, None),
    "several folders": ([f"{part}/{split}.jsonl.gz" for part in "ab" for split in ("train", "test")], None, None),
    "other words": (["training.jsonl", "eval.jsonl", "dev.jsonl"], None, None),
    "no split, two files": (["part-1.jsonl", "part-0.jsonl"], None, None),
    "below data": (["data/0000.parquet", "data/0001.parquet"], None, None),
    **{f"compressed {end}": ([f"train.jsonl{end}", f"test.jsonl{end}"], None, None) for end in (".gz", ".bz2", ".xz")},
    "a configuration": (SHARDS, CARD.format(first="default", rest="data_files: deep/*/*"), None),
    "patterns in depth": ([*JSON_SHARDS, *DEEP], CARD.format(first="default", rest="data_files: 'deep/**'"), "deep"),
    "patterns with a suffix": (
        [*JSON_SHARDS, *DEEP],
        CARD.format(first="default", rest="data_files: 'deep/**/*.jsonl'"),
        "deep",
    ),
    "alternatives": ([*JSON_SHARDS, *DEEP], CARD.format(first="default", rest="data_files: 'deep/[ab]/**'"), "deep"),
    "a data_dir": (
        [*JSON_SHARDS, "deep/train.jsonl", "deep/test.jsonl"],
        CARD.format(first="default", rest="data_dir: deep"),
        "deep",
    ),
    "a data_dir with patterns": (
        [*JSON_SHARDS, *DEEP],
        CARD.format(first="default", rest="data_dir: deep\n  data_files: a/*"),
        "deep",
    ),
    "the default among several": (
        [*JSON_SHARDS, *DEEP],
        CARD.format(first="other", rest="data_files: deep/a/*\n  default: true"),
        None,
    ),
    "a separator": (
        [*CSV_SHARDS, "deep/rows.csv"],
        CARD.format(first="x", rest="data_files: deep/*.csv\n  sep: '|'"),
        "deep",
    ),
}


def zstd(text):
    stream = pa.BufferOutputStream()
    with pa.CompressedOutputStream(stream, "zstd") as file:
        file.write(text)
    return stream.getvalue().to_pybytes()


def write(path):
    """A file whose rows name it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": f"{path.name} {number}", "number": str(number) + "a"} for number in range(3)]
    name = path.name.removesuffix(path.suffix) if path.suffix in COMPRESS else path.name
    if name == "dataset_infos.json":
        path.write_text("{}")
    elif name.endswith(".parquet"):
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        separator = "|" if path.parent.name == "deep" else ","
        lines = [json.dumps(row) for row in rows]
        if name.endswith(".csv"):
            lines = [separator.join(cells) for cells in [[*rows[0]], *([*row.values()] for row in rows)]]
        text = ("\n".join(lines) + "\n").encode()
        path.write_bytes(COMPRESS[path.suffix](text) if path.suffix in COMPRESS else text)


def make(folder, files, card):
    for file in files:
        write(folder / file)
    if card:
        (folder / "README.md").write_text(card)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_split_has_the_rows_that_datasets_reads(tmp_path, layout):
    files, card, name = LAYOUTS[layout]
    folder = make(tmp_path / "set", files, card)
    theirs = datasets.load_dataset(str(folder), name, cache_dir=str(tmp_path / "cache"))
    assert theirs
    for split in theirs:
        ours = load_rows(SourceConfig(path=str(folder), name=name, split=split))
        assert [*ours] == [dict(row) for row in theirs[split]], split


def test_zstandard_is_read(tmp_path):
    """Like the other compressed files; `datasets` needs another package for it."""
    write(tmp_path / "train.jsonl.zst")
    assert [row["number"] for row in load_rows(SourceConfig(path=str(tmp_path)))] == ["0a", "1a", "2a"]
    damaged = tmp_path / "train.jsonl.zst"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert "damaged" in [*load_rows(SourceConfig(path=str(tmp_path)))][-1].reason


def test_several_configurations_must_be_named_and_are_listed(tmp_path):
    folder = make(tmp_path, [*SHARDS, *DEEP], CARD.format(first="flat", rest="data_files: deep/a/*"))
    with pytest.raises(ValueError, match=r"configurations \['flat', 'deep'\]; expected one of them as `name`"):
        load_rows(SourceConfig(path=str(folder)))
    with pytest.raises(ValueError, match="Config name is missing"):
        datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    source = SourceConfig.parse({"path": str(folder), "config": "flat", "split": "test_sft"})
    assert len(load_rows(source)) == 3


def test_a_clone_with_one_split_only_is_read(tmp_path):
    """`datasets` wants the files of all splits."""
    folder = make(tmp_path, SHARDS[:2], CARD.format(first="default", rest="data_files: deep/*"))
    assert len(load_rows(SourceConfig(path=str(folder), split="train_sft"))) == 6
    with pytest.raises(ValueError, match="has split 'test_sft' in data/test_sft-.; found no file there"):
        load_rows(SourceConfig(path=str(folder), split="test_sft"))


@pytest.mark.parametrize(("split", "file"), [("validation", "dev.jsonl"), ("val", "dev.jsonl"), ("test", "eval.jsonl")])
def test_a_split_has_other_names(tmp_path, split, file):
    folder = make(tmp_path, ["training.jsonl", "eval.jsonl", "dev.jsonl"], None)
    assert files_of_split(folder, split, name=None) == [folder / file]


def test_a_standalone_card_comes_first(tmp_path):
    folder = make(tmp_path, ["a/x.jsonl", "b/y.jsonl"], CARD.format(first="default", rest="data_files: b/*"))
    (folder / ".huggingface.yaml").write_text("configs:\n- config_name: default\n  data_files: a/*\n")
    assert files_of_split(folder, "train", name=None) == [folder / "a/x.jsonl"]
    theirs = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert theirs[0]["text"] == "x.jsonl 0"


def test_what_datasets_would_join_is_left_to_the_user(tmp_path):
    """It takes the names of both for `train`, as they are not below data/, and Test.jsonl too, for its capital."""
    folder = make(tmp_path / "a", ["train_sft-00000-of-00001.jsonl", "train_gen-00000-of-00001.jsonl"], None)
    theirs = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(theirs) == 6
    with pytest.raises(ValueError, match=r"found splits \['train_gen', 'train_sft'\]; expected one of them"):
        files_of_split(folder, "train", name=None)
    folder = make(tmp_path / "b", ["Train.jsonl", "Test.jsonl"], None)
    assert files_of_split(folder, "train", name=None) == [folder / "Train.jsonl"]
