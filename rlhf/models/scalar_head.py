"""Decoders with one scalar per position: the reward model (the last one is the score) and the critic (each is a value).

The modules and their names are those of `AutoModelForSequenceClassification(num_labels=1)`, so an export is loaded by
plain transformers and gives the same scores. Left out: pooling and labels, which transformers would do in `forward`.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from rlhf.config.engine_config import Attention
from rlhf.config.stage_configs import LoraConfig
from rlhf.models.model_folder import ModelFolder, local_folder
from rlhf.models.model_spec import ModelSpec, assemble, build_on_meta, decoder_config, first_layers, with_dropout
from rlhf.models.weights import NewParameter, open_weights

logger = logging.getLogger(__name__)

HEAD = "score.weight"


class ScalarHead(nn.Linear):
    """A linear map to one number, computed in fp32 whatever the type of its input and weight."""

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., D]` of any type to `[..., 1]` fp32."""
        return F.linear(hidden.float(), self.weight.float())


class ScalarHeadModel(nn.Module):
    """A decoder's trunk with a scalar head at every position."""

    def __init__(self, classifier: PreTrainedModel, config: PreTrainedConfig) -> None:
        """Take over the trunk of `classifier`, under the name it has there, and the width of its head.

        Args:
            classifier: Parameters on meta.
            config: What an export writes.
        """
        super().__init__()
        self.config = config
        self._trunk_name = classifier.base_model_prefix
        self.add_module(self._trunk_name, classifier.base_model)
        head = classifier.score
        assert isinstance(head, nn.Linear), "`classifier_module` refuses other heads"
        self.score = ScalarHead(head.in_features, 1, bias=False, device="meta")

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *, position_ids: Tensor) -> Tensor:
        """One scalar for each position.

        Args:
            input_ids: `[B, T]`, padded on either side.
            attention_mask: `[B, T]`, True for real tokens.
            position_ids: `[B, T]`, see `rlhf/models/causal_lm.py`.

        Returns:
            `[B, T]` fp32.
        """
        trunk = self.get_submodule(self._trunk_name)
        hidden = trunk(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        # FSDP2 registers hooks on the returned tensor, which must not be a view; the sum over one number is none.
        values: Tensor = self.score(hidden).sum(-1)  # [B, T, 1] -> [B, T]
        return values


def scalar_head_model(
    path: str | Path,
    *,
    num_layers: int = 0,
    dropout: float = 0.0,
    lora: LoraConfig | None = None,
    seed: int = 0,
    head_scale: float = 1.0,
    attention: Attention | None = None,
) -> ModelSpec:
    """The trunk of the model at `path` with a scalar head.

    Args:
        path: A causal language model, whose head is replaced by a new one drawn from N(0, 1 / (D + 1)), or a reward
            model (`...ForSequenceClassification` with one label), whose head is kept.
        num_layers: Keep only the first layers of the trunk; 0 keeps all.
        dropout: Every dropout probability of the model.
        lora: Adapters; None or rank 0 trains the whole model. The head always learns.
        seed: Seed of the new head and the adapters' initial values.
        head_scale: Factor on a loaded head: a critic predicts normalised scores, a reward model does not.
        attention: Its implementation; None is transformers' choice.

    Returns:
        A spec whose module is a `ScalarHeadModel`.

    Raises:
        ValueError: `path` is not a decoder with safetensors weights, or its head gives several numbers.
    """
    folder = local_folder(path)
    config = classifier_config(folder, num_layers)
    files = ModelFolder(folder)
    classifier = classifier_module(with_dropout(config, dropout), attention)
    config.architectures = [type(classifier).__name__]
    module = ScalarHeadModel(classifier, config)
    weights = open_weights(classifier, files, optional={HEAD})
    new: dict[str, NewParameter] = {}
    if HEAD in weights:
        stored_rows = weights[HEAD]
        weights[HEAD] = lambda rows: stored_rows(rows) * head_scale
    else:
        # Variance 1 / (D + 1), so that first scores are small (Huang et al. 2024, "The N+ Implementation Details").
        deviation = (module.score.in_features + 1) ** -0.5
        new[HEAD] = NewParameter(
            module.score.weight.shape,
            fill=lambda head, generator: head.normal_(0.0, deviation, generator=generator),
        )
    logger.info("%s: %s scalar head.", folder, "new" if new else "loaded the")
    return assemble(module, weights, config=config, new=new, lora=lora, seed=seed, dropout=dropout)


def last_token_scores(values: Tensor, attention_mask: Tensor) -> Tensor:
    """The scalar at the last real token of every sequence, for left and right padding alike.

    Args:
        values: `[B, T]`, one scalar per position.
        attention_mask: `[B, T]`, True for real tokens; every row has one.

    Returns:
        `[B]`.
    """
    positions = torch.arange(values.shape[-1], device=values.device)
    last = (positions * attention_mask.bool()).argmax(-1, keepdim=True)
    return values.gather(-1, last).squeeze(-1)


def response_values(values: Tensor, response_length: int) -> Tensor:
    """The critic's estimate before each response token, which is the output at the position before that token.

    Args:
        values: `[B, T]` over prompt and response.
        response_length: R, with T - R >= 1.

    Returns:
        `[B, R]`, positions T-R-1 to T-2.
    """
    total = values.shape[-1]
    assert 0 < response_length < total, f"a response of {response_length} in sequences of {total} leaves no prompt"
    return values[:, total - response_length - 1 : total - 1]


def classifier_config(folder: Path, num_layers: int = 0) -> PreTrainedConfig:
    """The configuration of the first layers of the model in `folder` with a scalar head; 0 keeps all of them.

    Raises:
        ValueError: It has a head that gives several numbers, or transformers has no classifier on it.
    """
    config = decoder_config(folder)
    is_classifier = any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
    if is_classifier and config.num_labels != 1:
        raise ValueError(f"Model folder {folder}: its head gives {config.num_labels} numbers; expected one (a score).")
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise ValueError(f"Model folder {folder} ({config.model_type}): transformers has no classifier on this trunk.")
    config.num_labels = 1
    return first_layers(config, num_layers)


def classifier_module(config: PreTrainedConfig, attention: Attention | None = None) -> PreTrainedModel:
    """A classifier of this configuration, with its parameters on meta; raises ValueError for an unknown head."""
    classifier = build_on_meta(AutoModelForSequenceClassification, config, attention=attention)
    head = dict(classifier.named_children()).get("score")
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"{type(classifier).__name__} has no bias-free linear head named `score`; not supported.")
    return classifier
