"""TRL itself and the translated command learn alike: losses, norms, rates, held-out loss (where TRL is installed)."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.config.run_config import Embedded
from rlhf.migrate.__main__ import command_of, translations
from rlhf.migrate.flags import peer
from rlhf.models.embedded import prepare

ROOT = Path(__file__).parents[2]
WORDS = [("red", "blue"), ("pear", "plum"), ("oak", "elm"), ("ash", "fig")]
DEMONSTRATIONS = [{"prompt": f"Name {a}:", "completion": f" {a} {b} and {a}"} for a, b in WORDS]
PAIRS = [{"prompt": f"Name {a}:", "chosen": f" {a} {b} and {a}", "rejected": f" {b} or {b}"} for a, b in WORDS]
FLAGS = (
    "--max_length 128 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --max_steps 4 "
    "--max_grad_norm 0.5 --learning_rate 1e-3 --lr_scheduler_type cosine --weight_decay 0.1 "
    "--bf16 false --no_gradient_checkpointing --logging_steps 1 --report_to none --use_cpu --save_strategy no "
    "--eval_strategy steps --eval_steps 4"
)


@pytest.mark.parametrize(
    ("step", "rows", "flags"),
    [
        ("sft", DEMONSTRATIONS, "--adam_beta2 0.95"),
        ("dpo", PAIRS, "--beta 0.3 --loss_type ipo"),
    ],
)
def test_trl_and_the_translated_command_learn_alike(tmp_path, step, rows, flags):
    """A step takes all four rows, so their order does not matter; two micro-batches of different lengths make it."""
    pytest.importorskip("trl")
    prepare(Embedded.tiny, tmp_path / "tiny")
    (tmp_path / "rows").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"rows/{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = f"--model_name_or_path tiny --dataset_name rows {FLAGS} {flags}"
    said = run(f"-m trl.scripts.{step} {told} --output_dir theirs".split(), tmp_path)
    theirs = [ast.literal_eval(line) for line in re.findall(r"\{'(?:eval_)?loss.*?\}", said)]
    (found,) = translations(peer("trl"), [f"trl {step} {told} --output_dir ours"])
    words = [*command_of(found), "tracking.report=false", "tracking.progress=plain"]
    run([str(ROOT / "run_pipeline.py"), *words], tmp_path)
    ours = [json.loads(line) for line in (tmp_path / f"ours/{step}/metrics.jsonl").read_text().splitlines()]
    assert len(theirs) == len(ours) == 5  # four steps; theirs ends with an evaluation, ours begins with one
    for their, our in zip(theirs, ours[1:], strict=False):
        for name, key in (("loss", "train/loss"), ("grad_norm", "train/grad_norm"), ("learning_rate", "train/lr")):
            assert our[key] == pytest.approx(float(their[name]), rel=1e-3), (our["step"], name)
    assert ours[-1]["eval/loss"] == pytest.approx(float(theirs[-1]["eval_loss"]), rel=1e-3)


def run(words, folder):
    """What a Python program prints."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
