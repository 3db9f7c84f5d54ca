"""The table of flags has every flag of the peers' parsers, with their defaults, and the page is made from it."""

import dataclasses
import json
from pathlib import Path

import pytest

from data.known_datasets import known_datasets, named
from rlhf.migrate.flags import Fate, page, peer
from rlhf.migrate.translate import RULES
from stages.setup.command_line import known_keys

ROOT = Path(__file__).parents[2]
FLAGS = json.loads((ROOT / "tests/golden/peer_flags.json").read_text())
"""Names in the argument parsers of DeepSpeed-Chat's main.py of each step (July 2025), and of TRL 1.16."""
STEPS = [(name, step) for name, steps in FLAGS.items() for step in steps if step != "all"]
PAGE = ROOT / "docs/migrating.md"


@pytest.mark.parametrize(("name", "step"), STEPS)
def test_every_flag_of_a_peer_is_in_the_table(name, step):
    theirs = f"{FLAGS[name].get('all', '')} {FLAGS[name][step]}".split()
    assert [flag for flag in theirs if not peer(name).flag(step, flag)] == []


@pytest.mark.parametrize("step", ["sft", "reward", "dpo", "grpo", "rloo", "ppo"])
def test_flags_and_defaults_are_those_of_the_installed_trl(step):
    trl = pytest.importorskip("trl")
    utils = pytest.importorskip("trl.scripts.utils")
    configs = trl if step != "ppo" else pytest.importorskip("trl.experimental.ppo")
    config = {"sft": "SFTConfig", "reward": "RewardConfig"}.get(step, f"{step.upper()}Config")
    scripts = pytest.importorskip(f"trl.scripts.{step}") if step != "ppo" else utils
    arguments = getattr(scripts, f"{step.upper()}ScriptArguments", utils.ScriptArguments)
    classes = [getattr(configs, config), trl.ModelConfig, arguments]
    classes += [utils.DatasetMixtureConfig] * (step != "ppo")
    fields = [field for cls in classes for field in dataclasses.fields(cls) if field.init]
    flags = {field.name: peer("trl").flag(step, field.name) for field in fields}
    assert [name for name, flag in flags.items() if not flag] == []
    for field in fields:
        flag = flags[field.name]
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        default = [default] if flag.kind == "list" and isinstance(default, str) else default
        # What is not there by default, or is a name or a switch that is off, sets nothing.
        if flag.fate in (Fate.set, Fate.rule) and default not in (None, [], False, "huggingface"):
            assert flag.default == default, field.name


def test_every_row_names_settings_and_rules_that_exist():
    settings = {*known_keys(), "engine", "stage"}
    used = set()
    for name in FLAGS:
        for step, flags in peer(name).steps.items():
            stage = "ppo" if step in ("grpo", "rloo", "ppo") else step
            optimizer = "ppo.actor_optimizer" if stage == "ppo" else f"{stage}.optimizer"
            for flag in flags.values():
                for setting in flag.settings:
                    assert setting.replace("S.", f"{stage}.").replace("O.", f"{optimizer}.") in settings, flag
                used |= {flag.target} if flag.fate is Fate.rule else set()
                assert flag.fate in (Fate.set, Fate.rule) or len(str(flag.target)) > 10
            for constant in peer(name).about["constants"][step]:
                assert constant["set"].replace("O.", f"{optimizer}.") in settings
    assert used == set(RULES)


def test_a_pattern_takes_no_flag_that_may_be_another_mistyped():
    for name in FLAGS:
        for flags in peer(name).steps.values():
            families = tuple(flag.removesuffix("*") for flag in flags if "*" in flag)
            kept = [flag for flag in flags if flags[flag].fate in (Fate.set, Fate.rule)]
            assert [flag for flag in kept if flag.startswith(families)] == []


def test_data_sets_without_an_eval_split_are_those_of_the_maps():
    for name in peer("deepspeed-chat").about["without_eval"]:
        assert all("eval" not in entry.splits for entry in named(name))
    listed = peer("deepspeed-chat").about["without_eval"]
    deepspeed_chat = [*known_datasets().values()][: [*known_datasets()].index("ultrafeedback")]
    without = [entry for entry in deepspeed_chat if "eval" not in entry.splits]
    assert {entry.name for entry in without} == {entry.name for name in listed for entry in named(name)}


def test_the_page_is_current_and_names_every_data_set():
    text = (ROOT / "rlhf/migrate/page.md").read_text()
    assert PAGE.read_text() == page(text), "python -m rlhf.migrate docs > docs/migrating.md"
    assert [name for name in known_datasets() if f"`{name}`" not in text] == []
