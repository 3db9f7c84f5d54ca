"""Known data sets: rows of their schemas become what DeepSpeed-Chat and TRL make of them, as text and as messages."""

import json

import datasets
import pytest

from data.known_datasets import known_dataset, known_datasets, messages_of
from data.samples import demonstrations, preferences
from data.sources import load_rows, local_path
from rlhf.config.data_config import DataConfig, SourceConfig, StageDataConfig
from rlhf.config.engine_config import EngineConfig
from rlhf.config.stage_configs import LoraConfig, OptimizerConfig, RewardConfig, SFTConfig
from rlhf.text.tokenizer import decode, load_tokenizer
from tests import fakes

SETTINGS = {
    "engine": EngineConfig(zero_stage=0),
    "lora": LoraConfig(rank=0),
    "micro_batch_size": 2,
    "max_prompt_tokens": 200,
    "max_response_tokens": 200,
    "seed": 0,
    "optimizer": OptimizerConfig(lr=1e-3),
    "global_batch_size": 4,
}


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


HH = "\n\nHuman: Hi!\n\nAssistant: Yes?\n\nHuman: Why is it\nblue?\n\nAssistant:"
TURNS = [user("Hi!"), answer("Yes?"), user("Why is it\nblue?")]
CITED = "Rayleigh [1] scattering (see [2]). Blue[3]"
SUMMARIES = [{"text": " short", "policy": "a", "note": None}, {"text": " long", "policy": "b", "note": None}]
MKQA = {
    "queries": {"zh_cn": "天?", "ja": "空?"},
    "answers": {"zh_cn": [{"type": "entity", "text": "蓝"}], "ja": [{"type": "entity", "text": "青"}]},
}

# name -> row, the row as text, what of it changes as messages
CASES = {
    "rm-static": (
        {"prompt": HH, "response": " Light.", "chosen": " Light.", "rejected": " Dunno."},
        {"response": " Light.", "prompt": HH, "chosen": " Light.", "rejected": " Dunno."},
        {"prompt": TURNS, "chosen": [answer("Light.")], "rejected": [answer("Dunno.")]},
    ),
    "hh-rlhf": (
        {"chosen": f"{HH} Light.", "rejected": f"{HH} Dunno."},
        {"chosen": f"{HH} Light.", "rejected": f"{HH} Dunno."},
        {"chosen": [*TURNS, answer("Light.")], "rejected": [*TURNS, answer("Dunno.")]},
    ),
    "synthetic-instruct-gptj-pairwise": (
        {"prompt": "Why?", "chosen": "Light.", "rejected": "Dunno."},
        {"prompt": " Human: Why? Assistant:", "chosen": " Light.", "rejected": " Dunno."},
        {"prompt": [user("Why?")], "chosen": [answer("Light.")], "rejected": [answer("Dunno.")]},
    ),
    "rlhf-reward-datasets": (
        {"prompt": "\n\nHuman: Why?\n\n", "chosen": "Assistant: Light.", "rejected": "Assistant: Dunno."},
        {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": " Light.", "rejected": " Dunno."},
        {"prompt": [user("Why?")], "chosen": [answer("Light.")], "rejected": [answer("Dunno.")]},
    ),
    "webgpt": (
        {
            "question": {"full_text": "Why?", "id": "1"},
            "answer_0": "No",
            "answer_1": CITED,
            "score_0": -1,
            "score_1": 1,
        },
        {"prompt": " Human: Why? Assistant:", "chosen": " Rayleigh scattering). Blue", "rejected": " No"},
        {"prompt": [user("Why?")], "chosen": [answer("Rayleigh scattering). Blue")], "rejected": [answer("No")]},
    ),
    "SHP": (
        {"history": "Why?", "human_ref_A": "Dunno.", "human_ref_B": "Light.", "labels": 0, "score_ratio": 1.2},
        {"score_ratio": 1.2, "prompt": " Human: Why? Assistant:", "chosen": " Light.", "rejected": " Dunno."},
        {"prompt": [user("Why?")], "chosen": [answer("Light.")], "rejected": [answer("Dunno.")]},
    ),
    "sharegpt_alpaca_oa_vicuna_format": (
        {"prompt": "USER: Hi! ASSISTANT: Yes? USER: Why? ASSISTANT:", "label": "Light."},
        {"prompt": "Human: Hi! Assistant: Yes? Human: Why? Assistant:", "completion": " Light."},
        {"prompt": [user("Hi!"), answer("Yes?"), user("Why?")], "completion": [answer("Light.")]},
    ),
    "Zhihu-KOL": (
        {"INSTRUCTION": "Why?", "RESPONSE": "Light.", "SOURCE": "Zhihu"},
        {"SOURCE": "Zhihu", "prompt": " Human: Why? Assistant:", "completion": " Light."},
        {"prompt": [user("Why?")], "completion": [answer("Light.")]},
    ),
    "HC3-Chinese": (
        {"question": "Why?", "human_answers": ["Light.", "Air."], "chatgpt_answers": []},
        {"chatgpt_answers": [], "prompt": " Human: Why? Assistant:", "completion": " Light."},
        {"prompt": [user("Why?")], "completion": [answer("Light.")]},
    ),
    "miracl-zh": (
        {
            "query": "Why?",
            "positive_passages": [{"text": "Light."}],
            "negative_passages": [{"text": "No"}, {"text": "b"}],
        },
        {"prompt": " Human: Why? Assistant:", "chosen": " Light.", "rejected": " No"},
        {"prompt": [user("Why?")], "chosen": [answer("Light.")], "rejected": [answer("No")]},
    ),
    "mkqa-Chinese": (
        {"query": "sky?", **MKQA},
        {"query": "sky?", "prompt": " Human: 天? Assistant:", "completion": " 蓝"},
        {"prompt": [user("天?")], "completion": [answer("蓝")]},
    ),
    "mkqa-Japanese": (
        {"query": "sky?", "queries": MKQA["queries"], "answers": {"ja": {"type": ["entity"], "text": ["青"]}}},
        {"query": "sky?", "prompt": " Human: 空? Assistant:", "completion": " 青"},
        {"prompt": [user("空?")], "completion": [answer("青")]},
    ),
    "qg_jaquad": (
        {"question": "Why?", "sentence": "Light.", "answer": "x"},
        {"answer": "x", "prompt": " Human: Why? Assistant:", "completion": " Light."},
        {"prompt": [user("Why?")], "completion": [answer("Light.")]},
    ),
    "qag_jaquad": (
        {"questions": ["Why?", "How?"], "paragraph": "Light."},
        {"prompt": " Human: Why? Assistant:", "completion": " Light."},
        {"prompt": [user("Why?")], "completion": [answer("Light.")]},
    ),
    "summarize_from_feedback": (
        {"info": {"subreddit": "sky", "title": "Blue", "post": "It is.\n\nWhy?"}, "summaries": SUMMARIES, "choice": 1},
        {
            "prompt": "SUBREDDIT: r/sky\n\nTITLE: Blue\n\nPOST: It is.\nWhy?\n\nTL;DR:",
            "chosen": " long",
            "rejected": " short",
        },
        {},
    ),
    "gsm8k": (
        {"question": "1+1?", "answer": "#### 2"},
        {"prompt": " Human: 1+1? Assistant:", "completion": " #### 2"},
        {"prompt": [user("1+1?")], "completion": [answer("#### 2")]},
    ),
    "tldr": ({"prompt": "POST: a TL;DR:", "completion": " b"}, {"prompt": "POST: a TL;DR:", "completion": " b"}, {}),
}


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path, *, stage="reward", chat=False, wanted=None, **settings):
    return [*load_rows(SourceConfig.parse({"path": str(path), **settings}), wanted, stage=stage, chat=chat)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chat", [False, True])
def test_a_row_becomes_text_or_messages(tmp_path, name, chat):
    row, text, messages = CASES[name]
    file = write(tmp_path / "rows.jsonl", row)
    assert load(file, chat=chat, **{"as": name}) == [text | (messages if chat else {})]


def test_an_article_has_no_subreddit(tmp_path):
    info = {"title": "Blue", "article": "It is.\n\nWhy?", "subreddit": None, "post": None}
    file = write(tmp_path / "rows.jsonl", {"info": info, "summaries": SUMMARIES, "choice": 0})
    row = load(file, **{"as": "openai/summarize_from_feedback"})[0]
    assert (row["prompt"], row["chosen"]) == ("TITLE: Blue\n\nIt is.\nWhy?\n\nTL;DR:", " short")


def test_short_names_hub_ids_and_clones_are_the_same_data_set(tmp_path, monkeypatch):
    row, text, _ = CASES["rm-static"]
    for split in ("train", "test"):
        write(tmp_path / f"Dahoas/rm-static/data/{split}-00000-of-00001.jsonl", row | {"chosen": f" {split}"})
    assert load(tmp_path / "Dahoas/rm-static") == [text | {"chosen": " train"}]
    assert load(tmp_path / "Dahoas/rm-static", split="eval")[0]["chosen"] == " test"
    monkeypatch.chdir(tmp_path)
    assert load("Dahoas/rm-static", split="test")[0]["chosen"] == " test"
    asked = []

    def from_hub(path, name, *, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_list([row])

    monkeypatch.chdir(tmp_path / "Dahoas/rm-static/data")
    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    assert load("rm-static") == load("dahoas/rm-static") == [text]
    assert load("me/mine", split="eval", **{"as": "rm-static"}) == [text]
    assert asked == [
        ("Dahoas/rm-static", None, "train"),
        ("dahoas/rm-static", None, "train"),
        ("me/mine", None, "test"),
    ]


def test_a_split_is_that_of_the_stage(monkeypatch):
    asked = []

    def from_hub(path, name, *, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_list(
            [{"prompt": "a", "messages": [user("a"), answer("b")], "question": "c", "answer": "d"}]
        )

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    for stage in ("sft", "reward", "dpo", "ppo"):
        load("ultrafeedback", stage=stage)
    load("ultrafeedback", stage="sft", split="eval")
    load("ultrafeedback", stage="sft", split="train_gen")
    load("gsm8k")
    ultra = "HuggingFaceH4/ultrafeedback_binarized"
    assert asked == [
        (ultra, None, "train_sft"),
        *[(ultra, None, "train_prefs")] * 3,
        (ultra, None, "test_sft"),
        (ultra, None, "train_gen"),
        ("openai/gsm8k", "main", "train"),
    ]


def test_a_script_of_the_hub_is_not_run_its_parquet_copy_is_read(monkeypatch, caplog):
    def from_hub(path, name=None, *, split, data_files=None):
        if data_files is None:
            raise RuntimeError(f"Dataset scripts are no longer supported, but found {path}.py")
        assert (path, split) == ("parquet", "validation")
        address = "hf://datasets/openai/summarize_from_feedback@refs/convert/parquet/comparisons/validation/*.parquet"
        assert data_files == {"validation": address}
        return datasets.Dataset.from_list([CASES["summarize_from_feedback"][0]])

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    assert load("summarize_from_feedback", split="eval") == [CASES["summarize_from_feedback"][1]]


def test_ties_are_no_preference_but_can_be_imitated(tmp_path):
    row = CASES["webgpt"][0]
    file = write(tmp_path / "rows.jsonl", row, row | {"score_0": 0.0, "score_1": 0.0})
    assert load(file, **{"as": "webgpt"})[1].reason == "tie: neither answer is better"
    assert load(file, stage="sft", **{"as": "webgpt"})[1]["chosen"] == " No"  # the first, as in DeepSpeed-Chat


def test_rows_that_are_left_out_do_not_stop_the_run(tmp_path):
    row = CASES["webgpt"][0]
    file = write(tmp_path / "rows.jsonl", row, row | {"score_0": 0.0, "score_1": 0.0}, row | {"answer_0": None})
    source = {"path": str(file), "as": "webgpt"}
    tokenizer = load_tokenizer(str(fakes.pad_is_eos_tokenizer(tmp_path)))
    data = DataConfig(reward=StageDataConfig(train=[source], eval_fraction=0.0))
    found = preferences(data, RewardConfig(**SETTINGS), tokenizer=tokenizer)
    assert found.dropped == {"tie: neither answer is better": 1, "row without `answer_0`": 1}
    assert [decode(tokenizer, pair.chosen) for pair in found.train] == [
        " Human: Why? Assistant: Rayleigh scattering). Blue"
    ]


def test_a_chat_template_decides_between_text_and_messages(tmp_path):
    file = write(tmp_path / "rows.jsonl", CASES["rm-static"][0])
    data = DataConfig(sft=StageDataConfig(train=[{"path": str(file), "as": "rm-static"}], eval_fraction=0.0))
    plain = load_tokenizer(str(fakes.pad_is_eos_tokenizer(tmp_path / "plain")))
    chat = load_tokenizer(str(fakes.chat_tokenizer(tmp_path / "chat")))
    (text,) = demonstrations(data, SFTConfig(**SETTINGS), tokenizer=plain).train
    (turns,) = demonstrations(data, SFTConfig(**SETTINGS), tokenizer=chat).train
    assert decode(plain, text.input_ids) == f"{HH} Light."
    rendered = chat.apply_chat_template([*TURNS, answer("Light.")], tokenize=False)
    assert chat.decode(turns.input_ids).rstrip() == rendered.rstrip()


def test_other_columns_stay_for_functions_that_want_them(tmp_path):
    file = write(tmp_path / "rows.jsonl", CASES["SHP"][0])
    assert set(load(file, wanted={"prompt", "score_ratio"}, **{"as": "SHP"})[0]) >= {"prompt", "score_ratio"}
    assert "score_ratio" not in load(file, wanted={"prompt", "chosen"}, **{"as": "SHP"})[0]


def test_a_row_of_another_kind_is_a_bad_one(tmp_path):
    file = write(tmp_path / "rows.jsonl", CASES["rm-static"][0] | {"prompt": "no dialogue"})
    assert "begins with Human:, found 'no dialogue'" in load(file, chat=True, **{"as": "rm-static"})[0].reason
    file = write(tmp_path / "scores.jsonl", CASES["webgpt"][0] | {"score_0": "high"})
    assert "could not convert string to float" in load(file, **{"as": "webgpt"})[0].reason


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"as": "SHP"}, r"rows.jsonl is read as SHP, whose rows have \['history', .*found columns \['prompt', "),
        ({"as": "rm_static"}, "as=rm_static: expected one of rm-static, .* Did you mean rm-static"),
        ({"as": "apple/mkqa"}, "as=apple/mkqa: expected one of mkqa-Chinese, mkqa-Japanese"),
        ({"as": "rm-static", "columns": {"prompt": "a"}}, "found `as` and `columns`; expected one of them"),
    ],
)
def test_a_name_that_does_not_fit_is_refused(tmp_path, settings, message):
    file = write(tmp_path / "rows.jsonl", CASES["rm-static"][0])
    with pytest.raises(ValueError, match=message):
        load(file, **settings)


def test_a_mistyped_name_is_told_the_near_one():
    with pytest.raises(ValueError, match=r"the name of a known data set \(rm-static\?\)"):
        local_path("rm-statik")


def test_own_columns_come_before_a_map(tmp_path):
    file = write(tmp_path / "Dahoas/rm-static/train.jsonl", {"q": "a", "good": " b", "bad": " c"})
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert load(file.parent, columns=columns) == [{"prompt": "a", "chosen": " b", "rejected": " c"}]


def test_every_entry_can_be_found_and_is_complete():
    for name, entry in known_datasets().items():
        assert known_dataset(SourceConfig(path=name)) is entry
        assert set(entry.splits) <= {"train", "eval", "sft", "reward", "dpo", "ppo"}
        assert bool(entry.answers) == bool(entry.higher or entry.first_if or entry.index)
        assert local_path(name) is None


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("\n\nHuman: a\n\nAssistant:", [user("a")]),
        ("\n\nHuman: a\n\nAssistant: \n\nHuman: b\n\nAssistant:", [user("a\n\nb")]),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", [user("a\n\nb"), answer("c")]),
        ("\n\nHuman: say Human: and Assistant:\n\nAssistant:", [user("say Human: and Assistant:")]),
    ],
)
def test_turns_alternate(text, messages):
    assert messages_of(text, r"\n\n(Human|Assistant):") == messages


@pytest.mark.parametrize("text", ["", "a", "\n\nAssistant: a", "a\n\nHuman: b"])
def test_a_text_that_is_no_dialogue_is_refused(text):
    with pytest.raises(ValueError, match="a dialogue that begins with Human:"):
        messages_of(text, r"\n\n(Human|Assistant):")
