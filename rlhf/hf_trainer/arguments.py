"""`TrainingArguments` whose `deepspeed=` this project reads, and what it stands for: engine, optimizer, schedule."""

from __future__ import annotations

import copy
import json
import logging
import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from rlhf.config.engine_config import EngineConfig, Precision
from rlhf.config.stage_configs import OptimizerConfig
from rlhf.deepspeed.apply import ConfigurationReport, resolve
from rlhf.deepspeed.arithmetic import MICRO, STEPS, TRAIN
from rlhf.deepspeed.dialects import read_deepspeed
from rlhf.deepspeed.reader import Document
from rlhf.deepspeed.settings import Reading
from rlhf.hf_trainer.auto_values import AutoValues

if TYPE_CHECKING:
    _Arguments = transformers.TrainingArguments
else:
    _Arguments = object

logger = logging.getLogger(__name__)

_SETTING = "TrainingArguments.deepspeed"
_CHECKPOINTING = ("engine.activation_checkpointing", "engine.activation_offload")
_SIZES = (TRAIN, MICRO, STEPS)


@dataclass
class DeepSpeedSettings:
    """A DeepSpeed configuration beside training arguments, which fill its `"auto"`."""

    original: Document  # with its "auto"
    document: Document
    auto: AutoValues
    reported: bool = field(default=False, init=False)

    @classmethod
    def of(cls, source: Any, args: transformers.TrainingArguments) -> DeepSpeedSettings:
        """Read a file, JSON or mapping, and check all that can be checked without the model.

        Raises:
            ValueError: a key is unknown or refused, or a value unfit. Mismatches with `args` wait for `engine`.
        """
        return cls._fill(copy.deepcopy(read_deepspeed(source, setting=_SETTING)), args)  # a mapping is the user's own

    @classmethod
    def _fill(cls, original: Document, args: transformers.TrainingArguments) -> DeepSpeedSettings:
        document = copy.deepcopy(original)
        settings = cls(original, document, AutoValues(document.content))
        settings.auto.fill_arguments(args)
        settings.auto.fill_environment(args)
        settings._read(args)
        return settings

    def again(self, args: transformers.TrainingArguments) -> DeepSpeedSettings:
        """The same configuration for arguments that may have changed, in a script or from one trial to the next."""
        settings = self._fill(self.original, args)  # not read again: a script may be in another folder by now
        settings.reported = self.reported
        return settings

    def engine(self, args: transformers.TrainingArguments, model: nn.Module, *, total_steps: int) -> EngineConfig:
        """The engine's settings, for a model and a number of optimizer steps; 0 where nothing is trained yet.

        Raises:
            ValueError: the configuration and the training arguments differ, in all the places that the text lists.
        """
        self.auto.fill_hidden_size(model)
        if total_steps:
            self.auto.fill_steps(args, total_steps)
        self.auto.require_match()
        reading = self._read(args)
        values = {
            name.removeprefix("engine."): setting.value
            for name, setting in reading.settings.items()
            if name.startswith("engine.") and name not in _CHECKPOINTING
        }
        if args.process_index == 0 and not self.reported:
            self.reported = True
            self._report(reading, args)
        return replace(_own_engine(args, self.stage), **values)

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return int(self.document.content["zero_optimization"].get("stage") or 0)

    def adam(self, args: transformers.TrainingArguments) -> dict[str, Any] | None:
        """The settings of the section `optimizer`, as a group of `torch.optim.AdamW`; None where there is none."""
        found = self._read(args).settings
        if "optimizer.lr" not in found:
            return None
        names = ("lr", "betas", "eps", "weight_decay")
        return {name: found[f"optimizer.{name}"].value for name in names}

    def schedule(self, args: transformers.TrainingArguments) -> tuple[str, dict[str, Any]] | None:
        """Name and parameters of the section `scheduler`, as `deepspeed_schedule` takes them; None without one."""
        found = self._read(args).settings
        if "optimizer.schedule" not in found:
            return None
        return found["optimizer.schedule"].value, found["optimizer.schedule_options"].value

    def _read(self, args: transformers.TrainingArguments) -> Reading:
        # The optimizer stands in for values that are left to the run: none that AdamW needs are, once filled.
        return resolve(self.document, _own_engine(args, self.stage), optimizer=OptimizerConfig(lr=1.0))

    def _report(self, reading: Reading, args: transformers.TrainingArguments) -> None:
        """Log what every key of the configuration has become."""
        report, content = ConfigurationReport(), self.document.content
        chosen = {name: value for name, value in reading.settings.items() if name not in _CHECKPOINTING}
        if len(chosen) < len(reading.settings):
            reading.warnings.append(
                f"{self.document.name}: activation_checkpointing has no effect, as in Transformers; set "
                f"TrainingArguments(gradient_checkpointing=True)"
            )
        if content.get("gradient_clipping") is None:
            reading.warnings.append(
                f"{self.document.name}: has no gradient_clipping; gradients are clipped to max_grad_norm="
                f"{args.max_grad_norm} of the training arguments (DeepSpeed: 1.0, before 0.19.8 not at all)"
            )
        for name in _SIZES:
            reading.decided.add((name,))
            if name in content:
                report.line(f"{name} = {content[name]}  <- the training arguments", "Trainer")
        report.add(reading, chosen, place="Trainer")
        report.log()


def _own_engine(args: transformers.TrainingArguments, stage: int) -> EngineConfig:
    """What the configuration does not say: nothing may change a number, or how the model computes."""
    precision = Precision(args.mixed_precision) if args.mixed_precision in ("fp16", "bf16") else Precision.fp32
    return EngineConfig(zero_stage=stage, precision=precision, padding_free=False, cuda_graphs=False)


class ZeroArgumentsMixin(_Arguments):
    """For a class of training arguments: `deepspeed=` configures this project's engine, without DeepSpeed.

    `class ZeroSFTConfig(ZeroArgumentsMixin, SFTConfig)` serves a trainer that has arguments of its own.
    """

    def __post_init__(self) -> None:
        """Check the arguments; where `deepspeed` is not set, everything is as in Transformers."""
        given: Any = _parsed(self.deepspeed)
        self.zero_settings: DeepSpeedSettings | None = None
        if not given:
            super().__post_init__()  # type: ignore[no-untyped-call]
            return
        self._refuse_unsupported()
        if torch.cuda.is_available() and not self.use_cpu and self.ddp_backend in (None, "nccl"):
            self.ddp_backend = "cuda:nccl,cpu:gloo"  # checkpoints and offloaded states exchange host memory, too
        self.deepspeed = None  # transformers would look for the package
        try:
            super().__post_init__()  # type: ignore[no-untyped-call]
        finally:
            self.deepspeed = given  # as it was given: scripts look at it
        self._n_gpu = min(self._n_gpu, 1)  # one process is one rank: no DataParallel over all GPUs
        started = int(os.environ.get("WORLD_SIZE", 1))
        if self.world_size != started:
            raise ValueError(
                f"{started} processes were started, but Accelerate has made a group of {self.world_size}; on machines "
                f"without a GPU set TrainingArguments(use_cpu=True), or --use_cpu."
            )
        self.zero_settings = DeepSpeedSettings.of(given, self)

    def _refuse_unsupported(self) -> None:
        """Raise ValueError for arguments that cannot be honoured beside `deepspeed`."""
        reasons = {
            "torch_compile": "compiled graphs do not gather parameters",
            "auto_find_batch_size": "a step that ran out of memory has left the ranks in different places",
            "fsdp": "one of the two can shard the model",
            "parallelism_config": "sequences and matrices are not cut over ranks",
        }
        for name, reason in reasons.items():
            if getattr(self, name):
                raise ValueError(
                    f"TrainingArguments({name}={getattr(self, name)!r}) and deepspeed: expected one of them, because "
                    f"{reason}. Leave {name} out."
                )


def _parsed(given: Any) -> Any:
    """A configuration that is written out, as `--deepspeed '{...}'` gives it, as a mapping; a path as text."""
    given = os.fspath(given) if isinstance(given, os.PathLike) else given  # as JSON, arguments have no other
    if not (isinstance(given, str) and given.lstrip().startswith("{")):
        return given
    try:
        return json.loads(given)
    except json.JSONDecodeError as error:
        raise ValueError(f"{_SETTING}={given[:80]!r}: is not JSON: {error}.") from error


class TrainingArguments(ZeroArgumentsMixin, transformers.TrainingArguments):
    """`transformers.TrainingArguments`; `deepspeed=` needs no DeepSpeed."""


class Seq2SeqTrainingArguments(ZeroArgumentsMixin, transformers.Seq2SeqTrainingArguments):
    """`transformers.Seq2SeqTrainingArguments`; `deepspeed=` needs no DeepSpeed."""
