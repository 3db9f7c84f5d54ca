"""Every YAML composes, every setting is documented and read, and every mistake is answered with a sentence."""

import ast
import dataclasses
import math
import re
from fractions import Fraction
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from transformers import TrainingArguments

from rlhf import config, config_groups, config_stages, config_uses
from rlhf.config import EngineConfig, LoraConfig, OptimizerConfig, accumulation
from stages.composition import (
    CONF_DIR,
    as_plain,
    check_overrides,
    known_keys,
    load_run,
    register_schema,
    save_run,
    to_run,
)

ROOT = Path(__file__).parents[1]
GENERAL = ["experiment=custom", "model.path=somewhere"]


def composed(*overrides):
    register_schema()
    with initialize_config_dir(CONF_DIR, version_base=None):
        return to_run(compose("config", overrides=list(overrides)))


def choices():
    for file in sorted((ROOT / "conf").glob("*/*.yaml")):
        group, name = file.parent.name, file.stem
        extra = ["model.path=somewhere"] if name in {"path", "custom"} else []
        yield pytest.param([f"{group}={name}", *extra], id=f"{group}={name}")


@pytest.mark.parametrize("overrides", list(choices()))
def test_every_yaml_composes(overrides):
    selected = composed(*overrides)
    assert selected.stages or selected.uses


def test_the_default_is_the_whole_pipeline():
    assert composed().stages == ["sft", "reward", "ppo"]


def test_a_stage_that_is_not_selected_is_none():
    alone = composed("stage=sft")
    assert alone.sft is not None
    assert (alone.reward, alone.ppo) == (None, None)


def test_variants_of_a_stage_land_in_its_own_place():
    both = composed(*GENERAL, "stage=[sft,ppo_lora]")
    assert both.stages == ["sft", "ppo"]
    assert both.ppo.lora.rank == 16
    assert both.ppo.epochs == 4  # from ppo.yaml, which the variant extends


def test_the_engine_reaches_every_stage_and_can_be_changed_for_one():
    mixed = composed("engine=zero3", "sft.engine.zero_stage=1")
    assert (mixed.sft.engine.zero_stage, mixed.reward.engine.zero_stage, mixed.ppo.engine.zero_stage) == (1, 3, 3)


def test_a_saved_run_loads_as_it_was(tmp_path):
    before = composed("stage=[sft,grpo]", "engine=zero2", f"output_dir={tmp_path}")
    assert load_run(save_run(before)) == before


def test_paths_of_a_run_do_not_depend_on_where_it_is_started():
    assert Path(composed("output_dir=somewhere").ppo.actor).is_absolute()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["sft.epoch=3", "stage=sft"], r"sft\.epoch: there is no such setting\. Did you mean sft\.epochs"),
        (["nope=1"], r"nope: there is no such setting"),
        (
            ["stage=sft", "ppo.kl.coef=1"],
            r"the stage 'ppo' is not part of this run \(selected: sft\).*stage=\[sft,ppo\]",
        ),
        (["experiment=custom", "model.path=x", "stage=sft", "ppo.gamma=1"], r"the stage 'ppo' is not part of this run"),
        (["sft.epochs=many"], r"sft\.epochs: Value 'many' of type 'str' could not be converted to Float"),
        (["stage=stf"], r"Could not find 'stage/stf' Available options in 'stage': .*sft"),
        (["experiment=custom"], r"model\.path: has no value in this combination"),
        (["engine.zero_stage=4"], r"engine\.zero_stage=4: expected 0, 1, 2 or 3"),
        (
            ["ppo.minibatch_size=7"],
            r"ppo\.rollout_size by ppo\.minibatch_size: 64 is not a multiple of 7; use 63 or 70",
        ),
        (["ppo.sampling.temperature=0"], r"ppo\.sampling\.temperature=0.*expected a positive number"),
        (["ppo.lora.dropout=0.1"], r"PPO runs without dropout"),
        (["ppo.advantage=grpo"], r"needs several responses to a prompt: ppo\.samples_per_prompt above 1"),
        (["data.sft.train=[{path: x, wieght: 1}]"], r"unknown \['wieght'\]; expected \['path', 'name'"),
        (["data.sft.train=[{weight: 1}]"], r"`path` is missing"),
        (["data.stage_split=[1,2]"], r"data\.stage_split=\[1\.0, 2\.0\]: expected three numbers"),
        (["sft.micro_batch_size=0"], r"micro_batch_size=0: expected 1 or more"),
        (["ppo.max_response_tokens=0"], r"max_response_tokens=0: expected 1 or more"),
        (["sft.eval_rows=-5"], r"eval_rows=-5: expected 0 or more"),
        (["sft.optimizer.betas=[2,3]"], r"optimizer\.betas=\[2\.0, 3\.0\]: expected two numbers from 0 up to 1"),
        (["sft.optimizer.warmup_steps=-3"], r"warmup_steps=-3\.0: expected 0 or more"),
        (["sft.optimizer.warmup_steps=10.7"], r"warmup_steps=10\.7: .* from 1 on a whole number of them"),
        (["sft.optimizer.warmup_steps=inf"], r"warmup_steps=inf: .* from 1 on a whole number of them"),
        (["checkpoint.every=2.5"], r"checkpoint\.every=2\.5: .* below 1 a share of the stage's steps"),
        (["sft.optimizer.min_ratio=9"], r"min_ratio=9\.0: expected 0 to 1"),
        (["++foo=1"], r"nothing but data\.gold\.NAME=module:function can be added"),
        (["sft.lr=1"], r"sft\.lr: there is no such setting\. Did you mean .*sft\.optimizer\.lr"),
        (["sft.optimizer.lr=-1"], r"optimizer\.lr=-1\.0: expected a positive number"),
        (["launch.ranks=0"], r"launch\.ranks=0: expected at least 1"),
        (["launch.warn_after_s=0"], r"launch\.warn_after_s=0\.0: expected more than 0 seconds"),
        (["launch.timeout_s=9"], r"launch\.timeout_s=9\.0: expected .* seconds from launch\.warn_after_s=60\.0 on"),
    ],
)
def test_a_mistake_is_answered_with_a_sentence(overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_overrides(overrides)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LoraConfig(rank=-1), "lora.rank=-1"),
        (lambda: LoraConfig(rank=1, dropout=1.0), "lora.dropout=1.0"),
        (lambda: LoraConfig(rank=1, top_layers=-1), "lora.top_layers=-1"),
        (lambda: OptimizerConfig(lr=1.0, betas=[0.9]), "expected two numbers"),
        (lambda: OptimizerConfig(lr=1.0, max_grad_norm=-1), "max_grad_norm=-1"),
        (lambda: EngineConfig(zero_stage=-1), "zero_stage=-1"),
    ],
)
def test_a_class_refuses_what_makes_no_sense(make, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make()


def test_batch_arithmetic_adds_up_or_says_what_would():
    assert accumulation(64, micro_batch_size=4, ranks=4, name="sft.global_batch_size") == 4
    with pytest.raises(ValueError, match=r"global_batch_size by ranks x micro_batch_size \(3 x 4\): 64.*use 60 or 72"):
        accumulation(64, micro_batch_size=4, ranks=3, name="sft.global_batch_size")


def config_fields():
    for module in (config_groups, config_stages, config_uses, config):
        tree = ast.parse(Path(module.__file__).read_text())
        for cls in (node for node in tree.body if isinstance(node, ast.ClassDef) and node.decorator_list):
            for index, node in enumerate(cls.body):
                if isinstance(node, ast.AnnAssign):
                    yield cls, node.target.id, cls.body[index + 1] if index + 1 < len(cls.body) else None


def test_every_setting_says_what_it_is():
    for cls, name, following in config_fields():
        documented = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        assert documented, f"{cls.name}.{name} has no docstring"


def test_every_setting_has_a_reader():
    code = (
        "\n".join(
            file.read_text()
            for package in ("rlhf", "stages", "data")
            for file in (ROOT / package).rglob("*.py")
            if not file.name.startswith("config")
        )
        + (ROOT / "run_pipeline.py").read_text()
        + (ROOT / "rlhf/config_stages.py").read_text()
    )
    for cls, name, _ in config_fields():
        assert re.search(rf"\.{name}\b", code), f"nothing reads {cls.name}.{name}"


def test_known_keys_reach_the_leaves():
    assert {"ppo.kl.coef", "sft.optimizer.lr", "engine.zero_stage", "data.reward.train"} <= set(known_keys())


def test_plain_settings_hold_no_objects_of_ours():
    def leaves(value):
        if isinstance(value, dict):
            return [leaf for inner in value.values() for leaf in leaves(inner)]
        return [leaf for inner in value for leaf in leaves(inner)] if isinstance(value, list) else [value]

    assert all(type(leaf) in {str, int, float, bool, type(None)} for leaf in leaves(as_plain(composed())))


def test_dataclasses_of_the_configuration_are_keyword_only():
    for module in (config_groups, config_stages, config_uses, config):
        for value in vars(module).values():
            if dataclasses.is_dataclass(value):
                assert all(field.kw_only for field in dataclasses.fields(value)), value


@pytest.mark.parametrize(
    ("setting", "total_steps", "steps"),
    [(0.29, 100, 29), (0.03, 20, 1), (0.03, 100, 3), (0.1, 3, 1), (0.07, 100, 7), (2 / 3, 9, 6), (0.999, 10, 10)]
    + [(1e-9, 10, 1), (0, 10, 0), (1, 10, 1), (12, 10, 12)],
)
def test_a_share_of_the_steps_is_rounded_up_and_never_none(setting, total_steps, steps):
    assert OptimizerConfig(lr=1.0, warmup_steps=setting).warmup_of(total_steps) == steps


def test_shares_of_steps_are_what_decimals_make_and_transformers_makes_but_for_its_floats():
    for percent in range(1, 100):
        share = percent / 100
        found = [OptimizerConfig(lr=1.0, warmup_steps=share).warmup_of(total) for total in range(1, 201)]
        assert found == [math.ceil(Fraction(percent, 100) * total) for total in range(1, 201)]
        peer = [
            TrainingArguments.get_warmup_steps(OptimizerConfig(lr=1.0, warmup_steps=share), n) for n in range(1, 201)
        ]
        above = [theirs - ours for theirs, ours in zip(peer, found, strict=True)]
        assert set(above) <= {0, 1}
        assert all((percent * n) % 100 == 0 for n, more in enumerate(above, start=1) if more)
