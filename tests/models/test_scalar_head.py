"""Reward models and critics: one scalar per position, and exports that plain transformers scores alike."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from rlhf.config.stage_configs import LoraConfig
from rlhf.models.causal_lm import position_ids
from rlhf.models.export import export
from rlhf.models.scalar_head import last_token_scores, response_values, scalar_head_model
from tests.models import tiny

LENGTHS = [5, 9, 7]


def values(module, ids, mask):
    with torch.no_grad():
        return module(ids, mask, position_ids=position_ids(mask))


def exported(module, folder):
    export(module, tiny.named_tensors(module), folder=folder, tokenizer=tiny.tokenizer())
    return folder


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_left_and_right_padding_give_equal_values_and_scores(family, tmp_path):
    module = tiny.materialized(scalar_head_model(tiny.save(family, tmp_path)))
    left, right = (tiny.padded(LENGTHS, side=side, width=11) for side in ("left", "right"))
    of_left, of_right = values(module, *left), values(module, *right)
    assert of_left.shape == (3, 11)
    assert of_left.dtype == torch.float32
    assert of_left[left[1]].std() > 1e-2
    assert torch.allclose(of_left[left[1]], of_right[right[1]], rtol=1e-4, atol=1e-5)
    assert torch.allclose(
        last_token_scores(of_left, left[1]), last_token_scores(of_right, right[1]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_export_scores_the_same_in_plain_transformers(family, side, tmp_path):
    module = tiny.materialized(scalar_head_model(tiny.save(family, tmp_path / "lm"), num_layers=2, seed=3))
    exported(module, tmp_path / "reward")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", num_labels=1).eval()
    ids, mask = tiny.padded(LENGTHS, side=side, width=11)
    ids[:, -1 if side == "left" else 4] = tiny.EOS
    # GPT-2 is the one family here that takes positions from neither the mask nor the rotation.
    explicit = {"position_ids": position_ids(mask)} if family == "gpt2" and side == "left" else {}
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=mask, **explicit).logits.squeeze(-1)
    assert torch.allclose(last_token_scores(values(module, ids, mask), mask), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama_tied", "gemma3", "gpt2", "opt"])
def test_the_exported_configuration_is_a_classifier_that_pads(family, tmp_path):
    module = tiny.materialized(scalar_head_model(tiny.save(family, tmp_path / "lm"), dropout=0.25))
    written = AutoConfig.from_pretrained(exported(module, tmp_path / "reward"))
    original = AutoConfig.from_pretrained(tmp_path / "lm")
    assert written.architectures[0].endswith("ForSequenceClassification")
    assert (written.num_labels, written.pad_token_id) == (1, tiny.PAD)
    assert written.tie_word_embeddings == original.tie_word_embeddings
    assert {k: v for k, v in written.to_dict().items() if "drop" in k} == {
        k: v for k, v in original.to_dict().items() if "drop" in k
    }


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_exported_reward_model_comes_back_with_its_head(family, tmp_path):
    first = tiny.materialized(scalar_head_model(tiny.save(family, tmp_path / "lm"), num_layers=2, seed=3))
    again = scalar_head_model(exported(first, tmp_path / "reward"), seed=4)
    ids, mask = tiny.padded(LENGTHS, side="left")
    assert torch.equal(values(tiny.materialized(again), ids, mask), values(first, ids, mask))


def test_a_new_head_has_variance_one_over_width_plus_one_and_always_learns(tmp_path):
    tiny.save("llama", tmp_path)
    heads = [
        scalar_head_model(tmp_path, seed=seed, lora=LoraConfig(rank=2)).weights.read("score.weight", slice(None))
        for seed in range(30)
    ]
    drawn = torch.cat(heads)
    assert drawn.shape == (30, 32)
    assert drawn.std().item() == pytest.approx(33**-0.5, rel=0.08)
    assert abs(drawn.mean().item()) < 3 * 33**-0.5 / 960**0.5
    spec = scalar_head_model(tmp_path, lora=LoraConfig(rank=2))
    assert spec.module.score.weight.requires_grad
    assert "score.weight" in spec.trainable
    assert not spec.module.model.embed_tokens.weight.requires_grad


def test_the_head_computes_in_fp32_over_a_bf16_trunk(tmp_path):
    module = tiny.materialized(scalar_head_model(tiny.save("llama", tmp_path)), dtype=torch.bfloat16)
    ids, mask = tiny.padded(LENGTHS, side="right")
    hidden = []
    module.score.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    seen = values(module, ids, mask)
    assert hidden[0].dtype == torch.bfloat16
    expected = hidden[0].double() @ module.score.weight[0].double()
    assert torch.allclose(seen.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_head_of_several_numbers_is_refused(tmp_path):
    config = tiny.FAMILIES["llama"]()
    config.num_labels = 3
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="its head gives 3 numbers; expected one"):
        scalar_head_model(tmp_path)


def test_the_score_is_the_value_at_the_last_real_token():
    per_position = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [9.0, 10.0, 11.0, 12.0]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]])
    assert last_token_scores(per_position, mask).tolist() == [4.0, 7.0, 9.0]
    assert last_token_scores(per_position, mask.bool()).tolist() == [4.0, 7.0, 9.0]


def test_a_value_is_taken_where_the_token_is_predicted():
    per_position = torch.arange(12.0).view(2, 6)
    assert response_values(per_position, 3).tolist() == [[2.0, 3.0, 4.0], [8.0, 9.0, 10.0]]
    with pytest.raises(AssertionError, match="leaves no prompt"):
        response_values(per_position, 6)


def test_a_loaded_head_can_be_brought_to_the_units_of_a_critic(tmp_path):
    ids, mask = tiny.padded(LENGTHS, side="right")
    reward = tiny.materialized(scalar_head_model(tiny.save("llama", tmp_path / "base"), seed=1))
    folder = exported(reward, tmp_path / "reward")
    critic = tiny.materialized(scalar_head_model(folder, head_scale=0.25))
    torch.testing.assert_close(values(critic, ids, mask), values(reward, ids, mask) * 0.25, rtol=1e-4, atol=1e-5)
