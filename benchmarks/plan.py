"""The memory plan beside what is measured, on random Llamas of 25 to 125 million parameters.

Each case is planned, then run in processes of their own, twice: as a user runs it, and with a C library that gives
freed memory back at once (MALLOC_MMAP_THRESHOLD_), which leaves what tensors and kernels take: the counterpart of
`torch.cuda.max_memory_allocated`. Batches have the largest size, as the plan assumes.

    python -m benchmarks.plan                   all cases, into benchmarks/results/plan.md
    python -m benchmarks.plan sft_fp32 ppo      some, printed
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from rlhf.config.ppo_config import PPOConfig
from rlhf.config.roles import roles_of
from rlhf.config.run_config import LaunchConfig, RunConfig
from rlhf.memory_plan.plan import Place
from rlhf.memory_plan.planner import ALLOCATOR, machine_of, plan_stage
from rlhf.memory_plan.workloads import PHASES, Workload, generation, policy_update, scalars, statistics
from rlhf.models.embedded import byte_tokenizer
from rlhf.rollout import Models
from rlhf.runtime.cores import use_cores
from rlhf.runtime.dist import World, start, stop
from rlhf.runtime.process import VARIABLES
from rlhf.tracking.timing import METER, resident
from rlhf.training.ppo_update import policy_gradient, value_gradient
from stages.lifecycle.stage_models import open_model, scored_sources
from stages.ppo import load_models
from stages.setup.compose import CONF_DIR, load_run, register_schema, save_run, to_run

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "plan.md"
STEPS = 2
SMALL = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
LARGE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14, "num_attention_heads": 12}
_SUPERVISED = (
    "{0}.max_prompt_tokens={2} {0}.max_response_tokens={2} {0}.micro_batch_size=4 {0}.global_batch_size={1} "
    "engine.precision={3}"
)
_PPO = (
    "ppo.max_prompt_tokens=64 ppo.max_response_tokens=64 ppo.micro_batch_size=4 ppo.minibatch_size=8 "
    "ppo.rollout_size=16 ppo.rollout_micro_batch_size=16"
)
_NVME = "engine=zero3 engine.offload_optimizer=nvme engine.buffer_size=1000000"


def _supervised(stage: str, batch: int, *, precision: str = "fp32", length: int = 64) -> str:
    return f"stage={stage} " + _SUPERVISED.format(stage.split("_")[0], batch, length, precision)


CASES: dict[str, tuple[dict[str, int], str]] = {
    "sft_fp32": (SMALL, _supervised("sft", 8)),
    "sft_fp32_large": (LARGE, _supervised("sft", 8, length=32)),
    "sft_bf16": (SMALL, _supervised("sft", 8, precision="bf16")),
    "sft_bf16_one_micro_batch": (LARGE, _supervised("sft", 4, precision="bf16", length=32)),
    "sft_checkpointing": (SMALL, f"engine.activation_checkpointing=true {_supervised('sft', 8, length=128)}"),
    "sft_lora": (SMALL, _supervised("sft_lora", 8)),
    "reward_fp32": (SMALL, _supervised("reward", 8)),
    "ppo_fp32": (SMALL, f"stage=ppo engine.precision=fp32 {_PPO}"),
    "ppo_bf16": (SMALL, f"stage=ppo engine.precision=bf16 {_PPO}"),
    "sft_zero2_2_ranks": (SMALL, f"engine=zero2 {_supervised('sft', 16)}"),
    "sft_zero3_2_ranks": (SMALL, f"engine=zero3 {_supervised('sft', 16)}"),
    "sft_nvme_optimizer": (LARGE, f"{_NVME} {_supervised('sft', 8, precision='bf16', length=32)}"),
    "sft_nvme_all": (LARGE, f"{_NVME} engine.offload_param=nvme {_supervised('sft', 8, precision='bf16', length=32)}"),
}


def write_model(folder: Path | str, shape: dict[str, int], *, device: str = "cpu") -> None:
    """A random Llama with a byte tokenizer, 8,192 tokens where `shape` has no other, and a reward model of that shape.

    Args:
        folder: gets `model` and `reward`.
        shape: settings of `LlamaConfig`.
        device: where the random numbers are drawn.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    usual = {"vocab_size": 8192, "num_key_value_heads": shape["num_attention_heads"] // 2, "tie_word_embeddings": False}
    config = LlamaConfig(**usual | shape)
    tokenizer = byte_tokenizer()
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    for name, kind in (("model", LlamaForCausalLM), ("reward", LlamaForSequenceClassification)):
        config.num_labels = 1 if name == "reward" else 2
        with torch.device(device):
            model = kind(config)
        model.save_pretrained(Path(folder) / name)
        tokenizer.save_pretrained(Path(folder) / name)


def compose_run(folder: Path, overrides: str, *, device: str = "cpu") -> RunConfig:
    """The configuration of a case."""
    register_schema()
    fixed = [f"output_dir={folder / 'run'}", "model=path", f"model.path={folder / 'model'}", "~experiment"]
    fixed += [f"engine.nvme_path={folder / 'disk'}", "checkpoint.every=0", "launch.ranks=1", f"engine.device={device}"]
    if "stage=reward" in overrides:
        fixed.append(f"reward.init_from={folder / 'model'}")
    if "stage=ppo" in overrides:
        fixed += [f"ppo.actor={folder / 'model'}", f"ppo.reward={folder / 'reward'}", "ppo.score.normalize=false"]
        fixed.append("ppo.iterations=2")
    with initialize_config_dir(CONF_DIR, version_base=None):
        return to_run(compose("config", overrides=[*fixed, *overrides.split()]))


def measure(config: Path | str, out: Path | str) -> None:
    """In a process of its own: run the phases of the case and write their peaks."""
    run = load_run(Path(config))
    world = start(run.engine.device)
    use_cores(world, LaunchConfig(threads=1 if world.device.type == "cpu" else 0))
    bare = resident().get("RssAnon", 0)
    torch.zeros(1, device=world.device)  # a CUDA context is no part of any model
    runtime = resident().get("RssAnon", 0)
    stage = run.stages[0]
    peaks = _ppo_peaks(run, world) if run.ppo is not None else _supervised_peaks(run, stage, world)
    if world.is_main:
        Path(out).write_text(json.dumps({"bare": bare, "runtime": runtime, "peaks": peaks}))
    stop()


Peaks = dict[str, dict[str, int]]


def _peak_of(function: Callable[[], None], world: World) -> dict[str, int]:
    """Bytes: resident on the host, tensors on the device, and what CUDA's allocator holds for them by then."""
    METER.begin(world.device)
    function()
    peak = METER.end(world.device)
    reserved = torch.cuda.memory_reserved(world.device) if world.device.type == "cuda" else 0
    return {"host": peak.host, "device": peak.device, "reserved": reserved}


def _supervised_peaks(run: RunConfig, stage: str, world: World) -> Peaks:
    config, (role,) = run.training_config(stage), roles_of(run, stage)
    engine = open_model(run, role, world=world, total_steps=100)
    work = Workload.of(PHASES[stage]["train"][role.name], config)
    steps = config.batch_size // (world.size * config.micro_batch_size)

    def evaluate() -> None:
        with engine.evaluating() as model, world.device:  # the batch is made there
            work(model)

    def train() -> None:
        for _ in range(STEPS):
            for index in range(steps):
                with world.device:
                    loss = work(engine)
                engine.backward(loss, last=index == steps - 1)
                del loss
            engine.step()

    return {"evaluate": _peak_of(evaluate, world), "train": _peak_of(train, world)}


def _ppo_peaks(run: RunConfig, world: World) -> Peaks:
    config = run.ppo
    assert config is not None
    models = load_models(run, world, sources=scored_sources(config))

    def generate() -> None:
        with models.actor.generating() as model, world.device:
            Workload.of(generation, config)(model)

    def score() -> None:
        judges = [(models.actor, statistics), (models.reference, statistics)]
        rewards = [(engine, scalars) for engine in models.rewards.values()]
        for engine, compute in [*judges, *rewards, (models.critic, scalars)]:
            with engine.evaluating() as model, world.device:
                Workload.of(compute, config)(model)

    def train() -> None:
        for _ in range(STEPS):
            _ppo_step(models, config)

    phases = {"generate": generate, "score": score, "train": train}
    return {name: _peak_of(phase, world) for name, phase in phases.items()}


def _ppo_step(models: Models, config: PPOConfig) -> None:
    device = models.actor.world.device
    micro_batches = range(config.minibatch_size // config.micro_batch_size)
    batches = [Workload.of(policy_update, config).ppo_batch().to(device) for _ in micro_batches]
    count = torch.tensor(100.0, device=device)
    policy_gradient(models.actor, batches, config=config, denominator=count)
    models.actor.step()
    value_gradient(models, batches, config=config, denominator=count)
    assert models.critic is not None, "these cases have a critic"
    models.critic.step()


def run_case(name: str, folder: Path) -> list[list[object]]:
    """Rows of the table: what was planned and measured in each phase."""
    shape, overrides = CASES[name]
    write_model(folder, shape)
    run = compose_run(folder, overrides)
    ranks = 2 if "2_ranks" in name else 1
    plan = plan_stage(run, run.stages[0], machine=machine_of(run, ranks=ranks))
    found = {kind: _measured(run, folder, ranks=ranks, environment=extra) for kind, extra in _ALLOCATORS.items()}
    rows = []
    for phase in plan.phases:
        if phase.name in found["usual"]["peaks"]:
            planned = phase.total(Place.host)
            tensors = planned - sum(item.bytes for item in phase.items if item.part == ALLOCATOR)
            returned = found["returned"]["peaks"][phase.name]["host"] - found["returned"]["runtime"]
            usual = found["usual"]["peaks"][phase.name]["host"] - found["usual"]["runtime"]
            runtime = found["usual"]["runtime"]
            rows.append([name, phase.name, tensors, returned, planned, usual, runtime])
    return rows


_ALLOCATORS = {"usual": {}, "returned": {"MALLOC_MMAP_THRESHOLD_": "65536"}}


def _measured(run: RunConfig, folder: Path, *, ranks: int, environment: dict[str, str]) -> dict[str, Any]:
    out = folder / "measured.json"
    arguments = ["-m", "benchmarks.plan", "--measure", str(save_run(run)), str(out)]
    if ranks > 1:
        arguments = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *arguments]
    variables = {**VARIABLES, **os.environ, "OMP_NUM_THREADS": "1", **environment}
    subprocess.run([sys.executable, *arguments], cwd=ROOT, env=variables, check=True, stdout=sys.stderr)
    return json.loads(out.read_text())


def main() -> None:
    """Run the cases that are named, or all and write the table."""
    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    rows = []
    for name in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder:
            rows += run_case(name, Path(folder))
        sys.stderr.write(_table(rows[-3:]) + "\n")
    text = _table(rows)
    if len(sys.argv) == 1:
        RESULTS.write_text(f"{__doc__.splitlines()[0]}\n\n{_hardware()}\n\n{text}\n")
    sys.stdout.write(text + "\n")


def _table(rows: list[list[Any]]) -> str:
    head = (
        "| case | phase | tensors: planned MB | measured | difference | resident: planned MB | measured | difference "
        "| with the runtime's |\n|---|---|---|---|---|---|---|---|---|"
    )
    lines = [
        f"| {name} | {phase} | {tensors / 1e6:,.0f} | {returned / 1e6:,.0f} | {tensors / returned - 1:+.1%} "
        f"| {planned / 1e6:,.0f} | {usual / 1e6:,.0f} | {planned / usual - 1:+.1%} "
        f"| {runtime / 1e6:,.0f}: {(planned + runtime) / (usual + runtime) - 1:+.1%} |"
        for name, phase, tensors, returned, planned, usual, runtime in rows
    ]
    return "\n".join([head, *lines])


def _hardware() -> str:
    kind = f"{os.cpu_count()} cores, {platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    return f"`python -m benchmarks.plan`, {kind}, torch {torch.__version__}."


if __name__ == "__main__":
    main()
