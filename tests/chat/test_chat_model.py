"""What a model is given to answer, and what it is called."""

import pytest

from rlhf.chat.chat_model import ChatModel, labels
from rlhf.chat.conversation import Conversation, Turn, messages
from rlhf.config.run_config import Embedded
from rlhf.config.stage_configs import SamplingConfig
from rlhf.models.embedded import prepare
from rlhf.text.tokenize_rows import tokenize_prompt
from rlhf.text.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(prepare(Embedded.tiny, tmp_path_factory.mktemp("tiny") / "model")))


def test_the_oldest_turns_are_left_out_until_the_rest_fits(tokenizer):
    turns = [Turn(f"question {number}", number, {"x": f"answer {number}"}) for number in range(4)]
    prompts = [tokenize_prompt(tokenizer, {"prompt": messages(turns[start:], "last", label="x")}) for start in range(5)]
    talk = Conversation(SamplingConfig(), max_response_tokens=10, seed=0, turns=turns)
    sizes = [len(ids) for ids in prompts]
    for limit, forgotten in ((sizes[0], 0), (sizes[0] - 1, 1), (sizes[2], 2), (sizes[4], 4)):
        model = ChatModel("x", None, tokenizer, positions=limit + 10)
        assert model.fit_prompt(talk, "last") == (prompts[forgotten], forgotten)
    alone = ChatModel("x", None, tokenizer, positions=sizes[4] + 1)  # less than an answer, but the question fits
    assert alone.fit_prompt(talk, "last") == (prompts[4], 4)
    with pytest.raises(ValueError, match=r"expected at least one, and fewer than the \d+ positions of x"):
        ChatModel("x", None, tokenizer, positions=sizes[4]).fit_prompt(talk, "last")


def test_labels_are_as_short_as_they_tell_models_apart():
    assert labels(["/out/run/ppo/actor"]) == ["ppo/actor"]
    assert labels(["/out/run/ppo/actor", "/out/run/sft/model"]) == ["ppo/actor", "sft/model"]
    assert labels(["/out/a/ppo/actor", "/out/b/ppo/actor"]) == ["a/ppo/actor", "b/ppo/actor"]
    assert labels(["Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B"]) == ["Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B"]
