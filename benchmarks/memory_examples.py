"""Well-known claims about what fits where, put to the planner; `docs/memory.md` shows the answers.

python -m benchmarks.memory_examples          prints the table of the documentation
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir

from rlhf.config.run_config import RunConfig
from rlhf.memory_plan.plan import Item, Limits, Place, Plan
from rlhf.memory_plan.planner import Machine, machine_of, plan_stage
from stages.setup.compose import CONF_DIR, register_schema, to_run

GB = 1_000_000_000
RUNTIME = (Item("process", "runtime", Place.host, GB), Item("process", "runtime", Place.device, 600_000_000))
LIMITS = Limits(device=80 * GB, host=256 * GB, disk=4_000 * GB)
SHAPES = {
    "65B": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
_CPU = "engine=zero3 engine.offload_optimizer=cpu engine.activation_checkpointing=true"
_WEIGHTS_CPU = "engine=zero3 engine.offload_param=cpu engine.activation_checkpointing=true"
_NVME = f"{_CPU.replace('=cpu', '=nvme')} engine.offload_param=nvme engine.nvme_path=/disk"
_ALONE = "checkpoint.every=0"


@dataclass(frozen=True)
class Example:
    """A claim, as settings."""

    shape: str
    overrides: str


EXAMPLES = (
    Example("65B", "stage=sft"),
    Example("65B", f"stage=sft {_CPU} {_ALONE}"),
    Example("65B", f"stage=sft {_NVME} {_ALONE}"),
    Example("65B", f"stage=sft_lora {_WEIGHTS_CPU}"),
    Example("65B", f"stage=ppo_lora {_WEIGHTS_CPU} engine.stream_generation=true"),
    Example("13B", "stage=sft"),
    Example("13B", f"stage=sft {_CPU} {_ALONE}"),
    Example("13B", "stage=sft_lora engine.activation_checkpointing=true"),
    Example("13B", f"stage=ppo {_CPU} {_ALONE}"),
    Example("13B", f"stage=ppo {_NVME} {_ALONE} engine.stream_generation=true"),
    Example("13B", "stage=ppo_lora engine.activation_checkpointing=true"),
    Example("13B", f"stage=ppo_lora {_WEIGHTS_CPU}"),
)


def main() -> None:
    """Print the table."""
    sys.stdout.write(examples_table() + "\n")


def examples_table() -> str:
    """Markdown: what each example takes on one GPU, and whether that fits."""
    with tempfile.TemporaryDirectory() as folder:
        lines = [_row(example, Path(folder)) for example in EXAMPLES]
    head = "| model | settings | largest phase | device GB | host GB | disk GB | fits |\n|---|---|---|---|---|---|---|"
    return "\n".join([head, *lines])


def _row(example: Example, folder: Path) -> str:
    run = example_run(example, folder)
    machine = machine_of(run, ranks=1)
    plan = plan_stage(run, run.stages[0], machine=Machine(machine.device, 1, 1, RUNTIME))
    found = [max(phase.total(place) for phase in plan.phases) / GB for place in Place]
    missing = sorted({shortage.place for shortage in plan.shortages(LIMITS)})
    says = "yes" if not missing else f"no: {', '.join(missing)}"
    numbers = " | ".join(f"{number:,.0f}" for number in found)
    return f"| {example.shape} | `{example.overrides}` | {plan.largest.name} | {numbers} | {says} |"


def example_run(example: Example, folder: Path) -> RunConfig:
    """The configuration of an example, on a model that is a `config.json` below `folder`."""
    model = folder / example.shape
    model.mkdir(exist_ok=True)
    shape = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32_000, "hidden_act": "silu"}
    (model / "config.json").write_text(json.dumps(shape | SHAPES[example.shape] | {"max_position_embeddings": 4096}))
    fixed = [f"output_dir={folder / 'run'}", "model=path", f"model.path={model}", "~experiment", "engine.device=cuda"]
    fixed += [
        "engine.precision=bf16",
        *(["ppo.actor=" + str(model), "ppo.reward=" + str(model)] * ("stage=ppo" in example.overrides)),
    ]
    register_schema()
    with initialize_config_dir(CONF_DIR, version_base=None):
        return to_run(compose("config", overrides=[*fixed, *example.overrides.split()]))


def plan_of(example: Example, folder: Path) -> Plan:
    """The plan of an example."""
    run = example_run(example, folder)
    return plan_stage(run, run.stages[0], machine=Machine(machine_of(run, ranks=1).device, 1, 1, RUNTIME))


if __name__ == "__main__":
    main()
