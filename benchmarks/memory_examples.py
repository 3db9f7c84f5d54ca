"""Puts well-known claims about what fits where to the planner; `docs/memory.md` shows the answers.

python -m benchmarks.memory_examples          prints the first table of the documentation
python -m benchmarks.memory_examples host     prints the second: full fine-tuning by how optimizer state is stored
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from rlhf.config.roles import roles_of
from rlhf.config.run_config import RunConfig
from rlhf.memory_plan.plan import Item, Limits, Place
from rlhf.memory_plan.planner import Machine, plan_stage, shape_of
from stages.setup.compose import CONF_DIR, register_schema, to_run

GB = 1_000_000_000
LIMITS = Limits(device=80 * GB, host=256 * GB, disk=4_000 * GB)
RUNTIME = (Item("process", "runtime", Place.host, GB), Item("process", "runtime", Place.device, 600_000_000))
MACHINE = Machine(torch.device("cuda"), ranks=1, local_ranks=1, runtime=RUNTIME)
SHAPES: dict[str, dict[str, int]] = {
    "7.6B": {
        **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
        **{"num_key_value_heads": 4, "vocab_size": 152_064},
    },
    "30B": {"hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60, "num_attention_heads": 52},
    "65B": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
_CPU = "engine=zero3 engine.offload_optimizer=cpu engine.activation_checkpointing=true"
_WEIGHTS_CPU = "engine=zero3 engine.offload_param=cpu engine.activation_checkpointing=true"
_NVME = f"{_CPU.replace('=cpu', '=nvme')} engine.offload_param=nvme engine.nvme_path=/disk"
_ALONE = "checkpoint.every=0"
EXAMPLES = (
    ("65B", "stage=sft"),
    ("65B", f"stage=sft {_CPU} {_ALONE}"),
    ("65B", f"stage=sft {_NVME} {_ALONE}"),
    ("65B", f"stage=sft_lora {_WEIGHTS_CPU}"),
    ("65B", f"stage=ppo_lora {_WEIGHTS_CPU} engine.stream_generation=true"),
    ("13B", "stage=sft"),
    ("13B", f"stage=sft {_CPU} {_ALONE}"),
    ("13B", "stage=sft_lora engine.activation_checkpointing=true"),
    ("13B", f"stage=ppo {_CPU} {_ALONE}"),
    ("13B", f"stage=ppo {_NVME} {_ALONE} engine.stream_generation=true"),
    ("13B", "stage=ppo_lora engine.activation_checkpointing=true"),
    ("13B", f"stage=ppo_lora {_WEIGHTS_CPU}"),
)
"""Shapes and settings."""
_HOST = "stage=sft engine=zero3 engine.offload_optimizer=cpu engine.activation_checkpointing=true"
_DISK = "engine.offload_optimizer=nvme engine.nvme_path=/disk"
HOSTS = (128, 256)
"""GB of host memory."""
STATES = {
    "fp32": "",
    "split masters": "engine.master_weights=split",
    "split masters, bf16 sums and moments": "engine.master_weights=split engine.grad_accum_dtype=bf16 "
    "engine.moments=bf16",
    "split masters, bf16 sums, 8-bit moments": "engine.master_weights=split engine.grad_accum_dtype=bf16 "
    "engine.moments=int8",
    "8-bit moments, on disk": f"engine.moments=int8 {_DISK}",
}
"""Optimizer state as settings."""
WEIGHTS = {"7.6B": "none", "13B": "none", "30B": "none", "65B": "cpu"}
"""Where the working weights of each shape go on 80 GB."""
_HEAD = "| model | settings | largest phase | device GB | host GB | disk GB | fits |\n|---|---|---|---|---|---|---|"


_HOST_HEAD = (
    "| model | optimizer state | device GB | host GB | host bytes a parameter | disk GB | 128 GB | 256 GB |\n"
    "|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    """Print a table in Markdown: what each example takes on one GPU, and whether that fits."""
    with tempfile.TemporaryDirectory() as folder:
        if sys.argv[1:] == ["host"]:
            rows = [host_row(shape, state, folder=Path(folder)) for shape in WEIGHTS for state in STATES]
        else:
            rows = [row(shape, settings, folder=Path(folder)) for shape, settings in EXAMPLES]
    sys.stdout.write("\n".join([_HOST_HEAD if sys.argv[1:] == ["host"] else _HEAD, *rows, ""]))


def host_row(shape: str, state: str, *, folder: Path) -> str:
    """The row of a full fine-tune, all sums of 16 micro-batches, and whether it fits beside each host memory."""
    settings = f"{_HOST} {STATES[state]} engine.offload_param={WEIGHTS[shape]} checkpoint.asynchronous=false"
    run = example_run(shape, settings, folder=folder)
    plan = plan_stage(run, "sft", machine=MACHINE)
    device, host, disk = (max(phase.total(place) for phase in plan.phases) for place in Place)
    numel = sum(p.numel() for p in shape_of(run, roles_of(run, "sft")[0]).whole.module.parameters())
    fits = []
    for size in HOSTS:
        missing = {shortage.place for shortage in plan.shortages(replace(LIMITS, host=size * GB))}
        fits.append(f"no: {', '.join(sorted(missing))}" if missing else "yes")
    cells = [shape, state, f"{device / GB:,.0f}", f"{host / GB:,.0f}", f"{host / numel:.1f}", f"{disk / GB:,.0f}"]
    return f"| {' | '.join([*cells, *fits])} |"


def row(shape: str, settings: str, *, folder: Path) -> str:
    """The row of an example; `folder` gets its model's configuration."""
    run = example_run(shape, settings, folder=folder)
    plan = plan_stage(run, run.stages[0], machine=MACHINE)
    numbers = " | ".join(f"{max(phase.total(place) for phase in plan.phases) / GB:,.0f}" for place in Place)
    missing = sorted({shortage.place for shortage in plan.shortages(LIMITS)})
    verdict = f"no: {', '.join(missing)}" if missing else "yes"
    return f"| {shape} | `{settings}` | {plan.largest.name} | {numbers} | {verdict} |"


def example_run(shape: str, settings: str, *, folder: Path) -> RunConfig:
    """The run of an example, on a model of which `folder` has the configuration alone."""
    model = folder / shape
    model.mkdir(exist_ok=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32_000, "hidden_act": "silu"}
    (model / "config.json").write_text(json.dumps(config | SHAPES[shape] | {"max_position_embeddings": 4096}))
    fixed = [f"output_dir={folder / 'run'}", "model=path", f"model.path={model}", "~experiment"]
    fixed += ["engine.device=cuda", "engine.precision=bf16"]
    fixed += [f"ppo.actor={model}", f"ppo.reward={model}"] if "stage=ppo" in settings else []
    register_schema()
    with initialize_config_dir(CONF_DIR, version_base=None):
        return to_run(compose("config", overrides=[*fixed, *settings.split()]))


if __name__ == "__main__":
    main()
