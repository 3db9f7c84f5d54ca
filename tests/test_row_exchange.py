"""Rows on one, two and four ranks: what arrives is what was made elsewhere, bit for bit, and no more than is wanted."""

from dataclasses import fields

import pytest
import torch

from rlhf.row_exchange import concatenated, fetched, gather_rollout, packed, tensors_of, texts_of, unpacked
from rlhf.runtime import dist
from rlhf.runtime.dist import World
from rlhf.types import HeldRows, Rollout, Sequences
from tests.ranks import run_on_ranks

ROWS = 8
WANTED = [[6, 1], [0, 7, 3], [5], [2, 2, 4]]
"""Rows that each rank of four asks for; one row is wanted twice."""


def made(rows, num_prompt, num_response):
    """A rollout of some of the rows, whose numbers follow from the row: whoever makes it makes the same."""
    rows = torch.tensor(rows)
    columns = torch.arange(num_prompt + num_response)
    mask = (columns >= rows[:, None] % num_prompt) & (columns < num_prompt + 1 + rows[:, None] % num_response)
    numbers = {name: torch.randn(ROWS, 9, generator=torch.Generator().manual_seed(3))[rows] for name in "ab"}
    texts = tuple(f"text {row}" for row in rows.tolist())
    states = tuple(
        torch.full((int(count), 2), row.item()).bfloat16() for row, count in zip(rows, mask.sum(-1), strict=True)
    )
    own = Sequences(
        sequences=rows[:, None] * 100 + columns,
        attention_mask=mask,
        prompts=texts,
        responses=tuple(map(str.upper, texts)),
        actor_states=states,
    )
    tokens = numbers["a"][:, :num_response] * mask[:, num_prompt:]
    names = ("logprobs", "generation_logprobs", "values", "kl", "entropy")
    return Rollout(
        held=HeldRows.of(own, mask.sum(-1)),
        response_mask=mask[:, num_prompt:],
        sample_ids=rows,
        reference_logprobs=None,
        **dict.fromkeys(names, tokens),
        source_scores=numbers["b"][:, :3],
        raw_scores=numbers["b"][:, 0],
        scores=numbers["b"][:, 1],
        ended=rows % 2 == 0,
    )


def everywhere(ranks):
    """On this rank: the gathered rollout, its rows as they were fetched, and texts."""
    dist.start("cpu")
    world = World(torch.distributed.get_rank(), ranks, torch.device("cpu"))
    mine = list(range(ROWS))[world.rank * ROWS // ranks : (world.rank + 1) * ROWS // ranks]
    # The last ranks have stopped earlier than the first: fewer columns.
    rollout = gather_rollout(made(mine, 3, 5 if world.rank == 0 else 4), pad_id=-1, world=world)
    wanted = [torch.tensor(rows) for rows in WANTED[:ranks]]
    twice = concatenated([rollout, rollout.rows(torch.arange(ROWS).flip(0))])
    later = fetched(twice.held, [rows + ROWS for rows in wanted])
    return rollout, fetched(rollout.held, wanted), later, texts_of(rollout.held.rows(torch.tensor([7, 0, 3])))


@pytest.mark.parametrize("ranks", [2, 4])
def test_numbers_go_everywhere_and_sequences_to_those_who_want_them(ranks):
    whole = made(range(ROWS), 3, 5)
    for rank, (rollout, own, later, texts) in enumerate(run_on_ranks(everywhere, ranks, ranks)):
        for name, expected in tensors_of(whole).items():
            found = getattr(rollout, name)
            if name in ("response_mask", "logprobs", "generation_logprobs", "values", "kl", "entropy"):
                late = ROWS // ranks  # rows of other ranks had four columns, and one of padding since
                assert torch.equal(found[:late], expected[:late])
                assert not found[late:, 4].any()
                expected, found = expected[late:, :4], found[late:, :4]
                assert torch.equal(found, made(range(ROWS), 3, 4).__dict__[name][late:])
                continue
            assert torch.equal(found, expected), name
        assert len(rollout.held.own.prompts) == ROWS // ranks  # nothing of other ranks
        assert [row[0].item() // 100 for row in own.sequences[:, 3:]] == WANTED[rank]
        assert own.attention_mask.sum(-1).tolist() == rollout.held.num_tokens[WANTED[rank]].tolist()
        assert [int(rows[0, 0]) for rows in own.actor_states] == WANTED[rank]
        assert [len(rows) for rows in own.actor_states] == own.attention_mask.sum(-1).tolist()
        assert [row[0].item() // 100 for row in later.sequences[:, 3:]] == [7 - row for row in WANTED[rank]]
        assert texts == [(f"text {row}", f"TEXT {row}") for row in (7, 0, 3)]


def test_one_rank_fetches_from_itself_without_any_other():
    rollout = made(range(ROWS), 3, 5)
    found = fetched(rollout.held, [torch.tensor([4, 4, 1])])
    assert torch.equal(found.sequences, rollout.held.own.sequences[[4, 4, 1]])
    assert found.actor_states[2] is rollout.held.own.actor_states[1]


def test_rows_of_any_types_survive_as_bytes():
    columns = {
        "bits": torch.tensor([[float("nan"), -0.0], [float("inf"), 1e-45]]),
        "half": torch.ones(2, 2, 3).bfloat16(),
        "flags": torch.tensor([True, False]),
        "none": torch.zeros(2, 0),
    }
    found = unpacked(packed(columns), columns)
    assert found.keys() == columns.keys()
    for name, values in columns.items():
        assert found[name].dtype == values.dtype
        assert found[name].flatten().view(torch.uint8).tolist() == values.flatten().view(torch.uint8).tolist()
    one = {name: values[:1] for name, values in columns.items()}
    assert torch.equal(unpacked(packed(one), one)["half"], columns["half"][:1])


def test_every_field_of_a_rollout_of_all_ranks_is_known():
    """Fields that are neither gathered nor held would stay those of one rank."""
    kinds = {field.name: str(field.type) for field in fields(Rollout)}
    assert {name for name, kind in kinds.items() if not kind.startswith("Tensor")} == {"held"}
