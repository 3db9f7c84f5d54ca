"""oneDNN in place of MKL: as precise, for wide models alone, and never in attention."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.models import fp32_matmul
from rlhf.models.cpu_attention import speed_up_attention
from rlhf.models.fp32_matmul import multiply_with_mkl, multiply_with_onednn
from rlhf.runtime.dist import World

LONE = World.alone()


@pytest.fixture(autouse=True)
def mkl():
    yield
    multiply_with_mkl()


@pytest.fixture
def amd(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("vendor_id : AuthenticAMD")
    monkeypatch.setattr(fp32_matmul, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)


def precision():
    return torch.backends.mkldnn.matmul.fp32_precision


def test_it_is_for_amd_cpus_wide_models_and_products_that_are_not_rounded(amd, monkeypatch, tmp_path):
    assert not multiply_with_onednn(64, world=LONE)
    monkeypatch.setattr(fp32_matmul, "_relative_error", lambda: 3e-3)  # what rounding to bf16 does
    assert not multiply_with_onednn(576, world=LONE)
    monkeypatch.setattr(fp32_matmul, "_relative_error", lambda: 4e-7)
    assert multiply_with_onednn(576, world=LONE)
    assert precision() == "bf16"
    assert multiply_with_onednn(64, world=LONE)  # a small model beside it goes along
    multiply_with_mkl()
    Path(tmp_path / "cpuinfo").write_text("vendor_id : GenuineIntel")
    assert not multiply_with_onednn(576, world=LONE)
    assert precision() == "none"


def test_the_error_that_decides_is_that_of_the_product():
    assert fp32_matmul._relative_error() > 0
    if not torch.cpu._is_amx_tile_supported() and torch.cpu._is_avx512_supported():
        assert fp32_matmul._relative_error() < 1e-6
    assert precision() == "none"


def test_a_training_step_is_the_same_up_to_rounding_and_attention_never_sees_the_switch(amd, monkeypatch):
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **shape, attn_implementation="sdpa"))
    ids = torch.arange(64).view(2, 32)
    seen, kernel = [], F.scaled_dot_product_attention

    def attention(*args, **kwargs):
        out = kernel(*args, **kwargs)
        seen.append(precision())
        # Right after a product's backward, on the way into the kernel's own.
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)

    def gradients():
        loss = model(input_ids=ids, labels=ids).loss
        inside = []
        node = loss.grad_fn
        found, queue = set(), [node]
        while queue:
            node = queue.pop()
            if node is None or node in found:
                continue
            found.add(node)
            if "Attention" in node.name():
                node.register_prehook(lambda *_: inside.append(precision()))
            queue += [below for below, _ in node.next_functions]
        kept = torch.autograd.grad(loss, list(model.parameters()))
        return loss.item(), kept, inside

    loss, expected, _ = gradients()
    monkeypatch.setattr(fp32_matmul, "_relative_error", lambda: 0.0)
    assert multiply_with_onednn(256, world=LONE)
    speed_up_attention()
    seen.clear()
    again, found, inside = gradients()
    assert seen == ["none", "none"]
    assert inside == ["none", "none"]
    assert precision() == "bf16"
    if torch.cpu._is_amx_tile_supported():
        return  # there it rounds, and is not chosen
    assert again == pytest.approx(loss, rel=1e-6)
    for gradient, wanted in zip(found, expected, strict=True):
        assert (gradient - wanted).norm() <= 1e-5 * wanted.norm()
