"""What the Trainer on the engine refuses, and what it does with optimizers, schedules and precisions."""

import copy
import json
import math
import pickle

import pytest
import torch
import transformers

from rlhf import hf
from rlhf.config.engine_config import EngineConfig
from rlhf.deepspeed.arithmetic import WarmupDecayLR
from rlhf.engine.in_memory import shard_module
from rlhf.hf_trainer.trainer_mixin import HOOKS, check_hooks
from rlhf.runtime.dist import World
from tests.hf.runs import MODELS, OPTIONS, close, rows, train, zero


def arguments(folder, deepspeed=None, **options):
    return hf.TrainingArguments(output_dir=str(folder), **OPTIONS | {"max_steps": 4} | options, deepspeed=deepspeed)


def trained(folder, deepspeed, *, model="llama", optimizers=(None, None), kind=hf.Trainer, resume=None, **options):
    made = MODELS[model]()
    given = optimizers(made) if callable(optimizers) else optimizers
    args = arguments(folder, deepspeed, **options)
    trainer = kind(model=made, args=args, train_dataset=rows(made), optimizers=given)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_the_trainer_of_the_installed_transformers_has_the_hooks():
    check_hooks()


def test_another_trainer_is_refused_by_name(monkeypatch):
    class Changed(transformers.Trainer):
        def _wrap_model(self, model, mode):
            """Has another parameter."""

    with pytest.raises(RuntimeError, match=r"_wrap_model: found \(model, mode\), expected \(model, training, dataload"):
        check_hooks(Changed)
    monkeypatch.setitem(HOOKS, "_gone", ())
    with pytest.raises(RuntimeError, match="_gone: found no such method"):
        check_hooks()


def test_without_deepspeed_it_is_the_plain_trainer(tmp_path):
    trainer = trained(tmp_path, None)
    assert type(trainer.optimizer).__name__ == "AcceleratedOptimizer"
    assert trainer.args.zero_settings is None
    assert "generate" not in vars(trainer.model)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"torch_compile": True}, "torch_compile=True"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True"),
        ({"deepspeed": {"zero_optimization": {"stage": 3, "stag3_prefetch": 1}}}, "there is no such key"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}, "amp": {"enabled": True}}}, "cannot be honoured"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, "no zero_optimization"),
        ({"deepspeed": "no/such/file.json"}, "there is no such file"),
        ({"deepspeed": '{"zero_optimization": '}, "is not JSON"),
        ({"deepspeed": 5}, "expected a DeepSpeed JSON file"),
    ],
)
def test_arguments_that_cannot_be_honoured(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        arguments(tmp_path, **{"deepspeed": zero(2), **options})


def test_mismatches_are_refused_together_when_training_starts(tmp_path):
    config = zero(2, gradient_clipping=9.0, train_batch_size=5, scheduler={"type": "WarmupDecayLR", "params": {}})
    config["scheduler"]["params"] = {"total_num_steps": 77, "warmup_num_steps": "auto"}
    with pytest.raises(ValueError, match="mismatch TrainingArguments") as error:
        trained(tmp_path, config)
    lines = [line for line in str(error.value).splitlines() if line.startswith("- ds ")]
    assert lines == [
        "- ds train_batch_size=5 vs hf train_batch_size (calculated)=2",
        "- ds gradient_clipping=9.0 vs hf max_grad_norm=0.5",
        "- ds scheduler.params.total_num_steps=77 vs hf num_training_steps (calculated)=4",
    ]


@pytest.mark.parametrize("optim", ["adafactor", "sgd"])
def test_another_optimizer_is_refused(tmp_path, optim):
    with pytest.raises(ValueError, match=f"optim='{optim}'.*expected 'adamw_torch'"):
        trained(tmp_path, zero(2), optim=optim)


@pytest.mark.parametrize("make", [torch.optim.SGD, lambda p, lr: torch.optim.Adam(p, lr=lr, weight_decay=0.1)])
def test_an_optimizer_of_the_user_that_is_no_adamw_is_refused(tmp_path, make):
    with pytest.raises(ValueError, match=r"the optimizer is torch\.optim\..*Expected optim="):
        trained(tmp_path, zero(2), optimizers=lambda model: (make(model.parameters(), lr=1e-3), None))


def of_the_user(model):
    """Layers with rates of their own, frozen ones in a group, some in none; a schedule bound to this optimizer."""
    names = dict(model.named_parameters())
    slow = [p for name, p in names.items() if "layers.0" in name]
    fast = [p for name, p in names.items() if "layers.1" in name or "lm_head" in name]
    names["lm_head.weight"].requires_grad_(False)
    groups = [{"params": slow, "lr": 1e-4}, {"params": fast, "betas": (0.8, 0.9), "weight_decay": 0.3, "eps": 1e-6}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


def test_groups_and_schedules_of_the_user_are_kept(tmp_path):
    plain = trained(tmp_path / "plain", None, optimizers=of_the_user)
    engine = trained(tmp_path / "zero", zero(2), optimizers=of_the_user)
    assert losses(engine) == losses(plain)
    assert engine.deepspeed is engine.model
    assert plain.deepspeed is None
    for (name, mine), theirs in zip(engine.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert engine.optimizer.param_groups[1]["lr"] == plain.optimizer.param_groups[1]["lr"] == 1e-2 / 2**4


def test_groups_and_schedules_of_the_user_go_on_from_a_checkpoint(tmp_path):
    options = {"optimizers": of_the_user, "save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path, zero(2), **options)
    again = trained(tmp_path / "again", zero(2), resume=str(tmp_path / "checkpoint-2"), **options)
    assert losses(again) == losses(whole)
    with pytest.raises(ValueError, match=r"groups of \[9, 9\] parameters; expected \["):
        trained(tmp_path / "other", zero(2), resume=str(tmp_path / "checkpoint-2"))


def test_a_schedule_of_the_user_goes_with_its_optimizer(tmp_path):
    """Where the configuration has an optimizer, as with DeepSpeed."""
    config = zero(2, optimizer={"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}})
    trainer = trained(tmp_path, config, optimizers=of_the_user, warmup_steps=0)
    rates = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    assert rates == pytest.approx([3e-3 * (4 - step) / 4 for step in range(4)])  # linear, of the training arguments
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.0]


class WithOwnOptimizer(hf.Trainer):
    """Makes its optimizer itself, as many subclasses do."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.0)
        return self.optimizer


def test_a_subclass_may_make_the_optimizer(tmp_path):
    plain = trained(tmp_path / "plain", None, kind=WithOwnOptimizer)
    assert losses(trained(tmp_path / "zero", zero(1), kind=WithOwnOptimizer)) == pytest.approx(losses(plain), abs=2e-6)


def test_arguments_may_change_after_they_are_made(tmp_path):
    adam = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    warmup = {"total_num_steps": "auto", "warmup_num_steps": "auto", "warmup_max_lr": "auto"}
    sections = {"optimizer": {"type": "AdamW", "params": adam}}
    sections["scheduler"] = {"type": "WarmupDecayLR", "params": {**warmup, "warmup_type": "linear"}}
    args = arguments(tmp_path, zero(2, **sections))
    args.learning_rate, args.max_grad_norm = 0.25, 2.0
    made = MODELS["llama"]()
    trainer = hf.Trainer(model=made, args=args, train_dataset=rows(made))
    trainer.train()
    args.max_steps = 6
    trainer.train()
    rates = [row["learning_rate"] for row in trainer.state.log_history if "loss" in row]
    assert len(rates) == 6
    assert rates == [
        WarmupDecayLR(lr=0.25, warmup_max_lr=0.25, warmup_num_steps=3, warmup_type="linear", total_num_steps=6).lr_at(
            step
        )
        for step in range(6)
    ]


def test_training_twice_goes_on(tmp_path):
    twice = []
    for deepspeed in (None, zero(3)):
        trainer = trained(tmp_path, deepspeed)
        trainer.train()
        twice.append(losses(trainer))
    assert twice[0] == twice[1]


def test_optimizer_and_schedule_of_the_configuration(tmp_path):
    """One group that decays everything, as DeepSpeed makes it, by DeepSpeed's schedule, against torch step by step."""
    adam = {"lr": "auto", "betas": [0.8, 0.95], "eps": "auto", "weight_decay": "auto"}
    config = zero(
        2,
        optimizer={"type": "AdamW", "params": adam},
        scheduler={"type": "WarmupDecayLR", "params": {"warmup_num_steps": 2, "total_num_steps": "auto"}},
    )
    options = {"adam_beta1": 0.8, "adam_beta2": 0.95, "warmup_steps": 2, "lr_scheduler_type": "constant"}
    engine = trained(tmp_path / "zero", config, **options)
    schedule = WarmupDecayLR(lr=3e-3, warmup_num_steps=2, total_num_steps=4)

    def same(model):
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=1.0, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.1, fused=True
        )
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.lr_at)

    plain = trained(tmp_path / "plain", None, optimizers=same)
    assert [row["learning_rate"] for row in engine.state.log_history if "loss" in row] == [
        schedule.lr_at(step) for step in range(4)
    ]
    assert losses(engine) == pytest.approx(losses(plain), abs=2e-6)


def test_fp16_searches_its_scale(tmp_path):
    fp16 = {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 24, "hysteresis": 1}
    trainer = trained(tmp_path, zero(2, fp16=fp16), fp16=True, max_steps=12, learning_rate=1e-2, warmup_steps=0)
    assert trainer.model.dtype == torch.float16
    engine = trainer._engine
    assert engine.loss_scale.value < 2**24
    assert engine.steps_taken < 12
    assert trainer.lr_scheduler.last_epoch == engine.steps_taken  # skipped steps do not count
    assert all(map(math.isfinite, losses(trainer)))


def test_fp16_with_a_fixed_scale_is_near_fp32(tmp_path):
    plain = trained(tmp_path / "plain", None, max_steps=10)
    engine = trained(tmp_path / "zero", zero(3, fp16={"enabled": True, "loss_scale": 128}), max_steps=10, fp16=True)
    assert losses(engine) == pytest.approx(losses(plain), abs=0.02)
    assert losses(engine) != losses(plain)


def test_batch_norms_compute_in_bf16(tmp_path):
    config = {"zero_optimization": {"stage": 2}}
    plain = trained(tmp_path / "plain", None, model="recurrent")
    engine = trained(tmp_path / "zero", config | {"bf16": {"enabled": True}}, model="recurrent", bf16=True)
    assert losses(engine) == pytest.approx(losses(plain), abs=0.06)  # the loss itself is bf16
    assert engine.model.norm.running_mean.dtype == torch.bfloat16


def test_two_generations_are_the_same_before_and_after_sharding(tmp_path):
    made = MODELS["llama"]().eval()
    prompt = torch.randint(1, 90, (2, 5))
    before = made.generate(prompt, max_new_tokens=6, do_sample=False)
    trainer = hf.Trainer(
        model=made, args=arguments(tmp_path, zero(3)), train_dataset=rows(made), eval_dataset=rows(made)
    )
    trainer.evaluate()
    assert torch.equal(made.generate(prompt, max_new_tokens=6, do_sample=False), before)
    made.save_pretrained(tmp_path / "saved")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.generate(prompt, max_new_tokens=6, do_sample=False), before)
    close(trainer)


def test_weights_are_kept_and_set_as_wholes(tmp_path):
    """With masters beside the working weights, which would otherwise undo what was set in the next step."""
    trainer = trained(tmp_path, zero(3, bf16={"enabled": True}), bf16=True)
    kept = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert all(value.dtype == torch.bfloat16 for value in kept.values())
    trainer.train()
    assert any((kept[name] != value).any() for name, value in trainer.model.state_dict().items())
    trainer.model.load_state_dict(kept)
    parent = torch.nn.ModuleDict({"inside": trainer.model})
    assert all(torch.equal(kept[name.removeprefix("inside.")], value) for name, value in parent.state_dict().items())
    assert all(torch.equal(trainer._engine.read_weight(name), value.float()) for name, value in kept.items())
    with pytest.raises(RuntimeError, match="Missing key"):
        trainer.model.load_state_dict({"lm_head.weight": torch.zeros_like(kept["lm_head.weight"])})
    assert torch.equal(trainer.model.state_dict()["lm_head.weight"], kept["lm_head.weight"])


def test_copies_of_the_model_are_plain_models(tmp_path):
    trainer = trained(tmp_path, zero(3), max_steps=1)
    for made in (copy.deepcopy(trainer.model), pickle.loads(pickle.dumps(trainer.model))):
        assert "rlhf" not in repr(vars(made))
        prompt = {"inputs": torch.randint(1, 90, (2, 5)), "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(made.generate(**prompt), trainer.model.generate(**prompt))
        made.load_state_dict({name: value * 0 for name, value in trainer.model.state_dict().items()})
    assert trainer.model.lm_head.weight.any()


def test_the_optimizer_is_not_shared_by_trainers_of_one_model(tmp_path):
    first = trained(tmp_path, zero(2), max_steps=1)
    options = {"model": first.model, "train_dataset": first.train_dataset, "eval_dataset": first.train_dataset[:3]}
    second = hf.Trainer(args=arguments(tmp_path, zero(3, bf16={"enabled": True}), bf16=True), **options)
    second.train()
    assert first.evaluate(options["eval_dataset"])["eval_loss"] == second.evaluate()["eval_loss"]
    with pytest.raises(ValueError, match="another Trainer has trained the model since"):
        first.train()
    third = hf.Trainer(args=arguments(tmp_path), **options)  # a plain one
    third.train()
    assert "state_dict" not in vars(third.model)
    assert losses(third)[-1] < losses(second)[0]


def test_the_configuration_is_read_once(tmp_path, monkeypatch):
    (tmp_path / "zero.json").write_text(json.dumps(zero(3)))
    monkeypatch.chdir(tmp_path)
    args = arguments(tmp_path / "out", "zero.json", max_steps=1)
    monkeypatch.chdir("/")
    made = MODELS["llama"]()
    assert hf.Trainer(model=made, args=args, train_dataset=rows(made)).train().global_step == 1


def test_an_evaluation_without_training_is_that_of_the_plain_trainer(tmp_path):
    found = []
    for deepspeed in (None, zero(3), zero(3, bf16={"enabled": True})):
        made = MODELS["bert"]()
        args = arguments(tmp_path, deepspeed, bf16=deepspeed is not None and "bf16" in deepspeed)
        trainer = hf.Trainer(model=made, args=args, eval_dataset=rows(made))
        found.append((trainer.evaluate()["eval_loss"], trainer.predict(rows(made)).predictions))
    plain, same, rounded = found
    assert plain[0] == same[0] != rounded[0]
    assert (plain[1] == same[1]).all()
    assert rounded[0] == pytest.approx(plain[0], abs=0.02)


def test_a_model_for_each_trial(tmp_path):
    args = arguments(tmp_path, zero(3))
    trainer = hf.Trainer(model_init=lambda: MODELS["llama"](), args=args, train_dataset=rows(MODELS["llama"]()))
    trainer.train()
    first, engine = losses(trainer), trainer._engine
    trainer.train()
    assert losses(trainer) == first
    assert trainer._engine is not engine


def test_layers_must_not_be_dropped_where_ranks_gather_together(tmp_path):

    made = MODELS["llama"]()
    made.config.layerdrop = 0.1
    world = World(0, 2, torch.device("cpu"))
    with pytest.raises(ValueError, match="layerdrop.*use ZeRO stage 0"):
        shard_module(made, config=EngineConfig(zero_stage=1), world=world, optimizer=None)


def test_a_backward_past_the_accelerator_is_noticed(tmp_path):
    class Direct(hf.Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            loss.backward()
            return loss.detach()

    with pytest.raises(RuntimeError, match=r"not `loss\.backward\(\)`"):
        trained(tmp_path, zero(2), kind=Direct)


def test_gradients_are_not_clipped_by_value(tmp_path):
    class Clipping(hf.Trainer):
        def _clip_grad_norm(self, model):
            self.accelerator.clip_grad_value_(model.parameters(), 0.1)

    with pytest.raises(ValueError, match="clip_grad_value_: parameters have no gradients here"):
        trained(tmp_path, zero(2), kind=Clipping)


def test_scripts_ask_whether_deepspeed_is_there(tmp_path):
    """After training, to choose how to save; under it the Trainer's own code must not."""
    seen = []

    class Asking(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, **_):
            seen.append(trainer.is_deepspeed_enabled)

    made = MODELS["llama"]()
    args = arguments(tmp_path, zero(2), eval_strategy="steps", eval_steps=2)
    options = {"train_dataset": rows(made), "eval_dataset": rows(made)[:3], "callbacks": [Asking()]}
    trainer = hf.Trainer(model=made, args=args, **options)
    trainer.train()
    assert trainer.is_deepspeed_enabled
    trainer.evaluate()
    assert trainer.is_deepspeed_enabled
    assert seen == [False, False, False]
    assert not trained(tmp_path, None, max_steps=1).is_deepspeed_enabled


def test_a_checkpoint_of_the_plain_trainer_gives_its_weights(tmp_path, caplog):
    train(tmp_path / "plain", save_strategy="steps", save_steps=2, max_steps=2)
    found = train(tmp_path / "zero", zero(2), max_steps=4, resume=tmp_path / "plain/checkpoint-2")
    assert len(found["loss"]) == 4
    assert "has no state of this engine" in caplog.text


def test_what_the_configuration_leaves_out_is_said(tmp_path, caplog):
    config = {"zero_optimization": {"stage": 2}, "activation_checkpointing": {"partition_activations": True}}
    trained(tmp_path, config, max_steps=1)
    assert "has no gradient_clipping; gradients are clipped to max_grad_norm=0.5" in caplog.text
    assert "activation_checkpointing has no effect" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: model.to("meta"), "has no value"),
        (lambda model: model.register_parameter("codes", torch.nn.Parameter(torch.ones(2).byte(), False)), "uint8"),
    ],
)
def test_models_that_cannot_be_sharded(tmp_path, change, words):
    made = MODELS["llama"]()
    change(made)
    trainer = hf.Trainer(model=made, args=arguments(tmp_path, zero(2)), train_dataset=rows(made))
    with pytest.raises(ValueError, match=words):
        trainer.train()
