"""Forwards without padding, beside plain transformers that takes one sequence after the other."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    Cohere2Config,
    DeepseekV3Config,
    DogeConfig,
    FalconConfig,
    Llama4TextConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf.algorithms.logprobs import Wanted
from rlhf.config.engine_config import Attention
from rlhf.config.stage_configs import ModelKind
from rlhf.models.attention import remove_padding
from rlhf.models.causal_lm import causal_lm, causal_lm_module, position_ids, token_statistics
from rlhf.models.model_spec import enable_activation_checkpointing, find_blocks
from rlhf.models.padding_free import row_length
from rlhf.models.scalar_head import scalar_head_model
from stages.setup.compatibility import validate_model
from tests.models import tiny

LENGTHS, WIDTH, ROW = [14, 1, 9, 5], 16, 32  # longer and shorter than the windows of 6; 29 tokens
_SHAPE = {**tiny._IDS, **tiny._SHAPE}
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
OTHERS = {
    "chunks": lambda: Llama4TextConfig(
        **_SHAPE, head_dim=8, attention_chunk_size=6, num_local_experts=2, intermediate_size_mlp=48
    ),
    "windows of some layers": lambda: Cohere2Config(**_SHAPE, head_dim=8, sliding_window=6),
    "values of another width than keys": lambda: DeepseekV3Config(
        **(_SHAPE | {"num_key_value_heads": 4}), **_MLA, **_EXPERTS, first_k_dense_replace=1
    ),
}
FAMILIES = [family for family in tiny.FAMILIES if family != "gemma2"]


def saved(name, folder):
    if name in tiny.FAMILIES:
        return tiny.save(name, folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(OTHERS[name]()).save_pretrained(folder)
    return folder


def batch(side="left", lengths=LENGTHS):
    return tiny.padded(lengths, side=side, width=WIDTH)


def shapes_of(module):
    """The shapes `[b, t]` that the first block sees."""
    seen = []
    blocks = find_blocks(module, module.config.num_hidden_layers)
    blocks[0].register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    return seen


def padding_free(spec, dtype=torch.float32):
    module = tiny.materialized(spec, dtype)
    assert remove_padding(module, True, on_cuda=False)
    return module, shapes_of(module)


def logprobs(module, ids, mask):
    """Of each real token but the first of its sequence, `[B, T - 1]`, 0 elsewhere."""
    counted = mask[:, 1:] & mask[:, :-1]
    return token_statistics(module, ids, attention_mask=mask, mask=counted, wanted=Wanted()).logprobs * counted


def values(module, ids, mask):
    return module(ids, mask, position_ids=position_ids(mask)) * mask


def gradients(module, found):
    """Of a sum in which each token has a share of its own, the same on either side of padding."""
    real = found[found != 0]
    (real * torch.linspace(1, 2, len(real)).to(real)).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


def rows_alone(model, ids, mask, *, read):
    """What `read` finds for each sequence without padding, one after the other, and the gradients."""
    found = torch.cat([read(model, row[keep][None]) for row, keep in zip(ids, mask, strict=True)])
    return found.detach(), gradients(model, found)


def plain_logprobs(model, ids):
    logits = model(ids, use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1)


def plain_values(model, ids):
    hidden = model.base_model(ids, use_cache=False).last_hidden_state
    return model.score(hidden)[0, :, 0]


def assert_grads(found, expected):
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert_close(grad, expected[name], rtol=1e-3, atol=2e-4 * expected[name].abs().max().item() + 1e-6, msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_logprobs_and_gradients_are_those_of_sequences_alone(family, side, tmp_path):
    module, shapes = padding_free(causal_lm(saved(family, tmp_path)))
    ids, mask = batch(side)
    found = logprobs(module, ids, mask)
    assert shapes == [(1, ROW)]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected, grads = rows_alone(plain, ids, mask, read=plain_logprobs)
    assert_close(found[found != 0], expected, rtol=1e-4, atol=1e-4)
    assert_grads(gradients(module, found), grads)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_sequences_alone(family, tmp_path):
    torch.manual_seed(0)
    config = tiny.FAMILIES[family]()
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    module, shapes = padding_free(scalar_head_model(tmp_path))
    ids, mask = batch()
    found = values(module, ids, mask)
    assert shapes == [(1, ROW)]
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1, dtype=torch.float32)
    expected, grads = rows_alone(plain, ids, mask, read=plain_values)
    assert_close(found[found != 0], expected, rtol=1e-4, atol=1e-5)
    assert_grads(gradients(module, found), grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_bit_of_a_sequence_depends_on_the_others(family, dtype, tmp_path):
    module, shapes = padding_free(causal_lm(tiny.save(family, tmp_path)), dtype)
    ids, mask = batch()
    found = logprobs(module, ids, mask)
    for other in (0, 2, 3):
        changed = ids.clone()
        changed[other] = (changed[other] + 7) % 100
        again = logprobs(module, changed, mask)
        assert not torch.equal(again[other], found[other])
        assert torch.equal(again[torch.arange(4) != other], found[torch.arange(4) != other])
    assert set(shapes) == {(1, ROW)}


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_in_16_bits_the_error_is_that_of_padded_forwards(family, tmp_path):
    ids, mask = batch()
    exact = logprobs(tiny.materialized(causal_lm(tiny.save(family, tmp_path))), ids, mask)
    padded = logprobs(tiny.materialized(causal_lm(tmp_path), torch.bfloat16), ids, mask)
    module, _ = padding_free(causal_lm(tmp_path), torch.bfloat16)
    error, usual = ((found.double() - exact).norm() for found in (logprobs(module, ids, mask), padded))
    assert 0 < error < 1.5 * usual


def test_recomputed_blocks_get_the_sequences_of_their_own_forward(tmp_path):
    first, second = batch(), batch("right", [3, 12, 4, 8])
    expected = []
    for recomputes in (False, True):
        module, shapes = padding_free(causal_lm(tiny.save("gemma3", tmp_path)))
        if recomputes:
            enable_activation_checkpointing(module)
        computed = []
        module.train().model.layers[1].mlp.register_forward_hook(lambda *_, seen=computed: seen.append(1))
        found = [logprobs(module, *first), logprobs(module, *second)]
        grads = [gradients(module, found[0]), gradients(module, found[1])]  # after a forward of other sequences
        expected.append((found, grads))
        assert set(shapes) == {(1, ROW)}
        assert len(computed) == 2 + 2 * recomputes
    assert_close(*expected, rtol=1e-5, atol=1e-6)


def test_a_micro_batch_with_little_padding_keeps_it(tmp_path):
    module, shapes = padding_free(causal_lm(tiny.save("llama", tmp_path)))
    for lengths in ([16, 16], [16, 15], [16, 9], [16, 8]):
        logprobs(module, *batch(lengths=lengths))
    assert shapes == [(2, 16), (2, 16), (2, 16), (1, 24)]


@pytest.mark.parametrize(
    ("count", "length"), [(1, 8), (9, 16), (255, 256), (257, 288), (3000, 3008), (30_000, 30_016), (100_000, 0)]
)
def test_a_row_is_rounded_up_to_few_lengths(count, length):
    assert row_length(count, padded=100_000) == length


def test_generation_and_forwards_without_a_mask_are_left_alone(tmp_path):
    module, shapes = padding_free(causal_lm(tiny.save("llama", tmp_path)))
    ids, mask = batch()
    module(ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=True)
    module(ids, use_cache=False)
    assert shapes == [(4, WIDTH)] * 2


def test_after_an_error_the_next_forward_is_whole(tmp_path):
    module, shapes = padding_free(causal_lm(tiny.save("llama", tmp_path)))
    ids, mask = batch()
    expected = logprobs(module, ids, mask)
    handle = module.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logprobs(module, ids, mask)
    handle.remove()
    full = torch.ones_like(mask)
    assert_close(
        module(ids, attention_mask=full, position_ids=position_ids(full), use_cache=False).logits,
        module(ids, use_cache=False).logits,
    )
    assert torch.equal(logprobs(module, ids, mask), expected)


def test_a_mask_of_another_kind_is_refused_before_sequences_mix(tmp_path):
    module, _ = padding_free(causal_lm(tiny.save("llama", tmp_path)))

    def without_mask(block, args, kwargs):
        return args, kwargs | {"attention_mask": None}

    module.model.layers[1].register_forward_pre_hook(without_mask, with_kwargs=True)
    with pytest.raises(ValueError, match=r"LlamaAttention makes a mask of its own.*set engine.padding_free=false"):
        logprobs(module, *batch())


def test_dropout_of_attention_reaches_every_sequence(tmp_path, monkeypatch):
    module, _ = padding_free(causal_lm(tiny.save("llama", tmp_path), dropout=0.5))
    kernel, rates = F.scaled_dot_product_attention, []

    def counted(*args, dropout_p=0.0, **kwargs):
        rates.append(dropout_p)
        return kernel(*args, dropout_p=dropout_p, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    logprobs(module.train(), *batch())
    logprobs(module.eval(), *batch())
    calls = 3 * 5  # layers, and sequences with the one that fills up
    assert rates == [0.5] * calls + [0.0] * calls


def test_a_row_saves_no_more_for_backward_than_a_padded_micro_batch(tmp_path):
    """So the plan, which traces micro-batches with a token of padding, is an upper bound."""
    saved = []
    for free in (False, True):
        module = tiny.materialized(causal_lm(tiny.save("llama", tmp_path))).train()
        remove_padding(module, free, on_cuda=False)
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept = logprobs(module, *batch(lengths=[16, 8]))  # 24 of 32 tokens
        saved.append(sum(storages.values()))
        del kept
    assert saved[1] < saved[0]


def flash(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """As the kernel for rows: `[1, H, N, width]` to `[1, N, H, width]`, sequences by where they begin."""
    assert attention_mask is None
    starts = kwargs["cu_seq_lens_q"]
    assert starts.dtype is torch.int32
    assert torch.equal(starts, kwargs["cu_seq_lens_k"])
    lengths = starts.diff().tolist()
    assert kwargs["max_length_q"] == kwargs["max_length_k"] == max(lengths)
    parts = zip(*(tensor.split(lengths, 2) for tensor in (query, key, value)), strict=True)
    found = [F.scaled_dot_product_attention(*part, is_causal=True, scale=scaling, enable_gqa=True) for part in parts]
    return torch.cat(found, 2).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_flash_attention_is_told_where_sequences_begin(family, tmp_path, monkeypatch):
    """Its kernel, which needs CUDA, is written out."""
    module = tiny.materialized(causal_lm(tiny.save(family, tmp_path)))
    expected = logprobs(module, *batch())
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    for part in module.modules():
        if hasattr(part, "config"):
            part.config._attn_implementation_internal = "flash_attention_2"
    assert remove_padding(module, None, on_cuda=True)
    shapes = shapes_of(module)
    assert_close(logprobs(module, *batch()), expected, rtol=1e-4, atol=1e-4)
    assert shapes == [(1, ROW)]


REFUSED = {
    "gemma2": (tiny.FAMILIES["gemma2"], "has eager attention"),
    "a state": (tiny.with_states, "has layers other than attention"),
    "alibi": (lambda: BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4), "has eager attention"),
    "falcon": (
        lambda: FalconConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        "attends in a way of its own",
    ),
    "doge": (lambda: DogeConfig(**_SHAPE), "attends in a way of its own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_cannot_computes_padding_and_says_why(name, tmp_path, caplog):
    config, reason = REFUSED[name]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config()).save_pretrained(tmp_path)
    module = tiny.materialized(causal_lm(tmp_path))
    caplog.set_level("INFO", logger="rlhf.models.attention")
    assert not remove_padding(module, False, on_cuda=False)
    assert not caplog.messages
    assert not remove_padding(module, None, on_cuda=False)
    assert [message for message in caplog.messages if reason in message] == caplog.messages
    assert len(caplog.messages) == 1
    shapes = shapes_of(module)
    logprobs(module, *batch())
    assert shapes == [(4, WIDTH)]
    with pytest.raises(ValueError, match=f"engine.padding_free=true: .*{reason}.*; expected null or false"):
        validate_model(tmp_path, ModelKind.causal_lm, padding_free=True)
    validate_model(tmp_path, ModelKind.causal_lm)


def test_eager_attention_is_refused_where_it_was_chosen(tmp_path):
    validate_model(tiny.save("llama", tmp_path), ModelKind.causal_lm, padding_free=True)
    with pytest.raises(ValueError, match="LlamaForCausalLM has eager attention"):
        validate_model(tmp_path, ModelKind.causal_lm, padding_free=True, attention=Attention.eager)


def test_on_cuda_a_kernel_for_each_sequence_must_be_asked_for(caplog):
    caplog.set_level("INFO", logger="rlhf.models.attention")
    for wanted in (None, True):
        module = causal_lm_module(tiny.FAMILIES["llama"]())
        assert remove_padding(module, wanted, on_cuda=True) is bool(wanted)
    assert len(caplog.messages) == 1
