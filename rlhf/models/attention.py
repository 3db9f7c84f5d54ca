"""Which implementations of attention a model can use here, those of transformers, and whether it can omit padding."""

from __future__ import annotations

import inspect
import logging

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from rlhf.config.engine_config import Attention
from rlhf.models.model_spec import caps_scores, find_blocks
from rlhf.models.padding_free import compute_without_padding

log = logging.getLogger(__name__)

_PACKAGES = {
    Attention.flash_attention_2: ("flash-attn", is_flash_attn_2_available),
    Attention.flash_attention_3: ("flash-attn-3", is_flash_attn_3_available),
}

_ATTENDING = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers in which a mask says everything of which token sees which."""
_OWN_MASKS = {"doge"}
"""Models, by `model_type`, whose layers compute with the mask."""


def check_attention(module: PreTrainedModel, attention: Attention | None, *, on_cuda: bool) -> None:
    """Check that a model can attend as `engine.attention` says.

    transformers would download a kernel in place of a package that is missing, or choose another implementation.

    Raises:
        ValueError: it cannot; the message says what can be used.
    """
    obstacle = "" if attention is None else _obstacle(attention, module, on_cuda=on_cuda)
    if obstacle:
        usable = [str(other) for other in Attention if not _obstacle(other, module, on_cuda=on_cuda)]
        raise ValueError(f"engine.attention={attention}: {obstacle}; expected {', '.join(usable)}, or null.")


def _obstacle(attention: Attention, model: PreTrainedModel, *, on_cuda: bool) -> str:
    """Why a model cannot use an implementation; empty if it can."""
    if attention is Attention.eager:
        return ""
    supports = "_supports_flash_attn" if attention.is_flash else "_supports_sdpa"
    if not getattr(model, supports, False) or (not attention.is_flash and caps_scores(model.config)):
        return f"{type(model).__name__} does not support it"
    if not attention.is_flash:
        return ""
    name, is_available = _PACKAGES[attention]
    if not on_cuda:
        return "it runs on CUDA alone, and models compute on the CPU"
    return "" if is_available() else f"the package {name} is not installed (pip install {name})"


def remove_padding(module: nn.Module, wanted: bool | None, *, on_cuda: bool) -> bool:
    """Let a model compute without padding from now on, if it is to; one that does not says why, unless told.

    Args:
        module: A transformers model, or a module around one.
        wanted: `engine.padding_free`.
        on_cuda: Whether it computes on a GPU.

    Returns:
        Whether it does.

    Raises:
        ValueError: As `check_padding_free`.
    """
    if wanted is False:
        return False
    model = next(child for child in module.modules() if isinstance(child, PreTrainedModel))
    obstacle = check_padding_free(model, wanted)
    if wanted is None and not obstacle and on_cuda and model.config._attn_implementation == Attention.sdpa:
        obstacle = "would call SDPA for each sequence, unmeasured on CUDA (engine.padding_free=true does so)"
    if obstacle:
        log.info("%s computes padding, too: it %s", type(model).__name__, obstacle)
        return False
    compute_without_padding(_decoder(model))
    return True


def check_padding_free(model: PreTrainedModel, wanted: bool | None, *, attention: Attention | None = None) -> str:
    """Why a model cannot compute without padding; empty if it can.

    Args:
        model: On meta or not.
        wanted: `engine.padding_free`.
        attention: What it will attend with; None for what it was built with.

    Raises:
        ValueError: It cannot, and that is `wanted`.
    """
    obstacle = _padding_obstacle(model, attention or model.config._attn_implementation)
    if obstacle and wanted:
        raise ValueError(f"engine.padding_free=true: {type(model).__name__} {obstacle}; expected null or false.")
    return obstacle


def _padding_obstacle(model: PreTrainedModel, attention: str | None) -> str:
    kinds = set(getattr(model.config, "layer_types", None) or ())
    if attention not in set(Attention) - {Attention.eager}:
        return "has eager attention, which computes with a whole mask"
    if model._is_stateful or kinds - _ATTENDING:
        return "has layers other than attention that pass something from token to token"
    takes_positions = "position_ids" in inspect.signature(_decoder(model).forward).parameters
    if not (model._supports_attention_backend and takes_positions) or model.config.model_type in _OWN_MASKS:
        return "attends in a way of its own"
    return ""


def _decoder(model: PreTrainedModel) -> nn.Module:
    """The module that makes masks, runs the blocks and returns hidden states, which is the one that owns the blocks."""
    first = find_blocks(model, model.config.num_hidden_layers)[0]
    lists = {part: [child for child in part.children() if isinstance(child, nn.ModuleList)] for part in model.modules()}
    return next(part for part, children in lists.items() if any(first in child for child in children))
