"""Settings that follow from several flags of DeepSpeed-Chat."""

from __future__ import annotations

import math
import re
from typing import Any

from rlhf.migrate.flags import Fate
from rlhf.migrate.translation import Translation

OWN_FILE = "local/jsonfile"
"""Stands for data/train.json and data/eval.json of its folder."""


def data_dsc(t: Translation) -> None:
    """Sources, their split between the steps, and what is evaluated on."""
    extra = t.get("sft_only_data_path") or []
    paths = [*t.get("data_path"), *extra]
    if extra:
        t.none("sft_only_data_path", t.peer.steps["sft"]["sft_only_data_path"].note)
    if OWN_FILE in paths:
        t.notes.append(f"{OWN_FILE} is data/train.json and data/eval.json of DeepSpeed-Chat's folder: give their paths")
    sources = ["data/train.json" if path == OWN_FILE else path for path in paths]
    t.put("data.S.train", sources, "data_path", *["sft_only_data_path"] * bool(extra))
    held_out: list[Any] = [path for path in paths if path not in (*t.peer.about["without_eval"], OWN_FILE)]
    held_out = [{"path": path, "split": "eval"} for path in held_out] + ["data/eval.json"] * (OWN_FILE in paths)
    if held_out:
        t.put("data.S.eval", held_out, note="there every step evaluates on them; PPO does not")
    else:
        t.put("data.S.eval_fraction", 0.1, note="of data without an eval split, a tenth is held out there")
    shares = [float(share) for share in str(t.get("data_split")).split(",")]
    t.put("data.stage_split", [int(share) if share.is_integer() else share for share in shares], "data_split")
    t.put("data.S.bad_rows", "drop", note="there rows that cannot be used are skipped")


def rates_dsc(t: Translation) -> None:
    """Adapters have a rate of their own there; where nothing else learns here, it is that of the optimizer."""
    prefix = "actor_" if t.step == "ppo" else ""
    usual, adapters = f"{prefix}learning_rate", f"{prefix}lora_learning_rate"
    has_adapters = bool(t.get(f"{prefix}lora_dim"))
    flag = adapters if has_adapters and t.step != "reward" else usual
    t.put(f"{t.optimizers[0]}.lr", t.get(flag), flag)
    if has_adapters and t.step == "reward":
        t.put("O.lora_lr", t.get(adapters), adapters)
    elif has_adapters and usual in t.given:
        t.none(usual, f"it is the rate of embeddings, norms and biases there; adapters learn at --{flag}")
    if t.step == "ppo" and has_adapters:
        t.put("ppo.critic_optimizer.lora_lr", t.get("critic_lora_learning_rate"), "critic_lora_learning_rate")


def lora_dsc(t: Translation) -> None:
    """One rank for actor and critic; the scale is 1 / rank there."""
    prefix = "actor_" if t.step == "ppo" else ""
    rank, other = t.get(f"{prefix}lora_dim"), t.get("critic_lora_dim") or 0
    t.put("S.lora.rank", rank or other, f"{prefix}lora_dim", *["critic_lora_dim"] * (not rank and bool(other)))
    if not (rank or other):
        return
    if t.step == "ppo" and rank != other:
        ranks = f"the actor has adapters of rank {rank} there and the critic of {other}"
        t.notes.append(f"{ranks}; here both have ppo.lora.rank")
    t.put("S.lora.alpha", 1, note="there the product is divided by the rank, and not scaled")
    flag = f"{prefix}lora_module_name"
    linear = re.search(r"\w+_proj$|fc\d$|\w*dense\w*$|query_key_value$", t.get(flag))
    t.put("S.lora.targets", [linear[0]] if linear else ["all-linear"], flag)
    if not linear and not re.fullmatch(r"[a-z.]*(layers|h|blocks)\.", t.get(flag)):
        t.none(flag, "adapters are on all linear layers, or on those that lora.targets names by their last part")
    if not t.get("only_optimize_lora"):
        also = "embeddings, norms and biases learn too there; here adapters alone do"
        t.notes.append(f"without --only_optimize_lora {also}")


def engine_dsc(t: Translation) -> None:
    """ZeRO stages and offloading of every model."""
    name = "actor_zero_stage" if t.step == "ppo" else "zero_stage"
    stage, offload = int(t.get(name)), bool(t.get("offload"))
    t.put("engine", f"zero{stage}{'_cpu' if offload and stage else ''}", name, *["offload"] * offload)
    if offload and not stage:
        t.none("offload", "nothing is offloaded at ZeRO 0, where every rank holds everything; engine=zero1_cpu does it")
    if t.get("dtype") == "fp16":
        t.put("engine.loss_scale_window", 100, note="a constant of its DeepSpeed configuration, for fp16")
    if t.step == "dpo" and t.get("offload_reference_model"):
        t.reasons[Fate.itself].append("--offload_reference_model: DPO's reference is in memory before training only")
    if t.step == "ppo":
        _other_engines(t, stage, offload=offload)


def _other_engines(t: Translation, stage: int, *, offload: bool) -> None:
    """What the critic, the reference and the reward model have that the actor has not."""
    critic = int(t.get("critic_zero_stage"))
    parts = {
        "critic": (critic, "critic_zero_stage", "offload"),
        "reference": (3 if stage == 3 else 0, "actor_zero_stage", "offload_reference_model"),
        "reward": (3 if critic == 3 else 0, "critic_zero_stage", "offload_reward_model"),
    }
    actor = _engine(stage, is_offloaded=offload, has_optimizer=True)
    for role, (zero, flag, asked) in parts.items():
        own = _engine(zero, is_offloaded=bool(t.get(asked)), has_optimizer=role == "critic")
        if role != "critic" and zero:
            own["offload_optimizer"] = actor["offload_optimizer"]  # it has none
        if role != "critic" and 3 not in (zero, stage):
            own = actor  # of a frozen model nothing is sharded below 3
            if t.get(asked):
                t.none(asked, "without ZeRO 3 it offloads nothing there either")
        for name in [name for name in own if own[name] != actor[name]]:
            t.put(f"ppo.{role}_engine.{name}", own[name], asked, flag)


def _engine(zero: int, *, is_offloaded: bool, has_optimizer: bool) -> dict[str, Any]:
    """The settings of a model at a ZeRO stage; weights are offloaded at 3 alone, there and here."""
    return {
        "zero_stage": zero,
        "offload_param": "cpu" if is_offloaded and zero == 3 else "none",
        "offload_optimizer": "cpu" if is_offloaded and zero and has_optimizer else "none",
    }


def eval_rows(t: Translation) -> None:
    """Batches become rows."""
    rows = t.get("eval_iters") * (t.get("per_device_eval_batch_size") or 16) * t.ranks
    t.put("reward.eval_rows", rows, "eval_iters", "per_device_eval_batch_size")


def ptx(t: Translation) -> None:
    """Text beside PPO, which needs both names there."""
    name, config = t.get("unsupervised_dataset_name"), t.get("unsupervised_dataset_config_name")
    if name and config:
        t.put("ppo.ptx.coef", t.get("unsup_coef"), "unsup_coef")
        t.put("data.ptx.train", [{"path": name, "name": config}], "unsupervised_dataset_name")
    elif name or config:
        t.notes.append("--unsupervised_dataset_name and its config_name: nothing is learnt without both, there too")


def rollout_dsc(t: Translation) -> None:
    """Where a step accumulates over several rollouts there, one rollout is as large here: the same update."""
    flags = ("per_device_generation_batch_size", "per_device_training_batch_size", "generation_batches")
    generated, trained, batches = map(t.get, flags)
    minibatch = trained * t.get("gradient_accumulation_steps") * t.ranks
    t.put("ppo.rollout_micro_batch_size", generated, flags[0])
    t.put("ppo.micro_batch_size", trained, flags[1])
    t.put("ppo.minibatch_size", minibatch, flags[1], "gradient_accumulation_steps")
    t.put("ppo.rollout_size", math.lcm(generated * batches * t.ranks, minibatch), *flags, "gradient_accumulation_steps")
