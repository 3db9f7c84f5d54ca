"""An iteration of PPO as a user runs it, on the case for which DeepSpeed-Chat publishes what one card does."""

from __future__ import annotations

import json
import random
import statistics
import string
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, OPTConfig

from benchmarks.gpu_bench import Bench
from benchmarks.gpu_decode import _OPT
from benchmarks.gpu_plan import planned
from benchmarks.zero_report import table
from rlhf.models.embedded import byte_tokenizer

ITERATIONS = 3
"""The first is not counted."""
THEIRS = 131_900 / (11.7 * 3600)
"""Prompts a second of DeepSpeed-Chat's step 3, on one A100 with 80 GB: 131.9k in 11.7 hours."""
PHASES = ("generate", "score", "train")
_OPT_350M = _OPT | {"hidden_size": 1024, "ffn_dim": 4096, "num_attention_heads": 16}
_OPT_350M |= {"word_embed_proj_dim": 512, "do_layer_norm_before": False}
_TOY = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
_TOY |= {"word_embed_proj_dim": 64}


def write_models(folder: str, device: str) -> None:
    """`model`, of OPT-1.3B's shape, and `reward`, of OPT-350M's, with random weights in bf16; small ones on a CPU."""
    tokenizer, toy = byte_tokenizer(), device == "cpu"
    shapes = {"model": (AutoModelForCausalLM, _OPT), "reward": (AutoModelForSequenceClassification, _OPT_350M)}
    for name, (auto, shape) in shapes.items():
        special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        torch.manual_seed(0)
        with torch.device(device):  # where random numbers are drawn fast
            model = auto.from_config(OPTConfig(**shape | (_TOY if toy else {}) | special, num_labels=1))
        model.to(torch.bfloat16).save_pretrained(Path(folder) / name)
        tokenizer.save_pretrained(Path(folder) / name)


def write_prompts(file: Path, *, count: int, length: int) -> None:
    """Prompts of random letters, each a token."""
    draw = random.Random(0)
    texts = ["".join(draw.choices(string.ascii_letters, k=length)) for _ in range(count)]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))


def ppo(bench: Bench) -> str:
    """PPO on DeepSpeed-Chat's case for one card: OPT-1.3B as actor and reference, OPT-350M as critic and judge."""
    length, rows, micro = (16, 4, 2) if bench.toy else (256, 128, 16)
    folder = bench.folder / "ppo"
    folder.mkdir()
    bench.call(write_models, folder=str(folder), device=bench.device)
    write_prompts(folder / "prompts.jsonl", count=ITERATIONS * rows + 8, length=length)
    settings = {"max_prompt_tokens": length, "max_response_tokens": length, "rollout_size": rows, "epochs": 1}
    settings |= {"minibatch_size": rows, "micro_batch_size": micro, "rollout_micro_batch_size": rows}
    sizes = " ".join(f"ppo.{name}={value}" for name, value in settings.items())
    overrides = f"stage=ppo engine=zero0 engine.precision={'fp32' if bench.toy else 'bf16'} {sizes}"
    plan = bench.call(planned, folder=str(folder), overrides=overrides, device=bench.device)
    words = [*overrides.split(), "experiment=custom", f"model.path={folder / 'model'}", f"output_dir={folder / 'out'}"]
    words += [f"ppo.actor={folder / 'model'}", f"ppo.reward={folder / 'reward'}", f"ppo.iterations={ITERATIONS}"]
    words += [f"data.ppo.train=[{folder / 'prompts.jsonl'}]", "ppo.score.normalize=false", "ppo.eval_prompts=0"]
    words += ["checkpoint.every=0", f"engine.device={bench.device}", "tracking.report=false", "tracking.wandb=disabled"]
    bench.run([sys.executable, "run_pipeline.py", *words])
    lines = (folder / "out/ppo/metrics.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if "timing_s/train" in row][1:]
    return _report(found, plan, rows=rows, length=length, toy=bench.toy)


def _report(found: list[dict[str, Any]], plan: dict[str, dict[str, int]], *, rows: int, length: int, toy: bool) -> str:
    seconds = {name: statistics.median(row[f"timing_s/{name}"] for row in found) for name in PHASES}
    whole = sum(seconds.values())
    lines = []
    for name in PHASES:
        peaks = [row.get(f"memory/{name}_device_bytes", 0) for row in found]
        memory = [plan[name]["tensors"], plan[name]["device"], max(peaks)]
        share = f"{seconds[name] / whole:.0%}"
        lines.append([name, f"{seconds[name]:.2f}", share, *(f"{count / 1e6:,.0f}" for count in memory)])
    speed = rows / whole
    beside = "" if toy else f"; {speed / THEIRS:.1f} times that"
    what = (
        f"`run_pipeline.py stage=ppo`: {rows} prompts of {length} tokens, {length} new ones, one epoch, one minibatch; "
        f"medians of {len(found)} iterations after a first. **{speed:.2f} sequences/s**. DeepSpeed-Chat: {THEIRS:.2f} "
        f"(131.9k prompts of 256 + 256 tokens in 11.7 h), on another card, one A100 with 80 GB{beside}."
    )
    head = ["", "seconds", "share", "device: tensors planned MB", "with the allocator's allowance", "measured"]
    return f"{what}\n\n{table(head, lines)}"
