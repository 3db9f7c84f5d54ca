import math
from functools import partial

import pytest
import torch
from torch import tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.algorithms import logprobs as module
from rlhf.algorithms.logprobs import Wanted, statistics_of_logits


def random_logits(*shape, dtype=torch.float32):
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)


def random_targets(*shape, vocabulary):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(1))


def token_logprobs(logits, targets, **settings):
    return statistics_of_logits(logits, targets, wanted=Wanted(**settings)).logprobs


def token_logprobs_and_entropy(logits, targets, **settings):
    return statistics_of_logits(logits, targets, wanted=Wanted(entropy=True, **settings))[:2]


def token_entropy(logits, num_targets, **settings):
    targets = torch.zeros(len(logits), num_targets, dtype=torch.long)
    return token_logprobs_and_entropy(logits, targets, **settings)[1]


def reference_logprobs(logits, targets, temperature):
    return (logits / temperature).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


def reference_entropy(logits, temperature):
    return torch.distributions.Categorical(logits=logits / temperature).entropy()


def test_logprobs_by_hand():
    logits = tensor([[[1.0, 2.0, 5.0]]]).log()  # probabilities 1/8, 2/8, 5/8
    assert_close(token_logprobs(logits, tensor([[2]])), tensor([[math.log(5 / 8)]]))


def test_temperature_divides_the_logits():
    # Temperature 1/2 squares the weights: 1, 4, 25 of 30.
    logits = tensor([[[1.0, 2.0, 5.0]]]).log()
    assert_close(token_logprobs(logits, tensor([[1]]), temperature=0.5), tensor([[math.log(4 / 30)]]))


def test_entropy_by_hand():
    # Probabilities 1/2, 1/4, 1/4: H = 1/2 log 2 + 2 * 1/4 log 4 = 3/2 log 2.
    logits = tensor([[[2.0, 1.0, 1.0]]]).log() + 7
    assert_close(token_entropy(logits, num_targets=1), tensor([[1.5 * math.log(2)]]))


def test_entropy_at_a_temperature_by_hand():
    # Temperature 1/2 turns weights 1, 2 into 1, 4: H = 1/5 log 5 + 4/5 log 5/4.
    expected = 0.2 * math.log(5) + 0.8 * math.log(1.25)
    assert_close(token_entropy(tensor([[[1.0, 2.0]]]).log(), num_targets=1, temperature=0.5), tensor([[expected]]))


def test_the_logits_of_a_sequence_predict_the_next_tokens():
    # After the tokens 0, 1, 2, 3 the weight of the right next token is 2, 3, 4 of 5, 6, 7; after token 3, 9 of 12.
    sequence = tensor([[0, 1, 2, 3]])
    weights = torch.ones(1, 4, 4)
    for position, following in enumerate((1, 2, 3, 0)):
        weights[0, position, following] = (2.0, 3.0, 4.0, 9.0)[position]
    response = token_logprobs(weights.log(), sequence[:, 2:])  # tokens 2 and 3, predicted at positions 1 and 2
    assert_close(response, tensor([[math.log(3 / 6), math.log(4 / 7)]]))
    assert_close(token_logprobs(weights.log(), sequence[:, 3:]), tensor([[math.log(4 / 7)]]))
    assert_close(token_logprobs(weights.log(), sequence[:, 1:])[:, 1:], response)


def test_logits_of_the_end_of_a_sequence_give_the_same_as_those_of_all_of_it():
    logits, targets = random_logits(2, 7, 11), random_targets(2, 3, vocabulary=11)
    whole = token_logprobs_and_entropy(logits, targets)
    assert_close(token_logprobs_and_entropy(logits[:, -4:], targets), whole)
    assert_close(token_logprobs_and_entropy(logits[:, 3:6], targets), whole)  # aligned
    assert_close(token_entropy(logits, num_targets=3), whole[1])


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients_are_those_of_log_softmax_in_fp32(dtype, temperature):
    targets, weights = random_targets(2, 5, vocabulary=33), random_logits(2, 5)
    logits = random_logits(2, 9, 33, dtype=dtype).requires_grad_()
    expected_input = logits.detach().float().requires_grad_()
    expected = reference_logprobs(expected_input[:, 3:8], targets, temperature)
    (expected * weights).sum().backward()
    found = token_logprobs(logits, targets, temperature=temperature)
    (found * weights).sum().backward()
    assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert_close(logits.grad, expected_input.grad.to(dtype), rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-6)
    assert logits.grad[:, :3].abs().max() == 0
    assert logits.grad[:, 8:].abs().max() == 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_is_that_of_a_categorical_distribution(temperature):
    logits = random_logits(2, 4, 33)
    expected = reference_entropy(logits, temperature)
    assert_close(token_entropy(logits, num_targets=4, temperature=temperature), expected)
    statistics = token_logprobs_and_entropy(logits, random_targets(2, 4, vocabulary=33), temperature=temperature)
    assert_close(statistics[1], expected)


@pytest.mark.parametrize("length", [3, 5])
def test_gradients_agree_with_finite_differences(length):
    logits = random_logits(2, length, 4, dtype=torch.float64).requires_grad_()
    targets = random_targets(2, 3, vocabulary=4)
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, targets, temperature=0.7), logits)
    assert torch.autograd.gradcheck(lambda x: token_logprobs_and_entropy(x, targets, temperature=0.7), logits)


def test_entropy_alone_can_be_differentiated():
    logits = random_logits(2, 3, 5, dtype=torch.float64).requires_grad_()
    expected = torch.autograd.grad(reference_entropy(logits, 0.7).sum(), logits)
    statistics = token_logprobs_and_entropy(logits, random_targets(2, 3, vocabulary=5), temperature=0.7)
    assert_close(torch.autograd.grad(statistics[1].sum(), logits), expected)


def test_suppressed_tokens_leave_values_and_gradients_finite():
    logits = tensor([[[0.0, 0.0, -math.inf]]], requires_grad=True)
    statistics = token_logprobs_and_entropy(logits, tensor([[0]]))
    (statistics[0] + statistics[1]).sum().backward()
    assert_close(statistics[0], tensor([[-math.log(2)]]))
    assert_close(statistics[1], tensor([[math.log(2)]]))
    # d logp_0 = (1 - 1/2, -1/2, 0); the entropy is at its maximum over two tokens, so its gradient is 0.
    assert_close(logits.grad, tensor([[[0.5, -0.5, 0.0]]]))


def test_a_shift_of_all_logits_changes_nothing():
    logits, targets = random_logits(2, 3, 17), random_targets(2, 3, vocabulary=17)
    assert_close(token_logprobs(logits + 50, targets), token_logprobs(logits, targets), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("elements", [1, 17, 3 * 17, 8 * 17, 10_000])
def test_the_size_of_a_chunk_does_not_change_the_result(elements):
    logits = random_logits(5, 7, 17).requires_grad_()
    targets = random_targets(5, 3, vocabulary=17)
    expected = token_logprobs_and_entropy(logits, targets, temperature=0.7)
    expected_grad = torch.autograd.grad(expected[0].sum() + expected[1].square().sum(), logits)
    found = token_logprobs_and_entropy(logits, targets, temperature=0.7, chunk_elements=elements)
    assert_close(found, expected)
    assert_close(torch.autograd.grad(found[0].sum() + found[1].square().sum(), logits), expected_grad)
    assert_close(token_entropy(logits, num_targets=3, temperature=0.7, chunk_elements=elements), expected[1])


def test_the_first_of_the_largest_logits_is_the_first_choice():
    logits = tensor([[[1.0, 3.0, 3.0], [3.0, 1.0, 1.0], [0.0, 0.0, 1.0]]])
    found = statistics_of_logits(logits, tensor([[1, 0, 1]]), wanted=Wanted(first_choice=True))
    assert found.first_choice.tolist() == [[1.0, 1.0, 0.0]]
    assert statistics_of_logits(logits, tensor([[2, 0, 2]]), wanted=Wanted(first_choice=True)).first_choice[0, 0] == 0


def test_no_targets_give_an_empty_result():
    assert token_logprobs(random_logits(2, 4, 5), torch.empty(2, 0, dtype=torch.long)).shape == (2, 0)
    assert token_entropy(random_logits(0, 4, 5), num_targets=2).shape == (0, 2)


class LargestTensor(TorchDispatchMode):
    """Records the largest fp32 tensor that any operation returns, forward and backward."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                self.elements = max(self.elements, x.numel())
        return result


def largest_fp32_tensor(compute):
    logits = random_logits(4, 20, 30_000, dtype=torch.bfloat16).requires_grad_()
    targets = random_targets(4, 18, vocabulary=30_000)
    with LargestTensor() as largest:
        compute(logits, targets).sum().backward()
    assert logits.grad.dtype == torch.bfloat16
    return largest.elements


def test_no_fp32_copy_of_bf16_logits_is_ever_made():
    whole = 4 * 18 * 30_000
    assert whole > module.CPU_CHUNK_ELEMENTS
    assert largest_fp32_tensor(token_logprobs) <= module.CPU_CHUNK_ELEMENTS
    assert largest_fp32_tensor(lambda *xs: token_logprobs_and_entropy(*xs)[1]) <= module.CPU_CHUNK_ELEMENTS
    assert largest_fp32_tensor(partial(token_logprobs, chunk_elements=2**17)) <= 2**17
    assert largest_fp32_tensor(lambda x, t: reference_logprobs(x[:, 1:19].float(), t, 1.0)) == whole


def test_autograd_keeps_the_logits_and_the_targets_and_nothing_else():
    logits, kept = random_logits(2, 9, 33, dtype=torch.bfloat16).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        token_logprobs_and_entropy(logits, random_targets(2, 5, vocabulary=33), temperature=0.7)
    assert [tuple(x.shape) for x in kept] == [(2, 9, 33), (2, 5)]
    assert kept[0].data_ptr() == logits.data_ptr()


def test_the_logits_are_not_written_to():
    logits = random_logits(2, 5, 33).requires_grad_()
    before = logits.detach().clone()
    statistics = token_logprobs_and_entropy(logits, random_targets(2, 3, vocabulary=33))
    (statistics[0] + statistics[1]).sum().backward()
    assert torch.equal(logits, before)


@pytest.mark.parametrize(("targets", "found"), [([[-100, 1]], "from -100 to 1"), ([[0, 5]], "from 0 to 5")])
def test_ids_outside_the_vocabulary_are_refused(targets, found):
    with pytest.raises(ValueError, match=rf"{found}, expected 0 to 4"):
        token_logprobs(random_logits(1, 2, 5), tensor(targets))


def test_too_few_logits_are_refused():
    with pytest.raises(ValueError, match="logits at 2 positions for 3 targets"):
        token_logprobs(random_logits(1, 2, 5), tensor([[0, 1, 2]]))
    with pytest.raises(ValueError, match="logits at 2 positions for 3 targets"):
        token_entropy(random_logits(1, 2, 5), num_targets=3)


def test_shapes_without_a_batch_are_refused():
    with pytest.raises(ValueError, match=r"expected \[B, N, V\] and \[B, R\]"):
        token_logprobs(random_logits(2, 5), tensor([[0, 1]]))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match=f"found temperature {temperature}"):
        token_logprobs(random_logits(1, 2, 5), tensor([[0, 1]]), temperature=temperature)
