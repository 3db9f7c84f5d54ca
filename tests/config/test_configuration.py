"""Every YAML composes, every setting is documented and read, and every mistake is answered with a sentence."""

import ast
import dataclasses
import math
import os
import re
from fractions import Fraction
from pathlib import Path
from typing import get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import TrainingArguments

from rlhf.config import (
    data_config,
    dpo_config,
    engine_config,
    eval_config,
    objective_config,
    ppo_config,
    run_config,
    stage_configs,
)
from rlhf.config.bounds import MicroBatchLimit, Settings, accumulation, as_plain, bounds_of
from rlhf.config.engine_config import EngineConfig
from rlhf.config.stage_configs import LoraConfig, OptimizerConfig
from stages.setup.command_line import check_overrides, known_keys
from stages.setup.compose import CONF_DIR, load_run, register_schema, save_run, to_run

ROOT = Path(__file__).parents[2]
MODULES = (
    data_config,
    dpo_config,
    engine_config,
    eval_config,
    objective_config,
    ppo_config,
    run_config,
    stage_configs,
)
GENERAL = ["experiment=custom", "model.path=somewhere"]


def hydra_config(*overrides):
    register_schema()
    with initialize_config_dir(CONF_DIR, version_base=None):
        return compose("config", overrides=list(overrides))


def composed(*overrides):
    return to_run(hydra_config(*overrides))


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
        (["stage=stf"], r"stage=stf: expected one of chat, .*sft"),
        (["experiment=custom"], r"model\.path: has no value in this combination"),
        (["engine.zero_stage=4"], r"^engine\.zero_stage=4: expected 0 to 3"),
        (["seed=-1"], r"^seed=-1: expected 0 to 4294967295"),
        (["ppo.critic_engine.buffer_count=0"], r"^ppo\.critic_engine\.buffer_count=0: expected 1 or more"),
        (["ppo.kl.target=nan"], r"^ppo\.kl\.target=nan: expected 0 or more, and finite"),
        (["engine.offload_optimizer=cpu"], r"^engine\.offload_optimizer=cpu: expected engine\.zero_stage 1, 2 or 3"),
        (["sft.engine.offload_optimizer=cpu"], r"^sft\.engine\.offload_optimizer=cpu: expected"),
        (["data.sft.train=[{path: x, weight: nan}]"], r"^data\.sft: weight=nan"),
        (["data.sft.train=[{path: x, weight: abc}]"], r"^data\.sft: weight=abc: expected 0 or more\."),
        (
            ["sft.optimizer.schedule_options.warmup_max_lr=nan"],
            r"^sft\.optimizer\.schedule_options=.*: expected finite numbers",
        ),
        (["output_dir="], r"output_dir is empty; expected a folder"),
        (["name="], r"name='': expected a name"),
        (["name=../x"], r"name='../x': expected a name for the run, .* without '\.\.'"),
        (
            ["ppo.minibatch_size=7"],
            r"ppo\.rollout_size by ppo\.minibatch_size: 64 is not a multiple of 7; use 63 or 70",
        ),
        (["ppo.sampling.temperature=0"], r"ppo\.sampling\.temperature=0.*expected a number above 0"),
        (["ppo.lora.dropout=0.1"], r"PPO runs without dropout"),
        (["ppo.advantage=grpo"], r"needs several responses to a prompt: ppo\.samples_per_prompt above 1"),
        (["data.sft.train=[{path: x, wieght: 1}]"], r"unknown \['wieght'\]; expected \['path', 'name'"),
        (["data.sft.train=[{weight: 1}]"], r"`path` is missing"),
        (["data.stage_split=[1,2]"], r"data\.stage_split=\[1\.0, 2\.0\]: expected three numbers"),
        (["sft.micro_batch_size=0"], r"micro_batch_size=0: expected 1 or more"),
        (["ppo.max_response_tokens=0"], r"max_response_tokens=0: expected 1 or more"),
        (["sft.eval_rows=-5"], r"eval_rows=-5: expected 0 or more"),
        (["sft.optimizer.betas=[2,3]"], r"^sft\.optimizer\.betas=\[2\.0, 3\.0\]: expected at least 0, below 1"),
        (["sft.optimizer.warmup_steps=-3"], r"warmup_steps=-3\.0: expected 0 or more"),
        (["sft.optimizer.warmup_steps=10.7"], r"warmup_steps=10\.7: .* from 1 on a whole number of them"),
        (["sft.optimizer.warmup_steps=inf"], r"warmup_steps=inf: expected 0 or more, and finite"),
        (["checkpoint.every=2.5"], r"checkpoint\.every=2\.5: .* below 1 a share of the stage's steps"),
        (["sft.optimizer.min_ratio=9"], r"min_ratio=9\.0: expected 0 to 1"),
        (["++foo=1"], r"nothing but data\.gold\.NAME=module:function can be added"),
        (["sft.lr=1"], r"sft\.lr: there is no such setting\. Did you mean .*sft\.optimizer\.lr"),
        (["sft.optimizer.lr=-1"], r"^sft\.optimizer\.lr=-1\.0: expected a number above 0"),
        (["launch.ranks=0"], r"^launch\.ranks=0: expected 1 or more"),
        (["launch.warn_after_s=0"], r"^launch\.warn_after_s=0\.0: expected a number above 0"),
        (["launch.timeout_s=9"], r"^launch\.timeout_s=9\.0: expected .* launch\.warn_after_s=60\.0"),
    ],
)
def test_a_mistake_is_answered_with_a_sentence(overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_overrides(overrides)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LoraConfig(rank=-1), "rank=-1"),
        (lambda: LoraConfig(rank=1, dropout=1.0), "dropout=1.0"),
        (lambda: LoraConfig(rank=1, top_layers=-1), "top_layers=-1"),
        (lambda: OptimizerConfig(lr=1.0, betas=[0.9]), "expected two numbers"),
        (lambda: OptimizerConfig(lr=1.0, max_grad_norm=-1), "max_grad_norm=-1"),
        (lambda: EngineConfig(zero_stage=-1), "zero_stage=-1"),
    ],
)
def test_a_class_refuses_what_makes_no_sense(make, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make()


def groups(settings, path=""):
    """Every group of a run with the dotted name of what is in it."""
    yield path, settings
    for field in dataclasses.fields(settings):
        inner = getattr(settings, field.name)
        if dataclasses.is_dataclass(inner):
            yield from groups(inner, f"{path}{field.name}.")


def numbers():
    run = composed("stage=[sft,reward,ppo,eval,chat]")
    for path, settings in groups(run):
        for name, hint in get_type_hints(type(settings)).items():
            if re.search(r"\b(int|float)\b", str(hint)):
                yield f"{path}{name}", settings, name, "list" in str(hint)


def test_every_number_has_bounds_and_is_finite():
    found = list(numbers())
    assert len(found) > 200
    for dotted, settings, name, is_list in found:
        bounds = bounds_of(type(settings)).get(name)
        assert bounds is not None, f"{dotted}: its type says no bounds; see rlhf/config/bounds.py"
        wrong = [math.nan, math.inf, -math.inf, bounds.low - 1]
        wrong += [bounds.low] if bounds.above else []
        wrong += [bounds.high] if bounds.below else []
        wrong += [bounds.high + 1] if bounds.high < math.inf else []
        wrong += [2**63] if "float" not in str(get_type_hints(type(settings))[name]) else []
        for value in wrong:
            with pytest.raises(ValueError, match=rf"^{name}=.*: expected"):
                dataclasses.replace(settings, **{name: [value, value] if is_list else value})


def test_a_number_is_refused_by_its_whole_name():
    config = hydra_config("stage=[sft,reward,ppo,eval,chat]")
    one_of_each_group = {dotted.rpartition(".")[0]: found for found in numbers() for dotted in found[:1]}
    for dotted, settings, name, _ in one_of_each_group.values():
        wrong = config.copy()
        OmegaConf.update(wrong, dotted, bounds_of(type(settings))[name].low - 1, force_add=True)
        with pytest.raises(ValueError, match=rf"^{re.escape(dotted)}="):
            to_run(wrong)


def test_groups_of_settings_look_at_their_numbers():
    for cls, _, _ in config_fields():
        found = next(vars(module)[cls.name] for module in MODULES if cls.name in vars(module))
        assert issubclass(found, Settings), cls.name


@pytest.mark.parametrize("experiment", ["smoke", "reviews", "custom"])
@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "grpo"])
def test_a_rank_by_hand_is_the_variant_with_adapters(experiment, stage):
    key, more = ("ppo" if stage == "grpo" else stage), ["model.path=x"] if experiment == "custom" else []
    by_hand = composed(f"experiment={experiment}", f"stage={stage}", f"{key}.lora.rank=16", *more)
    variant = composed(f"experiment={experiment}", f"stage={key}_lora", *more)
    whole = composed(f"experiment={experiment}", f"stage={stage}", f"{key}.lora.rank=0", *more)
    names = ["actor_optimizer", "critic_optimizer"] if key == "ppo" else ["optimizer"]
    for name in names:
        rates = [getattr(getattr(run, key), name).lr for run in (by_hand, variant, whole)]
        assert rates[0] == rates[1]
        assert rates[2] < rates[0] or experiment == "smoke"


def test_a_rate_that_is_given_stands_with_and_without_adapters():
    for rank in (0, 4):
        assert composed("stage=sft", f"sft.lora.rank={rank}", "sft.optimizer.lr=0.5").sft.optimizer.lr == 0.5


@pytest.mark.parametrize("kind", ["grpo", "rloo", "dr_grpo", "dapo", "gspo", "cispo", "reinforce_pp"])
def test_the_third_stage_is_called_after_its_variant(kind, tmp_path):
    run = composed(f"stage=[sft,{kind},eval]", f"output_dir={tmp_path}")
    assert (run.title("ppo"), run.folder("ppo"), run.title("sft")) == (kind, f"{tmp_path}/{kind}", "sft")
    assert run.eval.model == f"{tmp_path}/{kind}/actor"
    assert (run.stage_of(kind), run.stage_of("ppo"), run.stage_of("eval")) == ("ppo", None, None)


def test_an_evaluation_by_itself_takes_the_newest_policy(tmp_path):
    assert composed("stage=eval", f"output_dir={tmp_path}").eval.model == f"{tmp_path}/ppo/actor"
    for age, name in enumerate(["grpo", "rloo", "ppo"]):
        (tmp_path / name / "actor").mkdir(parents=True)
        os.utime(tmp_path / name / "actor", (1e9 - age, 1e9 - age))
    assert composed("stage=eval", f"output_dir={tmp_path}").eval.model == f"{tmp_path}/grpo/actor"


def test_batch_arithmetic_adds_up_or_says_what_would():
    assert accumulation(64, limit=MicroBatchLimit(4), ranks=4, name="sft.global_batch_size") == 4
    with pytest.raises(ValueError, match=r"global_batch_size by ranks x micro_batch_size \(3 x 4\): 64.*use 60 or 72"):
        accumulation(64, limit=MicroBatchLimit(4), ranks=3, name="sft.global_batch_size")


def config_fields():
    for module in MODULES:
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
            if file.parent.name != "config"
        )
        + (ROOT / "run_pipeline.py").read_text()
        + (ROOT / "rlhf/config/stage_configs.py").read_text()
        + (ROOT / "rlhf/config/ppo_config.py").read_text()
        + (ROOT / "rlhf/config/objective_config.py").read_text()
        + (ROOT / "rlhf/config/roles.py").read_text()  # names the settings of each role
    )
    for cls, name, _ in config_fields():
        assert re.search(rf"[.\"]{name}\b", code), f"nothing reads {cls.name}.{name}"


def test_known_keys_reach_the_leaves():
    assert {"ppo.kl.coef", "sft.optimizer.lr", "engine.zero_stage", "data.reward.train"} <= set(known_keys())


def test_plain_settings_hold_no_objects_of_ours():
    def leaves(value):
        if isinstance(value, dict):
            return [leaf for inner in value.values() for leaf in leaves(inner)]
        return [leaf for inner in value for leaf in leaves(inner)] if isinstance(value, list) else [value]

    assert all(type(leaf) in {str, int, float, bool, type(None)} for leaf in leaves(as_plain(composed())))


def test_dataclasses_of_the_configuration_are_keyword_only():
    for module in MODULES:
        for value in vars(module).values():
            if dataclasses.is_dataclass(value) and issubclass(value, Settings):
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


def test_text_beside_ppo_needs_data_and_has_no_held_out_part():
    with pytest.raises(ValueError, match=r"ppo.ptx.coef above 0 .* but data.ptx.train is empty; .* set ppo.ptx.coef=0"):
        composed("ppo.ptx.coef=0.1")
    ppo = composed("ppo.ptx.coef=0.1", "data.ptx.train=[a.jsonl]", "ppo.minibatch_size=32").ppo
    assert ppo.ptx.batch_size == 32
    with pytest.raises(ValueError, match=r"data.ptx.eval_fraction=0.5: nothing is evaluated on it; expected"):
        composed("data.ptx.eval_fraction=0.5")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["ppo.lora.rank=8"], r"ppo.reference_update_every=3: with adapters \(ppo.lora.rank=8\) the actor shares"),
        (["ppo.lora.rank=0", "ppo.kl.coef=0"], r"ppo.reference_update_every=3: there is no reference"),
        (["ppo.lora.rank=0", "ppo.reference_update_mix=0"], r"ppo.reference_update_mix=0"),
    ],
)
def test_a_reference_that_cannot_follow_the_actor_is_refused(overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        composed("ppo.reference_update_every=3", *overrides)
    assert composed("ppo.reference_update_every=3", "ppo.lora.rank=0").ppo.reference_update_mix == 0.6  # as TRL
