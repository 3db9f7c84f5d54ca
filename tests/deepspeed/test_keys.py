"""The table knows every key that DeepSpeed knows, and the documentation is made of it."""

import dataclasses
import json
from pathlib import Path

import pytest

from rlhf.config.engine_config import EngineConfig
from rlhf.config.stage_configs import OptimizerConfig
from rlhf.deepspeed.keys import TABLE, Decision, page

ROOT = Path(__file__).parents[2]
GOLDEN = json.loads((ROOT / "tests/golden/deepspeed_keys.json").read_text())


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
