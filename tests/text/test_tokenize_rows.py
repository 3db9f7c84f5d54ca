"""Prompts and targets of strings, conversations and preferences."""

import gc
import weakref

import numpy as np
import pytest

from rlhf.text.tokenize_rows import (
    readable_prompt,
    tokenize_as_generated,
    tokenize_demonstration,
    tokenize_preference,
    tokenize_prompt,
)
from rlhf.text.tokenizer import decode, load_tokenizer, stop_token_ids
from tests import fakes

USER = {"role": "user", "content": "hello"}
HI = {"role": "assistant", "content": "hi there"}
MORE = {"role": "user", "content": "what is it?"}
FILM = {"role": "assistant", "content": "the best film"}
TURNS = [{"role": "system", "content": "be good"}, USER, HI, MORE, FILM]

# Writes reasoning into the last answer only, as Qwen3 does.
FORGETFUL_TEMPLATE = fakes.CHAT_TEMPLATE.replace(
    "{{ message.content }}",
    "{% if loop.last and message.role == 'assistant' %}<think></think>{% endif %}{{ message.content }}",
)
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
EOS_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def with_template(tmp_path, template):
    return load_tokenizer(str(fakes.chat_tokenizer(tmp_path / "other", chat_template=template)))


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def runs(tokenizer, tokens):
    """The learnt stretches of a sequence, as text."""
    found, previous = [], False
    for token, learnt in zip(tokens.input_ids.tolist(), tokens.target_mask.tolist(), strict=True):
        if learnt:
            found = [*found[:-1], found[-1] + [token]] if previous else [*found, [token]]
        previous = learnt
    return [tokenizer.decode(run) for run in found]


# ---- strings


@pytest.mark.parametrize("name", ["gpt", "bare", "chat"])
@pytest.mark.parametrize(
    ("prompt", "completion"), [("the movie", " is great"), ("Movie review: ", "bad"), ("a\n", "\nb")]
)
def test_prompt_and_completion_keep_the_tokens_that_generation_starts_from(name, prompt, completion, request):
    tokenizer = request.getfixturevalue(name)
    row = {"prompt": prompt, "completion": completion}
    tokens = tokenize_demonstration(tokenizer, row, response_only=True)
    start = tokenizer(prompt).input_ids
    assert tokens.input_ids[: tokens.num_prompt].tolist() == start == tokenize_prompt(tokenizer, row)
    assert decode(tokenizer, tokens.input_ids) == prompt + completion
    assert tokens.input_ids[-1] == tokenizer.eos_token_id
    assert tokens.target_mask.tolist() == [False] * len(start) + [True] * (len(tokens.input_ids) - len(start))


def test_a_completion_is_tokenised_as_part_of_the_whole_text(gpt):
    tokens = tokenize_demonstration(gpt, {"prompt": "the movie", "completion": " is great"}, response_only=True)
    assert tokens.input_ids.tolist() == [*ids(gpt, "the movie is great"), gpt.eos_token_id]


def test_no_space_appears_between_prompt_and_completion(tmp_path):
    tokenizer = load_tokenizer(str(fakes.byte_fallback_tokenizer(tmp_path)))
    tokens = tokenize_demonstration(tokenizer, {"prompt": "ab", "completion": "cd"}, response_only=True)
    assert tokenizer.convert_ids_to_tokens(tokens.input_ids) == ["▁", "a", "b", "c", "d", "</s>"]


def test_an_eos_in_the_text_is_not_doubled(gpt):
    tokens = tokenize_demonstration(gpt, {"prompt": "a", "completion": "b<|endoftext|>"}, response_only=True)
    assert tokens.input_ids.tolist().count(gpt.eos_token_id) == 1
    assert tokens.target_mask[-1]


def test_the_bos_comes_once(bare):
    for prompt in ("a film", "<s>a film"):
        tokens = tokenize_demonstration(bare, {"prompt": prompt, "completion": " is bad"}, response_only=True)
        assert tokens.input_ids.tolist() == [*bare("a film is bad").input_ids, bare.eos_token_id]
        assert tokens.input_ids.tolist().count(bare.bos_token_id) == 1


@pytest.mark.parametrize("name", ["bare", "gpt", "chat"])
def test_a_text_that_holds_its_bos_or_its_end_gets_no_second_one(name, request):
    tokenizer = request.getfixturevalue(name)
    bos, eos = tokenizer.bos_token or "", tokenizer.eos_token
    plain = tokenize_demonstration(tokenizer, {"text": "a film"}, response_only=True)
    for text in (f"{bos}a film", f"a film{eos}", f"{bos}a film{eos}", f"a film{eos}\n \n"):
        tokens = tokenize_demonstration(tokenizer, {"text": text}, response_only=True)
        assert tokens.input_ids.tolist() == plain.input_ids.tolist()
        assert tokens.target_mask.tolist() == plain.target_mask.tolist()
        assert tokens.num_prompt == plain.num_prompt
    ended = tokenize_demonstration(tokenizer, {"prompt": "a", "completion": f" film{eos}\n"}, response_only=True)
    assert ended.input_ids.tolist() == plain.input_ids.tolist()


def test_a_rendered_conversation_as_text_keeps_its_ends(chat):
    text = chat.apply_chat_template(TURNS, tokenize=False)
    tokens = tokenize_demonstration(chat, {"text": text}, response_only=True)
    assert tokens.input_ids.tolist() == ids(chat, text.rstrip())
    assert tokens.input_ids[-1] == chat.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("completion", ["b</s>c", "</s>b", "b</s></s>", "b</s>c</s>\n"])
def test_an_end_inside_a_completion_is_refused(bare, completion):
    for row in ({"completion": completion}, {"chosen": completion, "rejected": "x"}):
        with pytest.raises(ValueError, match="an answer holds the text '</s>', which becomes the token that ends"):
            tokenize_demonstration(bare, {"prompt": "a", **row}, response_only=True)
    with pytest.raises(ValueError, match="holds the text '</s>'"):
        tokenize_preference(bare, {"prompt": "a", "chosen": "x", "rejected": completion})


def test_the_prompt_is_learnt_too_when_asked_but_never_the_first_token(bare):
    row = {"prompt": "a film", "completion": " is bad"}
    tokens = tokenize_demonstration(bare, row, response_only=False)
    assert tokens.target_mask.tolist() == [False] + [True] * (len(tokens.input_ids) - 1)
    assert tokens.num_prompt == len(bare("a film").input_ids)


def test_a_text_is_all_target(bare, gpt):
    tokens = tokenize_demonstration(bare, {"text": "a film"}, response_only=True)
    assert tokens.input_ids.tolist() == [*bare("a film").input_ids, bare.eos_token_id]
    assert tokens.target_mask.tolist() == [False] + [True] * (len(tokens.input_ids) - 1)
    assert tokens.num_prompt == 1  # the BOS
    tokens = tokenize_demonstration(gpt, {"text": "a film"}, response_only=True)
    assert (tokens.num_prompt, tokens.target_mask[0], tokens.target_mask[1:].all()) == (0, False, True)


def test_an_empty_response_is_refused(gpt):
    with pytest.raises(ValueError, match="the response is empty"):
        tokenize_demonstration(gpt, {"prompt": "a", "completion": ""}, response_only=True)


# ---- conversations


@pytest.mark.parametrize("template", [fakes.CHAT_TEMPLATE, fakes.MARKED_CHAT_TEMPLATE, FORGETFUL_TEMPLATE])
def test_every_assistant_turn_and_its_end_is_a_target(tmp_path, template):
    tokenizer = with_template(tmp_path, template)
    tokens = tokenize_demonstration(tokenizer, {"messages": TURNS}, response_only=True)
    first = ["hi there<|im_end|>"] * (template is not FORGETFUL_TEMPLATE)  # which it rewrites
    think = "<think></think>" * (template is FORGETFUL_TEMPLATE)
    assert runs(tokenizer, tokens) == [*first, f"{think}the best film<|im_end|>"]
    assert tokens.rewritten == ((2,) if template is FORGETFUL_TEMPLATE else ())
    prompt = tokenizer.apply_chat_template(TURNS[:-1], add_generation_prompt=True, return_dict=False)
    assert tokens.input_ids[: tokens.num_prompt].tolist() == prompt
    assert (
        prompt == tokenize_prompt(tokenizer, {"messages": TURNS}) == tokenize_prompt(tokenizer, {"prompt": TURNS[:-1]})
    )


@pytest.mark.parametrize(
    "template", [fakes.CHAT_TEMPLATE, fakes.MARKED_CHAT_TEMPLATE, FORGETFUL_TEMPLATE, PLAIN_TEMPLATE, EOS_TEMPLATE]
)
def test_every_form_of_a_conversation_starts_with_the_same_prompt_tokens(tmp_path, template):
    tokenizer = with_template(tmp_path, template)
    turns = [USER, FILM, MORE, HI]  # "assistant: the" has a token that joins header and answer
    prompt = tokenize_prompt(tokenizer, {"prompt": turns[:-1]})
    pair = {"chosen": turns, "rejected": [*turns[:-1], FILM]}
    sequences = [
        tokenize_demonstration(tokenizer, {"messages": turns}, response_only=True),
        tokenize_demonstration(tokenizer, {"prompt": turns[:-1], "completion": [HI]}, response_only=True),
        *tokenize_preference(tokenizer, pair),
    ]
    assert tokenizer.decode(prompt) == tokenizer.apply_chat_template(
        turns[:-1], add_generation_prompt=True, tokenize=False
    )
    assert [tokens.input_ids[: tokens.num_prompt].tolist() for tokens in sequences] == [prompt] * 4
    assert tokenize_prompt(tokenizer, {"messages": turns}) == tokenize_prompt(tokenizer, pair) == prompt


def test_marks_in_a_template_agree_with_those_of_transformers(tmp_path):
    tokenizer = with_template(tmp_path, fakes.MARKED_CHAT_TEMPLATE)
    tokens = tokenize_demonstration(tokenizer, {"messages": TURNS}, response_only=True)
    reference = tokenizer.apply_chat_template(TURNS, return_assistant_tokens_mask=True, return_dict=True)
    length = len(tokens.input_ids)
    assert reference["input_ids"][:length] == tokens.input_ids.tolist()
    ends = tokens.input_ids == tokenizer.convert_tokens_to_ids("<|im_end|>")
    before_end = np.append(False, np.array(reference["assistant_masks"], dtype=bool)[: length - 1])
    assert (
        tokens.target_mask.tolist()
        == (np.array(reference["assistant_masks"], dtype=bool)[:length] | ends & before_end).tolist()
    )


def test_a_mark_that_reaches_behind_the_end_of_a_turn_gets_no_second_end(tmp_path):
    template = fakes.CHAT_TEMPLATE.replace(
        "{{ message.content }}<|im_end|>\n",
        "{% if message.role == 'user' %}{{ message.content }}<|im_end|>\n"
        "{% else %}{% generation %}{{ message.content }}<|im_end|>\n{% endgeneration %}{% endif %}",
    )
    tokenizer = with_template(tmp_path, template)
    tokens = tokenize_demonstration(tokenizer, {"messages": TURNS[1:]}, response_only=True)
    assert runs(tokenizer, tokens) == ["hi there<|im_end|>", "the best film<|im_end|>"]
    assert tokenizer.decode(tokens.input_ids) == tokenizer.apply_chat_template(TURNS[1:], tokenize=False).rstrip("\n")


def test_a_sequence_ends_with_the_token_that_ends_the_turn(chat):
    tokens = tokenize_demonstration(
        chat, {"messages": [*TURNS, {"role": "user", "content": "bye"}]}, response_only=True
    )
    assert chat.decode(tokens.input_ids).endswith("the best film<|im_end|>")


def test_a_template_without_an_end_of_turn_gets_the_eos(tmp_path):
    tokenizer = with_template(tmp_path, PLAIN_TEMPLATE)
    tokens = tokenize_demonstration(tokenizer, {"messages": [USER, HI]}, response_only=True)
    assert tokenizer.decode(tokens.input_ids) == "user: hello\nassistant: hi there\n<|endoftext|>"
    assert runs(tokenizer, tokens) == ["hi there\n<|endoftext|>"]
    assert stop_token_ids(tokenizer) == (tokenizer.eos_token_id,)


def test_a_template_that_writes_the_eos_gets_no_second_one(tmp_path):
    tokenizer = with_template(tmp_path, EOS_TEMPLATE)
    tokens = tokenize_demonstration(tokenizer, {"messages": TURNS}, response_only=True)
    assert runs(tokenizer, tokens) == ["hi there<|endoftext|>", "the best film<|endoftext|>"]


def test_only_the_completion_is_learnt_after_a_prompt_with_history(chat):
    tokens = tokenize_demonstration(chat, {"prompt": TURNS[:-1], "completion": [FILM]}, response_only=True)
    assert runs(chat, tokens) == ["the best film<|im_end|>"]
    everything = tokenize_demonstration(chat, {"prompt": TURNS[:-1], "completion": [FILM]}, response_only=False)
    assert everything.target_mask.tolist() == [False] + [True] * (len(tokens.input_ids) - 1)


def test_text_beside_messages_becomes_a_message(chat):
    expected = tokenize_demonstration(chat, {"messages": [USER, HI]}, response_only=True)
    for row in ({"prompt": "hello", "completion": [HI]}, {"prompt": [USER], "completion": "hi there"}):
        assert tokenize_demonstration(chat, row, response_only=True).input_ids.tolist() == expected.input_ids.tolist()


def test_empty_fields_that_a_table_adds_do_not_matter(tmp_path):
    tokenizer = with_template(
        tmp_path, "{% for m in messages %}{{ m.tool_calls is defined }}{{ m.content }}<|im_end|>{% endfor %}"
    )
    tokens = tokenize_demonstration(tokenizer, {"messages": [{**USER, "tool_calls": None}, HI]}, response_only=True)
    assert tokenizer.decode(tokens.input_ids) == "Falsehello<|im_end|>Falsehi there<|im_end|>"


def test_options_and_tools_of_a_row_reach_the_template(tmp_path):
    tokenizer = with_template(tmp_path, "{{ mood }}{{ tools | length if tools }}" + PLAIN_TEMPLATE)
    row = {"prompt": [USER], "chat_template_kwargs": {"mood": "good"}, "tools": [{"name": "search"}]}
    assert tokenizer.decode(tokenize_prompt(tokenizer, row)) == "good1user: hello\nassistant: "


def test_messages_without_a_chat_template_are_refused(bare):
    with pytest.raises(ValueError, match="no chat template.*model.chat_template"):
        tokenize_demonstration(bare, {"messages": [USER, HI]}, response_only=True)


def test_messages_without_an_answer_are_refused(chat):
    with pytest.raises(ValueError, match=r"roles \['user'\]; expected an assistant turn"):
        tokenize_demonstration(chat, {"messages": [USER]}, response_only=True)


@pytest.mark.parametrize("prompt", [[HI], [USER, HI]])
def test_a_prompt_that_the_assistant_ends_is_refused(chat, prompt):
    with pytest.raises(ValueError, match="expected its last turn to be one that an assistant answers"):
        tokenize_prompt(chat, {"prompt": prompt})


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_an_end_inside_an_answer_is_refused_and_in_a_question_is_not(chat, end):
    call = {**HI, "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": [f"a {end}"]}}}]}
    for answer in ({**HI, "content": f"write {end} to stop"}, call):
        rows = [
            {"messages": [USER, answer, MORE, FILM]},
            {"messages": [USER, HI, MORE, answer]},
            {"prompt": [USER], "completion": [answer]},
        ]
        for row in rows:
            with pytest.raises(ValueError, match="an answer holds the text '<|" + end[2:]):
                tokenize_demonstration(chat, row, response_only=True)
        with pytest.raises(ValueError, match="an answer holds"):
            tokenize_preference(chat, {"prompt": [USER], "chosen": [HI], "rejected": [answer]})
    asked = tokenize_demonstration(chat, {"messages": [{**USER, "content": f"what is {end}?"}, HI]}, response_only=True)
    assert runs(chat, asked) == ["hi there<|im_end|>"]


SYSTEM = TURNS[0]


@pytest.mark.parametrize("response", [[SYSTEM, USER, HI], [USER, HI], [MORE, FILM], [USER]])
def test_a_response_that_does_not_begin_with_an_answer_is_named_and_not_the_template(chat, response):
    prompt = [MORE] if response[0] is USER else [USER]
    rows = [{"prompt": prompt, "completion": response}, {"prompt": prompt, "chosen": response, "rejected": [FILM]}]
    roles = [message["role"] for message in response]
    for row in rows:
        with pytest.raises(ValueError, match="the response has roles .* after a prompt with roles") as error:
            tokenize_demonstration(chat, row, response_only=True)
        assert f"roles {roles} after a prompt with roles ['user']; expected the answer alone" in str(error.value)
        assert "template" not in str(error.value)
    for read in (tokenize_preference, tokenize_prompt):
        with pytest.raises(ValueError, match="the response has roles"):
            read(chat, rows[1])


THINKING_TEMPLATE = """\
{%- for m in messages -%}
{%- set text = m.content -%}
{%- if m.role == 'assistant' and not loop.last and '</think>' in text %}{% set text = text.split('</think>')[-1] %}\
{% endif -%}
<|im_start|>{{ m.role }}
MARK{{ text }}ENDMARK<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}
"""
THOUGHTFUL = [
    *(USER, {**HI, "content": "<think>plan</think>hi there"}),
    *(MORE, {**FILM, "content": "a film"}),
    *(USER, {**FILM, "content": "<think>look</think>the best film"}),
]


@pytest.mark.parametrize(
    "marks",
    [
        ("", ""),
        (
            "{% if m.role == 'assistant' %}{% generation %}{{ text }}{% endgeneration %}{% else %}",
            "{% endif %}",
        ),
    ],
    ids=["plain", "marked"],
)
def test_answers_that_the_template_rewrites_are_not_learnt_or_learnt_as_they_were_generated(tmp_path, marks):
    template = THINKING_TEMPLATE.replace("ENDMARK", marks[1]).replace("MARK", marks[0])
    tokenizer = with_template(tmp_path, template)
    row = {"messages": THOUGHTFUL}
    whole = tokenize_demonstration(tokenizer, row, response_only=True)
    assert runs(tokenizer, whole) == ["a film<|im_end|>", "<think>look</think>the best film<|im_end|>"]
    assert whole.rewritten == (1,)
    assert tokenizer.decode(whole.input_ids) == tokenizer.apply_chat_template(THOUGHTFUL, tokenize=False).rstrip("\n")
    again, first = tokenize_as_generated(tokenizer, row, response_only=True)
    assert again.input_ids.tolist() == whole.input_ids.tolist()
    assert (again.rewritten, first.rewritten) == ((), ())
    assert runs(tokenizer, first) == ["<think>plan</think>hi there<|im_end|>"]
    assert first.input_ids[: first.num_prompt].tolist() == tokenize_prompt(tokenizer, {"prompt": [USER]})
    (only,) = tokenize_as_generated(tokenizer, {"messages": THOUGHTFUL[2:]}, response_only=True)
    assert runs(tokenizer, only) == ["a film<|im_end|>", "<think>look</think>the best film<|im_end|>"]


def test_history_that_nobody_learns_counts_for_nothing(tmp_path):
    tokenizer = with_template(tmp_path, THINKING_TEMPLATE.replace("ENDMARK", "").replace("MARK", ""))
    row = {"prompt": THOUGHTFUL[:-1], "completion": THOUGHTFUL[-1:]}
    assert tokenize_demonstration(tokenizer, row, response_only=True).rewritten == ()
    several = {"prompt": THOUGHTFUL[:1], "completion": THOUGHTFUL[1:]}
    assert tokenize_demonstration(tokenizer, several, response_only=True).rewritten == (1,)
    assert len(tokenize_as_generated(tokenizer, several, response_only=True)) == 2


def test_a_template_that_rewrites_its_own_prompt_is_refused(tmp_path):
    template = PLAIN_TEMPLATE.replace("assistant: {%", "assistant: <think>{%")
    with pytest.raises(ValueError, match=r"renders the beginning of this conversation differently"):
        tokenize_demonstration(with_template(tmp_path, template), {"messages": [USER, HI]}, response_only=True)


def test_a_template_that_refuses_a_conversation_says_why(tmp_path):
    template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('start with the user') }}{% endif %}" + PLAIN_TEMPLATE
    )
    with pytest.raises(ValueError, match="refuses this conversation: start with the user"):
        tokenize_demonstration(with_template(tmp_path, template), {"messages": TURNS}, response_only=True)


# ---- preferences


def texts(tokenizer, row):
    """Prompt and the two responses of a preference."""
    chosen, rejected = tokenize_preference(tokenizer, row)
    assert chosen.num_prompt == rejected.num_prompt
    cut = chosen.num_prompt
    assert chosen.input_ids[:cut].tolist() == rejected.input_ids[:cut].tolist() == tokenize_prompt(tokenizer, row)
    return [
        tokenizer.decode(part) for part in (chosen.input_ids[:cut], chosen.input_ids[cut:], rejected.input_ids[cut:])
    ]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        {"prompt": "The sky is", "chosen": "The sky is blue.", "rejected": "The sky is green."},
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},  # TRL's own example
    ],
)
def test_a_preference_of_strings_has_its_prompt_taken_out(gpt, row):
    assert texts(gpt, row) == ["The sky is", " blue.<|endoftext|>", " green.<|endoftext|>"]


def test_a_shared_start_is_not_cut_inside_a_word_or_after_a_line_break(gpt):
    row = {"chosen": "Is it black?\nyes", "rejected": "Is it black?\nyet"}
    assert texts(gpt, row) == ["Is it black?\n", "yes<|endoftext|>", "yet<|endoftext|>"]
    row = {"chosen": "The sky is blue", "rejected": "The sky is bluer"}
    assert texts(gpt, row) == ["The sky is", " blue<|endoftext|>", " bluer<|endoftext|>"]
    row = {"chosen": "電影很好", "rejected": "電影很壞"}
    assert texts(gpt, row) == ["電影很", "好<|endoftext|>", "壞<|endoftext|>"]


def test_the_prompt_of_an_hh_dialogue_ends_where_the_assistant_begins(gpt):
    dialogue = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how?\n\nAssistant:"
    row = {"chosen": dialogue + " I do not know.", "rejected": dialogue + " I do not care."}
    assert texts(gpt, row) == [dialogue, " I do not know.<|endoftext|>", " I do not care.<|endoftext|>"]


PROMPT = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [HI], "rejected": [FILM]},
        {"prompt": [USER], "chosen": [USER, HI], "rejected": [USER, FILM]},
        {"chosen": [USER, HI], "rejected": [USER, FILM]},
        {"prompt": "hello", "chosen": [USER, HI], "rejected": [USER, FILM]},  # as in UltraFeedback
        {"prompt": "hello", "chosen": [HI], "rejected": [FILM]},
        {"prompt": [USER], "chosen": "hi there", "rejected": "the best film"},
    ],
)
def test_a_preference_of_messages_has_its_prompt_taken_out(chat, row):
    assert texts(chat, row) == [PROMPT, "hi there<|im_end|>", "the best film<|im_end|>"]


def test_preferences_that_share_nothing_are_refused(gpt, chat):
    with pytest.raises(ValueError, match="begin differently"):
        tokenize_preference(gpt, {"chosen": "yes", "rejected": "no"})
    with pytest.raises(ValueError, match="begin differently"):
        tokenize_preference(chat, {"chosen": [USER, HI], "rejected": [MORE, FILM]})


def test_a_preference_without_an_answer_is_refused(chat):
    with pytest.raises(ValueError, match=r"the response has roles \[\] after a prompt with roles \['user'\]"):
        tokenize_preference(chat, {"chosen": [USER], "rejected": [USER, HI]})


def test_text_against_messages_is_refused(chat):
    with pytest.raises(ValueError, match="one is text and the other messages"):
        tokenize_preference(chat, {"prompt": "hello", "chosen": "yes", "rejected": [HI]})


def test_a_preference_is_also_a_demonstration_of_its_chosen_response(gpt):
    row = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
    assert runs(gpt, tokenize_demonstration(gpt, row, response_only=True)) == [" blue.<|endoftext|>"]


# ---- for people


def test_people_read_a_prompt_without_its_control_tokens():
    assert readable_prompt({"prompt": "The sky is", "completion": " blue"}) == "The sky is"
    assert readable_prompt({"messages": [USER, HI]}) == "hello"
    assert (
        readable_prompt({"messages": TURNS}) == "system: be good\nuser: hello\nassistant: hi there\nuser: what is it?"
    )


def test_a_prompt_may_have_turns_that_its_template_rewrites_later(tmp_path):
    forgetful = fakes.CHAT_TEMPLATE.replace("{{ message.content }}", "{{ message.content if loop.last else '...' }}")
    tokenizer = load_tokenizer(str(fakes.chat_tokenizer(tmp_path, chat_template=forgetful)))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    ids = tokenize_prompt(tokenizer, {"prompt": turns})
    assert "user\n...<|im_end|>" in tokenizer.decode(ids)
    assert "user\nc<|im_end|>" in tokenizer.decode(ids)
    with pytest.raises(ValueError, match="differently"):
        tokenize_demonstration(tokenizer, {"messages": [*turns, turns[1]]}, response_only=True)


def test_a_tokenizer_is_gone_when_nobody_uses_it(tmp_path):
    tokenizer = with_template(tmp_path, fakes.CHAT_TEMPLATE)
    tokenize_demonstration(tokenizer, {"messages": TURNS}, response_only=True)
    used = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert used() is None
