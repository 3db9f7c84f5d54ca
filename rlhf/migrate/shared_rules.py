"""Settings that follow from several flags, for DeepSpeed-Chat and TRL alike."""

from __future__ import annotations

import math

from rlhf.migrate.translation import Translation

START = {"sft": "model.path", "grpo": "ppo.actor", "rloo": "ppo.actor"}


def model(t: Translation) -> None:
    """What the stage starts from; the tokenizer is that of `model.path`."""
    if t.step == "ppo":
        _models_of_ppo(t)
        return
    path = t.get("model_name_or_path")
    if path is None:
        t.notes.append("no model is named: give one in place of MODEL")
    for name in dict.fromkeys(("model.path", START.get(t.step, "S.init_from"))):
        t.put(name, path or "MODEL", "model_name_or_path")


def _models_of_ppo(t: Translation) -> None:
    is_trl = t.peer.name == "trl"
    actor = "sft_model_path" if is_trl else "actor_model_name_or_path"
    reward = "reward_model_path" if is_trl else "critic_model_name_or_path"
    policy, scorer = t.get(actor) or "${output_dir}/sft/model", t.get(reward) or "${output_dir}/reward/model"
    t.put("model.path", t.get("model_name_or_path") or policy, "model_name_or_path" if is_trl else actor)
    t.put("ppo.actor", policy, actor)
    for setting in ("ppo.reward", "ppo.critic"):
        t.put(setting, scorer, reward)
    source = {"source": scorer, "normalize": False} | ({} if is_trl else {"clamp": 5})
    t.put("ppo.rewards", [source], note="scores are not normalised there" + ", and cut to 5 both ways" * (not is_trl))


def batch(t: Translation) -> None:
    """Sequences of a device, times the accumulation, times the devices."""
    size = t.get("per_device_train_batch_size") or 1
    t.put("S.micro_batch_size", size, "per_device_train_batch_size")
    if t.stage != "ppo":
        flags = ("per_device_train_batch_size", "gradient_accumulation_steps")
        t.put("S.global_batch_size", size * t.get("gradient_accumulation_steps") * t.ranks, *flags)


def lengths(t: Translation) -> None:
    """One limit becomes two, with the same longest sequence."""
    usual = "max_seq_len" if t.peer.name == "deepspeed-chat" else "max_length"
    flag = next((name for name in ("max_length", "max_seq_length", "max_seq_len") if name in t.given), usual)
    length = t.get(flag)
    if not isinstance(length, int):
        limits = f"{t.stage}.max_prompt_tokens and max_response_tokens"
        t.notes.append(f"--{flag} {length}: there is always a limit here, {limits}")
        return
    prompt = t.get("max_prompt_length") or length // 2
    t.put("S.max_prompt_tokens", prompt, flag)
    t.put("S.max_response_tokens", max(length - prompt, 1), flag)


def warmup(t: Translation) -> None:
    """Steps in which the rate climbs; no more than the run has."""
    usual = "num_warmup_steps" if t.peer.name == "deepspeed-chat" else "warmup_steps"
    name = next((name for name in ("warmup_ratio", "num_warmup_steps", "warmup_steps") if name in t.given), usual)
    steps = 0 if t.get("lr_scheduler_type") == "constant" else t.get(name) or 0
    if (t.peer.name, t.step) == ("trl", "ppo") and steps >= 1:
        steps *= t.updates  # its schedule is advanced once per batch
    if t.steps and steps > t.steps:
        t.notes.append(f"--{name} {steps}: the run has {t.steps} steps, so the full rate is reached at its end")
        steps = t.steps
    t.put("O.warmup_steps", steps, name)


def epochs(t: Translation) -> None:
    """Passes or steps; PPO counts iterations, which need the number of prompts or of responses."""
    epochs, steps = t.get("num_train_epochs"), t.get("max_steps") or -1
    if t.stage != "ppo":
        t.put(*(("S.max_steps", steps, "max_steps") if steps > 0 else ("S.epochs", epochs, "num_train_epochs")))
        t.steps = steps if steps > 0 else None
        return
    size, episodes = t.value("ppo.rollout_size"), t.get("total_episodes")
    prompts, rows = size // (t.get("num_generations") or 1), t.rows or _known_rows(t)
    stop = t.get("test_stop_step") if t.get("enable_test_mode") else None
    if stop:
        t.put("ppo.iterations", stop, "test_stop_step", "enable_test_mode")
    elif episodes:
        t.put("ppo.iterations", math.ceil(episodes / size), "total_episodes")
    elif steps > 0:
        t.put("ppo.iterations", math.ceil(steps / t.updates), "max_steps")
    elif rows:
        note = f"--num_train_epochs {epochs} of {rows:,} prompts, {prompts} at a time"
        t.put("ppo.iterations", max(1, math.ceil(rows * epochs / prompts)), note=note)
    else:
        count = f"{epochs} epochs of N prompts are {epochs} x N / {prompts}"
        t.notes.append(f"ppo.iterations is our own; {count}: say --rows N")
        return
    t.steps = t.value("ppo.iterations") * t.updates


def _known_rows(t: Translation) -> int | None:
    """Prompts of the data sets whose sizes are known, as far as they belong to step 3."""
    names: list[str] = t.get("data_path") or []
    sizes: dict[str, int] = t.peer.about["rows"]
    if not names or not all(name in sizes for name in names):
        return None
    shares = [float(share) for share in str(t.get("data_split")).split(",")]
    return sum(round(sizes[name] * shares[-1] / sum(shares)) for name in names)
