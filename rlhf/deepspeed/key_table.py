"""The whole table, and the page that shows it: `python -m rlhf.deepspeed.key_table > docs/deepspeed.md`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import groupby

from rlhf.deepspeed.accelerate import PLUGIN
from rlhf.deepspeed.keys import CLOSED_SECTIONS, Key, Table
from rlhf.deepspeed.keys_run import TOP_KEYS
from rlhf.deepspeed.keys_zero import ZERO_KEYS

TABLE = Table((*TOP_KEYS, *ZERO_KEYS))

_HEAD = """# DeepSpeed configurations

<!-- Made by `python -m rlhf.deepspeed.key_table > docs/deepspeed.md` from rlhf/engine/deepspeed/keys_*.py. -->

    python run_pipeline.py engine.deepspeed=ds_config.json
    python run_pipeline.py ppo.engine.deepspeed=actor.json ppo.critic_engine.deepspeed=critic.json
    python run_pipeline.py 'engine.deepspeed={zero_optimization: {stage: 2}}'

A file reaches every stage and every model of it (`ppo.engine` is the actor's, `ppo.critic_engine`,
`ppo.reference_engine` and `ppo.reward_engine` are the others') unless one of them has its own, or null. A mapping,
also in Python and YAML, and url-safe base64 do as well as a file (leave out the `=` at its end, which the command
line takes for its own). `examples/` has three.

**Reading.** As DeepSpeed reads: by the rules of Hjson, so comments (`#`, `//`, `/* */`), trailing and missing commas
and keys without quotes are fine, and `5e8` or `"3"` are whole numbers. The same content may be YAML, in a file named
`.yaml` or `.yml`. A key that is there twice ends the run, with its line.

**Hugging Face Accelerate.** A file that `accelerate config` writes is read for what it says of DeepSpeed:
`mixed_precision`, and of `deepspeed_config` <PLUGIN>. What else is missing is DeepSpeed's default, as in Accelerate,
but `zero_stage` is 2. `deepspeed_config_file` is followed, looked for in the working directory and then beside the
file; what stands beside it fills in what the named file leaves out or `auto`, and may not contradict it. What is said
to the launcher (`num_processes`, ...) is ignored: `launch.ranks` says it here. A file for another `distributed_type`
(FSDP, MULTI_GPU, ...) ends the run with the setting to use instead.

**Files of trainers** (TrainingArguments, TRL, LLaMA-Factory, Axolotl) end the run; where they name a DeepSpeed file,
that is the one to give. So does a file in which no key at the top level is DeepSpeed's.

**Who wins.** What the file says replaces the YAML. What the command line says stands; where the two contradict each
other, the run ends and names both. What the file leaves out is the run's own, except where that would change results:
a section `zero_optimization` without `stage` is stage 0, `optimizer.params` without `weight_decay` decays nothing, a
missing batch size follows from the others. These defaults are DeepSpeed's, and yield to the command line.
`gradient_clipping` is the exception: where the file is silent the run's own `optimizer.max_grad_norm` stands, because
DeepSpeed's default has changed (0.19.2: off, 0.19.8: 1).

**`"auto"`** is the run's own value, anywhere. In the batch sizes it is the run's own as far as the others leave it
free: with `train_batch_size` a number, an `auto` micro-batch is the largest that divides its share and is not above
the run's own.

**At the start** the run prints every setting it took, with file, line and keys, and then, for every value that none
of them comes from, why: ignored, `auto`, without effect (`fp16.*` while bf16 computes), or unknown. No value of the
file is without a line. `config.yaml` in the output folder then holds the settings themselves, so that a run resumes
without the file.

**Values** are checked whether anything depends on them or not: `"contiguous_gradients": "Treu"` ends the run. What
DeepSpeed takes is taken: `"true"`, `"on"` and 1 are true. Two precisions in one file end the run, also where
DeepSpeed is silent: `bf16` with `torch_autocast` in float16.

**Unknown keys** end the run where DeepSpeed refuses them too: in <CLOSED>. Elsewhere DeepSpeed takes no notice, and
the run only warns; in both cases with the nearest name.

**What differs.** The schedules are DeepSpeed's value for value, including the two steps at the lowest rate with which
its warm-ups begin, and a step that is skipped because of an overflow does not count for them. To frozen models
(reference, reward) the sections `optimizer` and `scheduler` and the batch sizes mean nothing; the critic takes its
optimizer from its own file.

Of the <TOTAL> keys below, <USED> are used (the same setting exists here), <MAPPED> mapped (to a setting of another
name or shape), <IGNORED> ignored and <REFUSED> refused. A refused key ends the run only with a value that asks for
something: `"amp": {"enabled": false}` is fine.
"""


def page() -> str:
    """The page in Markdown."""
    counts = Counter(key.decision.value for key in TABLE)
    closed = ", ".join(f"`{section}`" for section in CLOSED_SECTIONS)
    plugin = ", ".join(f"`{name}`" for name in PLUGIN)
    words = {
        "CLOSED": closed,
        "PLUGIN": plugin,
        "TOTAL": len(TABLE.keys),
        **{name.upper(): count for name, count in counts.items()},
    }
    head = _HEAD
    for word, value in words.items():
        head = head.replace(f"<{word}>", str(value))
    parts = [head]
    ordered = sorted(TABLE, key=lambda key: _ORDER.index(_section(key)))
    for section, keys in groupby(ordered, key=_section):
        parts.append(
            f"## {section}\n\n| key | DeepSpeed's default | here | what it does, or why not |\n|---|---|---|---|"
        )
        parts.append("\n".join(map(_row, keys)) + "\n")
    return "\n".join(parts)


_ORDER = (
    "top level",
    "zero_optimization",
    "offload_optimizer",
    "offload_param",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
    "activation_checkpointing",
    "aio",
    "others",
)


def _section(key: Key) -> str:
    parents = key.path.removesuffix(".*").split(".")[:-1]
    if not parents and not key.path.endswith(".*"):
        return "top level"
    return next((name for name in reversed(parents) if name in _ORDER), "others")


def _row(key: Key) -> str:
    section = _section(key)
    name = key.path.rpartition(f"{section}.")[2]
    name = f"`{name.removesuffix('.*')}`" + (" and all in it" if name.endswith(".*") else "")
    also = ", ".join(f"`{old}`" for old in key.old_names)
    older = f" (also: {also})" if also else ""
    default = key.default if isinstance(key.default, str) else json.dumps(key.default)
    setting = f"`{'engine' if _is_of_engine(key) else 'optimizer'}.{key.setting}`: " if key.setting else ""
    note = f"{setting}{key.note}{_allowed(key)}".replace("|", "\\|")
    return f"| {name}{older} | {'' if key.default is None else default} | {key.decision} | {note} |"


def _allowed(key: Key) -> str:
    words = [value if isinstance(value, str) else json.dumps(value) for value in key.allowed]
    return f" (allowed: {', '.join(words)})" if words else ""


def _is_of_engine(key: Key) -> bool:
    return key.path.startswith(("zero_optimization.", "fp16."))


if __name__ == "__main__":
    sys.stdout.write(page())
