"""Settings that follow from several flags of TRL."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from rlhf.migrate.translation import Translation


def data_trl(t: Translation) -> None:
    """Sources with their splits and columns, and whether anything is held out."""
    text, listed = t.get("dataset_text_field"), t.get("datasets")
    sources = [_source(entry) for entry in listed or []]
    if not listed:
        name = t.get("dataset_name")
        source = {"path": name or "DATA", "name": t.get("dataset_config"), "split": t.get("dataset_train_split")}
        source |= {"columns": {"text": text}} if text not in (None, "text") else {}
        sources = [_source(source)]
        if name is None:
            t.notes.append("no data set is named: give one in place of DATA")
    t.put(
        "data.S.train",
        sources,
        *(["datasets"] if listed else ["dataset_name", "dataset_train_split", "dataset_config"]),
    )
    strategy = str(t.get("eval_strategy"))
    if strategy in ("no", "False") and t.stage == "ppo":
        t.put("data.S.eval_fraction", 0, "eval_strategy")
        t.put("ppo.eval_prompts", 0, "eval_strategy")
        return
    if strategy in ("no", "False"):
        t.put(
            "data.S.eval_fraction", 0.01, "eval_strategy", note="nothing is held out there; a stage is always evaluated"
        )
        return
    if not listed:
        source = {"path": t.get("dataset_name") or "DATA", "name": t.get("dataset_config")}
        t.put(
            "data.S.eval",
            [_source(source | {"split": t.get("dataset_test_split")})],
            "dataset_name",
            "dataset_test_split",
        )
    every = t.get("eval_steps") or t.get("logging_steps")
    if every < 1:  # a share of the run
        t.notes += [f"--eval_steps {every} of the run: give the steps, {t.stage}.eval_every"] * (t.steps is None)
        every = every * (t.steps or 0)
    t.put("S.eval_every", math.ceil(every) if strategy == "steps" else 0, "eval_strategy", "eval_steps")


def _source(entry: Mapping[str, Any]) -> Any:
    """A source as short as it can be written; what has no counterpart is left out."""
    path = entry.get("data_files") if isinstance(entry.get("data_files"), str) else entry["path"]
    kept = {"path": path, "name": entry.get("name") or entry.get("data_dir"), "split": entry.get("split", "train")}
    kept |= {"columns": entry["columns"]} if isinstance(entry.get("columns"), Mapping) else {}
    kept = {key: value for key, value in kept.items() if value and (key, value) != ("split", "train")}
    return path if [*kept] == ["path"] else kept


def learns(t: Translation) -> None:
    """Which tokens of demonstrations are learnt."""
    asked = [t.get("completion_only_loss"), t.get("assistant_only_loss")]
    if any(asked):
        t.put("sft.response_only", True, "completion_only_loss", "assistant_only_loss")
    elif asked[0] is False or t.get("dataset_name") in t.peer.lists["learns_all"]:
        t.put("sft.response_only", False, "completion_only_loss", note="there all turns of `messages` are learnt")
    else:
        t.notes.append(
            "TRL learns all of `messages` unless --assistant_only_loss; sft.response_only=false does so here"
        )


def betas(t: Translation) -> None:
    """Two flags, one list."""
    t.put("O.betas", [t.get("adam_beta1"), t.get("adam_beta2")], "adam_beta1", "adam_beta2")


def optim(t: Translation) -> None:
    """AdamW in full, or with moments in 8 bits."""
    name = str(t.get("optim"))
    if "8bit" in name and "adamw" in name:
        t.put("engine.moments", "int8", "optim")
    elif not name.startswith(("adamw_torch", "adamw_hf", "adamw_apex", "adamw_anyprecision")):
        t.none("optim", "the optimizer is AdamW; with less memory engine.moments=int8")


def precision_trl(t: Translation) -> None:
    """TRL computes in bf16 beside fp32 weights unless told otherwise, which is what bf16 is here."""
    is_fp16, bf16 = bool(t.get("fp16")), t.get("bf16")
    half = {"bfloat16": "bf16", "float16": "fp16"}.get(str(t.get("torch_dtype") or t.get("dtype")), "fp32")
    precision = "fp16" if is_fp16 else "bf16" if bf16 is not False else half
    t.put("engine.precision", precision, "fp16", "bf16", "dtype", note="TRL computes in bf16 unless told otherwise")


def report_to(t: Translation) -> None:
    """W&B or nothing; other trackers are said."""
    wanted = {str(name) for name in t.get("report_to")}
    t.put("tracking.wandb", "auto" if wanted & {"wandb", "all"} else "disabled", "report_to")
    for name in sorted(wanted - {"wandb", "all", "none", "False"}):
        t.none("report_to", f"nothing is sent to {name}; metrics.jsonl has every number")


def saving(t: Translation) -> None:
    """When checkpoints and metrics are written, and how many checkpoints are kept."""
    every = t.get("logging_steps")
    t.put("tracking.log_every", max(1, int(every)), "logging_steps")
    if every < 1:
        t.none("logging_steps", "tracking.log_every counts steps; a share of the run is not one")
    strategy = str(t.get("save_strategy"))
    if strategy in ("no", "False"):
        t.put("checkpoint.every", 0, "save_strategy")
    elif strategy == "steps":
        t.put("checkpoint.every", t.get("save_steps"), "save_steps", "save_strategy")
    if t.get("save_total_limit"):
        t.put("checkpoint.keep", t.get("save_total_limit"), "save_total_limit")


def engine_trl(t: Translation) -> None:
    """A DeepSpeed file is read as it is; FSDP's sharding has a ZeRO stage."""
    names = [name for name in ("deepspeed", "config_file", "accelerate_config") if isinstance(t.get(name), str)]
    flag = names[0] if names else ""
    file = t.get(flag)
    zero = re.fullmatch(r"zero([123])", str(file))
    if zero:
        t.put("engine", f"zero{zero[1]}", flag)
    elif t.get("fsdp") or "fsdp" in str(file):
        t.put("engine", "zero2" if "shard_grad_op" in str(t.get("fsdp")) else "zero3", "fsdp", *[flag] * bool(flag))
    elif file and re.search(r"deepspeed|zero|ds_|\.json", str(file)):
        t.put("engine.deepspeed", str(file), flag)
    elif file and not re.search(r"(multi|single)_gpu", str(file)):
        t.none(flag, "not known to be for DeepSpeed or FSDP; engine=zero0 to zero3, or engine.deepspeed=FILE")


def attention(t: Translation) -> None:
    """Implementations that Transformers itself has."""
    name = t.get("attn_implementation")
    kernels = re.fullmatch(r"kernels-community/.*flash-attn(2|3)", str(name))
    name = f"flash_attention_{kernels[1]}" if kernels else name
    if str(name).startswith("flash") and t.settings["engine.precision"].value == "fp32":
        t.none("attn_implementation", "flash attention computes in 16 bits, there too")
    elif name in ("eager", "sdpa", "flash_attention_2", "flash_attention_3"):
        t.put("S.engine.attention", name, "attn_implementation")
    elif name:
        t.none("attn_implementation", "expected eager, sdpa, flash_attention_2 or flash_attention_3 (engine.attention)")


def offloading(t: Translation) -> None:
    """Activations that are kept, not recomputed, stay on the device."""
    if t.get("activation_offloading") and t.get("gradient_checkpointing"):
        t.put("S.engine.activation_offload", True, "activation_offloading")
    elif t.get("activation_offloading"):
        t.none("activation_offloading", "engine.activation_offload needs engine.activation_checkpointing=true")


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
    chosen = targets or ["q_proj", "v_proj"]
    t.put(
        "S.lora.targets",
        chosen,
        "lora_target_modules",
        note="PEFT's choice for Llama, Qwen, OPT; others have other names",
    )


def loss_type(t: Translation) -> None:
    """The loss of the step."""
    kinds = [str(kind) for kind in t.get("loss_type")]
    if t.step == "sft":
        if kinds not in (["nll"], ["chunked_nll"]):
            t.none("loss_type", "SFT learns by the likelihood of the tokens (nll)")
    elif t.step == "dpo":
        _dpo_loss(t, kinds)
    else:
        _grpo_loss(t, kinds[0])


def _dpo_loss(t: Translation, kinds: list[str]) -> None:
    weights = t.get("loss_weights") or [1.0] * len(kinds)
    weighted = dict(zip(kinds, weights, strict=False))
    sft = weighted.pop("sft", 0.0)
    other = [kind for kind in weighted if kind not in ("sigmoid", "robust", "hinge", "ipo")]
    if other or len(weighted) != 1:
        t.none(
            "loss_type", "expected one of sigmoid, robust, hinge and ipo, perhaps with sft beside it (dpo.loss_type)"
        )
        return
    kind, weight = next(iter(weighted.items()))
    t.put("dpo.loss_type", kind, "loss_type")
    if t.get("label_smoothing") and kind not in ("sigmoid", "robust"):
        t.put("dpo.label_smoothing", 0, "loss_type")
        t.none("label_smoothing", f"the loss {kind} has none, there too")
    if sft:
        t.put("dpo.rpo_alpha", sft / weight, "loss_type", "loss_weights")


def _grpo_loss(t: Translation, kind: str) -> None:
    means = {
        "grpo": "sequence_mean",
        "dr_grpo": "constant",
        "dapo": "token_mean",
        "bnpo": "token_mean",
        "cispo": "token_mean",
    }
    if kind not in means:
        t.none(
            "loss_type", f"expected one of {', '.join(means)}; stage=gspo, rloo and reinforce_pp are further ones here"
        )
        return
    t.put("ppo.loss_aggregation", means[kind], "loss_type")
    if kind == "cispo":
        high = t.get("epsilon_high") or t.get("epsilon")  # there the bound itself, here how far it is above 1
        t.put("ppo.policy_loss", "cispo", "loss_type")
        t.put("ppo.clip_range", 1.0, "loss_type")
        t.put("ppo.dual_clip", None, "loss_type")
        t.put("ppo.clip_range_high", max(high - 1, 1e-6), "loss_type", "epsilon_high")


def reference(t: Translation) -> None:
    """A reference that follows the policy, counted in iterations here."""
    if not t.get("sync_ref_model"):
        return
    if t.step == "dpo":
        t.none(
            "sync_ref_model", "the reference of DPO does not move: its log-probabilities are computed before training"
        )
        return
    if t.get("use_peft"):
        t.none("sync_ref_model", "with adapters the reference is the model without them, and does not move")
        return
    size, minibatch = t.settings["ppo.rollout_size"].value, t.settings["ppo.minibatch_size"].value
    updates = size // minibatch * t.get("num_iterations")
    t.put(
        "ppo.reference_update_every",
        max(1, t.get("ref_model_sync_steps") // updates),
        "sync_ref_model",
        "ref_model_sync_steps",
    )
    t.put("ppo.reference_update_mix", t.get("ref_model_mixup_alpha"), "ref_model_mixup_alpha")
    if not t.get("beta"):
        t.put("ppo.reference", t.get("model_name_or_path") or "MODEL", "sync_ref_model")


def rollout_trl(t: Translation) -> None:
    """A rollout holds the responses that are generated at once; where a step needs more of them, several of those."""
    size, accumulated = t.get("per_device_train_batch_size"), t.get("gradient_accumulation_steps")
    minibatch, steps = size * accumulated * t.ranks, t.get("steps_per_generation") or accumulated
    generated = t.get("generation_batch_size") or size * steps * t.ranks
    flags = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "generation_batch_size",
        "steps_per_generation",
    )
    rollout = math.lcm(generated, minibatch, t.get("num_generations"))
    t.put("ppo.minibatch_size", minibatch, *flags[:2])
    t.put("ppo.rollout_size", rollout, *flags)
    t.put("ppo.rollout_micro_batch_size", math.ceil(generated / t.ranks), *flags)
    if rollout != generated:
        t.notes.append(
            f"{generated} responses are generated at once there; here {rollout}, a multiple of the batch and the group"
        )


def rewards(t: Translation) -> None:
    """Sources of scores: a model, functions by their import path, and their weights."""
    model, functions = t.get("reward_model_name_or_path"), t.get("reward_funcs") or []
    sources: list[dict[str, Any]] = [{"source": model, "normalize": False}] if model else []
    for name in functions:
        if name == "get_soft_overlong_punishment":
            t.none(
                "reward_funcs", "get_soft_overlong_punishment: ppo.score.overlong_share=0.2 of max_response_tokens=1280"
            )
            continue
        module, _, function = f"trl.rewards.{name}".removeprefix("" if "." not in name else "trl.rewards.").rpartition(
            "."
        )
        sources.append({"source": f"{module}:{function}"})
        if "." not in name:
            t.notes.append(
                f"{module}:{function} is TRL's own function, which is called as there and needs `pip install trl`"
            )
    for source, weight in zip(sources, t.get("reward_weights") or [], strict=False):
        source["weight"] = weight
    if sources:
        t.put("ppo.rewards", sources, "reward_model_name_or_path", "reward_funcs", "reward_weights")
        if model:
            t.put("ppo.reward", model, "reward_model_name_or_path")
        return
    t.put("ppo.rewards", ["rewards.py:reward"], note="the functions of a Python script are not on its command line")
    t.notes.append(
        "name your reward functions in place of rewards.py:reward, as file.py:function; they are called as by TRL"
    )
