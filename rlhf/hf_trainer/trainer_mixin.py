"""The Hugging Face Trainer on this project's engine, where its training arguments have a `deepspeed` configuration.

The loop, data, logging, callbacks and evaluation are the Trainer's own. The mixin takes over what touches parameters:

| the Trainer | here |
|---|---|
| moves the model to the device | nothing: it is sharded first |
| wraps it (`_wrap_model`) | the engine is built, in place, and the optimizer put in front of it |
| `accelerator.backward`, `clip_grad_norm_` | `ZeroOptimizer`, which also owns fp16's loss scale |
| saves a model | whole tensors are gathered one at a time, and the first rank writes them |
| saves and loads the optimizer | its options as in Transformers, all state as checkpoint files of the engine |

The engine is built in `train`, or in `evaluate` where that comes first.
See also: the arguments (`arguments.py`), and what the model does otherwise (`attached_model.py`).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from rlhf.config.engine_config import EngineConfig, OffloadDevice
from rlhf.config.stage_configs import OptimizerConfig
from rlhf.engine.checkpoint.checkpoints import Checkpoints
from rlhf.engine.engine import Engine
from rlhf.engine.in_memory import full_state_dict, shard_module, whole_parameters
from rlhf.hf_trainer.arguments import DeepSpeedSettings
from rlhf.hf_trainer.attached_model import attach, detach, engine_of, forget_gradients_of
from rlhf.hf_trainer.zero_optimizer import DeepSpeedScheduler, NamedGroup, ZeroOptimizer, named_groups
from rlhf.runtime.dist import World

if TYPE_CHECKING:
    _Trainer = transformers.Trainer
else:
    _Trainer = object

logger = logging.getLogger(__name__)

HOOKS: dict[str, tuple[str, ...]] = {
    "create_accelerator_and_postprocess": (),
    "_build_accelerator_args": ("kwargs",),
    "_move_model_to_device": ("model", "device"),
    "_wrap_model": ("model", "training", "dataloader"),
    "_prepare_input": ("data",),
    "_save": ("output_dir", "state_dict"),
    "_save_optimizer_and_scheduler": ("output_dir",),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_best_model": (),
}
"""Methods of the Trainer that are no public interface, and their parameters, as this mixin knows them."""
_OPTIMS = ("adamw_torch", "adamw_torch_fused")
_FOLDER = "zero"
"""Of the engine's state, in a checkpoint of the Trainer."""


class ZeroTrainerMixin(_Trainer):
    """For any subclass of the Trainer: `class ZeroSFTTrainer(ZeroTrainerMixin, SFTTrainer)`.

    Its arguments must be those of a `ZeroArgumentsMixin`; without `deepspeed` in them it is the class itself.
    """

    _own: Engine | None = None
    """The engine that this Trainer has built."""
    _is_inside = False
    """Whether the Trainer's own code runs; see `_inside`."""

    @property
    def _engine(self) -> Engine | None:
        """The engine of the model, which another Trainer with the same model may have built."""
        return engine_of(self.model)

    @property
    def _settings(self) -> DeepSpeedSettings | None:
        return getattr(self.args, "zero_settings", None)

    def _read_again(self) -> DeepSpeedSettings:
        """Fill the configuration from the arguments as they are now: scripts and trials change them."""
        assert self._settings is not None, "the caller has asked"
        settings = self._settings.again(self.args)
        vars(self.args)["zero_settings"] = settings
        return settings

    @property
    def _module(self) -> nn.Module:
        assert isinstance(self.model, nn.Module), "the Trainer has one from its construction on"
        return self.model

    # Before training.

    def create_accelerator_and_postprocess(self) -> None:
        """Put the optimizer behind the accelerator's methods, as loops other than the Trainer's use them, too."""
        super().create_accelerator_and_postprocess()
        if self._settings is None:
            return
        check_hooks()
        self._read_again()
        accelerator: Any = self.accelerator
        accelerator.backward = self._backward
        accelerator.clip_grad_norm_ = self._clip
        accelerator.clip_grad_value_ = _refuse_clipping_by_value
        accelerator.get_state_dict = self._whole_state_dict

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        built = super()._build_accelerator_args(**kwargs)
        # The engine computes in 16 bits itself: neither autocast nor a gradient scaler.
        return built if self._settings is None else built | {"mixed_precision": "no"}

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if self._settings is None:
            super()._move_model_to_device(model, device)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer whose groups the engine takes over; the configuration's own decays every parameter alike."""
        if self._settings is None and self._engine is not None:  # this Trainer is a plain one, another was not
            detach(self._engine)
            self._move_model_to_device(self._module, self.args.device)
        adam = self._settings and self._settings.adam(self.args)
        if adam and not isinstance(self.optimizer, ZeroOptimizer):
            self.lr_scheduler = None  # one of the user would go on with the optimizer that this replaces
            learning = [p for p in (model or self._module).parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW([{"params": learning, **adam}])
            return self.optimizer
        optim = getattr(self.args.optim, "value", self.args.optim)
        if self._settings and self.optimizer is None and self.optimizer_cls_and_kwargs is None and optim not in _OPTIMS:
            raise ValueError(
                f"TrainingArguments(optim={optim!r}): the engine shards and offloads AdamW; expected "
                f"{' or '.join(map(repr, _OPTIMS))}, or a section optimizer in the DeepSpeed configuration."
            )
        return super().create_optimizer(model)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """DeepSpeed's schedule where the configuration has one, else that of the training arguments."""
        schedule = self._settings and self._settings.schedule(self.args)
        if not schedule:
            return super().create_scheduler(num_training_steps, optimizer)
        kind, options = schedule
        target = optimizer or self.optimizer
        assert target is not None, "`create_optimizer` comes before"
        scheduler = DeepSpeedScheduler(target, kind, options=options, total=num_training_steps)
        self.lr_scheduler: Any = scheduler
        self._created_lr_scheduler = True
        return scheduler

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if self._settings is None:
            return super()._wrap_model(model, *args, **kwargs)
        training = args[0] if args else kwargs.get("training", True)
        self._prepare_engine(training=training)
        return self._module  # FSDP2 puts hooks on it and wraps nothing

    def _prepare_engine(self, *, training: bool) -> None:
        """Build the engine, unless there is one, and put an optimizer in front of it."""
        engine, settings = self._engine, self._read_again()
        config = settings.engine(self.args, self._module, total_steps=self.state.max_steps if training else 0)
        if engine is not None and not training:
            return
        # In an evaluation before training, only if it is kept: `create_optimizer` prefers the configuration's own.
        is_taken = not isinstance(self.optimizer, ZeroOptimizer) and (training or not settings.adam(self.args))
        given = self.optimizer if is_taken else None
        groups = [] if given is None else named_groups(given, self._module)  # before parameters are replaced
        if engine is None or engine is not self._own or not engine.is_trained:
            if given is None and training:
                raise ValueError(
                    "another Trainer has trained the model since this one did, and this one's optimizer has no state "
                    "any more; expected a new Trainer for the model."
                )
            self._build_engine(config, learns=training or given is not None or self.train_dataset is not None)
        if given is not None:
            self._take_over(groups)

    def _build_engine(self, config: EngineConfig, *, learns: bool) -> None:
        if self._engine is not None:  # of another Trainer, or without an optimizer
            detach(self._engine)
        elif self._own is not None:  # `model_init` has made another model
            self._own.close()
        # Rates and decay come with every step; what is set here has no effect.
        adam = OptimizerConfig(lr=1.0) if learns else None
        self._own = shard_module(self._module, config=config, world=_world(self.args), optimizer=adam)
        attach(self._own, streams=config.offload_param != OffloadDevice.none)
        self.deepspeed: Any = self._module  # scripts ask whether it is there, and then use `save_model`

    def _take_over(self, groups: list[NamedGroup]) -> None:
        assert self._own is not None, "it was built before"
        self.optimizer = ZeroOptimizer(self._own, groups)
        forget_gradients_of(self.optimizer)

    # Training and evaluation.

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer."""
        with self._inside():
            return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer."""
        with self._inside():
            return super().evaluate(*args, **kwargs)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """Outside of the Trainer's own code `is_deepspeed_enabled` is true: scripts ask it before they save a model.

        Inside it is false, for the code under it would look for the package.
        """
        if self._settings is None:
            yield
            return
        is_outermost = not self._is_inside
        self._is_inside, self.is_deepspeed_enabled = True, False
        try:
            yield
        finally:
            self._is_inside, self.is_deepspeed_enabled = not is_outermost, is_outermost

    def _backward(self, loss: Tensor, **_: Any) -> None:
        assert isinstance(self.optimizer, ZeroOptimizer), "training has begun"
        self.optimizer.backward(loss, last=self.accelerator.sync_gradients)

    def _clip(self, parameters: Any, max_norm: float, *, norm_type: float = 2) -> Tensor:  # noqa: ARG002 - Accelerate's
        assert isinstance(self.optimizer, ZeroOptimizer), "training has begun"
        if norm_type != 2:
            raise ValueError(f"clip_grad_norm_(norm_type={norm_type}): expected 2.")
        return self.optimizer.clip(max_norm)

    def _prepare_input(self, data: Any) -> Any:
        data = super()._prepare_input(data)
        if self._engine is not None and isinstance(data, Tensor) and data.is_floating_point():
            return data.to(self._engine.dtype)  # pixels and the like meet weights of this type
        return data

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer; the model computes in the engine's precision, which `*_full_eval` have chosen."""
        if self._settings is None:
            return super().evaluation_loop(*args, **kwargs)
        full = self.args.fp16_full_eval, self.args.bf16_full_eval
        self.args.fp16_full_eval = self.args.bf16_full_eval = False  # casting would replace the shards
        try:
            with self._inside():
                return super().evaluation_loop(*args, **kwargs)
        finally:
            self.args.fp16_full_eval, self.args.bf16_full_eval = full
            if self._engine is not None:
                self._engine.sharding.release()

    # Models and checkpoints.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model, as `from_pretrained` reads it; all ranks must call."""
        if self._engine is None:
            super().save_model(output_dir, _internal_call)
            return
        whole = full_state_dict(self._engine, keep=self.args.should_save)  # collectives, so before `_save` returns
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=whole)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _whole_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:  # noqa: ARG002 - Accelerate's
        if self._engine is None or model is not self._engine.module:
            return model.state_dict()
        return full_state_dict(self._engine, keep=self._engine.world.is_main)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # groups without state, and the schedule
        if self._engine is not None:
            checkpoints = self._checkpoints(output_dir)
            checkpoints.remove()  # one of an earlier run in the same place
            checkpoints.save(
                self.state.global_step,
                self._engine.checkpoint_tensors(),
                state=self._engine.counters(),
                protected=set(),
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._engine is None or checkpoint is None:
            return
        checkpoints = self._checkpoints(checkpoint)
        saved = checkpoints.newest()
        if saved is None:
            logger.warning(
                "%s has no state of this engine (%s): training goes on from its weights, and the optimizer starts anew",
                checkpoint,
                _FOLDER,
            )
            return
        checkpoints.load(saved, self._engine.checkpoint_tensors())
        self._engine.load_counters(saved.state)

    def _checkpoints(self, folder: str) -> Checkpoints:
        assert self._engine is not None, "the caller has asked"
        return Checkpoints(Path(folder) / _FOLDER, self._engine.world, keep=1, asynchronous=False)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._engine is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with whole_parameters(self._engine):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._engine is None:
            super()._load_best_model()
            return
        with whole_parameters(self._engine):
            super()._load_best_model()


def _refuse_clipping_by_value(*_: Any) -> None:
    raise ValueError("accelerator.clip_grad_value_: parameters have no gradients here; expected clip_grad_norm_.")


def _world(args: transformers.TrainingArguments) -> World:
    device = args.device
    if device.type == "cpu":
        device = torch.device("cpu")  # Accelerate's has an index, which tensors do not have
    return World(args.process_index, args.world_size, device)


def check_hooks(trainer: type = transformers.Trainer) -> None:
    """Raise RuntimeError where the installed Transformers has another Trainer than the one that this mixin knows."""
    for name, known in HOOKS.items():
        method = getattr(trainer, name, None)
        found = None if method is None else tuple(inspect.signature(method).parameters)[1:]
        if found != known:
            has = "no such method" if found is None else f"({', '.join(found)})"
            raise RuntimeError(
                f"transformers {transformers.__version__}: Trainer.{name}: found {has}, expected ({', '.join(known)}). "
                f"The Trainer on this engine was made for 5.24; install that, or train without `deepspeed`."
            )


class Trainer(ZeroTrainerMixin, transformers.Trainer):
    """`transformers.Trainer`; with `TrainingArguments(deepspeed=...)` it trains on this project's engine."""


class Seq2SeqTrainer(ZeroTrainerMixin, transformers.Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer`; with `Seq2SeqTrainingArguments(deepspeed=...)` on this project's engine."""
