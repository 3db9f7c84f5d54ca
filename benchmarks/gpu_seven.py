"""Full fine-tuning of a model of seven billion parameters on one card: its optimizer is on the host."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, Qwen2Config

from benchmarks.gpu_bench import Bench, Tried, failures
from benchmarks.gpu_plan import planned
from benchmarks.zero_report import table
from benchmarks.zero_run import RandomWeights, highest_resident, llama, resident
from rlhf.config.roles import roles_of
from rlhf.engine.engine import build_engine
from rlhf.models.causal_lm import causal_lm_module
from rlhf.models.embedded import byte_tokenizer
from rlhf.models.model_spec import assemble
from rlhf.runtime.dist import start
from rlhf.training.supervised_step import objective_of, take_step
from rlhf.types import SFTBatch
from stages.setup.compose import load_run

PEAK = 989e12
"""Dense bf16 operations a second of one H100 SXM, and of one H200, as NVIDIA states them."""
MEGATRAIN = 272
"""TFLOPS at 7B on one H100, as MegaTrain states them, with a formula of its own."""
HOST = "engine.moments=int8 engine.master_weights=split engine.grad_accum_dtype=bf16"
"""Six bytes a parameter on the host, where fp32 would take sixteen."""
SHAPES = {
    "7B": Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    ),
    "1B": llama("1B"),
    "toy": llama("1M"),
}
WARMUP = 1  # steps


@dataclass(frozen=True)
class Case:
    """A training run."""

    size: str
    engine: str
    length: int = 2048
    micro: int = 8
    batch: int = 64
    steps: int = 3


def flops_of_token(config: PreTrainedConfig, parameters: int, *, length: int) -> float:
    """6 N + 6 L T D operations of forward and backward, where a token attends to those before it.

    N is without the input embedding; recomputation does not count.
    """
    weights = parameters - config.vocab_size * config.hidden_size
    return 6.0 * weights + 6.0 * config.num_hidden_layers * length * config.hidden_size


def seven_b(bench: Bench) -> str:
    """A full step of SFT at Qwen2.5-7B's shape with the optimizer on the host, beside 1B all on the device."""
    cases = {"7B, optimizer on the host": Case("7B", f"zero2_cpu {HOST}"), "1B, all on the device": Case("1B", "zero0")}
    if bench.toy:
        small = {"size": "toy", "length": 16, "micro": 2, "batch": 4}
        cases = {name: Case(**asdict(case) | small) for name, case in cases.items()}
    tried = {name: _tried(bench, name, case) for name, case in cases.items()}
    base = tried["1B, all on the device"].value
    rows = [_cells(name, one, base) for name, one in tried.items()]
    head = ["", "parameters", "s a step", "tokens/s", "TFLOPS", "of the card's peak", "of 1B's", "device: planned MB"]
    head += ["measured", "host: planned MB", "measured"]
    case = next(iter(cases.values()))
    what = (
        f"{case.batch} sequences of {case.length} tokens a step, {case.micro} in a micro-batch, blocks recomputed, "
        f"random weights; medians of {case.steps - WARMUP} steps after {WARMUP}. `{HOST}`. TFLOPS: 6 N + 6 L T D "
        "operations a token (forward and backward; N without the input embedding, L layers, T tokens, D width; "
        f"recomputation is not counted), of {PEAK / 1e12:.0f}, an H100's or H200's dense bf16 peak. MegaTrain states "
        f"{MEGATRAIN} TFLOPS at 7B on one H100. The device's plan is of tensors, without the allocator's allowance."
    )
    return f"{what}\n\n{table(head, rows)}{failures(tried)}"


def _tried(bench: Bench, name: str, case: Case) -> Tried:
    folder = bench.folder / name.split(",")[0]
    folder.mkdir()

    def job() -> dict[str, Any]:
        bench.call(write_config, folder=str(folder), size=case.size)
        sizes = {"max_prompt_tokens": case.length // 2, "max_response_tokens": case.length // 2}
        sizes |= {"micro_batch_size": case.micro, "global_batch_size": case.batch, "max_steps": case.steps}
        words = " ".join(f"sft.{key}={value}" for key, value in sizes.items())
        engine = f"engine={case.engine} engine.precision=bf16 engine.activation_checkpointing=true"
        plan = bench.call(planned, folder=str(folder), overrides=f"stage=sft {engine} {words}", device=bench.device)
        config = str(folder / "run/config.yaml")
        return bench.call(train, config=config, case=asdict(case)) | {"plan": plan["train"]}

    return bench.attempt(job)


def write_config(folder: str, size: str) -> None:
    """A model folder without weights, from which the plan is made."""
    SHAPES[size].save_pretrained(Path(folder) / "model")
    byte_tokenizer().save_pretrained(Path(folder) / "model")


def train(config: str, case: dict[str, Any]) -> dict[str, Any]:
    """Train on random tokens, with random weights drawn on the device; seconds of a step, and peaks in bytes."""
    run, shape, before = load_run(Path(config)), SHAPES[case["size"]], resident()
    world, (role,) = start(run.engine.device), roles_of(run, "sft")
    torch.set_num_threads(os.cpu_count() or 1)
    module = causal_lm_module(shape)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    weights = RandomWeights(module, device=str(world.device.type))
    spec = assemble(module, weights, config=shape, new={}, lora=None, seed=0)
    optimizer = role.optimizer_config(run)
    engine = build_engine(
        spec, config=role.engine_config(run), world=world, optimizer=optimizer, total_steps=case["steps"]
    )
    objective, on_cuda, seconds, losses = objective_of(run.training_config("sft")), world.device.type == "cuda", [], []
    for number in range(case["steps"]):
        if on_cuda and number == WARMUP:
            torch.cuda.reset_peak_memory_stats()
        batches = [_batch(shape, case) for _ in range(case["batch"] // case["micro"])]
        begin = time.perf_counter()
        losses.append(take_step(engine, batches, objective=objective)["train/loss"])
        if on_cuda:  # what was queued belongs to this step
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    device = torch.cuda.max_memory_allocated() if on_cuda else 0
    engine.close()
    operations = flops_of_token(shape, parameters, length=case["length"])
    report = {"seconds": statistics.median(seconds[WARMUP:]), "losses": losses, "device": device}
    report |= {"host": highest_resident() - before, "parameters": parameters, "operations": operations}
    return report | {"tokens": case["batch"] * case["length"]}


def _batch(shape: PreTrainedConfig, case: dict[str, Any]) -> SFTBatch:
    ids = torch.randint(shape.vocab_size, (case["micro"], case["length"]))
    mask = torch.ones_like(ids, dtype=torch.bool)
    return SFTBatch(ids, mask, target_mask=mask)


def _rate(found: dict[str, Any]) -> float:
    """Operations a second."""
    return found["operations"] * found["tokens"] / found["seconds"]


def _cells(name: str, one: Tried, base: dict[str, Any] | None) -> list[str]:
    found = one.value
    if found is None:
        return [name, one.reason, *["–"] * 9]
    rate, plan = _rate(found), found["plan"]
    speed = [f"{found['seconds']:.2f}", f"{found['tokens'] / found['seconds']:,.0f}", f"{rate / 1e12:.3g}"]
    shares = [f"{rate / PEAK:.0%}", f"{rate / _rate(base):.0%}" if base else "–"]
    bytes_ = (plan["tensors"], found["device"], plan["host"], found["host"])
    return [name, f"{found['parameters'] / 1e9:.2f} B", *speed, *shares, *(f"{count / 1e6:,.0f}" for count in bytes_)]
