"""Cards and uploads of the models of a real run, against a hub on the loopback."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf.tracking import provenance
from stages.lifecycle.model_card import card
from stages.lifecycle.stage_record import StageRecord, read_record
from stages.publish import main
from tests.forking import run_forked
from tests.stages.hub_server import serving

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
OF_SFT = {"sft.engine.precision": "auto", "sft.init_from": "Qwen/Qwen2.5-0.5B", "model.path": "Qwen/Qwen2.5-0.5B"}
ROWS = [{"text": f"Movie review: number {number} is a film."} for number in range(40)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("publish")
    data = folder / "private" / "demonstrations"
    data.mkdir(parents=True)
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (data / "README.md").write_text("---\nlicense: cc-by-4.0\n---\nFilms.\n")
    words = ["experiment=smoke", "stage=[sft_lora,reward,ppo_lora]", "engine.precision=fp32", "tracking.report=false"]
    words += [f"data.sft.train=[{data}]", "data.sft.eval=[]", "ppo.kl.coef=0.125", "sft.optimizer.ema_decay=0.9"]
    done = run_forked("run_pipeline.py", *words, f"output_dir={folder / 'films'}", env=ENV)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "films"


def publish(*words, url="http://127.0.0.1:9", token="hf_good"):
    """What the command prints, and the sentence it ends with; in this process, for another takes seconds to start."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", token)
        patch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
        try:
            main([*map(str, words)])
        except SystemExit as ended:
            return output.getvalue(), str(ended.code)
    return output.getvalue(), ""


@pytest.mark.parametrize("model", ["sft/model", "sft/model_ema", "reward/model", "ppo/actor", "ppo/critic"])
def test_the_code_of_a_card_runs_where_it_says(run, model, capsys, monkeypatch):
    monkeypatch.chdir(run / model)
    exec(re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)[1], {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("model", ["sft/model", "ppo/actor", "ppo/critic"])
def test_the_code_of_the_adapters_card_gives_what_the_merged_model_gives(run, model, monkeypatch):
    base = run / ("base" if model == "sft/model" else "reward/model" if model == "ppo/critic" else "sft/model")
    monkeypatch.chdir(run / model / "adapter")
    for file in Path("..").glob("tokenizer*"):
        shutil.copy(file, ".")
    shutil.copy("../chat_template.jinja", ".")
    text = re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)[1]
    found = {}
    exec(text.replace('BASE = "MODEL"', f'BASE = "{base}"'), found)
    merged = type(found["model"].get_base_model()).from_pretrained("..")
    with torch.no_grad():
        logits = [model(found["inputs"]["input_ids"]).logits for model in (found["model"], merged)]
    assert torch.allclose(*logits, atol=1e-5)


def test_the_score_of_a_reward_models_card_is_the_one_that_ppo_is_paid(run, monkeypatch, capsys):
    monkeypatch.chdir(run / "reward/model")
    exec(re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)[1], {})
    record = json.loads(Path("stage.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(".")
    ids = tokenizer("A questionand its answer<|im_end|>", return_tensors="pt").input_ids
    with torch.no_grad():
        score = AutoModelForSequenceClassification.from_pretrained(".")(ids).logits.item()
    expected = (score - record["score_mean"]) / record["score_std"]
    assert float(re.search(r"tensor\((.*)\)", capsys.readouterr().out)[1]) == pytest.approx(expected, rel=1e-3)


def test_a_card_says_where_the_model_comes_from(run):
    text = (run / "sft/model/README.md").read_text()
    assert "| private/demonstrations | split train, training | cc-by-4.0 |" in text
    assert "38 rows to train on, 2 held out" in text
    assert "Licence: apache-2.0" in text
    assert "| sft.lora.rank | " in text
    actor = (run / "ppo/actor/README.md").read_text()
    assert "films/base, made by this project (`model.embedded=tiny`), then sft in the same run" in actor
    assert "| ppo.kl.coef | 0.125 |" in actor
    assert "- **Rewards**: reward/model." in actor
    head = ModelCard(actor).data
    assert (head.license, head.base_model, head.pipeline_tag) == ("apache-2.0", None, "text-generation")


def test_a_card_tells_nothing_of_the_machine(run):
    for file in run.rglob("README.md"):
        assert str(run.parent) not in file.read_text(), file


def test_a_card_has_the_results_of_the_record(run):
    record = read_record(run / "ppo/actor")
    rows = re.findall(r"^\| (eval/\S+) \| (\S*) \| (\S*) \|", (run / "ppo/actor/README.md").read_text(), re.MULTILINE)
    assert {name for name, _, _ in rows} == {name for name in record.after if name.startswith("eval/")}
    for name, before, after in rows:
        assert float(before) == pytest.approx(record.before[name], rel=1e-3)
        assert float(after) == pytest.approx(record.after[name], rel=1e-3)


def test_a_card_of_little_knowledge_says_so(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.setattr(provenance, "version", absent)  # a checkout that is run as it is
    record = StageRecord("sft", "template", 0)
    text = card(tmp_path / "model", record)
    assert "**Base model**: unknown. Licence: unknown." in text
    assert "None were measured" in text
    assert "How many rows there were is not recorded" in text
    assert "The command was not recorded. rlhf-pipeline not installed." in text


def absent(package):
    raise PackageNotFoundError(package)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"path": "rm-static"},
            "| rm-static | split train, training, read as Dahoas/rm-static | see huggingface.co/da",
        ),
        (
            {"path": "Dahoas/rm-static"},
            "training | see huggingface.co/datasets/Dahoas/rm-static |",
        ),
        (
            {"path": "COPY", "known_as": "rm-static"},
            "| data/copy | split train, training, read as Dahoas/rm-static | mit |",
        ),
        ({"path": "COPY"}, "| data/copy | split train, training | mit |"),
        ({"path": "BROKEN"}, "| data/broken | split train, training | unknown: nothing there states it |"),
        ({"path": "/gone/a.jsonl", "weight": 0.5}, "| gone/a.jsonl | split train, training, weight 0.5 | unknown |"),
        ({"path": "my/rows.py:made"}, "| rows.py:made | split train, training | unknown |"),
    ],
    ids=["known name", "hub id", "copy of a known set", "folder", "broken head", "gone", "function"],
)
def test_a_card_names_every_kind_of_data(settings, expected, tmp_path):
    for name, head in (("copy", "license: mit"), ("broken", "license: [")):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "README.md").write_text(f"---\n{head}\n---\n")
    (tmp_path / "sft/model").mkdir(parents=True)
    places = {"COPY": str(tmp_path / "data/copy"), "BROKEN": str(tmp_path / "data/broken")}
    source = {"split": "train", **settings, "path": places.get(settings["path"], settings["path"])}
    flat = {f"data.sft.train.0.{name}": value for name, value in source.items()}
    (tmp_path / "sft/config.json").write_text(json.dumps({**OF_SFT, **flat}))
    text = card(tmp_path / "sft/model", StageRecord("sft", "template", 0))
    assert expected in text
    head = ModelCard(text).data
    assert (head.base_model, head.license) == ("Qwen/Qwen2.5-0.5B", None)
    assert "Base model**: Qwen/Qwen2.5-0.5B. Licence: see huggingface.co/Qwen/Qwen2.5-0.5B." in text


def test_without_a_repository_nothing_is_sent(run):
    with serving() as hub:
        printed, error = publish(run / "ppo/actor", url=hub.url)
    assert error == ""
    assert "model.safetensors" in printed
    assert "Nothing was uploaded" in printed
    assert (hub.created, hub.files) == ([], {})


def test_an_upload_is_the_folder_with_the_card_as_edited(run, tmp_path):
    """As a user runs it."""
    model = shutil.copytree(run / "ppo", tmp_path / "ppo") / "actor"
    (model / "README.md").write_text((model / "README.md").read_text() + "\nEdited.\n")
    command = [sys.executable, "-m", "stages.publish", str(model), "--to", "me/policy", "--private"]
    with serving() as hub:
        env = {**ENV, "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_good", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("/me/policy/commit/1")
    assert hub.created[0]["name"] == "policy"
    assert hub.files == {
        path.relative_to(model).as_posix(): path.read_bytes() for path in model.rglob("*") if path.is_file()
    }


def test_adapters_alone_name_a_base_that_others_have(run):
    assert "--base OWNER/NAME" in publish(run / "ppo/actor", "--adapter")[1]
    with serving() as hub:
        words = ("--adapter", "--base", "me/base", "--to", "me/policy")
        assert publish(run / "ppo/actor", *words, url=hub.url)[1] == ""
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "me/base"
    assert b'BASE = "me/base"' in hub.files["README.md"]
    assert {"adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(hub.files)
    assert "model.safetensors" not in hub.files


@pytest.mark.parametrize(
    ("words", "token", "expected"),
    [
        (["ppo"], "hf_good", "expected the folder of a model that a finished stage has written"),
        (["reward/model", "--adapter"], "hf_good", "has no adapter/"),
        (["ppo/actor", "--to", "me/policy"], "hf_bad", "the hub did not take it"),
        (["ppo/actor", "--to", "me/policy"], "", "Run `hf auth login`"),
        (["ppo/actor", "--to", "a/b/c"], "hf_good", "Repo id must be"),
    ],
)
def test_what_cannot_be_published_is_refused_in_one_sentence(run, words, token, expected):
    with serving() as hub:
        _, error = publish(run / words[0], *words[1:], url=hub.url, token=token)
    assert expected in error
    assert hub.files == {}


def test_a_hub_that_is_not_there_ends_in_one_sentence(run):
    assert "the hub did not take it" in publish(run / "ppo/actor", "--to", "me/policy")[1]


def test_a_damaged_model_is_not_published(run, tmp_path):
    model = shutil.copytree(run / "ppo", tmp_path / "ppo") / "actor"
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x00\x01\x02\x03")
    assert "checksum differs" in publish(model)[1]


def test_a_missing_card_is_written_again(run, tmp_path):
    stage = shutil.copytree(run / "ppo", tmp_path / "films" / "ppo")
    (stage / "actor/README.md").unlink()
    assert publish(stage / "actor")[1] == ""
    assert "# films/ppo/actor" in (stage / "actor/README.md").read_text()
