"""Settings of DPO, which learns from preferences without a reward model."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from rlhf.config.bounds import NonNegative, Positive, ShareBelowOne, require
from rlhf.config.stage_configs import BestMetric, ModelKind, SupervisedConfig


class DPOLossType(StrEnum):
    """Loss of a pair; see `rlhf/algorithms/dpo.py`."""

    sigmoid = "sigmoid"
    robust = "robust"
    hinge = "hinge"
    ipo = "ipo"


@dataclass(kw_only=True)
class DPOConfig(SupervisedConfig):
    """Direct preference optimisation: a policy learns from preferences, without a reward model."""

    rows = "dpo_preferences"
    kind = ModelKind.causal_lm
    objective = "dpo"
    row_unit = "pairs"
    best_metric = BestMetric("eval/loss", -1)  # it also sees a policy that runs away; accuracy counts signs alone

    init_from: str = "${output_dir}/sft/model"
    """Policy that training starts from."""
    reference: str | None = None
    """Model that the policy is compared with; null is the one it starts from. It is in memory before training only."""
    beta: Positive = 0.1
    """Reward per nat of log-ratio to the reference: the smaller, the further the policy may go."""
    loss_type: DPOLossType = DPOLossType.sigmoid
    """Loss of a pair: sigmoid (DPO), robust (to wrong labels), hinge (SLiC), or ipo, which averages over tokens."""
    label_smoothing: ShareBelowOne = 0.0
    """Assumed share of pairs that are labelled the wrong way round, below 0.5: cDPO with sigmoid, and for robust."""
    normalize_length: bool = False
    """Average log-ratios over the tokens of a response instead of summing them; needs a larger `beta`."""
    rpo_alpha: NonNegative = 0.0
    """Weight of the chosen response's loss per token, which keeps it likely (RPO, Pang et al. 2024)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        smoothing = f"label_smoothing={self.label_smoothing}"
        require(self.label_smoothing < 0.5, f"{smoothing}: expected at least 0, below 0.5.")
        require(
            not self.label_smoothing or self.loss_type in (DPOLossType.sigmoid, DPOLossType.robust),
            f"{smoothing}: loss_type={self.loss_type} has none; expected 0, or loss_type=sigmoid or robust.",
        )
