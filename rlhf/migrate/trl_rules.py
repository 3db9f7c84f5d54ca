"""Settings that follow from several flags of TRL."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlhf.migrate.translation import Translation

AGGREGATIONS = {
    "grpo": "sequence_mean",
    "dr_grpo": "constant",
    "dapo": "token_mean",
    "bnpo": "token_mean",
    "cispo": "token_mean",
}
"""Losses of GRPO -> `ppo.loss_aggregation`."""


def data_trl(t: Translation) -> None:
    """Sources with their splits and columns, and whether anything is held out."""
    text, listed = t.get("dataset_text_field"), t.get("datasets")
    source = {"path": t.get("dataset_name") or "DATA", "name": t.get("dataset_config")}
    own = source | {"split": t.get("dataset_train_split")}
    own |= {"columns": {"text": text}} if text not in (None, "text") else {}
    if not listed and source["path"] == "DATA":
        t.notes.append("no data set is named: give one in place of DATA")
    flags = ["datasets"] if listed else ["dataset_name", "dataset_train_split", "dataset_config"]
    t.put("data.S.train", [_source(entry) for entry in listed or [own]], *flags)
    if str(t.get("eval_strategy")) not in ("no", "False"):
        held_out = [_source(source | {"split": t.get("dataset_test_split")})]
        t.put("data.S.eval", held_out, "dataset_name", "dataset_test_split") if not listed else None
    elif t.stage == "ppo":
        t.put("data.S.eval_fraction", 0, "eval_strategy")
        t.put("ppo.eval_prompts", 0, "eval_strategy")
    else:
        note = "nothing is held out there; a stage is always evaluated"
        t.put("data.S.eval_fraction", 0.01, "eval_strategy", note=note)


def _source(entry: Mapping[str, Any]) -> Any:
    """A source as short as it can be written; what has no counterpart is left out."""
    path = entry.get("data_files") if isinstance(entry.get("data_files"), str) else entry["path"]
    kept = {"path": path, "name": entry.get("name") or entry.get("data_dir"), "split": entry.get("split", "train")}
    kept |= {"columns": entry["columns"]} if isinstance(entry.get("columns"), Mapping) else {}
    kept = {key: value for key, value in kept.items() if value and (key, value) != ("split", "train")}
    return path if [*kept] == ["path"] else kept


def every(t: Translation) -> None:
    """What happens every N optimizer steps there; PPO counts iterations here, and below 1 it is a share of the run."""
    evaluates, saves = str(t.get("eval_strategy")), str(t.get("save_strategy"))
    follows = t.get("sync_ref_model") and t.stage == "ppo" and not t.get("use_peft")
    t.put("S.eval_every", _every(t, "eval_steps") if evaluates == "steps" else 0, "eval_strategy", "eval_steps")
    t.put("tracking.log_every", _every(t, "logging_steps") or 1, "logging_steps")
    if saves in ("no", "steps", "False"):
        steps = t.get("save_steps") if saves == "steps" else 0
        t.put("checkpoint.every", steps if steps < 1 else _every(t, "save_steps"), "save_steps", "save_strategy")
    for flag, setting in (("eval_strategy", f"{t.stage}.eval_every"), ("save_strategy", "checkpoint.every")):
        if str(t.get(flag)) in ("epoch", "best"):
            t.none(flag, f"{setting} counts steps: give those of an epoch")
    if follows:
        t.put("ppo.reference_update_every", _every(t, "ref_model_sync_steps"), "sync_ref_model", "ref_model_sync_steps")
        t.put("ppo.reference_update_mix", t.get("ref_model_mixup_alpha"), "ref_model_mixup_alpha")
        if not t.get("beta"):  # without a KL there is no other reason to load it
            t.put("ppo.reference", t.get("model_name_or_path") or "MODEL", "sync_ref_model")
    elif t.get("sync_ref_model"):
        why = (
            "with adapters it is the base" if t.stage == "ppo" else "its log-probabilities are computed before training"
        )
        t.none("sync_ref_model", f"the reference does not move: {why}")


def _every(t: Translation, flag: str) -> int:
    """Optimizer steps, or iterations where ours count them; 0 where it is a share of a run of unknown length.

    TRL's PPO counts batches, which are iterations.
    """
    steps: float = t.get(flag) or t.get("logging_steps")
    updates = 1 if t.step == "ppo" else t.updates
    if steps >= 1:
        return max(1, math.ceil(steps) // updates)
    if not t.steps:
        t.none(flag, "a share of the run, whose length is not known here: give the steps")
    return math.ceil(steps * (t.steps or 0) / t.updates)


def learns(t: Translation) -> None:
    """Which tokens of demonstrations are learnt."""
    asked = [t.get("completion_only_loss"), t.get("assistant_only_loss")]
    if any(asked):
        t.put("sft.response_only", True, "completion_only_loss", "assistant_only_loss")
    elif asked[0] is False or t.get("dataset_name") in t.peer.about["learns_all"]:
        t.put("sft.response_only", False, "completion_only_loss", note="there all turns of `messages` are learnt")
    else:
        note = "TRL learns all of `messages` unless --assistant_only_loss; sft.response_only=false does so here"
        t.notes.append(note)


def betas(t: Translation) -> None:
    """Two flags, one list."""
    t.put("O.betas", [t.get("adam_beta1"), t.get("adam_beta2")], "adam_beta1", "adam_beta2")


def precision_trl(t: Translation) -> None:
    """TRL computes in bf16 beside fp32 weights unless told otherwise, which is what bf16 is here."""
    is_fp16, bf16 = bool(t.get("fp16")), t.get("bf16")
    half = {"bfloat16": "bf16", "float16": "fp16"}.get(str(t.get("torch_dtype") or t.get("dtype")), "fp32")
    precision = "fp16" if is_fp16 else "bf16" if bf16 is not False else half
    t.put("engine.precision", precision, "fp16", "bf16", "dtype", note="TRL computes in bf16 unless told otherwise")


def engine_trl(t: Translation) -> None:
    """A DeepSpeed file is read as it is; for one that is not here its name must do, and FSDP has a ZeRO stage."""
    flags = ("deepspeed", "config_file", "accelerate_config", "deepspeed_config_file")
    flag = next((name for name in flags if isinstance(t.get(name), str)), "")
    file = str(t.get(flag) or "")
    is_here, fsdp = Path(file).is_file(), str(t.get("fsdp") or t.get("use_fsdp") or "")
    head = yaml.safe_load(Path(file).read_text("utf-8")) if is_here else {}
    kind = str(head.get("distributed_type", "")) if isinstance(head, dict) else ""
    stage = re.search(r"(?:zero_?|stage_?)([0-3])", file)
    if fsdp or "FSDP" in kind or (not is_here and "fsdp" in file):
        t.put(
            "engine", "zero2" if "shard_grad_op" in f"{fsdp}{head}".lower() else "zero3", "fsdp", *[flag] * bool(flag)
        )
    elif t.get("zero_stage") is not None and not is_here:
        t.put("engine", f"zero{t.get('zero_stage')}", "zero_stage")
    elif not is_here and stage and not file.endswith(".json"):
        t.put("engine", f"zero{stage[1]}", flag)
        t.notes.append(f"--{flag} {file} is not here: its stage is taken from its name")
    elif file and kind in ("", "DEEPSPEED") and not re.search(r"(multi|single)_gpu", file):
        t.put("engine.deepspeed", file, flag)


def lora_trl(t: Translation) -> None:
    """Adapters, if they are asked for at all."""
    flags = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
    if not t.get("use_peft"):
        for flag in [flag for flag in flags if flag in t.given]:
            t.none(flag, "without --use_peft there are no adapters, there too")
        return
    rank, alpha, dropout, targets = map(t.get, flags)
    t.put("S.lora.rank", rank, "use_peft", "lora_r")
    scaled = alpha * math.sqrt(rank) if t.get("use_rslora") else alpha
    t.put("S.lora.alpha", scaled, "lora_alpha", *["use_rslora"] * bool(t.get("use_rslora")))
    if t.stage != "ppo":
        t.put("S.lora.dropout", dropout, "lora_dropout")
    elif dropout:
        t.notes.append(f"--lora_dropout {dropout}: responses are generated and learnt without dropout here")
    note = "PEFT's choice for Llama, Qwen, OPT; others have other names"
    t.put("S.lora.targets", targets or ["q_proj", "v_proj"], "lora_target_modules", note=note)


def loss_type(t: Translation) -> None:
    """The loss of the step."""
    kinds = [str(kind) for kind in t.get("loss_type")]
    if t.step == "dpo":
        _dpo_loss(t, kinds)
    elif t.step == "grpo":
        _grpo_loss(t, kinds[0])
    elif kinds not in (["nll"], ["chunked_nll"]):
        t.none("loss_type", "SFT learns by the likelihood of the tokens (nll)")


def _dpo_loss(t: Translation, kinds: list[str]) -> None:
    weighted = dict(zip(kinds, t.get("loss_weights") or [1.0] * len(kinds), strict=False))
    sft = weighted.pop("sft", 0.0)
    if len(weighted) != 1 or not {*weighted} <= {"sigmoid", "robust", "hinge", "ipo"}:
        t.none("loss_type", "expected one of sigmoid, robust, hinge and ipo, perhaps with sft beside it")
        return
    kind, weight = next(iter(weighted.items()))
    t.put("dpo.loss_type", kind, "loss_type")
    if t.get("label_smoothing") and kind not in ("sigmoid", "robust"):
        t.put("dpo.label_smoothing", 0, "loss_type")
        t.none("label_smoothing", f"the loss {kind} has none, there too")
    if sft:
        t.put("dpo.rpo_alpha", sft / weight, "loss_type", "loss_weights")


def _grpo_loss(t: Translation, kind: str) -> None:
    if kind not in AGGREGATIONS:
        known = ", ".join(AGGREGATIONS)
        t.none("loss_type", f"expected one of {known}; stage=gspo, rloo and reinforce_pp are further ones here")
        return
    t.put("ppo.loss_aggregation", AGGREGATIONS[kind], "loss_type")
    if kind == "cispo":
        high = t.get("epsilon_high") or t.get("epsilon")  # there the bound itself, here how far it is above 1
        for setting, value in (("policy_loss", "cispo"), ("clip_range", 1.0), ("dual_clip", None)):
            t.put(f"ppo.{setting}", value, "loss_type")
        t.put("ppo.clip_range_high", max(high - 1, 1e-6), "loss_type", "epsilon_high")


def rollout_trl(t: Translation) -> None:
    """A rollout holds the responses that are generated at once; where a step needs more of them, several of those."""
    size, accumulated = t.get("per_device_train_batch_size"), t.get("gradient_accumulation_steps")
    minibatch, steps = size * accumulated * t.ranks, t.get("steps_per_generation") or accumulated
    generated = t.get("generation_batch_size") or size * steps * t.ranks
    flags = ("per_device_train_batch_size", "gradient_accumulation_steps")
    both = (*flags, "generation_batch_size", "steps_per_generation")
    rollout = math.lcm(generated, minibatch, t.get("num_generations"))
    t.put("ppo.minibatch_size", minibatch, *flags)
    t.put("ppo.rollout_size", rollout, *both)
    t.put("ppo.rollout_micro_batch_size", math.ceil(generated / t.ranks), *both)
    if rollout != generated:
        ours = f"here {rollout}, a multiple of the batch and the group"
        t.notes.append(f"{generated} responses are generated at once there; {ours}")


def rollout_ppo(t: Translation) -> None:
    """All of a batch is generated at once; a step comes after gradient_accumulation_steps micro-batches of it."""
    flags = ("per_device_train_batch_size", "gradient_accumulation_steps")
    size, accumulated = map(t.get, flags)
    micro = max(1, min(size, size * accumulated // t.get("num_mini_batches")))
    t.put("ppo.rollout_size", size * accumulated * t.ranks, *flags)
    t.put("ppo.minibatch_size", micro * accumulated * t.ranks, *flags, "num_mini_batches")


def rewards(t: Translation) -> None:
    """Sources of scores: a model, functions by their import path, and their weights."""
    model = t.get("reward_model_name_or_path")
    sources: list[Any] = [{"source": model, "normalize": False}] if model else []
    for name in t.get("reward_funcs") or []:
        module, _, function = (name if "." in name else f"trl.rewards.{name}").rpartition(".")
        if name == "get_soft_overlong_punishment":
            t.none("reward_funcs", f"{name}: ppo.score.overlong_share=0.2 of max_response_tokens=1280")
            continue
        sources.append({"source": f"{module}:{function}"})
        if "." not in name:
            t.notes.append(f"{module}:{function} is TRL's own function, called as there; it needs `pip install trl`")
    for source, weight in zip(sources, t.get("reward_weights") or [], strict=False):
        source["weight"] = weight
    if not sources:
        sources = ["rewards.py:reward"]
        hint = (
            "name your reward functions in place of rewards.py:reward, as file.py:function; they are called as by TRL"
        )
        t.notes.append(hint)
    flags = ("reward_model_name_or_path", "reward_funcs", "reward_weights")
    t.put("ppo.rewards", sources, *flags, note="the functions of a Python script are not on its command line")
    if model:
        t.put("ppo.reward", model, "reward_model_name_or_path")
