"""Evaluation, generation and callbacks of the Trainer see the same model on the engine as on plain ranks."""

import tempfile

import numpy as np
import pytest
import transformers
from peft import LoraConfig, get_peft_model

from rlhf import hf
from rlhf.runtime import dist
from tests.hf.runs import OPTIONS, close, llama, rows, t5, zero
from tests.ranks import run_on_ranks


def matches(prediction):
    labels = np.where(prediction.label_ids == -100, 0, prediction.label_ids)
    return {"match": float((prediction.predictions[:, 1:] == labels[:, : prediction.predictions.shape[1] - 1]).mean())}


class Seen(transformers.TrainerCallback):
    """What a callback is given."""

    def __init__(self):
        self.norms = []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **_):
        self.norms.append((state.global_step, model is not None, optimizer.param_groups[0]["lr"]))

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= 3


def summaries(module, deepspeed):
    """A translation model that is trained, and measured on what it generates; stopped by a callback."""
    model, seen = t5(), Seen()
    model.generation_config.eos_token_id = 1
    options = {"predict_with_generate": True, "generation_max_length": 9, "generation_num_beams": 2}
    options |= {"output_dir": dist.broadcast_object(tempfile.mkdtemp()), "deepspeed": deepspeed, "max_steps": 9}
    args = module.Seq2SeqTrainingArguments(**OPTIONS | options)
    data = rows(model)
    trainer = module.Seq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=data[:7],
        compute_metrics=matches,
        callbacks=[seen],
        processing_class=None,
    )
    trainer.train()
    found = trainer.predict(data[:7])
    metrics = trainer.evaluate()
    close(trainer)
    return {
        "tokens": found.predictions.tolist(),
        "metrics": [found.metrics["test_loss"], found.metrics["test_match"], metrics["eval_match"]],
        "seen": seen.norms,
        "steps": trainer.state.global_step,
    }


def untrained(module, deepspeed):
    """What a model generates that streams its weights, and has not computed anything before."""
    model, data = t5(), rows(t5())
    if deepspeed is not None:
        deepspeed = zero(3, zero_optimization={"offload_param": {"device": "cpu"}})
    options = {"output_dir": dist.broadcast_object(tempfile.mkdtemp()), "predict_with_generate": True}
    args = module.Seq2SeqTrainingArguments(**OPTIONS | options, deepspeed=deepspeed, generation_max_length=6)
    trainer = module.Seq2SeqTrainer(model=model, args=args, eval_dataset=data[:7])
    tokens = trainer.predict(data[:7]).predictions.tolist()
    close(trainer)
    return tokens


def adapters(module, deepspeed):
    """Adapters on the last layer alone, recomputed in backward, which reaches the frozen layers below; then merged."""
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[2]))
    model.enable_input_require_grads()
    args = module.TrainingArguments(
        **OPTIONS | {"output_dir": dist.broadcast_object(tempfile.mkdtemp()), "max_steps": 4},
        gradient_checkpointing=True,
        deepspeed=deepspeed,
        label_names=["labels"],
        neftune_noise_alpha=0.1,
    )
    trainer = module.Trainer(model=model, args=args, train_dataset=rows(llama()))
    trainer.train()
    found = [[row["loss"], row["grad_norm"]] for row in trainer.state.log_history if "loss" in row]
    merged = model.merge_and_unload().state_dict()
    close(trainer)
    return found + [[value.norm().item(), value.abs().max().item()] for value in merged.values()]


def one_after_the_other(module, deepspeed):
    """Two Trainers of one model, whose weights are kept in memory and set again before each is done."""
    model, options = llama(), {"output_dir": dist.broadcast_object(tempfile.mkdtemp()), "max_steps": 3}
    data, found = rows(model), []
    for rate in (3e-3, 1e-3):
        args = module.TrainingArguments(**OPTIONS | options | {"learning_rate": rate}, deepspeed=deepspeed)
        trainer = module.Trainer(model=model, args=args, train_dataset=data, eval_dataset=data[:7])
        trainer.train()
        kept = {name: value.clone() for name, value in model.state_dict().items()}
        found += [trainer.evaluate()["eval_loss"], *(value.norm().item() for value in kept.values())]
        trainer.train()
        found += [row["loss"] for row in trainer.state.log_history if "loss" in row]
        # Not evaluated again: the plain Trainer marks the model then, and the next one would average no gradients.
        model.load_state_dict(kept)
    close(trainer)
    return found


def both():
    return {
        work.__name__: (
            work(transformers, None),
            work(hf, zero(3, zero_optimization={"stage3_prefetch_bucket_size": 0})),
        )
        for work in (summaries, untrained, adapters, one_after_the_other)
    }


@pytest.fixture(scope="module")
def found():
    return run_on_ranks(both, 2)[0]


def test_generated_tokens_and_their_metrics_are_the_same(found):
    plain, engine = found["summaries"]
    assert engine["tokens"] == plain["tokens"]
    assert found["untrained"][0] == found["untrained"][1]
    assert engine["metrics"] == pytest.approx(plain["metrics"], abs=2e-6)


def test_callbacks_see_every_step_and_may_end_training(found):
    plain, engine = found["summaries"]
    assert engine["seen"] == plain["seen"]
    assert engine["steps"] == 3


def test_adapters_above_frozen_layers_that_are_recomputed(found):
    plain, engine = found["adapters"]
    assert np.array(engine) == pytest.approx(np.array(plain), abs=2e-6, rel=1e-6)


def test_a_model_goes_from_one_trainer_to_the_next(found):
    plain, engine = found["one_after_the_other"]
    assert engine == pytest.approx(plain, abs=2e-6, rel=1e-6)
