"""Working weights off the device: the same numbers as on it, whatever happens, and memory for a few units only."""

import pytest
import torch

from tests.engine import plain, tiny
from tests.engine.offload.param_runs import FP32_STEPS, KINDS

BLOCK = sum(parameter.numel() for parameter in tiny.reference().llama.model.layers[0].parameters())


@pytest.fixture
def runs(on_ranks):
    """`runs(ranks)[rank][part]`: what `param_runs.part` returned there."""
    return lambda ranks: [rank["offload_param"] for rank in on_ranks(ranks)]


@pytest.fixture(scope="module")
def twenty_steps():
    """Loss and norm of each step of one process without an engine."""
    return plain.train(tiny.reference(), 20, rate=lambda step: 3e-3)


def same(found, expected):
    """Curves and all tensors, bit for bit."""
    curve, *tensors = found
    expected_curve, *expected_tensors = expected
    assert curve == expected_curve
    for mine, theirs in zip(tensors, expected_tensors, strict=True):
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_steps_from_disk_are_those_of_plain_torch(runs, twenty_steps, ranks):
    expected = twenty_steps[: FP32_STEPS[ranks]]
    for rank in runs(ranks):
        found, _, _ = rank["stores"]["fp32", "disk"]
        for (loss, norm), (expected_loss, expected_norm) in zip(found, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-4)


@pytest.mark.parametrize(
    ("ranks", "precision", "store"),
    [
        *((ranks, precision, "disk") for ranks in (1, 2, 4) for precision in ("fp32", "bf16")),
        *((ranks, "bf16", store) for ranks in (1, 2) for store in ("host", "both")),
    ],
)
def test_stores_agree_bit_for_bit(runs, ranks, precision, store):
    for rank in runs(ranks):
        same(rank["stores"][precision, store], rank["stores"][precision, "device"])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_models_and_settings_of_all_kinds_train_from_disk_as_from_memory(runs, ranks, kind):
    for rank in runs(ranks):
        same(rank["kinds"][kind, "disk"], rank["kinds"][kind, "device"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_nothing_between_steps_disturbs_them(runs, ranks):
    for rank in runs(ranks):
        found, expected, logits, raised = rank["disturbed"]
        assert raised == 2
        assert found == expected
        assert all(torch.equal(found, logits[0]) for found in logits)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_frozen_model_on_disk_scores_as_one_in_memory_and_leaves_nothing_behind(runs, ranks):
    model = tiny.reference()
    with torch.no_grad():
        expected = model(tiny.batch(50)[0])
    for rank in runs(ranks):
        logits, exported, remembered, whole = rank["frozen"]
        assert all(torch.equal(found, expected) for found in logits)
        assert all(torch.equal(exported[name], parameter) for name, parameter in model.named_parameters())
        assert remembered == 0
        assert whole == 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_adapters_learn_on_weights_that_are_on_disk(runs, ranks):
    for rank in runs(ranks):
        evaluated, generated, unchanged, norms = rank["adapters"]["disk"]
        expected, _, _, expected_norms = rank["adapters"]["device"]
        assert torch.equal(evaluated, expected)
        assert torch.equal(generated, expected)
        assert unchanged
        assert norms == expected_norms


@pytest.mark.parametrize("ranks", [1, 2])
def test_live_parameters_do_not_grow_with_the_model(runs, ranks):
    for rank in runs(ranks):
        peaks = rank["peaks"]
        peak, between_steps = peaks["disk", 16]
        assert between_steps == 0
        assert peak == peaks["disk", 4][0]
        assert peak < 4 * 1.1 * BLOCK
    in_memory = runs(2)[0]["peaks"]
    assert in_memory["device", 16][0] > 2 * in_memory["device", 4][0], "what is measured grows where it should"


def test_a_reduce_bucket_saves_collectives_and_changes_no_number(runs):
    for rank in runs(2):
        found = rank["collectives"]
        # root, embedding, three blocks, head; then two blocks in one; then all three
        assert [found[stage, blocks][:2] for stage in (1, 2) for blocks in (1, 2, 3)] == [(6, 6), (5, 5), (4, 4)] * 2
        # ZeRO 3 gathers the first two blocks and the middle one again for backward, and never the embedding
        assert found[3, 3][:2] == (6 + 3, 6)
        first = found[1, 1][2]
        for *_, points in found.values():
            for point, expected in zip(points, first, strict=True):
                assert point == pytest.approx(expected, rel=1e-6)


def test_small_parameters_are_kept_whole_at_zero_three_and_their_gradients_are_summed(runs):
    small = {name for name, parameter in tiny.reference().named_parameters() if parameter.numel() < 33}
    names = {name for name, _ in tiny.reference().named_parameters()}
    assert small
    for rank in runs(2):
        found, expected = rank["persistent"]
        assert found[2][:2] == (names, set())
        assert found[3][:2] == (names - small, small)
        for stage in (2, 3):
            for point, known in zip(found[stage][2], expected, strict=True):
                assert point == pytest.approx(known, rel=1e-6)


def test_units_are_gathered_ahead_of_use_forward_and_back(runs):
    # 0 root, 1 embedding, 2 to 4 blocks, 5 head: by block, what is gathered or on its way
    for rank in runs(2):
        found = rank["ahead"]
        one = {0: [0, 2, 3], 1: [0, 3, 4], 2: [0, 4, 5]}, {2: [0, 3, 4], 1: [0, 2, 3], 0: [0, 2]}
        none = {0: [0, 2], 1: [0, 3], 2: [0, 4]}, {2: [0, 4], 1: [0, 3], 0: [0, 2]}
        assert found["one"] == found["few"] == one
        assert found["none"] == found["alone"] == none
        assert found["two"][0] == {0: [0, 2, 3, 4], 1: [0, 3, 4, 5], 2: [0, 4, 5]}
        assert found["two"][1] == {2: [0, 2, 3, 4], 1: [0, 2, 3], 0: [0, 2]}
