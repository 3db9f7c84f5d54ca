"""The table knows every key that DeepSpeed knows, and the documentation is made of it."""

import dataclasses
import json
from pathlib import Path

import pytest

from rlhf.config.engine_config import EngineConfig
from rlhf.config.optimizer_config import OptimizerConfig
from rlhf.deepspeed.keys import TABLE, Decision, page
from rlhf.deepspeed.reader import Document
from rlhf.deepspeed.resolve import Batch, solve_batch

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests/golden/deepspeed_keys.json").read_text())
BATCHES = json.loads((ROOT / "tests/golden/deepspeed_batch.json").read_text())["cases"]


def test_every_key_of_deepspeeds_top_level_has_a_row_or_a_section():
    missing = [
        name
        for name in GOLDEN["top_level"]
        if name != "bfloat16" and not (TABLE.find((name,)) or TABLE.is_section((name,)))
    ]
    assert missing == []


@pytest.mark.parametrize("section", GOLDEN["names"])
def test_every_key_of_deepspeeds_sections_has_a_row(section):
    names = GOLDEN["names"][section] + (GOLDEN["removed_of_zero"] if section == "zero_optimization" else [])
    paths = [TABLE.canonical((*section.split("."), name)) for name in names]
    assert [path for path in paths if TABLE.find(path) is None and not TABLE.is_section(path)] == []


def test_every_parameter_of_deepspeeds_schedules_has_a_row():
    assert [name for name in GOLDEN["scheduler_params"] if TABLE.find(("scheduler", "params", name)) is None] == []


def test_the_defaults_are_deepspeeds():
    for section, defaults in GOLDEN["defaults"].items():
        for name, default in defaults.items():
            key = TABLE.find(TABLE.canonical((*section.split("."), name)))
            if key is not None and key.default is not None and not isinstance(key.default, str):
                assert key.default == (tuple(default) if isinstance(default, list) else default), key.path


def test_used_keys_go_to_settings_that_exist_and_every_key_says_why():
    groups = {"engine": EngineConfig, "optimizer": OptimizerConfig}
    settings = {group: {field.name for field in dataclasses.fields(cls)} for group, cls in groups.items()}
    for key in TABLE:
        assert (key.decision is not Decision.used) or key.setting, key.path
        group, _, name = key.setting.partition(".")
        assert not key.setting or name in settings[group], key.path
        assert len(key.note) >= 5, key.path


def test_the_page_is_what_the_table_says():
    found = (ROOT / "docs/deepspeed.md").read_text()
    assert found == page(), "run: python -m rlhf.deepspeed.keys > docs/deepspeed.md"


@pytest.mark.parametrize("case", BATCHES, ids=str)
def test_batch_sizes_are_solved_as_deepspeed_solves_them(case):
    (train, micro, steps), ranks, expected = case
    given = {"train_batch_size": train, "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": steps}
    document = Document("ds.json", {name: size for name, size in given.items() if size})
    own = Batch(48, 2)
    if train is None and micro is None:  # where DeepSpeed asserts, the run's own sizes answer
        assert solve_batch(document, own, ranks=ranks) == (Batch(2 * steps * ranks, 2) if steps else own)
    elif expected is None:
        with pytest.raises(ValueError, match=r"ds\.json: (train_|gradient_)"):
            solve_batch(document, own, ranks=ranks)
    else:
        assert solve_batch(document, own, ranks=ranks) == Batch(expected[0], expected[1])


@pytest.mark.parametrize(
    ("train", "micro", "steps", "expected"),
    [
        ("auto", "auto", "auto", (48, 4)),
        ("auto", "auto", None, (48, 4)),
        (None, "auto", "auto", (48, 4)),
        ("auto", 3, "auto", (48, 3)),
        (None, 3, "auto", (48, 3)),
        (32, "auto", "auto", (32, 4)),
        (12, "auto", "auto", (12, 3)),  # 4 does not divide its share of 6
        (12, None, None, (12, 6)),
        (12, "auto", 3, (12, 2)),
        ("auto", "auto", 3, (24, 4)),
        ("auto", 2, 3, (12, 2)),
        ("8", 2.0, "auto", (8, 2)),
    ],
)
def test_auto_is_the_runs_own_as_far_as_the_others_leave_it_free(train, micro, steps, expected):
    given = {"train_batch_size": train, "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": steps}
    document = Document("ds.json", {name: size for name, size in given.items() if size is not None})
    assert solve_batch(document, Batch(48, 4), ranks=2) == Batch(*expected)


@pytest.mark.parametrize(
    ("sizes", "ranks", "sentence"),
    [
        ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}, 1,
         r"expected train_batch_size = .* found 32 and 4 x 1 x 1\. These numbers are for launch\.ranks=8\."),
        ({"train_batch_size": 4}, 8, "less than one sequence in each"),
        ({"train_batch_size": "MBSIZE,"}, 1, r"='MBSIZE,': expected .*goes to the end of its line"),
        ({"train_batch_size": "BATCH"}, 1, "Is it a placeholder"),
        ({"train_micro_batch_size_per_gpu": 1.5}, 1, "expected a whole number"),
        ({"train_batch_size": 0}, 1, "=0: expected 1 or more"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_add_up_are_refused_with_all_numbers(sizes, ranks, sentence):
    with pytest.raises(ValueError, match=sentence):
        solve_batch(Document("ds.json", sizes), Batch(48, 4), ranks=ranks)
