"""What is wrong with an evaluation is said before a model is loaded, with the setting and what to do about it."""

import json
import os
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.config.run_config import Embedded
from rlhf.models.embedded import prepare
from rlhf.models.export import export
from rlhf.models.scalar_head import scalar_head_model
from rlhf.text.tokenizer import load_tokenizer
from stages.lifecycle.stage_record import StageRecord, write_record
from stages.setup.preflight import preflight
from tests import fakes
from tests.config.test_configuration import composed
from tests.models import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return prepare(Embedded.tiny, tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def reward(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "model"
    module = tiny.materialized(scalar_head_model(model))
    export(module, tiny.named_tensors(module), folder=folder, tokenizer=load_tokenizer(str(model)))
    return folder


@pytest.fixture
def evaluation(model, reward, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"a{n}"}) + "\n" for n in range(9)))

    def make(*overrides):
        named = {"model": model, "baseline": model, "reference": model, "reward": reward}
        settings = ["experiment=custom", "stage=eval", f"model.path={model}", f"output_dir={tmp_path / 'out'}"]
        paths = [f"eval.{name}={path}" for name, path in named.items()]
        return composed(*settings, f"data.ppo.eval=[{file}]", *paths, *overrides)

    return make


def test_a_good_evaluation_is_let_through(evaluation):
    assert preflight(evaluation(), ranks=2) == []


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["eval.model=${output_dir}/ppo/actor"], r"eval\.model=.*stage=\[sft,reward,ppo,eval\]', or name another"),
        (["eval.reference=${output_dir}/sft/model"], r"stage=\[sft,eval\]', or name another, .*eval\.reference=null"),
        (["eval.baseline=/no/such/place"], r"eval\.baseline=/no/such/place: there is no such model .*Name another"),
        (["eval.judges=[rewrd]"], r"eval\.judges: 'rewrd' is no judge; expected reward, human, or module:function"),
        (["eval.judges=['math:nothing']"], r"eval\.judges: 'math:nothing': no such function.*expected module:function"),
        (["eval.reward=null"], r"has reward, but eval\.reward=null; expected a reward model"),
        (["eval.baseline=null", "eval.judges=[human]"], r"compare two models, but eval\.baseline=null"),
        (["eval.reward=${eval.model}"], r"eval\.reward=.* without a scalar head; .*eval\.reward=null"),
        (["data.ppo.eval=[]"], r"data\.ppo\.eval is empty and data\.ppo\.eval_fraction holds no row out"),
        (["eval.max_prompt_tokens=1"], r"longer than eval\.max_prompt_tokens=1"),
        (["eval.max_response_tokens=9999"], r"eval\.max_prompt_tokens \+ eval\.max_response_tokens = 512 \+ 9999"),
        (["eval.max_row_tokens=9999"], r"eval\.model=.* has 2048 positions, but .*eval\.max_row_tokens = 512 \+ 9999"),
        (["eval.engine.device=cuda"], r"eval\.engine\.device=cuda differs from engine\.device"),
    ],
)
def test_what_is_wrong_is_named(evaluation, overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        preflight(evaluation(*overrides), ranks=1)


def test_rows_beyond_their_own_limit_are_named_with_it(evaluation, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "a", "chosen": " b" * 9, "rejected": " c"}) + "\n")
    with pytest.raises(ValueError, match=r"data\.reward\.eval: all rows .* longer than eval\.max_row_tokens=4"):
        preflight(evaluation(f"data.reward.eval=[{file}]", "eval.max_row_tokens=4"), ranks=1)


def test_another_vocabulary_is_refused(evaluation, tmp_path):
    other = tmp_path / "other"
    LlamaForCausalLM(LlamaConfig(vocab_size=400, hidden_size=8, num_attention_heads=2)).save_pretrained(other)
    fakes.chat_tokenizer(other)
    with pytest.raises(ValueError, match=r"eval\.baseline=.* has another vocabulary than eval\.model="):
        preflight(evaluation(f"eval.baseline={other}"), ranks=1)


def test_a_reward_model_of_another_template_is_refused(evaluation, reward, tmp_path, model):
    write_record(StageRecord("reward", template="another", pad_id=0), reward)
    try:
        with pytest.raises(ValueError, match=r"eval\.reward=.* was trained with another chat template"):
            preflight(evaluation(), ranks=1)
    finally:
        (reward / "stage.json").unlink()


def test_a_person_needs_one_rank_and_something_to_answer_with(evaluation, monkeypatch):
    run = evaluation("eval.judges=[human]")
    with pytest.raises(ValueError, match=r"has human, but this run has 2 ranks.*launch\.ranks=1"):
        preflight(run, ranks=2)
    with open(os.devnull) as nothing:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdin", nothing)
        with pytest.raises(ValueError, match=r"neither a terminal to ask in nor anything piped in"):
            preflight(run, ranks=1)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match=r"neither a terminal"):
        preflight(run, ranks=1)
    reading, writing = os.pipe()
    with os.fdopen(writing, "w"), os.fdopen(reading) as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        assert preflight(run, ranks=1) == []


def test_models_that_this_run_will_make_need_not_be_there(tmp_path):
    run = composed("experiment=smoke", "stage=[sft,reward,ppo,eval]", f"output_dir={tmp_path}")
    assert preflight(run, ranks=1) == ["sft", "reward", "ppo"]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("eval.prompts=0", "prompts=0: expected 1 or more"),
        ("eval.name=a/b", "expected the name of a folder"),
        ("eval.name='..'", "expected the name of a folder"),
        ("eval.judges=[reward,reward]", "reward is there twice"),
        ("eval.rows=-1", "rows=-1: expected 0 or more"),
    ],
)
def test_settings_that_make_no_sense_are_refused(override, sentence):
    with pytest.raises(Exception, match=sentence):
        composed("experiment=smoke", "stage=eval", override)
