"""Statistics from hidden states against autograd through whole logits, in fp64 and in the working types."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.algorithms.head_statistics import Head, head_statistics
from rlhf.algorithms.logprobs import Wanted

WORDS, WIDTH = 11, 5
MASK = torch.tensor([[True, False, True, True], [False, False, True, False]])
LEARNS = {"hidden": (0,), "head": (1, 2), "weight": (1,), "all": (0, 1, 2)}


def random(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def example(learns=(0, 1, 2), *, positions=6, mask=MASK, dtype=torch.float64, words=WORDS):
    tensors = [random(len(mask), positions, WIDTH), random(words, WIDTH, seed=1), random(words, seed=2)]
    tensors = [tensor.to(dtype).requires_grad_(index in learns) for index, tensor in enumerate(tensors)]
    targets = torch.randint(words, mask.shape, generator=torch.Generator().manual_seed(3))
    return tensors, targets


def whole(tensors, targets, mask, *, temperature=1.0, scale=1.0, cap=None):
    """The same through logits of every position, `[B, R, 2]`."""
    hidden, weight, bias = tensors
    start = hidden.shape[1] - mask.shape[1] - 1 if hidden.shape[1] > mask.shape[1] else 0
    logits = scale * F.linear(hidden, weight, bias)[:, start : start + mask.shape[1]]
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    logprobs = (logits / temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return torch.stack((logprobs.gather(-1, targets[..., None]).squeeze(-1), entropy), -1) * mask[..., None]


@pytest.mark.parametrize("positions", [4, 5, 7], ids=["aligned", "end", "sequence"])
@pytest.mark.parametrize("chunk", [1, 40, 10_000])
@pytest.mark.parametrize("changed", [{}, {"scale": 0.3}, {"cap": 2.0}, {"scale": 0.3, "cap": 2.0}])
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("learns", LEARNS)
def test_values_and_gradients_are_those_of_whole_logits(learns, entropy_grad, changed, chunk, positions):
    tensors, targets = example(LEARNS[learns], positions=positions)
    wanted = Wanted(0.7, entropy=True, entropy_grad=entropy_grad, chunk_elements=chunk)
    found = head_statistics(tensors[0], Head(*tensors[1:], **changed), targets, MASK, wanted=wanted)
    expected = whole(tensors, targets, MASK, temperature=0.7, **changed)
    assert_close(found[..., :2], expected)
    upstream = random(*MASK.shape, 2, seed=4) * torch.tensor([1.0, float(entropy_grad)])
    leaves = [tensors[index] for index in LEARNS[learns]]
    grads = torch.autograd.grad((found[..., :2] * upstream).sum(), leaves)
    assert_close(grads, torch.autograd.grad((expected * upstream).sum(), leaves))


@pytest.mark.parametrize("learns", LEARNS)
def test_gradients_agree_with_finite_differences(learns):
    tensors, targets = example(LEARNS[learns])
    wanted = Wanted(0.7, entropy=True, entropy_grad=True, chunk_elements=20)

    def compute(*tensors):
        return head_statistics(tensors[0], Head(*tensors[1:], cap=3.0), targets, MASK, wanted=wanted)

    assert torch.autograd.gradcheck(compute, tensors)


@pytest.mark.parametrize("learns", ["hidden", "all"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_in_the_working_types_the_error_is_that_of_rounding(dtype, tolerance, learns):
    tensors, targets = example(LEARNS[learns], dtype=dtype)
    exact = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors]
    found = head_statistics(tensors[0], Head(*tensors[1:]), targets, MASK, wanted=Wanted(chunk_elements=30))
    expected = whole(exact, targets, MASK)
    assert found.dtype == torch.float32
    assert_close(found[..., 0].double(), expected[..., 0], rtol=tolerance, atol=tolerance)
    upstream = random(*MASK.shape, seed=4)
    (found[..., 0] * upstream).sum().backward()
    (expected[..., 0] * upstream).sum().backward()
    for one, other in zip(tensors, exact, strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            assert one.grad.dtype == dtype
            assert_close(one.grad.double(), other.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("learns", [False, True])
def test_a_token_that_is_nearly_certain_keeps_its_small_gradient(learns):
    # Logits 0 and 12: the gradient is 1 - p = 6e-6 of the difference of rows, which a difference of sums would lose.
    weight = torch.tensor([[0.0, 1.0], [12.0, 1.0]], requires_grad=learns)
    hidden = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    mask, targets = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 1, dtype=torch.long)
    head_statistics(hidden, Head(weight, None), targets, mask, wanted=Wanted())[..., 0].sum().backward()
    expected = 12 * torch.sigmoid(torch.tensor(-12.0))
    assert_close(hidden.grad[0, 0], torch.tensor([expected, 0.0]), rtol=0.02, atol=12 * 2**-23)


def test_the_first_of_the_largest_logits_is_the_first_choice():
    weight = torch.tensor([[1.0], [3.0], [3.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    wanted = Wanted(first_choice=True)
    found = head_statistics(torch.ones(1, 3, 1), Head(weight, None), torch.tensor([[0, 1, 2]]), mask, wanted=wanted)
    assert found[0, :, 2].tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("learns", ["hidden", "all"])
def test_where_no_token_counts_every_gradient_is_there_and_0(learns):
    tensors, targets = example(LEARNS[learns])
    nothing = torch.zeros_like(MASK)
    found = head_statistics(tensors[0], Head(*tensors[1:]), targets, nothing, wanted=Wanted(entropy=True))
    found.sum().backward()
    assert not found.any()
    for index in LEARNS[learns]:
        assert tensors[index].grad.shape == tensors[index].shape
        assert not tensors[index].grad.any()


def test_sequences_of_one_token_have_nothing_to_predict():
    tensors, targets = example(positions=1, mask=torch.zeros(2, 0, dtype=torch.bool))
    found = head_statistics(tensors[0], Head(*tensors[1:]), targets, targets.bool(), wanted=Wanted())
    assert found.shape == (2, 0, 3)
    found.sum().backward()
    assert not tensors[0].grad.any()


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation returns, other than those of a weight's size."""

    def __init__(self, *, but):
        super().__init__()
        self.elements, self.but = 0, but

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.numel() != self.but:
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize("learns", ["hidden", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_whole_sequences_are_never_made(learns, dtype):
    mask, words = torch.ones(4, 64, dtype=torch.bool), 1000
    tensors, targets = example(LEARNS[learns], positions=65, mask=mask, dtype=dtype, words=words)
    wanted = Wanted(entropy=True, first_choice=True, chunk_elements=4 * words)
    with LargestTensor(but=words * WIDTH) as largest:
        found = head_statistics(tensors[0], Head(*tensors[1:]), targets, mask, wanted=wanted)
        found[..., 0].sum().backward()
    assert 4 * words <= largest.elements <= 16 * words  # of 256 rows


def test_without_gradients_nothing_is_kept():
    tensors, targets = example()
    with torch.no_grad():
        found = head_statistics(tensors[0], Head(*tensors[1:]), targets, MASK, wanted=Wanted())
    assert found.grad_fn is None


@pytest.mark.parametrize(("targets", "found"), [([[-100, 1]], "from -100 to 1"), ([[0, 11]], "from 0 to 11")])
def test_ids_outside_the_vocabulary_are_refused(targets, found):
    tensors, _ = example(positions=2, mask=torch.ones(1, 2, dtype=torch.bool))
    targets = torch.tensor(targets)
    with pytest.raises(ValueError, match=rf"{found}, expected 0 to 10"):
        head_statistics(tensors[0], Head(*tensors[1:]), targets, torch.ones(1, 2), wanted=Wanted())


def test_too_few_hidden_states_are_refused():
    tensors, targets = example(positions=3)
    with pytest.raises(ValueError, match="logits at 3 positions for 4 targets"):
        head_statistics(tensors[0], Head(*tensors[1:]), targets, MASK, wanted=Wanted())
