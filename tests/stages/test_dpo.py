"""The DPO stage on a tiny model: its reference, what a checkpoint keeps of it, and who finds its policy."""

import filecmp
import json
import os
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from data.samples import READERS
from rlhf.config.roles import policy_path, roles_of
from rlhf.config.run_config import Embedded
from rlhf.memory_plan.planner import machine_of, plan_stage
from rlhf.models.embedded import prepare
from rlhf.runtime.dist import World
from rlhf.text.tokenizer import load_tokenizer
from stages import dpo
from stages.setup.preflight import preflight
from tests.config.test_configuration import composed

SHORT = ["dpo.eval_rows=6", "engine.precision=fp32"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "model"
    prepare(Embedded.tiny, path)
    return path


@pytest.fixture(scope="module")
def other(model, tmp_path_factory):
    """A model of the same shape and tokenizer with other weights."""
    path = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(model, path)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    loaded.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _no_wandb(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")


def run_of(model, folder, *words):
    words = [f"model.path={model}", "model.embedded=null", f"dpo.init_from={model}", f"output_dir={folder}", *words]
    return composed("experiment=smoke", "stage=dpo", "tracking.progress=quiet", *SHORT, *words)


def numbers(folder):
    rows = [json.loads(line) for line in (folder / "dpo/metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key.startswith(("train", "eval"))} for row in rows]


@pytest.mark.parametrize("words", [[], ["dpo.lora.rank=2"], ["dpo.reference={other}"]], ids=["whole", "lora", "named"])
def test_an_interrupted_run_goes_on_bit_for_bit_without_asking_the_reference_again(
    model, other, tmp_path, monkeypatch, words
):
    words = ["checkpoint.every=1", "dpo.eval_every=2", *(word.format(other=other) for word in words)]
    whole, cut = (run_of(model, tmp_path / name, *words) for name in ("whole", "cut"))
    dpo.run_dpo(whole, World.alone())
    with monkeypatch.context() as patched:
        patched.setattr("stages.supervised.take_step", _fails_after(2))
        with pytest.raises(ZeroDivisionError):
            dpo.run_dpo(cut, World.alone())
    monkeypatch.setattr(dpo.ReferenceLogprobs, "ask", None)
    dpo.run_dpo(cut, World.alone())
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    weights = (tmp_path / name / "dpo/model/model.safetensors" for name in ("cut", "whole"))
    assert filecmp.cmp(*weights, shallow=False)


def _fails_after(count):
    take_step, calls = dpo.run_supervised.__globals__["take_step"], iter(range(count))

    def step(*arguments, **options):
        if next(calls, None) is None:
            raise ZeroDivisionError
        return take_step(*arguments, **options)

    return step


def test_a_named_reference_is_asked_and_closed_before_the_policy_is_opened(model, other, tmp_path, monkeypatch):
    events, open_model = [], dpo.open_model

    def opening(run, role, **options):
        engine = open_model(run, role, **options)
        close = engine.close
        engine.close = lambda: (events.append(f"{role.name} closed"), close())
        events.append(f"{role.name} opened")
        return engine

    monkeypatch.setattr(dpo, "open_model", opening)
    monkeypatch.setattr("stages.supervised.open_model", opening)
    dpo.run_dpo(run_of(model, tmp_path, f"dpo.reference={other}"), World.alone())
    assert events == ["reference opened", "reference closed", "model opened", "model closed"]
    before = numbers(tmp_path)[0]
    assert abs(before["eval/log_ratio"]) > 1e-2  # another model than the policy
    assert before["eval/loss"] != pytest.approx(numbers_of_itself(model, tmp_path / "own"), abs=1e-4)


def numbers_of_itself(model, folder):
    dpo.run_dpo(run_of(model, folder, "dpo.reference=null"), World.alone())
    return numbers(folder)[0]["eval/loss"]


def test_a_reference_that_is_the_policy_itself_gives_the_same_run(model, tmp_path):
    for name, word in (("own", "dpo.reference=null"), ("named", f"dpo.reference={model}")):
        dpo.run_dpo(run_of(model, tmp_path / name, word), World.alone())
    assert numbers(tmp_path / "own") == numbers(tmp_path / "named")
    assert numbers(tmp_path / "own")[0]["eval/loss"] == pytest.approx(0.693147, abs=1e-5)


def test_the_plan_has_the_reference_alone_and_before_training(model, other, tmp_path):
    for words, phases in (([], []), ([f"dpo.reference={other}"], ["reference"])):
        run = run_of(model, tmp_path, *words)
        plan = plan_stage(run, "dpo", machine=machine_of(run, ranks=1))
        assert [phase.name for phase in plan.phases] == [*phases, "evaluate", "train", "save"]
        for phase in plan.phases:
            roles = {item.role for item in phase.items} - {"process"}
            assert roles == {"reference" if phase.name == "reference" else "model"}, phase.name


REFUSED = [
    (["dpo.beta=0"], r"dpo\.beta=0\.0: expected a number above 0"),
    (["dpo.beta=-1"], r"dpo\.beta=-1\.0: expected a number above 0"),
    (["dpo.label_smoothing=0.5"], r"dpo\.label_smoothing=0\.5: expected at least 0, below 0\.5"),
    (["dpo.label_smoothing=-0.1"], r"dpo\.label_smoothing=-0\.1: expected at least 0, below 1"),
    (["dpo.loss_type=hinge", "dpo.label_smoothing=0.1"], r"dpo\.label_smoothing=0\.1: loss_type=hinge has none"),
    (["dpo.loss_type=ipo", "dpo.label_smoothing=0.1"], r"dpo\.label_smoothing=0\.1: loss_type=ipo has none"),
    (["dpo.rpo_alpha=-1"], r"dpo\.rpo_alpha=-1\.0: expected 0 or more"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_settings_that_mean_nothing_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        composed("experiment=smoke", "stage=dpo", *words)


def test_data_without_pairs_and_a_missing_model_are_refused_before_any_work(model, tmp_path):
    with pytest.raises(ValueError, match=r"data\.dpo\.train\[0\].*chosen.*rejected"):
        preflight(run_of(model, tmp_path, "data.dpo.train=[data/reviews/prompts_train.jsonl]"), ranks=1)
    with pytest.raises(ValueError, match=r"dpo\.init_from=.*no such model yet.*'stage=\[sft,dpo\]'"):
        preflight(composed("experiment=smoke", "stage=dpo", f"output_dir={tmp_path}"), ranks=1)
    with pytest.raises(
        ValueError, match=r"dpo\.reference=/nowhere: .*no such model yet.*or do without, as in dpo\.reference=null"
    ):
        preflight(run_of(model, tmp_path, "dpo.reference=/nowhere"), ranks=1)


def test_the_pairs_are_those_of_reward_modelling_until_others_are_named(model, tmp_path):
    tokenizer = load_tokenizer(str(model))

    def splits(*words):
        run = run_of(model, tmp_path, *words)
        return {
            name: READERS[name](run.data, run.dpo, tokenizer=tokenizer) for name in ("preferences", "dpo_preferences")
        }

    for words in ([], ["data.stage_split=[2,4,4]"], ["data.reward.eval=[]", "data.reward.eval_fraction=0.2"]):
        found = splits(*words)
        assert found["preferences"].fingerprint == found["dpo_preferences"].fingerprint
    found = splits("data.dpo.train=[data/reviews/preferences_eval.jsonl]")
    assert len(found["dpo_preferences"].train) < len(found["preferences"].train)
    assert len(found["dpo_preferences"].eval) == len(found["preferences"].eval)


@pytest.mark.parametrize(
    ("there", "stages", "expected"),
    [
        (["dpo/model"], "chat", "dpo/model"),
        (["sft/model"], "[dpo,chat]", "dpo/model"),
        (["dpo/model"], "[ppo,chat]", "ppo/actor"),
        (["sft/model", "ppo/actor", "dpo/model"], "chat", "dpo/model"),
        (["dpo/model", "ppo/actor"], "chat", "ppo/actor"),
    ],
)
def test_the_newest_policy_of_a_folder_is_the_one_that_answers(there, stages, expected, tmp_path):
    for seconds, product in enumerate(there):  # the last one is the newest
        (tmp_path / product).mkdir(parents=True)
        os.utime(tmp_path / product, (seconds, seconds))
    run = composed("experiment=smoke", f"stage={stages}", f"output_dir={tmp_path}")
    assert policy_path(run) == roles_of(run, "chat")[0].path == f"{tmp_path}/{expected}"
    run = composed("experiment=smoke", f"stage={stages.replace('chat', 'eval')}", f"output_dir={tmp_path}")
    assert run.eval.model == f"{tmp_path}/{expected}"


def test_an_evaluation_needs_no_reward_model_where_the_policy_needs_none(tmp_path):
    by_function = ["stage=[sft,grpo,eval]", "ppo.rewards=[my.py:f]"]
    for words in (["stage=[sft,dpo,eval]"], by_function):
        run = composed("experiment=smoke", *words, f"output_dir={tmp_path}")
        assert (run.eval.reward, run.eval.judges) == (None, [])
    for words in (["stage=[sft,grpo,eval]"], [*by_function[:1], "ppo.rewards=['${ppo.reward}',my.py:f]"]):
        run = composed("experiment=smoke", *words, f"output_dir={tmp_path}")
        assert run.eval.reward == f"{tmp_path}/reward/model"  # and its absence is an error
    (tmp_path / "dpo/model").mkdir(parents=True)
    alone = composed("experiment=smoke", "stage=eval", f"output_dir={tmp_path}")
    assert (alone.eval.reward, alone.eval.judges) == (None, [])
    named = composed("experiment=smoke", "stage=[sft,dpo,eval]", f"output_dir={tmp_path}", "eval.reward=judge")
    assert (named.eval.reward, named.eval.judges) == ("judge", ["reward"])
    (tmp_path / "reward/model").mkdir(parents=True)
    there = composed("experiment=smoke", "stage=[sft,dpo,eval]", f"output_dir={tmp_path}")
    assert there.eval.reward == f"{tmp_path}/reward/model"
