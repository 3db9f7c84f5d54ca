"""Implementations of attention give the same steps, and one that cannot be used is refused with those that can."""

import json
from contextlib import closing

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

from rlhf.config.engine_config import Attention, EngineConfig, Precision
from rlhf.config.stage_configs import LoraConfig, OptimizerConfig, RewardConfig, SFTConfig
from rlhf.engine.engine import build_engine
from rlhf.models.attention import check_attention
from rlhf.models.causal_lm import causal_lm
from rlhf.models.export import export
from rlhf.models.scalar_head import scalar_head_model
from rlhf.runtime.dist import World
from rlhf.training.supervised_step import objective_of, take_step
from rlhf.types import PreferenceBatch, SFTBatch
from stages.setup.compatibility import ModelKind, validate_model
from tests.config.test_configuration import composed
from tests.models import tiny

# eps: a bias of keys has no gradient but rounding, whose sign AdamW would follow.
OPTIMIZER = OptimizerConfig(lr=1e-3, eps=1e-3, max_grad_norm=0, schedule="constant")
SIZES = {"global_batch_size": 4, "micro_batch_size": 2, "max_prompt_tokens": 8, "max_response_tokens": 8}


def batches(kind):
    ids, mask = tiny.padded([9, 5, 7, 2], side="right")
    if kind is SFTBatch:
        return [SFTBatch(ids, mask, target_mask=mask)]
    pairs = {"margin": torch.zeros(2), "reference_logprobs": torch.zeros(4)}
    return [PreferenceBatch(ids, mask, target_mask=mask, **pairs)]


def after_a_step(make, kind, settings, **chosen):
    """The loss, and the weights, of one step of an engine, and the implementations that its layers have."""
    world = World.alone()
    engine = EngineConfig(zero_stage=0, precision="fp32")
    config = settings(engine=engine, seed=0, optimizer=OPTIMIZER, lora=LoraConfig(rank=0), init_from="-", **SIZES)
    with closing(build_engine(make(**chosen), config=engine, world=world, optimizer=OPTIMIZER, total_steps=2)) as model:
        layers = [part.config._attn_implementation for part in model.module.modules() if hasattr(part, "q_proj")]
        metrics = take_step(model, batches(kind), objective=objective_of(config))
        return metrics["train/loss"], {name: value.clone() for name, value in model.full_tensors()}, set(layers)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3", "gpt2", "opt"])
@pytest.mark.parametrize(
    ("make", "kind", "settings"), [(causal_lm, SFTBatch, SFTConfig), (scalar_head_model, PreferenceBatch, RewardConfig)]
)
def test_a_step_of_eager_attention_is_one_of_sdpa(family, make, kind, settings, tmp_path):
    folder = tiny.save(family, tmp_path)

    def model(**chosen):
        return make(folder, **chosen)

    loss, weights, layers = after_a_step(model, kind, settings, attention=Attention.sdpa)
    other_loss, others, other_layers = after_a_step(model, kind, settings, attention=Attention.eager)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-3, atol=2e-5, msg=name)
    if family != "gpt2":  # has no projections of these names
        assert (layers, other_layers) == ({"sdpa"}, {"eager"})
    assert after_a_step(model, kind, settings)[2] == layers  # the default


def test_the_choice_is_no_part_of_an_export(tmp_path):
    folder = tiny.save("llama", tmp_path / "base")

    def exported(attention):
        target = tmp_path / str(attention)
        with closing(
            build_engine(causal_lm(folder, attention=attention), config=EngineConfig(zero_stage=0), world=World.alone())
        ) as engine:
            export(engine.module, engine.full_tensors(), folder=target, tokenizer=tiny.tokenizer())
        return json.loads((target / "config.json").read_text())

    assert exported(Attention.eager) == exported(None)


@pytest.mark.parametrize(
    ("family", "attention", "on_cuda", "said"),
    [
        ("llama", "flash_attention_2", False, "models compute on the CPU; expected eager, sdpa, or null"),
        ("gemma2", "sdpa", False, "Gemma2ForCausalLM does not support it; expected eager, or null"),
    ],
)
def test_what_cannot_be_used_is_refused_with_what_can(tmp_path, family, attention, on_cuda, said):
    folder = tiny.save(family, tmp_path)
    with pytest.raises(ValueError, match=f"engine.attention={attention}: .*{said}"):
        validate_model(folder, ModelKind.causal_lm, attention=Attention(attention), on_cuda=on_cuda)


def test_scores_are_capped_also_where_transformers_would_let_sdpa_drop_the_cap(tmp_path, monkeypatch):
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)  # as in transformers 5.17
    folder = tiny.save("gemma2", tmp_path)
    assert causal_lm(folder).module.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="Gemma2ForCausalLM does not support it; expected eager, or null"):
        validate_model(folder, ModelKind.causal_lm, attention=Attention.sdpa, on_cuda=False)


PACKAGES = {"flash_attention_2": "flash-attn", "flash_attention_3": "flash-attn-3"}


@pytest.mark.parametrize(("attention", "package"), PACKAGES.items())
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, attention, package):
    there: set[str] = set()
    checks = {Attention(name): (label, lambda label=label: label in there) for name, label in PACKAGES.items()}
    monkeypatch.setattr("rlhf.models.attention._PACKAGES", checks)
    module = causal_lm(tiny.save("llama", tmp_path)).module
    with pytest.raises(ValueError, match=f"the package {package} is not installed.*expected eager, sdpa, or null"):
        check_attention(module, Attention(attention), on_cuda=True)
    there.add(package)
    check_attention(module, Attention(attention), on_cuda=True)


def test_every_implementation_but_flash_needs_no_package(tmp_path):
    module = causal_lm(tiny.save("llama", tmp_path)).module
    for attention in (None, Attention.eager, Attention.sdpa):
        check_attention(module, attention, on_cuda=False)


def test_an_unknown_name_is_refused_when_the_configuration_is_read():
    with pytest.raises(Exception, match="flash_attention_9"):
        composed("experiment=smoke", "engine.attention=flash_attention_9")
    run = composed("experiment=smoke", "engine.attention=eager", "ppo.reward_engine.attention=sdpa")
    assert run.sft.engine.attention is run.ppo.critic_engine.attention is Attention.eager
    assert run.ppo.reward_engine.attention is Attention.sdpa


def test_flash_attention_in_fp32_is_refused():
    with pytest.raises(ValueError, match=r"engine\.attention=flash_attention_2 computes in 16 bits.*found fp32"):
        EngineConfig(zero_stage=0, precision=Precision.fp32, attention=Attention.flash_attention_2)
