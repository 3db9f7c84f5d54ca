"""The code of docs/trainer.md does what the page says, and so does the example that it starts."""

import os
import re
import socket
import subprocess
from pathlib import Path

import transformers
from safetensors.torch import load_file

from tests.hf.runs import llama, rows, zero
from tests.test_readme import checkout  # noqa: F401 - a fixture

PAGE = (Path(__file__).parents[2] / "docs/trainer.md").read_text()
BLOCKS = {kind: re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL) for kind in ("python", "bash", "diff")}


def test_the_page_is_short():
    assert len(PAGE.splitlines()) <= 110


def test_the_code_runs_as_it_is_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = llama()
    space = {"model": model, "rows": rows(model), "config": zero(3)}
    space |= {"MyArguments": transformers.TrainingArguments, "MyTrainer": transformers.Trainer}
    for block in BLOCKS["python"]:
        exec(block, space)  # noqa: S102 - of our own page
    assert transformers.LlamaForCausalLM.from_pretrained("out").num_parameters() == model.num_parameters()
    args = space["MyZeroArguments"](output_dir="mine", use_cpu=True, max_steps=1, save_strategy="no", deepspeed=zero(2))
    trainer = space["MyZeroTrainer"](model=llama(), args=args, train_dataset=rows(model))
    assert trainer.train().global_step == 1
    assert trainer._engine is not None


def test_lines_that_change_are_lines_of_imports():
    for block in BLOCKS["diff"]:
        old, new = block.splitlines()
        assert re.sub("transformers|trl", "rlhf.hf", old[1:]) == new[1:]
        names = new.partition(" import ")[2]
        exec(f"from rlhf.hf import {names}") if "SFT" not in names else None  # noqa: S102 - TRL may not be there


def test_the_commands_train_on_two_ranks_and_go_on_on_one(checkout):  # noqa: F811
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for block in BLOCKS["bash"]:
        text = block.replace("--nproc-per-node", f"--master-port {port} --nproc-per-node")
        done = subprocess.run(
            ["bash", "-ec", text],
            cwd=checkout,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert (checkout / "out/checkpoint-4/zero/step-000004/rank-00001.safetensors").is_file()
    assert not (checkout / "out/checkpoint-6/zero/step-000006/rank-00001.safetensors").exists()
    assert "eval_loss" in done.stdout
    assert load_file(checkout / "out/model.safetensors")
