"""The registry of metrics: what each logged number means, its unit, and which stages log it.

A metric must be here before it can be logged; console, dashboard and report are built from the registry, so they cannot
drift apart. In a key `*` stands for every name that a stage or the user puts there. Left out: how a metric is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.config.ppo_config import POLICIES
from rlhf.config.run_config import SUPERVISED

STEP = "trainer/step"
"""The axis of all curves, which a resumed run continues: optimizer steps in SFT and reward, iterations in PPO."""

PPO = POLICIES
REWARD = ("reward",)
PAIRS = tuple(stage for stage, settings in SUPERVISED.items() if settings.row_unit == "pairs")
EXAMPLES = tuple(SUPERVISED)
ALL = (*EXAMPLES, *PPO)
ACCURACY = "SFT: target tokens ranked first; reward, DPO: chosen scored higher"
DPO = ("dpo",)
RATIO = "log-ratio of policy to reference, mean over responses: no KL, as the policy did not write them"
PAID = "what PPO is paid for held-out answers: normalised, clamped, less the penalty for no end"
RAW = "weighted sum in the units of the reward sources, where it is not the score of a single one"
KL = "KL to the reference, summed over a response, mean over responses"
ENTROPY = "entropy per token at the sampling temperature, before top-k and top-p"
SEARCHED = "fp16: skipped steps that found the loss scale, at the start or after it grew: normal"
SKIPPED = "steps skipped for a non-finite gradient"


@dataclass(frozen=True)
class Metric:
    """The description of a metric."""

    section: str
    """Heading under which dashboard and report show it."""
    unit: str
    """Unit, or what the number counts; empty for a pure number."""
    stages: tuple[str, ...]
    meaning: str
    """One line for somebody who sees it for the first time."""
    better: int = 0
    """1 where more is better, -1 where less is, 0 where that depends on the rest, as it does for the KL."""
    headline: bool = False
    """Whether it is shown beside the progress bar."""


METRICS: dict[str, Metric] = {
    "objective/kl": Metric("Objective", "nats", PPO, KL, headline=True),
    "objective/kl_per_token": Metric("Objective", "nats", PPO, "KL to the reference, mean over response tokens"),
    "objective/kl_clamped": Metric("Objective", "fraction", PPO, "tokens whose k2 or k3 estimate was cut at 10"),
    "objective/entropy": Metric("Objective", "nats", PPO, ENTROPY),
    "objective/scores": Metric("Objective", "score", PPO, "normalised score, with clamp and penalty", headline=True),
    "objective/clamped": Metric("Objective", "fraction", PPO, "responses whose score is at the clamp"),
    "objective/raw_scores": Metric("Objective", "score", PPO, RAW, headline=True),
    "reward/*": Metric("Objective", "score", PPO, "what one reward source says of the responses, mean"),
    "reward/*/std": Metric("Objective", "score", PPO, "deviation of the scores of one reward source"),
    "reward/*/none": Metric("Objective", "fraction", PPO, "responses to which one reward source does not apply"),
    "reward/log/*": Metric("Objective", "", PPO, "what reward functions gave to log_metric under this name, mean"),
    "objective/non_score_reward": Metric("Objective", "score", PPO, "KL penalty of a response: -kl_coef times its KL"),
    "objective/rlhf_reward": Metric("Objective", "score", PPO, "what PPO maximises: score plus non-score reward"),
    "objective/kl_coef": Metric("Objective", "score/nat", PPO, "reward lost per nat of KL"),
    "objective/reference_updated": Metric("Objective", "", PPO, "1 where the reference then moved to the actor"),
    "eval/loss": Metric("Evaluation", "nats", EXAMPLES, "loss on held-out data", -1, headline=True),
    "eval/perplexity": Metric("Evaluation", "", ("sft",), "exponential of the held-out loss per token", -1),
    "eval/accuracy": Metric("Evaluation", "fraction", EXAMPLES, "accuracy on held-out data", 1, headline=True),
    "eval/margin": Metric("Evaluation", "score", PAIRS, "chosen minus rejected score, mean over held-out pairs", 1),
    "eval/reward_chosen": Metric("Evaluation", "score", DPO, "implicit reward of held-out chosen responses"),
    "eval/reward_rejected": Metric("Evaluation", "score", DPO, "implicit reward of held-out rejected responses"),
    "eval/log_ratio": Metric("Evaluation", "nats", DPO, RATIO),
    "eval/score_mean": Metric("Evaluation", "score", REWARD, "mean held-out score, which PPO subtracts"),
    "eval/score_std": Metric("Evaluation", "score", REWARD, "deviation of the held-out scores, which PPO divides by"),
    "eval/pairs": Metric("Evaluation", "pairs", PAIRS, "held-out pairs behind the accuracy"),
    "eval/score": Metric("Evaluation", "score", PPO, PAID, 1, headline=True),
    "eval/raw_score": Metric("Evaluation", "score", PPO, f"for held-out answers: {RAW}", 1),
    "eval/reward/*": Metric("Evaluation", "score", PPO, "what one reward source says of held-out answers", 1),
    "eval/reward/log/*": Metric("Evaluation", "", PPO, "what reward functions logged of held-out answers, mean"),
    "eval/clamped": Metric("Evaluation", "fraction", PPO, "held-out answers whose score is at the clamp", -1),
    "eval/kl": Metric("Evaluation", "nats", PPO, "KL to the reference per held-out response"),
    "eval/response_length": Metric("Evaluation", "tokens", PPO, "length of answers to held-out prompts"),
    "eval/eos_rate": Metric("Evaluation", "fraction", PPO, "answers to held-out prompts that end by themselves", 1),
    "eval/distinct_2": Metric("Evaluation", "fraction", PPO, "share of different word pairs: low if answers repeat", 1),
    "reward_model/accuracy": Metric("Evaluation", "fraction", PPO, "the reward model's, at the end of its own stage"),
    "reward_model/pairs": Metric("Evaluation", "pairs", PPO, "held-out pairs behind that accuracy"),
    "reward_model/score_std": Metric("Evaluation", "score", PPO, "deviation of the reward model's held-out scores"),
    "ema/*": Metric("Evaluation", "", ALL, "the held-out metric of that name, for the moving average of the weights"),
    "gold/*": Metric("Evaluation", "", PPO, "a metric of data.gold that no model was trained on", 1),
    "actor/loss": Metric("Actor", "", PPO, "clipped surrogate loss, mean over the iteration's updates"),
    "actor/approxkl_avg": Metric("Actor", "nats", PPO, "KL per token from the sampling policy, over the updates"),
    "actor/clipfrac_avg": Metric("Actor", "fraction", PPO, "response tokens whose ratio was clipped"),
    "actor/ratio_mean": Metric("Actor", "", PPO, "probability ratio to the sampling policy, mean over tokens"),
    "actor/ratio_max": Metric("Actor", "", PPO, "largest probability ratio to the sampling policy"),
    "actor/entropy": Metric("Actor", "nats", PPO, "entropy per token during the updates"),
    "actor/kl_clamped": Metric("Actor", "fraction", PPO, "tokens whose KL in the loss was cut at 10"),
    "actor/epochs": Metric("Actor", "epochs", PPO, "passes over the rollout until target_kl stopped them"),
    "ptx/loss": Metric("Actor", "nats", PPO, "language modelling loss per token of data.ptx, without its weight", -1),
    "ptx/tokens": Metric("Actor", "tokens", PPO, "target tokens of data.ptx in a step of the actor"),
    "critic/loss": Metric("Critic", "", PPO, "clipped value loss, mean over the iteration's updates"),
    "critic/clipfrac_avg": Metric("Critic", "fraction", PPO, "response tokens whose value was clipped"),
    "critic/explained_variance": Metric("Critic", "fraction", PPO, "share of the returns' variance that it predicts"),
    "rollout/response_length": Metric("Rollout", "tokens", PPO, "counted tokens of a response, mean", headline=True),
    "rollout/eos_rate": Metric("Rollout", "fraction", PPO, "responses that end by themselves"),
    "rollout/episodes": Metric("Rollout", "responses", PPO, "responses drawn since the start of the stage"),
    "rollout/left_out": Metric("Rollout", "responses", PPO, "responses left out for numbers that are not finite"),
    "rollout/unscored": Metric("Rollout", "responses", PPO, "responses left out because no reward source applies"),
    "rollout/logprob_gap_max": Metric("Rollout", "nats", PPO, "generation path against training path, largest gap"),
    "rollout/logprob_gap_mean": Metric("Rollout", "nats", PPO, "generation path against training path, mean gap"),
    "rollout/groups_equal": Metric("Rollout", "fraction", PPO, "responses whose group has one score: nothing to learn"),
    "rollout/further_rollouts": Metric("Rollout", "rollouts", PPO, "drawn to replace groups of equal scores"),
    "rollout/mismatch_mean": Metric("Rollout", "", PPO, "training over generation probability of tokens, mean"),
    "rollout/mismatch_max": Metric("Rollout", "", PPO, "training over generation probability of tokens, largest"),
    "rollout/mismatch_weight": Metric("Rollout", "", PPO, "weight that corrects for it in the loss, mean"),
    "rollout/mismatch_left_out": Metric("Rollout", "fraction", PPO, "response tokens that the correction leaves out"),
    "rollout/generated_tokens": Metric("Rollout", "tokens", PPO, "response tokens that were generated, all ranks"),
    "rollout/scored_tokens": Metric("Rollout", "tokens", PPO, "tokens of these responses and their prompts"),
    "rollout/trained_tokens": Metric("Rollout", "tokens", PPO, "tokens of all minibatches: of the rollout, each epoch"),
    "train/loss": Metric("Training", "nats", EXAMPLES, "loss of the step's global batch", -1, headline=True),
    "train/accuracy": Metric("Training", "fraction", EXAMPLES, ACCURACY, 1, headline=True),
    "train/margin": Metric("Training", "score", PAIRS, "chosen minus rejected score, mean over the batch", 1),
    "train/reward_chosen": Metric("Training", "score", DPO, "beta times log-ratio of the chosen responses"),
    "train/reward_rejected": Metric("Training", "score", DPO, "beta times log-ratio of the rejected responses"),
    "train/log_ratio": Metric("Training", "nats", DPO, RATIO),
    "train/grad_norm": Metric("Training", "", EXAMPLES, "global gradient norm before clipping"),
    "train/lr": Metric("Training", "", EXAMPLES, "learning rate of the step"),
    "train/lora_lr": Metric("Training", "", EXAMPLES, "learning rate of the adapters, where they have their own"),
    "train/tokens": Metric("Training", "tokens", EXAMPLES, "real tokens in the step's global batch"),
    "train/skipped_steps": Metric("Training", "steps", EXAMPLES, SKIPPED),
    "train/loss_scale": Metric("Training", "", EXAMPLES, "fp16: factor on the loss of the step"),
    "train/scale_search_steps": Metric("Training", "steps", EXAMPLES, SEARCHED),
    "actor/grad_norm": Metric("Optimizer", "", PPO, "actor's gradient norm before clipping"),
    "actor/lr": Metric("Optimizer", "", PPO, "actor's learning rate"),
    "actor/lora_lr": Metric("Optimizer", "", PPO, "learning rate of the actor's adapters, where they have their own"),
    "actor/skipped_steps": Metric("Optimizer", "steps", PPO, SKIPPED),
    "actor/loss_scale": Metric("Optimizer", "", PPO, "fp16: factor on the actor's loss, the smallest of the updates"),
    "actor/scale_search_steps": Metric("Optimizer", "steps", PPO, SEARCHED),
    "critic/grad_norm": Metric("Optimizer", "", PPO, "critic's gradient norm before clipping"),
    "critic/lr": Metric("Optimizer", "", PPO, "critic's learning rate"),
    "critic/lora_lr": Metric("Optimizer", "", PPO, "learning rate of the critic's adapters, where they have their own"),
    "critic/skipped_steps": Metric("Optimizer", "steps", PPO, SKIPPED),
    "critic/loss_scale": Metric("Optimizer", "", PPO, "fp16: factor on the critic's loss, the smallest of the updates"),
    "critic/scale_search_steps": Metric("Optimizer", "steps", PPO, SEARCHED),
    "timing_s/*": Metric("Throughput", "seconds", ALL, "time spent in this phase of the step"),
    "timing_s/*/*": Metric("Throughput", "seconds", PPO, "time spent in this part of a phase"),
    "perf/tokens_per_second": Metric("Throughput", "tokens/s", ALL, "tokens per second of the whole step, all ranks"),
    "perf/tokens_per_second/*": Metric(
        "Throughput", "tokens/s", ALL, "tokens of this phase over its seconds, all ranks"
    ),
    "perf/fastest_rank_s/*": Metric("Throughput", "seconds", ALL, "time of the rank that was first through this phase"),
    "perf/slowest_rank_s/*": Metric("Throughput", "seconds", ALL, "time of the rank that was last through this phase"),
    "memory/rss_bytes": Metric("Memory", "bytes", ALL, "resident memory of this process"),
    "memory/device_bytes": Metric("Memory", "bytes", ALL, "memory that PyTorch holds of this process's GPU"),
    "memory/*": Metric("Memory", "bytes", ALL, "peak memory of this process in this phase, as measured or as planned"),
}
"""Every metric by its key. The dashboard shows the sections in the order in which they begin here."""

COLUMNS = {
    "eval/score": "score",
    "eval/raw_score": "raw_score",
    "eval/kl": "kl",
    "eval/response_length": "length",
    "eval/eos_rate": "ended",
}
"""PPO's held-out metrics, each with the column of `samples.jsonl` that it averages; a gold metric's has its name."""


def metric(key: str) -> Metric:
    """The registry's entry of `key`. Raises ValueError where it has none."""
    return METRICS[registered(key)]


def registered(key: str) -> str:
    """The name under which the registry has `key`: itself, or that of its family.

    Raises:
        ValueError: the registry has no such metric.
    """
    parts = key.split("/")
    families = ["/".join([*parts[:count], "*"]) for count in range(len(parts) - 1, 0, -1)]  # the longest first
    if len(parts) == 3:
        families[1:1] = [f"{parts[0]}/*/{parts[2]}", f"{parts[0]}/*/*"]
    found = next((name for name in (key, *families) if name in METRICS), None)
    if found is None or parts[-1] in ("", "*"):
        raise ValueError(f"metric {key!r} is not registered; add it to METRICS in metric_registry.py.")
    return found


def check(stage: str, keys: list[str]) -> None:
    """Refuse a metric that is unknown, or that the registry gives to other stages than `stage`.

    Raises:
        ValueError: naming the key and the stages it is registered for.
    """
    for key in keys:
        stages = metric(key).stages
        if stage not in stages:
            known = ", ".join(stages)
            raise ValueError(f"stage {stage!r} logged {key!r}, which metric_registry.py registers for {known}.")
