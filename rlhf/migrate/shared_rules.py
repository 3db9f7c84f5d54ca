"""Settings that follow from several flags, for DeepSpeed-Chat and TRL alike."""

from __future__ import annotations

import math

from rlhf.migrate.translation import Translation

SCHEDULES = {"constant_with_warmup": "constant", "cosine_with_restarts": "cosine", "polynomial": "linear"}
"""With their own defaults, these are others of which the project has one."""


def model(t: Translation) -> None:
    """What the stage starts from; the tokenizer is that of `model.path`."""
    if t.step == "ppo":
        actor, critic = t.get("actor_model_name_or_path"), t.get("critic_model_name_or_path")
        for setting in ("model.path", "ppo.actor"):
            t.put(setting, actor or "${output_dir}/sft/model", "actor_model_name_or_path")
        critic = critic or "${output_dir}/reward/model"
        for setting in ("ppo.reward", "ppo.critic"):
            t.put(setting, critic, "critic_model_name_or_path")
        sources = [{"source": critic, "normalize": False, "clamp": 5}]
        t.put("ppo.rewards", sources, note="clip_reward_value, a constant there; scores are not normalised")
        return
    path = t.get("model_name_or_path")
    start = {"sft": "model.path", "grpo": "ppo.actor"}.get(t.step, "S.init_from")
    if path is None:
        t.notes.append("no model is named: give one in place of MODEL")
    for name in dict.fromkeys(("model.path", start)):
        t.put(name, path or "MODEL", "model_name_or_path")


def batch(t: Translation) -> None:
    """Sequences of a device, times the accumulation, times the devices."""
    size = t.get("per_device_train_batch_size") or 1
    t.put("S.micro_batch_size", size, "per_device_train_batch_size")
    if t.stage != "ppo":
        flags = ("per_device_train_batch_size", "gradient_accumulation_steps")
        t.put("S.global_batch_size", size * t.get("gradient_accumulation_steps") * t.ranks, *flags)


def lengths(t: Translation) -> None:
    """One limit becomes two, with the same longest sequence."""
    flag = next((name for name in ("max_length", "max_seq_length", "max_seq_len") if name in t.given), None)
    flag = flag or ("max_seq_len" if t.peer.name == "deepspeed-chat" else "max_length")
    length = t.get(flag)
    if not isinstance(length, int):
        t.notes.append(
            f"--{flag} {length}: there is always a limit here, {t.stage}.max_prompt_tokens and max_response_tokens"
        )
        return
    prompt = t.get("max_prompt_length") or length // 2
    t.put("S.max_prompt_tokens", prompt, flag)
    t.put("S.max_response_tokens", max(length - prompt, 1), flag)


def schedule(t: Translation) -> None:
    """Shape and warm-up, also of the critic."""
    theirs = t.get("lr_scheduler_type")
    ours = SCHEDULES.get(theirs, theirs)
    options = t.get("lr_scheduler_kwargs") or {}
    if ours == "cosine_with_min_lr" and options:
        ours, share = "cosine", options.get("min_lr_rate", options.get("min_lr", 0) / t.get("learning_rate"))
        t.put("O.min_ratio", share, "lr_scheduler_type", "lr_scheduler_kwargs")
    elif options:
        t.none("lr_scheduler_kwargs", "the shapes of rates have no further parameters but optimizer.min_ratio")
    if ours not in ("linear", "cosine", "constant"):
        t.none(
            "lr_scheduler_type", "expected linear, cosine or constant; optimizer.schedule has those of DeepSpeed too"
        )
        ours = "linear"
    name = next((name for name in ("warmup_ratio", "num_warmup_steps", "warmup_steps") if name in t.given), None)
    name = name or ("num_warmup_steps" if t.peer.name == "deepspeed-chat" else "warmup_steps")
    warmup = 0 if theirs == "constant" else t.get(name) or 0
    if t.steps and warmup > t.steps:
        t.notes.append(f"--{name} {warmup}: the run has {t.steps} steps, so the full rate is reached at its end")
        warmup = t.steps
    for optimizer in [t.optimizer] + ["ppo.critic_optimizer"] * (t.step == "ppo"):
        t.put(f"{optimizer}.schedule", ours, "lr_scheduler_type")
        t.put(f"{optimizer}.warmup_steps", warmup, name)


def epochs(t: Translation) -> None:
    """Passes or steps; PPO counts iterations, which need the number of prompts."""
    epochs, steps = t.get("num_train_epochs"), t.get("max_steps") or -1
    if t.stage != "ppo":
        t.put(*(("S.max_steps", steps, "max_steps") if steps > 0 else ("S.epochs", epochs, "num_train_epochs")))
        t.steps = steps if steps > 0 else None
        return
    size, minibatch = t.settings["ppo.rollout_size"].value, t.settings["ppo.minibatch_size"].value
    updates = size // minibatch * (t.get("num_iterations") or t.get("ppo_epochs"))
    stop = t.get("test_stop_step") if t.get("enable_test_mode") else None
    rows, prompts = t.rows or _known_rows(t), size // (t.get("num_generations") or 1)
    if stop:
        t.put("ppo.iterations", stop, "test_stop_step", "enable_test_mode")
    elif steps > 0:
        t.put("ppo.iterations", max(1, math.ceil(steps / updates)), "max_steps")
    elif rows:
        note = f"--num_train_epochs {epochs} of {rows:,} prompts, {prompts} at a time"
        t.put("ppo.iterations", max(1, math.ceil(rows * epochs / prompts)), note=note)
    else:
        t.notes.append(
            f"ppo.iterations is our own; {epochs} epochs of N prompts are {epochs} x N / {prompts}: say --rows N"
        )
        return
    t.steps = t.settings["ppo.iterations"].value * updates


def _known_rows(t: Translation) -> int | None:
    """Prompts of the data sets whose sizes are known, as far as they belong to step 3."""
    names = t.get("data_path") or []
    if not names or not all(name in t.peer.rows for name in names):
        return None
    shares = [float(share) for share in str(t.get("data_split")).split(",")]
    return sum(round(t.peer.rows[name] * shares[-1] / sum(shares)) for name in names)
