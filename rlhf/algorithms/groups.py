"""Advantages without a critic: each response is compared with others to the same prompt."""

from __future__ import annotations

from torch import Tensor

from rlhf.algorithms.precision import at_least_fp32


def group_advantages(scores: Tensor, *, group_size: int, kind: str, eps: float = 1e-6) -> Tensor:
    """Advantage of each response over its group, `[B]`; consecutive rows form a group. Equal scores give exactly 0.

    * "grpo": `(score - mean) / (std + eps)` (Shao et al. 2024, arXiv:2402.03300), with the sample standard deviation
      (divided by group_size - 1) that TRL, verl and OpenRLHF all use; their eps are 1e-4, 1e-6 and 1e-9.
    * "dr_grpo": `score - mean`, which does not favour prompts whose scores are close (Liu et al. 2025,
      arXiv:2503.20783).
    * "rloo": `score - mean of the others` (Ahmadian et al. 2024, arXiv:2402.14740).

    Args:
        scores: `[B]`, with the responses to one prompt in consecutive rows.
        group_size: responses per prompt, at least 2.
        kind: "grpo", "dr_grpo" or "rloo".
        eps: added to the standard deviation.
    """
    groups = at_least_fp32(_grouped(scores, group_size))
    offsets = groups - groups[:, :1]  # measured from the group's first score, so that equal scores are exactly 0
    centered = offsets - offsets.mean(-1, keepdim=True)
    if kind == "grpo":
        return (centered / (offsets.std(-1, keepdim=True) + eps)).flatten()
    if kind == "dr_grpo":
        return centered.flatten()
    if kind == "rloo":
        # s_i - sum_{j != i} s_j / (n - 1) = (s_i - mean) n / (n - 1)
        return (centered * (group_size / (group_size - 1))).flatten()
    raise ValueError(f'found group advantage "{kind}", expected "grpo", "dr_grpo" or "rloo"')


def _grouped(scores: Tensor, group_size: int) -> Tensor:
    """`[B]` as `[B / group_size, group_size]`."""
    if group_size < 2:
        raise ValueError(f"found groups of {group_size}, expected at least 2 responses per prompt to compare")
    if scores.dim() != 1 or scores.shape[0] % group_size:
        raise ValueError(
            f"found scores of shape {tuple(scores.shape)}, expected [B] with B a multiple of {group_size}, "
            "the number of responses per prompt"
        )
    return scores.view(-1, group_size)
