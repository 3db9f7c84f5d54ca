"""The head of a language model, which can answer with statistics of tokens in place of logits.

The head alone may use its weight: sharded, it is whole only while the head's own forward runs. So a `HeadQuestion` is
left that the head finds when the model comes to it; the answer takes the place of the logits in the
model's output, and gradients, FSDP2's hooks among them, pass through it as through logits.

A few models change logits after their head. Where it is known how (`_ALTERATIONS`), the head does it and the model,
for this forward, does not. Whatever else a model does is noticed, because its output is not the head's answer; from
then on its whole logits are made, and the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.algorithms.head_statistics import Head, head_statistics
from rlhf.algorithms.logprobs import Wanted

log = logging.getLogger(__name__)


class Alteration(NamedTuple):
    """What a model does to the output of its head, by the attribute of the model that says so."""

    attribute: str  # dotted
    kind: str  # cap, multiply or divide
    neutral: float | None  # the value with which the model leaves logits as they are


_CAP = Alteration("config.final_logit_softcapping", "cap", None)
_MULTIPLY = Alteration("logit_scale", "multiply", 1.0)
_DIVIDE = Alteration("config.logits_scaling", "divide", 1.0)
_ALTERATIONS = {
    **dict.fromkeys(("gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "vaultgemma", "nanochat"), _CAP),
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe"), _MULTIPLY),
    **dict.fromkeys(("granite", "granitemoe", "granitemoeshared", "granitemoehybrid"), _DIVIDE),
}
"""By `model_type` of the configuration."""


class HeadQuestion:
    """Left for the head of the model that runs next."""

    def __init__(self, targets: Tensor, mask: Tensor, wanted: Wanted) -> None:
        """Ask for the statistics of targets `[B, R]` where `mask` `[B, R]` is True."""
        self._asked = (targets, mask)
        self._wanted = wanted
        self.head: LanguageHead | None = None  # that answered
        self._answer: Tensor | None = None  # [B, R, 3], see `head_statistics`
        self._is_copied = False
        self._restore = ExitStack()

    def answered_by(self, head: LanguageHead, hidden: Tensor) -> Tensor:
        """The answer, with the model's own change of logits in it, and no longer in the model."""
        kind, value = self._take_over(head)
        scale = {"multiply": value, "divide": 1 / value}.get(kind, 1.0)
        whole = Head(head.weight, head.bias, scale, cap=value if kind == "cap" else None)
        self.head, self._answer = head, head_statistics(hidden, whole, *self._asked, wanted=self._wanted)
        return self._answer

    def is_answered_by(self, output: Tensor) -> bool:
        """Whether the output of a model is its head's answer, as the head gave it."""
        return output is self._answer or self._is_copied

    def _take_over(self, head: LanguageHead) -> tuple[str, float]:
        known, model = _ALTERATIONS.get(head.model.config.model_type), head.model
        if known is None:
            return "", 1.0
        outer, _, name = known.attribute.rpartition(".")
        owner = attrgetter(outer)(model) if outer else model
        value = getattr(owner, name)
        if value is None:
            return "", 1.0
        self._restore.callback(object.__setattr__, owner, name, value)
        object.__setattr__(owner, name, known.neutral)  # a configuration would refuse None, which its model knows
        self._is_copied = known.neutral is not None  # by the multiplication with 1
        return known.kind, float(value)

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Inside, a head answers; afterwards the model is as it was."""
        token = _CURRENT.set(self)
        with self._restore:
            try:
                yield
            finally:
                _CURRENT.reset(token)


_CURRENT: ContextVar[HeadQuestion | None] = ContextVar("question", default=None)


class LanguageHead(nn.Linear):
    """A linear head of a model; see the top of the file."""

    answers: bool = True
    """False for a model that does something unknown with the output."""
    _model: tuple[PreTrainedModel]

    @property
    def model(self) -> PreTrainedModel:
        """The model whose head this is."""
        return self._model[0]

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits `[B, N, V]` of hidden states `[B, N, D]`, or the answer to a question, `[B, R, 3]`."""
        question = _CURRENT.get()
        if question is not None and self.answers:
            return question.answered_by(self, hidden)
        # `logits_to_keep` cuts a window out of the hidden states, and for such a window `nn.Linear` copies the whole
        # head once for every sequence: 17 times the work for 64 sequences and 49,152 tokens on a CPU.
        return super().forward(hidden.contiguous())


def make_answering(model: PreTrainedModel) -> None:
    """Let the head of `model` answer questions, if it is a plain linear layer."""
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if type(head) is not nn.Linear:
        log.info("%s has a head of its own kind: its losses are computed from whole logits", type(model).__name__)
        return
    head.__class__ = LanguageHead
    vars(head)["_model"] = (model,)  # in a tuple, or it would be a submodule
