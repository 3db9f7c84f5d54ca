"""From `data.*` to samples: every stage, limits, held-out rows, weights, shares, the cache, and bad data."""

import json
import logging

import pytest

from data.build_samples import LengthLimits
from data.samples import demonstrations, preferences, prompts, ptx_texts
from rlhf.config.data_config import BadRows, DataConfig, RewrittenTurns, StageDataConfig
from rlhf.config.engine_config import EngineConfig
from rlhf.config.eval_config import EvalConfig
from rlhf.config.ppo_config import PPOConfig, PtxConfig
from rlhf.config.stage_configs import LoraConfig, OptimizerConfig, RewardConfig, SFTConfig
from rlhf.text.tokenizer import decode, load_tokenizer
from tests import fakes

SHARED = {
    "engine": EngineConfig(zero_stage=0),
    "lora": LoraConfig(rank=0),
    "micro_batch_size": 2,
    "max_prompt_tokens": 20,
    "max_response_tokens": 20,
    "seed": 0,
}
SUPERVISED = {"optimizer": OptimizerConfig(lr=1e-3), "global_batch_size": 4}
ROLLOUT = {
    "iterations": 1,
    "rollout_size": 4,
    "rollout_micro_batch_size": 2,
    "minibatch_size": 4,
    "actor_optimizer": OptimizerConfig(lr=1e-3),
    "critic_optimizer": OptimizerConfig(lr=1e-3),
}
STAGES = {"sft": demonstrations, "reward": preferences, "ppo": prompts}
PAIRS = [{"prompt": f"p{n}", "chosen": f" good {n}", "rejected": f" bad {n}", "margin": n / 2} for n in range(40)]


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
    return load_tokenizer(str(fakes.pad_is_eos_tokenizer(tmp_path_factory.mktemp("gpt"))))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return load_tokenizer(str(fakes.chat_tokenizer(tmp_path_factory.mktemp("chat"))))


@pytest.fixture
def write(tmp_path):
    def save(name, rows):
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return save


def samples(stage, train, *, tokenizer, evaluation=(), fraction=0.0, limits=None, **data):
    config = DataConfig(
        **{stage: StageDataConfig(train=list(train), eval=list(evaluation), eval_fraction=fraction)}, **data
    )
    kinds = {"sft": (SFTConfig, SUPERVISED), "reward": (RewardConfig, SUPERVISED), "ppo": (PPOConfig, ROLLOUT)}
    kind, own = kinds[stage]
    return STAGES[stage](config, kind(**{**SHARED, **own, **(limits or {})}), tokenizer=tokenizer)


def texts(tokenizer, found):
    return [decode(tokenizer, sample.input_ids) for sample in found]


def test_every_stage_reads_the_same_preferences(gpt, write):
    file = write("pairs.jsonl", PAIRS)
    sft, reward, ppo = (samples(stage, [file], tokenizer=gpt).train for stage in STAGES)
    assert texts(gpt, sft) == [f"p{n} good {n}" for n in range(40)]
    assert [decode(gpt, pair.chosen) for pair in reward] == [f"p{n} good {n}" for n in range(40)]
    assert [decode(gpt, pair.rejected) for pair in reward] == [f"p{n} bad {n}" for n in range(40)]
    assert [pair.margin for pair in reward] == [n / 2 for n in range(40)]
    assert [prompt.text for prompt in ppo] == texts(gpt, ppo) == [f"p{n}" for n in range(40)]


def test_conversations_reach_every_stage(chat, write):
    user, good, bad = ({"role": role, "content": text} for role, text in (("user", "q"), *[("assistant", "a")] * 2))
    bad["content"] = "b"
    pairs = write("pairs.jsonl", [{"chosen": [user, good], "rejected": [user, bad]}])
    turns = write("turns.jsonl", [{"messages": [user, good]}])
    limits = {"max_prompt_tokens": 40}
    (demonstration,) = samples("sft", [turns], tokenizer=chat, limits=limits).train
    (pair,) = samples("reward", [pairs], tokenizer=chat, limits=limits).train
    (prompt,) = samples("ppo", [turns], tokenizer=chat, limits=limits).train
    assert demonstration.input_ids.tolist() == pair.chosen.tolist()
    assert demonstration.input_ids[: len(prompt)].tolist() == prompt.input_ids.tolist()
    assert demonstration.target_mask.tolist() == [False] * len(prompt) + [True] * 2  # "a" and the end of the turn
    assert prompt.text == "q"
    assert [targets.tolist() for targets in pair.targets] == [demonstration.target_mask.tolist()] * 2


def test_in_responses_of_several_turns_what_the_user_says_is_no_response(chat, write):
    user, good, bad = ({"role": role, "content": text} for role, text in (("user", "q"), *[("assistant", "a")] * 2))
    bad["content"] = "b"
    file = write("pairs.jsonl", [{"prompt": [user], "chosen": [good, user, good], "rejected": [bad]}])
    limits = {"max_prompt_tokens": 40, "max_response_tokens": 60}
    (pair,) = samples("reward", [file], tokenizer=chat, limits=limits).train
    assert chat.decode(pair.chosen[pair.targets[0]]) == "a<|im_end|>a<|im_end|>"


def test_the_eos_is_a_target_where_the_tokenizer_padded_with_it(gpt, write):
    (sample,) = samples("sft", [write("a.jsonl", [{"prompt": "a", "completion": " b"}])], tokenizer=gpt).train
    assert (sample.input_ids[-1], sample.target_mask[-1]) == (gpt.eos_token_id, True)


def test_prompts_are_learnt_when_response_only_is_off(gpt, write):
    file = write("a.jsonl", [{"prompt": "abc", "completion": " b"}])
    (sample,) = samples("sft", [file], tokenizer=gpt, limits={"response_only": False}).train
    assert sample.target_mask.tolist() == [False] + [True] * (len(sample) - 1)


# ---- limits


def test_long_rows_are_dropped_and_counted(gpt, write, caplog):
    rows = [
        {"prompt": "x" * 21, "completion": "y"},
        {"prompt": "x" * 20, "completion": "y" * 19},  # 19 letters and the EOS
        {"prompt": "x", "completion": "y" * 20},
        {"prompt": "x" * 30, "completion": "y" * 30},
    ]
    with caplog.at_level(logging.WARNING):
        found = samples("sft", [write("a.jsonl", rows)], tokenizer=gpt)
    assert texts(gpt, found.train) == ["x" * 20 + "y" * 19]
    assert found.dropped == {
        "prompt longer than sft.max_prompt_tokens=20": 2,
        "response longer than sft.max_response_tokens=20": 1,
    }
    assert (
        "a.jsonl): dropped 3 of 4 rows\n  2 for a prompt longer than sft.max_prompt_tokens=20\n"
        "  1 for a response longer than sft.max_response_tokens=20\n"
    ) in caplog.text


def test_a_pair_is_dropped_where_either_response_is_too_long(gpt, write):
    rows = [
        {"prompt": "x", "chosen": "y" * 20, "rejected": "z"},
        {"prompt": "x", "chosen": "y", "rejected": "z" * 20},
        {"prompt": "x", "chosen": "y", "rejected": "z"},
    ]
    found = samples("reward", [write("a.jsonl", rows)], tokenizer=gpt)
    assert (len(found.train), found.dropped) == (1, {"response longer than reward.max_response_tokens=20": 2})


def test_when_everything_is_dropped_the_error_says_why(gpt, write):
    file = write("a.jsonl", [{"prompt": "x" * 21}, {"prompt": "x" * 22}])
    with pytest.raises(
        ValueError, match=r"data.ppo.train: all rows were dropped: 2 for a prompt longer than ppo.max_pr"
    ):
        samples("ppo", [file], tokenizer=gpt)
    with pytest.raises(ValueError, match=r"data.ppo.eval: all rows were dropped"):
        samples("ppo", [write("b.jsonl", [{"prompt": "x"}])], evaluation=[file], tokenizer=gpt)


# ---- train, eval, weights, shares


def test_held_out_rows_are_taken_away_and_the_same_for_every_stage(gpt, write):
    file = write("pairs.jsonl", PAIRS)
    sft = samples("sft", [file], tokenizer=gpt, fraction=0.1)
    ppo = samples("ppo", [file], tokenizer=gpt, fraction=0.1)
    assert (len(sft.train), len(sft.eval)) == (36, 4)
    assert len({*texts(gpt, sft.train), *texts(gpt, sft.eval)}) == 40
    assert [text.split(" ")[0] for text in texts(gpt, sft.eval)] == [prompt.text for prompt in ppo.eval]


def test_evaluation_data_of_its_own_leaves_the_training_rows_alone(gpt, write):
    train, evaluation = write("train.jsonl", PAIRS[:30]), write("eval.jsonl", PAIRS[30:])
    found = samples("ppo", [train], evaluation=[evaluation], tokenizer=gpt, fraction=0.5)
    assert [prompt.text for prompt in found.train] == [f"p{n}" for n in range(30)]
    assert [prompt.text for prompt in found.eval] == [f"p{n}" for n in range(30, 40)]


def test_weights_blend_sources_and_repeat_no_held_out_row(gpt, write):
    first, second = write("a.jsonl", PAIRS[:20]), write("b.jsonl", PAIRS[20:])
    sources = [{"path": first, "weight": 0.5}, {"path": second, "weight": 2}]
    found = samples("ppo", sources, tokenizer=gpt, fraction=0.1)
    train = [prompt.text for prompt in found.train]
    evaluation = [prompt.text for prompt in found.eval]
    assert (len(train), len(evaluation)) == (9 + 2 * 18, 1 + 2)
    assert {train.count(f"p{n}") for n in range(20)} == {0, 1}
    assert {train.count(f"p{n}") for n in range(20, 40)} == {0, 2}
    assert not set(train) & set(evaluation)
    assert len(set(evaluation)) == 3


def test_a_bad_weight_is_named(gpt, write):
    with pytest.raises(ValueError, match=r"data.ppo.train\[0\].weight=0: expected a positive number"):
        samples("ppo", [{"path": write("a.jsonl", PAIRS), "weight": 0}], tokenizer=gpt)


def test_the_stage_split_divides_rows_without_overlap(gpt, write):
    file = write("pairs.jsonl", PAIRS)
    split = {"stage_split": [2, 4, 4], "split_seed": 7}
    sft = {text.split(" ")[0] for text in texts(gpt, samples("sft", [file], tokenizer=gpt, **split).train)}
    reward = {decode(gpt, p.chosen).split(" ")[0] for p in samples("reward", [file], tokenizer=gpt, **split).train}
    ppo = {prompt.text for prompt in samples("ppo", [file], tokenizer=gpt, **split).train}
    assert [len(part) for part in (sft, reward, ppo)] == [8, 16, 16]
    assert len(sft | reward | ppo) == 40


def test_a_stage_without_a_share_is_told_so(gpt, write):
    with pytest.raises(ValueError, match=r"data.stage_split=\[5, 5, 0\] leaves ppo none of 40 rows"):
        samples("ppo", [write("a.jsonl", PAIRS)], tokenizer=gpt, stage_split=[5, 5, 0])


# ---- bad data


def test_no_data_is_refused(gpt):
    with pytest.raises(ValueError, match="data.sft.train is empty; expected at least one"):
        samples("sft", [], tokenizer=gpt)


def test_missing_columns_name_the_setting_that_renames_them(gpt, write):
    files = [write("a.jsonl", PAIRS), write("b.jsonl", [{"question": "a", "answer": "b"}])]
    with pytest.raises(ValueError, match=r"train\[1\].*columns: \{prompt: ITS_NAME, completion: ITS_NAME\}"):
        samples("sft", files, tokenizer=gpt)


def test_renamed_columns_are_found(gpt, write):
    source = {"path": write("a.jsonl", [{"q": "a", "a": " b"}]), "columns": {"prompt": "q", "completion": "a"}}
    assert texts(gpt, samples("sft", [source], tokenizer=gpt).train) == ["a b"]


def test_bad_rows_are_all_reported_with_their_numbers_in_the_file(gpt, write):
    rows = [*PAIRS[:5], {"prompt": "a", "chosen": "b", "rejected": "b"}, *PAIRS[5:9], {"prompt": "", "chosen": "b"}]
    file = write("a.jsonl", rows)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        samples("reward", [file], tokenizer=gpt)
    assert str(error.value) == (
        f"data.reward.train[0] ({file}): 2 of 11 rows cannot be used (from row 0); "
        "repair them or set data.reward.bad_rows=drop:\n"
        "  row 5: `chosen` and `rejected` are identical; expected one to be better.\n"
        "  row 10: only ['prompt', 'chosen'] hold something; expected chosen and rejected."
    )


def test_bad_rows_are_dropped_and_counted_where_the_user_says_so(gpt, write):
    rows = [PAIRS[0], {"prompt": "a", "chosen": "b", "rejected": "b"}, {"chosen": "yes", "rejected": "no"}, PAIRS[1]]
    config = StageDataConfig(train=[write("a.jsonl", rows)], eval_fraction=0.0, bad_rows=BadRows.drop)
    splits = preferences(DataConfig(reward=config), RewardConfig(**SHARED, **SUPERVISED), tokenizer=gpt)
    assert len(splits.train) == 2
    assert sorted(splits.dropped.values()) == [1, 1]
    assert all("cannot be used" in reason for reason in splits.dropped)


def test_problems_that_only_show_when_tokenising_have_row_numbers_too(gpt, write):
    file = write("a.jsonl", [{"chosen": "a b", "rejected": "a c"}, {"chosen": "yes", "rejected": "no"}])
    with pytest.raises(ValueError, match="row 1: `chosen` and `rejected` begin differently"):
        samples("reward", [file], tokenizer=gpt)


def test_messages_without_a_chat_template_name_the_setting(gpt, write):
    file = write("a.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    with pytest.raises(ValueError, match=r"row 0: the row has messages, but.*model.chat_template"):
        samples("sft", [file], tokenizer=gpt)


ODD = [
    '{"prompt": "a", "chosen": "b", "rejected": "c"}',
    '{"prompt": "a", "chosen": "b"',
    '{"prompt": "a\\ud800", "chosen": "b", "rejected": "c"}',
    '{"prompt": "a", "chosen": "b", "rejected": "c", "tools": %s}' % ("[" * 200 + "]" * 200),
    '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": %s}' % ("9" * 5000),
    '{"prompt": "a", "chosen": "b", "rejected": "c", "id": ["x", 1, {"y": null}]}',
]


def test_rows_that_cannot_be_read_are_bad_rows_like_others(gpt, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(ODD))
    with pytest.raises(ValueError) as error:  # noqa: PT011
        samples("reward", [file.as_posix()], tokenizer=gpt)
    head, *lines = str(error.value).split("\n")
    assert head.startswith(f"data.reward.train[0] ({file}): 4 of 6 rows cannot be used (from row 0); repair them")
    assert [line.split(": ")[0] for line in lines] == ["  row 1", "  row 2", "  row 3", "  row 4"]
    assert "line 2 is not one JSON object" in lines[0]
    assert "`prompt` has half of a character" in lines[1]
    assert "`tools` is nested more than 100 deep" in lines[2]
    assert "`margin` holds a number of more than 4300 digits" in lines[3]
    config = StageDataConfig(train=[str(file)], eval_fraction=0.0, bad_rows=BadRows.drop)
    splits = preferences(DataConfig(reward=config), RewardConfig(**SHARED, **SUPERVISED), tokenizer=gpt)
    assert (len(splits.train), sum(splits.dropped.values())) == (2, 4)


def test_a_file_without_a_row_that_can_be_read_names_its_rows_and_not_its_columns(gpt, tmp_path):
    (tmp_path / "a.json").write_text('{\n"prompt": "a"\n}\n')
    with pytest.raises(ValueError, match=r"3 of 3 rows cannot be used .*\n  row 0: line 1 is not one JSON object"):
        samples("ppo", [str(tmp_path / "a.json")], tokenizer=gpt)


def test_rows_of_several_files_are_named_with_their_file(gpt, write, tmp_path):
    write("part-0.jsonl", PAIRS[:3])
    write("part-1.jsonl", [PAIRS[0], {"prompt": "a", "chosen": "b", "rejected": "b"}])
    with pytest.raises(ValueError, match=r"1 of 5 rows .*\n  row 1 of part-1.jsonl: `chosen` and `rejected` are"):
        samples("reward", [str(tmp_path)], tokenizer=gpt)


def test_many_reasons_to_drop_rows_are_not_all_said(gpt, tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n' + "\n".join("x" * n for n in range(1, 9)))
    config = StageDataConfig(train=[str(tmp_path / "a.jsonl")], eval_fraction=0.0, bad_rows=BadRows.drop)
    with caplog.at_level(logging.WARNING):
        prompts(DataConfig(ppo=config), PPOConfig(**SHARED, **ROLLOUT), tokenizer=gpt)
    first, *lines = caplog.text.strip().split("\n")
    assert "dropped 8 of 9 rows" in first
    assert len(lines) == 6
    assert lines[0].startswith("  1 for a row that cannot be used: line 2 is not one JSON object")
    assert lines[-1] == "  3 for 3 more reasons"


def test_pairs_that_become_the_same_tokens_are_bad_rows(chat, write):
    user, good = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    rows = [
        {"prompt": [user], "chosen": [good], "rejected": [{**good, "name": "other"}]},  # which the template leaves out
        {"prompt": "q", "chosen": "a <|im_end|>", "rejected": "a <|im_end|>\n"},
    ]
    with pytest.raises(ValueError, match="row 0, 1: `chosen` and `rejected` become the same tokens"):
        samples("reward", [write("a.jsonl", rows)], tokenizer=chat, limits={"max_prompt_tokens": 99})


@pytest.mark.parametrize("cached", [False, True])
def test_rewritten_turns_are_counted_or_learnt_in_sequences_of_their_own(write, tmp_path, cached):
    template = fakes.CHAT_TEMPLATE.replace("{{ message.content }}", "{{ message.content if loop.last else 'x' }}")
    template = template.replace(
        "message.content if loop.last", "message.content if loop.last or message.role == 'user'"
    )
    tokenizer = load_tokenizer(str(fakes.chat_tokenizer(tmp_path / "chat", chat_template=template)))
    turns = [{"role": role, "content": text} for role, text in [("user", "q"), ("assistant", "a")] * 3]
    file = write("a.jsonl", [{"messages": turns}, {"messages": turns[:2]}, {"messages": turns[:4]}])

    def read(rewritten_turns):
        sources = StageDataConfig(train=[file], eval_fraction=0.0, rewritten_turns=rewritten_turns)
        config = SFTConfig(**{**SHARED, **SUPERVISED, "max_prompt_tokens": 99})
        data = DataConfig(sft=sources, cache_dir=str(tmp_path / "cache") if cached else None)
        return [demonstrations(data, config, tokenizer=tokenizer) for _ in range(2)]

    for splits in read(RewrittenTurns.skip):
        assert splits.note.startswith("data.sft: 3 assistant turns in 2 rows are not learnt: the chat template writes")
        assert [sample.target_mask.sum() for sample in splits.train] == [2, 2, 2]
    for splits in read(RewrittenTurns.as_generated):
        assert splits.note == ""
        assert [sample.target_mask.sum() for sample in splits.train] == [2] * 6
        assert {decode(tokenizer, sample.input_ids[sample.target_mask]) for sample in splits.train} == {"a"}


def test_a_column_that_is_read_beside_the_needed_ones_is_named_too(gpt, write):
    with pytest.raises(ValueError, match="row 0: `completion` is 3; expected text or a list of messages"):
        samples("ppo", [write("a.jsonl", [{"prompt": "a", "completion": 3}])], tokenizer=gpt)


def test_only_demonstrations_have_rewritten_turns():
    with pytest.raises(ValueError, match="data.ppo.rewritten_turns: only demonstrations have it"):
        DataConfig(ppo=StageDataConfig(rewritten_turns=RewrittenTurns.as_generated))


# ---- fingerprint and cache


def test_the_fingerprint_follows_the_tokens(gpt, write):
    first = samples("ppo", [write("a.jsonl", PAIRS)], tokenizer=gpt, fraction=0.1)
    same = samples("ppo", [write("b.jsonl", PAIRS)], tokenizer=gpt, fraction=0.1)
    other = samples("ppo", [write("a.jsonl", PAIRS)], tokenizer=gpt, fraction=0.2)
    changed = samples("ppo", [write("c.jsonl", [*PAIRS[1:], {"prompt": "new"}])], tokenizer=gpt, fraction=0.1)
    assert first.fingerprint == same.fingerprint
    assert len({found.fingerprint for found in (first, other, changed)}) == 3


def test_the_cache_gives_the_same_samples_and_misses_a_changed_row_or_setting(gpt, chat, write, tmp_path):
    cache = tmp_path / "cache"

    def files_after(rows, tokenizer=gpt, **limits):
        found = samples("sft", [write("a.jsonl", rows)], tokenizer=tokenizer, limits=limits, cache_dir=str(cache))
        return found, len(list(cache.iterdir()))

    first, stored = files_after(PAIRS)
    again, same = files_after(PAIRS)
    assert (stored, same) == (1, 1)
    assert (
        first.fingerprint == again.fingerprint == samples("sft", [write("a.jsonl", PAIRS)], tokenizer=gpt).fingerprint
    )
    assert [s.target_mask.tolist() for s in first.train] == [s.target_mask.tolist() for s in again.train]
    shorter, same = files_after(PAIRS, max_prompt_tokens=2)
    assert (same, len(shorter.train)) == (1, 10)  # limits do not change tokens: p0 ... p9
    changed, stored = files_after([*PAIRS[:-1], {**PAIRS[-1], "chosen": " new"}])
    assert (stored, texts(gpt, changed.train)[-1]) == (2, "p39 new")
    assert files_after(PAIRS, response_only=False)[1] == 3
    assert files_after(PAIRS, tokenizer=chat)[1] == 4


def test_a_changed_template_misses_the_cache(write, tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    cache = tmp_path / "cache"
    found = []
    for number, template in enumerate(
        (fakes.CHAT_TEMPLATE, fakes.CHAT_TEMPLATE.replace("assistant\n", "assistant: \n"))
    ):
        tokenizer = load_tokenizer(str(fakes.chat_tokenizer(tmp_path / str(number), chat_template=template)))
        limits = {"max_prompt_tokens": 99}
        file = write("a.jsonl", rows)
        found += texts(
            tokenizer, samples("ppo", [file], tokenizer=tokenizer, limits=limits, cache_dir=str(cache)).train
        )
    assert len(list(cache.iterdir())) == 2
    assert found[0] != found[1]


def test_who_wants_held_out_rows_only_needs_no_others(gpt, write):
    held_out = LengthLimits("eval", 20, 20, "max_row_tokens")
    config = EvalConfig(
        prompts=4, micro_batch_size=2, max_prompt_tokens=20, max_response_tokens=2, max_row_tokens=20, subset="kind"
    )
    rows = [row | {"kind": f"k{n % 2}"} for n, row in enumerate(PAIRS)]
    file, missing = write("a.jsonl", rows), "nowhere.jsonl"
    for sources in (StageDataConfig(eval=[file]), StageDataConfig(train=[missing], eval=[file])):
        data = DataConfig(sft=sources, reward=sources, ppo=sources)
        for read in STAGES.values():
            splits = read(data, config, tokenizer=gpt, held_out=held_out)
            assert (len(splits.train), len(splits.eval)) == (0, 40)
    assert [
        pair.subset
        for pair in preferences(data, config, tokenizer=gpt, held_out=held_out, subset_column="kind").eval[:3]
    ] == [
        "k0",
        "k1",
        "k0",
    ]


def test_held_out_rows_are_those_that_training_left_out(gpt, write):
    sources = StageDataConfig(train=[write("a.jsonl", PAIRS)], eval_fraction=0.25)
    config = EvalConfig(prompts=4, micro_batch_size=2, max_prompt_tokens=20, max_response_tokens=2, max_row_tokens=20)
    data = DataConfig(ppo=sources)
    trained = prompts(data, PPOConfig(**SHARED, **ROLLOUT), tokenizer=gpt)
    alone = prompts(data, config, tokenizer=gpt, held_out=LengthLimits("eval", 20, 2))
    assert [sample.text for sample in alone.eval] == [sample.text for sample in trained.eval]
    assert len(alone.eval) == 10
    none = prompts(DataConfig(ppo=StageDataConfig()), config, tokenizer=gpt, held_out=LengthLimits("eval", 20, 2))
    assert (none.train, none.eval) == ([], [])


COLUMNS = {"answer": 7, "cases": [{"in": "x", "out": None}, 1.5], "deep": {"a": [True, "é"]}, "id": None}


@pytest.mark.parametrize("cached", [False, True])
def test_further_columns_travel_with_a_prompt_as_they_are(gpt, write, tmp_path, cached):
    file = write("a.jsonl", [{"prompt": "a"} | COLUMNS, {"prompt": "b", "completion": "c", "answer": "8"}])
    data = DataConfig(
        ppo=StageDataConfig(train=[file], eval=[file]), cache_dir=str(tmp_path / "cache") if cached else None
    )
    config = PPOConfig(**SHARED, **ROLLOUT)
    kept = {
        name: [prompts(data, config, tokenizer=gpt, columns=columns) for _ in range(2)]
        for name, columns in {"all": None, "one": ["answer", "missing"], "none": ()}.items()
    }
    for found in kept["all"]:
        assert [dict(prompt.columns) for prompt in found.train] == [
            {"prompt": "a"} | COLUMNS,
            {"prompt": "b", "answer": "8"},
        ]
    for found in kept["one"]:
        assert [dict(prompt.columns) for prompt in found.eval] == [{"answer": 7}, {"answer": "8"}]
    for found in kept["none"]:
        assert [dict(prompt.columns) for prompt in found.train] == [{}, {}]
    assert len({found.fingerprint for pair in kept.values() for found in pair}) == 3
    assert not cached or len(list((tmp_path / "cache").iterdir())) == 1  # the tokens are the same


def test_a_further_column_that_is_kept_must_be_readable(gpt, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a", "answer": "\\ud83d"}\n')
    data = DataConfig(ppo=StageDataConfig(train=[str(file)], eval_fraction=0.0))
    assert len(prompts(data, PPOConfig(**SHARED, **ROLLOUT), tokenizer=gpt).train) == 1
    with pytest.raises(ValueError, match="row 0: `answer` has half of a character"):
        prompts(data, PPOConfig(**SHARED, **ROLLOUT), tokenizer=gpt, columns=["answer"])


def test_subsets_do_not_move_what_training_sees(gpt, write):
    plain = preferences(
        DataConfig(reward=StageDataConfig(train=[write("a.jsonl", PAIRS)])),
        RewardConfig(**SHARED, **SUPERVISED),
        tokenizer=gpt,
    )
    named = preferences(
        DataConfig(reward=StageDataConfig(train=[write("b.jsonl", [row | {"subset": "x"} for row in PAIRS])])),
        RewardConfig(**SHARED, **SUPERVISED),
        tokenizer=gpt,
    )
    assert named.fingerprint == plain.fingerprint
    assert {pair.subset for pair in named.train} == {""}


def texts_of(file, *, tokenizer, coef=1.0, max_tokens=None, **data):
    data = DataConfig(ptx=StageDataConfig(train=[file], eval_fraction=0.0), **data)
    ppo = PPOConfig(**SHARED, **ROLLOUT, rewards=["r"], ptx=PtxConfig(coef=coef, batch_size=4, max_tokens=max_tokens))
    return ptx_texts(data, ppo, tokenizer=tokenizer)


def test_a_long_text_is_cut_so_that_every_token_is_predicted_once(gpt, write):
    long, short = "".join(map(str, range(90))), "ab"
    file = write("texts.jsonl", [{"text": long}, {"text": short}])
    (whole, brief) = texts_of(file, tokenizer=gpt, max_tokens=1000).train
    pieces = texts_of(file, tokenizer=gpt, max_tokens=16).train[:-1]
    assert len(pieces) > 5
    assert max(map(len, pieces)) == 16
    assert not any(piece.target_mask[0] for piece in pieces)
    learnt = [token for piece in pieces for token in piece.input_ids[piece.target_mask].tolist()]
    assert learnt == whole.input_ids[whole.target_mask].tolist()
    assert whole.input_ids[-1] == brief.input_ids[-1] == gpt.eos_token_id
    assert max(map(len, texts_of(file, tokenizer=gpt).train)) == 20 + 20  # ppo's longest prompt and response


def test_demonstrations_beside_ppo_learn_their_response_and_are_never_cut(gpt, write, caplog):
    rows = [{"prompt": "12345", "completion": "678"}, {"prompt": "1" * 30, "completion": "2" * 30}]
    (only,) = texts_of(write("demos.jsonl", rows), tokenizer=gpt).train
    assert decode(gpt, only.input_ids[only.target_mask].tolist()) == "678"
    assert "1 for a sequence longer than ppo.ptx.max_tokens=40" in caplog.text


def test_texts_are_whole_under_a_stage_split_and_nothing_is_read_without_a_coefficient(gpt, write):
    file = write("texts.jsonl", [{"text": f"text {number}"} for number in range(10)])
    assert len(texts_of(file, tokenizer=gpt, stage_split=[2, 4, 4]).train) == 10
    assert texts_of("nowhere.jsonl", tokenizer=gpt, coef=0.0).train == []


def test_columns_that_have_a_meaning_elsewhere_travel_too_but_prompt_and_completion(gpt, write):
    row = {"prompt": "a", "chosen": " b", "rejected": " c", "completion": " d", "text": "t", "margin": 2}
    data = DataConfig(ppo=StageDataConfig(train=[write("a.jsonl", [row])], eval_fraction=0.0))
    config = PPOConfig(**SHARED, **ROLLOUT)
    (found,) = prompts(data, config, tokenizer=gpt, columns=None).train
    assert dict(found.columns) == {**{k: v for k, v in row.items() if k != "completion"}, "prompt": "a"}
    (found,) = prompts(data, config, tokenizer=gpt, columns={"text", "completion"}).train
    assert dict(found.columns) == {"text": "t"}
