"""The Hugging Face Trainer and TRL's trainers on this project's engine, by one changed line of a script.

    from rlhf.hf import Trainer, TrainingArguments  # was: from transformers import Trainer, TrainingArguments
    from rlhf.hf import SFTConfig, SFTTrainer  # was: from trl import SFTConfig, SFTTrainer

`TrainingArguments(deepspeed="ds_config.json")` then needs no DeepSpeed. Trainers and arguments of TRL are made when
they are asked for; those of other libraries are made with the two mixins. See docs/trainer.md.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import transformers

from rlhf.hf_trainer.arguments import Seq2SeqTrainingArguments, TrainingArguments, ZeroArgumentsMixin
from rlhf.hf_trainer.trainer_mixin import Seq2SeqTrainer, Trainer, ZeroTrainerMixin

__all__ = [
    "Seq2SeqTrainer",
    "Seq2SeqTrainingArguments",
    "Trainer",
    "TrainingArguments",
    "ZeroArgumentsMixin",
    "ZeroTrainerMixin",
]


def __getattr__(name: str) -> Any:
    if not name.endswith(("Trainer", "Config")):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _of_trl(name)


@cache  # one class for each name: pickled arguments name it
def _of_trl(name: str) -> type:
    """A trainer of TRL, or its arguments, on this engine."""
    try:
        own = getattr(importlib.import_module("trl"), name)
    except (ImportError, AttributeError) as error:
        raise AttributeError(f"module {__name__!r} has no {name!r}, and TRL gives none: {error}") from error
    for base, mixin in ((transformers.Trainer, ZeroTrainerMixin), (transformers.TrainingArguments, ZeroArgumentsMixin)):
        if isinstance(own, type) and issubclass(own, base):
            return type(name, (mixin, own), {"__module__": __name__, "__doc__": f"`trl.{name}` on this engine."})
    raise AttributeError(f"module {__name__!r} has no {name!r}: TRL's is neither a Trainer nor its arguments")
