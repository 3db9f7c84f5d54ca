"""Odd words, tab completion, help: what a person sees of the program before anything is loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.setup.command_line import check_overrides, overridden_keys, prepared

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["data.sft.train=file.jsonl"], "expected a list; write 'data.sft.train=[file.jsonl]'"),
        (["data.sft.train=null"], "expected a list; write 'data.sft.train=[]'"),
        (["data.sft.train={path: x}"], "expected a list; write 'data.sft.train=[{path: x}]'"),
        (["stage=eval", "eval.judges=reward"], "expected a list; write 'eval.judges=[reward]'"),
        (["sft.optimizer.betas=0.9"], "expected a list; write 'sft.optimizer.betas=[0.9]'"),
        (["data.sft.train=[1]"], "expected a path, or a mapping with `path`"),
        (["model=/path"], "expected one of path, smollm2, tiny. A folder or hub id is given as model=path"),
        (["data=my.jsonl"], "Files are given as data=files data.sft.train=[my.jsonl]"),
        (["engine=ds.json"], "A DeepSpeed file is given as engine.deepspeed=ds.json"),
        (["stage="], "expected one of chat, "),
        (["experiment=null"], "expected one of custom, reasoning, reviews, smoke"),
        (["model.path=~/x"], f"write model.path={Path.home()}/x"),
        (["data.sft.train=[~/x.jsonl]"], f"write 'data.sft.train=[{Path.home()}/x.jsonl]'"),
        (["name=ü"], """write 'name="ü"'"""),
        (["data.sft.train=[ü.jsonl,a.jsonl]"], """write 'data.sft.train=["ü.jsonl",a.jsonl]'"""),
        (["model.path=a=b"], """write 'model.path="a=b"'"""),
        (["model.path=a(b)"], """write 'model.path="a(b)"'"""),
        (["name=a;b"], """write 'name="a;b"'"""),
        (["name=${x}"], "name=${x}: Interpolation key 'x' not found"),
        (["name=${oc.env:NO_SUCH_VARIABLE}"], "Environment variable 'NO_SUCH_VARIABLE' not found"),
        (["stage=[sft"], "a bracket or a quotation mark is not closed"),
        (["stage=[sft]]"], "a bracket or a quotation mark is not closed"),
        (["name='a"], "a bracket or a quotation mark is not closed"),
        (["stage=sft,reward"], "A list is written 'stage=[sft,reward]'"),
        (["name=a,b"], """a text with commas 'name="a,b"'; -m in front"""),
        (["plan"], "plan: expected NAME=VALUE"),
        (["hydra.verbose=true"], "its own change nothing"),
        (["=3"], "is no name of a setting"),
        (["sft..epochs=1"], "'sft..epochs' is no name of a setting"),
        (["sft.epochs =1"], "'sft.epochs ' is no name of a setting"),
        (["ü=1"], "'ü' is no name of a setting"),
        (["sft@x=1"], "'sft@x' is no name of a setting"),
        (["sft=1"], "these are many settings; expected one of them, such as sft.engine=VALUE"),
        (["name=null"], "name: expected a value, found null"),
        (["~sft"], "nothing but data.gold.NAME=module:function can be added or taken away"),
        (["~data.gold"], "nothing but data.gold.NAME=module:function can be added or taken away"),
        (["+sft.epochs=1"], "nothing but data.gold.NAME=module:function can be added or taken away"),
        (["stage=[sft,grpo]", "grpo.kl.coef=1"], "the settings of grpo are those of ppo; write ppo.kl.coef=1"),
        (["stage=grpo", "sft.epochs=1"], "(selected: grpo). Add it, as in 'stage=[grpo,sft]'"),
        (["engine.optimizer_tier=cpu"], "engine.optimizer_tier: this setting is now called engine.offload_optimizer."),
        (["ppo.score.no_end_kind=set"], "this setting is now called ppo.score.missing_eos_mode."),
        (["stage=eval", "eval.against=M"], "this setting is now called eval.baseline."),
        (["stage=gspo", "ppo.ratio=token"], "ppo.ratio: this setting is now called ppo.ratio_level."),
        (["tracking.histograms_every=5"], "have no histograms any more; remove the setting"),
        (["engine.offload_optimizer=device"], "expected one of [none, cpu, nvme]"),
        (["seed=nan"], "seed: Value 'nan' of type 'float' could not be converted to Integer"),
    ],
)
def test_an_odd_word_is_answered_with_how_to_write_it(words, sentence):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as found:
        check_overrides(words)
    assert sentence in str(found.value)


@pytest.mark.parametrize(
    "words",
    [
        ["sft=null"],
        ["data.gold.mine=module:function"],
        ["+data.gold.mine=module:function"],
        ["~data.gold.lexicon"],
        ["stage=sft", "sft.optimizer.schedule=warmup_lr", "sft.optimizer.schedule_options.warmup_num_steps=3"],
        ["stage=sft", "sft.optimizer.schedule=warmup_lr", "sft.optimizer.schedule_options={warmup_num_steps: 3}"],
        ["model.path=/a b"],
        ['name="ü"'],
        ["ppo.target_kl=null"],
        ["data.sft.train=${data.reward.train}"],
    ],
)
def test_what_can_be_meant_is_accepted(words):
    check_overrides(words)


def test_a_stage_may_be_taken_out_but_its_settings_need_it():
    assert check_overrides(["stage=[sft,reward]", "sft=null"]).stages == ["reward"]
    with pytest.raises(ValueError, match="the stage 'ppo' is not part of this run"):
        check_overrides(["stage=sft", "ppo.epochs=2", "sft.epochs=x"])


def test_entries_of_a_mapping_need_no_plus():
    assert prepared(["data.gold.x=m:f", "+data.gold.y=m:f", "seed=1"]) == [
        "++data.gold.x=m:f",
        "+data.gold.y=m:f",
        "seed=1",
    ]
    assert "data.gold.x" in overridden_keys(prepared(["data.gold.x=m:f"]))


def run(*words, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "run_pipeline.py"), *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_help_begins_with_sentences_and_shows_choices_and_settings():
    shown = run("--help").stdout
    assert shown.startswith("The whole of RLHF: supervised fine-tuning")
    assert "stage: chat, cispo, dapo, dpo, dpo_lora, dr_grpo, eval, grpo, gspo" in shown
    assert "zero_stage: 0" in shown


def test_a_mistake_ends_with_one_line_before_torch_is_imported(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    for words in (["sft.epoch=3"], ["--help"], ["-m", "seed=1"], ["--cfg", "job"]):
        done = run(*words, PYTHONPATH=str(tmp_path))
        assert "torch was imported" not in done.stdout + done.stderr, words
    refused = run("sft.epoch=3")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert (
        refused.stderr
        == "error: sft.epoch: there is no such setting. Did you mean sft.epochs or ppo.epochs or dpo.epochs?\n"
    )


def test_tab_completes_choices_and_settings():
    assert "COMPREPLY" in run("-sc", "install=bash").stdout
    line = "python run_pipeline.py engine=zero3"
    found = run("-sc", "query=bash", COMP_LINE=line, COMP_POINT=str(len(line))).stdout.split()
    assert {"engine=zero3", "engine=zero3_cpu", "engine=zero3_nvme"} == set(found)
