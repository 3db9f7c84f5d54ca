"""Which implementations of attention a model can use here; those of transformers, under its names."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from rlhf.config.engine_config import Attention

_PACKAGES = {
    Attention.flash_attention_2: ("flash-attn", is_flash_attn_2_available),
    Attention.flash_attention_3: ("flash-attn-3", is_flash_attn_3_available),
}


def check_attention(module: PreTrainedModel, attention: Attention | None, *, on_cuda: bool) -> None:
    """Check that a model can attend as `engine.attention` says.

    transformers would download a kernel in place of a package that is missing, or choose another implementation.

    Raises:
        ValueError: it cannot; the message says what can be used.
    """
    obstacle = "" if attention is None else _obstacle(attention, type(module), on_cuda=on_cuda)
    if obstacle:
        usable = [str(other) for other in Attention if not _obstacle(other, type(module), on_cuda=on_cuda)]
        raise ValueError(f"engine.attention={attention}: {obstacle}; expected {', '.join(usable)}, or null.")


def _obstacle(attention: Attention, model: type[PreTrainedModel], *, on_cuda: bool) -> str:
    """Why a model class cannot use an implementation; empty if it can."""
    if attention is Attention.eager:
        return ""
    supports = "_supports_flash_attn" if attention.is_flash else "_supports_sdpa"
    if not getattr(model, supports, False):
        return f"{model.__name__} does not support it"
    if not attention.is_flash:
        return ""
    name, is_available = _PACKAGES[attention]
    if not on_cuda:
        return "it runs on CUDA alone, and models compute on the CPU"
    return "" if is_available() else f"the package {name} is not installed (pip install {name})"
