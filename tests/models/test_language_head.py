"""A model's head answers with the statistics that whole logits of plain transformers give, in every family."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    GraniteConfig,
    GraniteMoeConfig,
    HyperCLOVAXConfig,
    NemotronConfig,
    PhiConfig,
)

from rlhf.algorithms.logprobs import Wanted
from rlhf.config.stage_configs import LoraConfig
from rlhf.models.causal_lm import causal_lm, position_ids, token_statistics
from rlhf.models.language_head import LanguageHead
from tests.models import tiny

_IDS, _SHAPE = tiny._IDS, tiny._SHAPE
ALTERING = {
    "gemma2_capped": lambda: tiny.Gemma2Config(**tiny._GEMMA, final_logit_softcapping=2.0),
    "gemma3_capped": lambda: tiny.Gemma3TextConfig(**tiny._GEMMA, final_logit_softcapping=2.0),
    "cohere": lambda: CohereConfig(**_IDS, **_SHAPE, logit_scale=0.3),
    "cohere2": lambda: Cohere2Config(**_IDS, **_SHAPE, logit_scale=0.3, head_dim=8),
    "granite": lambda: GraniteConfig(**_IDS, **_SHAPE, logits_scaling=3.0),
    "granitemoe": lambda: GraniteMoeConfig(**_IDS, **_SHAPE, logits_scaling=3.0, num_local_experts=2),
}
OTHERS = {
    "phi, whose head has a bias": lambda: PhiConfig(**_IDS, **_SHAPE),
    "nemotron": lambda: NemotronConfig(**_IDS, **_SHAPE),
}
MODELS = {**tiny.FAMILIES, **ALTERING, **OTHERS}
UNKNOWN = {"hyperclovax": lambda: HyperCLOVAXConfig(**_IDS, **_SHAPE, logits_scaling=3.0)}
WANTED = Wanted(0.7, entropy=True, entropy_grad=True, first_choice=True, chunk_elements=300)


def saved(folder, config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(4 * parameter if parameter.dim() > 1 else parameter + 0.1)
    model.save_pretrained(folder)
    return folder


def batch():
    ids, mask = tiny.padded([9, 6, 4], side="left", width=9)
    counted = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    return ids, mask, counted


def expected_of(folder):
    """Statistics `[B, R]` by plain transformers, and the gradients of a sum of them."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids, mask, counted = batch()
    logits = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False).logits
    logprobs = (logits[:, 4:8] / 0.7).log_softmax(-1)
    chosen = logprobs.gather(-1, ids[:, 5:, None]).squeeze(-1)
    entropy = torch.distributions.Categorical(logits=logprobs).entropy()
    found = [chosen, entropy, (logits[:, 4:8].argmax(-1) == ids[:, 5:]).float()]
    loss_of(found, counted).backward()
    return [value.detach() * counted for value in found], {
        name: parameter.grad for name, parameter in model.named_parameters()
    }


def loss_of(found, counted):
    factors = torch.linspace(-1, 1, counted.numel()).view(counted.shape) * counted
    return (found[0] * factors + found[1] * factors.square()).sum()


def answered(model):
    ids, mask, counted = batch()
    found = token_statistics(model, ids, attention_mask=mask, mask=counted, wanted=WANTED)
    loss_of(found, counted).backward()
    return [value.detach() * counted for value in found]


def module_of(folder):
    return tiny.materialized(causal_lm(folder))


def assert_grads(model, expected):
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert_close(grad, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", MODELS)
def test_the_answer_is_that_of_whole_logits_by_transformers(name, tmp_path, monkeypatch):
    saved(tmp_path, MODELS[name]())
    expected, grads = expected_of(tmp_path)
    model = module_of(tmp_path)
    before = model.config.to_dict()
    monkeypatch.setattr(nn.Linear, "forward", watched := Watched(nn.Linear.forward, model.get_output_embeddings()))
    found = answered(model)
    assert not watched.seen, "logits were made"
    assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert_grads(model, grads)
    assert model.config.to_dict() == before


class Watched:
    """In place of a method: notes when it is called for one module."""

    def __init__(self, method, module):
        self.method, self.module, self.seen = method, module, False

    def __get__(self, this, _):
        def call(*arguments):
            self.seen |= this is self.module
            return self.method(this, *arguments)

        return call


@pytest.mark.parametrize("name", ALTERING)
def test_a_model_that_changes_logits_still_does_so_when_it_is_not_asked(name, tmp_path):
    saved(tmp_path, MODELS[name]())
    model, plain = module_of(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    answered(model)
    ids, mask, _ = batch()
    with torch.no_grad():
        assert_close(model(ids, attention_mask=mask).logits, plain(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_unknown_change_of_logits_is_noticed_and_said_once(tmp_path, caplog, dropout):
    saved(tmp_path, UNKNOWN["hyperclovax"]())
    expected, grads = expected_of(tmp_path)
    model = tiny.materialized(causal_lm(tmp_path, dropout=dropout)).train(dropout > 0)
    caplog.set_level("INFO")
    torch.manual_seed(0)
    first = answered(model)
    state = torch.get_rng_state()
    if not dropout:
        assert_close(first, expected, rtol=1e-4, atol=1e-5)
        assert_grads(model, grads)
    torch.manual_seed(0)  # the forward that found out drew no random numbers that count
    assert_close(answered(model), first, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    messages = [record.message for record in caplog.records if "whole logits" in record.message]
    assert messages == [
        "HyperCLOVAXForCausalLM changes logits after its head: its losses are computed from whole logits"
    ]


def test_a_model_without_such_a_head_is_asked_for_logits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 128, generator=generator)

    def model(**inputs):
        assert inputs["logits_to_keep"] == 5
        return type("Output", (), {"logits": logits})

    ids, mask, counted = batch()
    found = token_statistics(model, ids, attention_mask=mask, mask=counted, wanted=Wanted())
    expected = logits[:, :4].log_softmax(-1).gather(-1, ids[:, 5:, None]).squeeze(-1)
    assert_close(found.logprobs, expected)


def test_a_forward_that_fails_leaves_no_question_behind(tmp_path):
    saved(tmp_path, MODELS["gemma2_capped"]())
    model = module_of(tmp_path)
    ids, mask, counted = batch()
    handle = model.get_output_embeddings().register_forward_hook(lambda *_: 1 / 0)  # the head has answered
    with pytest.raises(ZeroDivisionError):
        token_statistics(model, ids, attention_mask=mask, mask=counted, wanted=Wanted())
    handle.remove()
    assert model.config.final_logit_softcapping == 2.0
    assert model(ids, attention_mask=mask).logits.shape == (3, 9, 128)


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_a_frozen_head_gets_no_gradient_and_the_adapters_theirs(tmp_path, entropy_grad):
    saved(tmp_path, MODELS["llama_tied"]())
    model = tiny.materialized(causal_lm(tmp_path, lora=LoraConfig(rank=4), seed=1))
    head = model.get_output_embeddings()
    assert isinstance(head, LanguageHead)
    ids, mask, counted = batch()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    grads = []
    for answers in (True, False):
        head.answers = answers
        found = token_statistics(
            model, ids, attention_mask=mask, mask=counted, wanted=WANTED._replace(entropy_grad=entropy_grad)
        )
        loss = loss_of(found if entropy_grad else (found.logprobs, torch.zeros_like(found.entropy)), counted)
        grads.append(torch.autograd.grad(loss, [model.get_parameter(name) for name in names]))
        assert found.entropy.requires_grad == (entropy_grad or not answers)
    assert_close(*grads, rtol=1e-4, atol=1e-5)
