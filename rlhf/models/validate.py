"""Validate a model folder without loading it: all files are there, readable, and fit its configuration.

Left out: whether the values of its tensors mean anything.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from rlhf.config.stage_configs import ModelKind
from rlhf.models.causal_lm import causal_lm_module, generation_config
from rlhf.models.meta_init import decoder_config, max_positions
from rlhf.models.model_folder import Checkpoint
from rlhf.models.scalar_head import HEAD, classifier_config, classifier_module
from rlhf.models.weights import plain_keys

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFacts:
    """A validated model."""

    folder: Path
    rows: int
    """Rows of its embedding: it can read token ids below this."""
    positions: int
    """The longest sequence that it was made for, in tokens."""
    has_scores: bool
    """Whether it has a scalar head that some training has filled."""


def validate_model(folder: Path, head: ModelKind, *, num_layers: int = 0) -> ModelFacts:
    """Check that the model in `folder` can be loaded with the head `head`.

    Args:
        folder: with `config.json` and safetensors, of which only the headers are read.
        head: the head it will be used with; a scalar head need not exist yet.
        num_layers: use only the first layers; 0 all.

    Raises:
        ValueError: a file is missing or damaged, tensors are missing or of another shape than `config.json` gives them,
            or the model cannot be used.
    """
    if (folder / "adapter_config.json").is_file():
        Checkpoint(folder)  # says first what it is, and what to do with it
    config = decoder_config(folder)
    checkpoint = Checkpoint(folder)
    if head is ModelKind.causal_lm:
        if HEAD in checkpoint:
            raise ValueError(f"{folder} is a reward model or critic, which gives scores; expected one that speaks.")
        keys = plain_keys(causal_lm_module(config), checkpoint)
        generation_config(folder)
    else:
        classifier = classifier_module(classifier_config(folder, num_layers))
        keys = plain_keys(classifier, checkpoint, optional={HEAD})
    if keys is None:
        logger.warning("%s: transformers converts its tensors; whether all are there shows when it is loaded.", folder)
    return ModelFacts(folder, int(config.vocab_size), max_positions(config), has_scores=HEAD in checkpoint)
