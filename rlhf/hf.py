"""The Hugging Face Trainer and TRL's trainers on this project's engine, by one changed line of a script.

    from rlhf.hf import AutoTokenizer, Trainer, TrainingArguments  # was: from transformers import ...
    from rlhf.hf import SFTConfig, SFTTrainer  # was: from trl import ...
    import rlhf.hf as transformers  # was: import transformers

`TrainingArguments(deepspeed="ds_config.json")` then needs no DeepSpeed. TRL's trainers and their arguments are made
when they are asked for, those of other libraries with the two mixins; every other name is transformers' or TRL's own.
See docs/trainer.md.
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
    if name.startswith("__"):
        raise AttributeError(name)  # such as __path__, which modules are asked for
    return getattr(transformers, name) if hasattr(transformers, name) else _of_trl(name)


@cache  # one class for each name: pickled arguments name it
def _of_trl(name: str) -> Any:
    """A trainer of TRL on this engine, its arguments, or any other name of TRL's."""
    try:
        own = getattr(importlib.import_module("trl"), name)
    except (ImportError, AttributeError) as error:
        raise AttributeError(f"neither {__name__} nor transformers has {name!r}, and TRL: {error}") from error
    for base, mixin in ((transformers.Trainer, ZeroTrainerMixin), (transformers.TrainingArguments, ZeroArgumentsMixin)):
        if isinstance(own, type) and issubclass(own, base):
            return type(name, (mixin, own), {"__module__": __name__, "__doc__": f"`trl.{name}` on this engine."})
    return own
