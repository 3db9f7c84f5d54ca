"""One draw from logits, and where its random numbers come from."""

import pytest
import torch

from rlhf.generation.sampling import sample, uniforms


def grid(rows):
    """`rows` uniforms that cover [0, 1) evenly, so that shares of draws are probabilities."""
    return (torch.arange(rows) + 0.5) / rows


def shares(logits, *, rows=4000, **settings):
    drawn = sample(logits.expand(rows, -1), grid(rows), **settings)
    return torch.bincount(drawn.tokens, minlength=logits.shape[-1]) / rows


def plain_truncation(logits, *, temperature, top_k, top_p):
    """Temperature, then top-k, then top-p, one token at a time."""
    probabilities = (logits.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    kept = order[:top_k] if top_k else order
    total = sum(probabilities[token] for token in kept)
    nucleus, mass = [], 0.0
    for token in kept:
        if mass / total >= top_p:
            break
        nucleus.append(token)
        mass += probabilities[token]
    result = torch.zeros(len(probabilities))
    for token in nucleus:
        result[token] = probabilities[token] / mass
    return result


def test_a_uniform_falls_into_the_token_whose_interval_holds_it():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(6, -1)
    tokens = sample(logits, torch.tensor([0.0, 0.09, 0.11, 0.31, 0.59, 0.61]), temperature=1.0).tokens
    assert tokens.tolist() == [0, 0, 1, 2, 2, 3]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 1, 4, 50])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.3])
def test_draws_follow_the_truncated_distribution(temperature, top_k, top_p):
    logits = torch.tensor([1.5, -0.3, 0.7, 2.2, -2.0, 0.1, 1.1])
    expected = plain_truncation(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = shares(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    assert torch.allclose(drawn, expected, atol=1e-3)


def test_the_log_probability_is_of_the_whole_distribution_at_this_temperature():
    logits = torch.randn(16, 300) * 3
    for settings in ({}, {"top_k": 3}, {"top_p": 0.4}):
        drawn = sample(logits, torch.rand(16), temperature=0.7, **settings)
        expected = (logits.double() / 0.7).log_softmax(-1).gather(-1, drawn.tokens[:, None])[:, 0]
        assert drawn.logprobs.dtype == torch.float32
        assert torch.allclose(drawn.logprobs.double(), expected, rtol=1e-5, atol=1e-5)


def test_temperature_zero_takes_the_best_and_reports_it_at_temperature_one():
    logits = torch.randn(8, 40)
    drawn = sample(logits, torch.rand(8), temperature=0.0, top_k=5, top_p=0.5)
    assert torch.equal(drawn.tokens, logits.argmax(-1))
    assert torch.allclose(drawn.logprobs, logits.log_softmax(-1).amax(-1), atol=1e-5)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.9}])
def test_the_ends_of_the_interval_never_give_an_impossible_token(uniform, settings):
    for scale in (0.1, 1.0, 30.0):
        logits = torch.randn(64, 50) * scale
        logits[:, 0] = logits[:, -1] = -torch.inf
        tokens = sample(logits, torch.full((64,), uniform), temperature=1.0, **settings).tokens
        assert tokens.min() > 0
        assert tokens.max() < 49
        if "top_k" in settings:
            assert (logits.topk(2).indices == tokens[:, None]).any(-1).all()


def test_a_nucleus_wider_than_the_first_candidates_is_still_exact():
    logits = torch.linspace(0, 2, 6000)[torch.randperm(6000)]
    expected = plain_truncation(logits, temperature=1.0, top_k=0, top_p=0.7)
    tokens = sample(logits.expand(2000, -1), grid(2000), temperature=1.0, top_p=0.7).tokens
    assert int((expected > 0).sum()) > 2 * 1024
    assert (expected[tokens] > 0).all()
    ranks = logits.argsort(descending=True).argsort()[tokens].double()
    mean_rank = (expected.double() * logits.argsort(descending=True).argsort()).sum()
    assert ranks.mean().item() == pytest.approx(mean_rank.item(), rel=2e-3)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, {"temperature": 0.8}, {"temperature": 1.0, "top_k": 40, "top_p": 0.7}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_large_vocabulary_are_drawn_as_each_alone(settings, dtype):
    """They are drawn in pieces of three rows, the last of one."""
    logits = (3 * torch.randn(7, 200_000, generator=torch.Generator().manual_seed(0))).to(dtype)
    together = sample(logits, grid(7), **settings)
    alone = [sample(logits[row : row + 1], grid(7)[row : row + 1], **settings) for row in range(7)]
    assert together.tokens.tolist() == [int(drawn.tokens) for drawn in alone]
    assert torch.equal(together.logprobs, torch.cat([drawn.logprobs for drawn in alone]))
    expected = (logits.double() / (settings["temperature"] or 1.0)).log_softmax(-1)
    torch.testing.assert_close(together.logprobs.double(), expected[range(7), together.tokens], rtol=1e-5, atol=1e-5)


def test_greedily_the_first_of_equal_tokens_is_taken():
    logits = torch.zeros(2, 300, dtype=torch.bfloat16)
    logits[0, [7, 200]] = 2.0
    assert sample(logits, grid(2), temperature=0.0).tokens.tolist() == [7, 0]


def test_half_precision_logits_are_summed_in_more():
    logits = torch.zeros(1, 50_000, dtype=torch.bfloat16)
    tokens = sample(logits.expand(4, -1), torch.tensor([0.0, 0.25, 0.5, 1 - 2**-24]), temperature=1.0).tokens
    assert tokens.tolist() == [0, 12_500, 25_000, 49_999]


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.9}])
def test_a_model_that_gives_nan_is_seen_in_its_log_probabilities(settings):
    logits = torch.randn(3, 600)
    logits[1] = torch.nan
    drawn = sample(logits, torch.rand(3), temperature=1.0, **settings)
    assert drawn.logprobs.isnan().tolist() == [False, True, False]
    assert drawn.tokens.max() < 600


def splitmix64(state):
    """The generator of Steele, Lea and Flood in Python's own integers: one output from one state."""
    word = (1 << 64) - 1
    z = (state + 0x9E3779B97F4A7C15) & word
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
    return z ^ (z >> 31)


def test_the_reference_generator_gives_its_published_first_number():
    assert splitmix64(1234567) == 6457827717110365317


@pytest.mark.parametrize("seed", [0, 1, -3, 2**63 + 11])
def test_uniforms_are_splitmix64_of_seed_sample_and_position(seed):
    samples = [0, 1, 77, 2**40 + 3]
    drawn = uniforms(seed, torch.tensor(samples), length=5)
    for row, sample_id in enumerate(samples):
        for position in range(5):
            word = splitmix64(splitmix64(splitmix64(seed % 2**64) ^ sample_id) ^ position)
            assert drawn[row, position].item() == (word >> 40) / 2**24


def test_uniforms_do_not_depend_on_the_batch():
    whole = uniforms(3, torch.tensor([5, 9, 2]), length=7)
    assert torch.equal(uniforms(3, torch.tensor([2, 5]), length=7), whole[[2, 0]])
    assert torch.equal(uniforms(3, torch.tensor([9]), length=4), whole[[1], :4])
    assert not torch.equal(uniforms(4, torch.tensor([9]), length=7), whole[[1]])


def test_uniforms_are_uniform():
    drawn = uniforms(0, torch.arange(1000), length=200)
    assert 0 <= drawn.min() < drawn.max() < 1
    counts = torch.histc(drawn, bins=100, min=0, max=1)
    chi_square = ((counts - 2000) ** 2 / 2000).sum().item()
    assert 50 < chi_square < 150  # 99 degrees of freedom: four deviations around 99 are 43 to 155
    assert drawn.mean().item() == pytest.approx(0.5, abs=4 * (1 / 12 / 200_000) ** 0.5)


@pytest.mark.parametrize("shift", [(0, 1), (1, 0), (1, 1), (0, 64), (64, 0)])
def test_neighbours_are_independent(shift):
    rows, columns = shift
    drawn = uniforms(0, torch.arange(1000), length=200) - 0.5
    a, b = drawn[rows:, columns:], drawn[: 1000 - rows, : 200 - columns]
    assert abs((a * b).mean().item()) * 12 < 4 / a.numel() ** 0.5


def test_neighbouring_seeds_are_independent():
    a, b = (uniforms(seed, torch.arange(1000), length=200) - 0.5 for seed in (6, 7))
    assert abs((a * b).mean().item()) * 12 < 4 / a.numel() ** 0.5
