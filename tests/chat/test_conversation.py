"""Commands change what they say, and nothing else; histories are taken back and cut as wholes."""

import pytest

from rlhf.chat.conversation import COMMANDS, Conversation, Turn, fit, messages
from rlhf.config.stage_configs import SamplingConfig


def conversation(**settings):
    return Conversation(SamplingConfig(temperature=0.7), max_response_tokens=9, seed=3, **settings)


def said(talk, *questions):
    for question in questions:
        talk.ask()
        for history in talk.histories:
            talk.record(history, question, answer=f"answer to {question}")


@pytest.mark.parametrize(
    ("line", "question"),
    [("Hello", "Hello"), ("  indented", "  indented"), ("//usr is a folder", "/usr is a folder"), ("a\n/b", "a\n/b")],
)
def test_a_line_is_a_question(line, question):
    assert conversation().heed(line).question == question


@pytest.mark.parametrize("line", ["", "   ", "\t"])
def test_an_empty_line_asks_nothing(line):
    assert conversation().heed(line) == ("", None, False)


@pytest.mark.parametrize(
    ("line", "read", "value"),
    [
        ("/temperature 0", lambda talk: talk.sampling.temperature, 0.0),
        ("/top_p 0.5", lambda talk: talk.sampling.top_p, 0.5),
        ("/top_k  40 ", lambda talk: talk.sampling.top_k, 40),
        ("/max 5", lambda talk: talk.max_response_tokens, 5),
        ("/seed -2", lambda talk: talk.seed, -2),
        ("/system Be brief.\nAnd kind.", lambda talk: talk.system, "Be brief.\nAnd kind."),
        ("/plain on", lambda talk: talk.plain, True),
    ],
)
def test_a_command_sets_what_it_names(line, read, value):
    talk = conversation()
    assert read(talk) != value
    outcome = talk.heed(line)
    assert read(talk) == value
    assert outcome.question is None
    assert outcome.notice


def test_a_command_without_a_value_shows_and_keeps_it():
    talk = conversation()
    assert talk.heed("/temperature").notice == "temperature 0.7"
    assert "9 tokens" in talk.heed("/max").notice
    assert talk.heed("/seed").notice == "seed 3, sample 0 comes next"
    assert (talk.sampling, talk.max_response_tokens, talk.seed) == (SamplingConfig(temperature=0.7), 9, 3)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/temperature warm", "/temperature warm: expected a number."),
        ("/temperature nan", "expected a finite number"),
        ("/temperature -1", "temperature=-1.0: expected 0 or more."),
        ("/top_p 2", "top_p=2.0: expected above 0, at most 1."),
        ("/top_k 1.5", "/top_k 1.5: expected a whole number."),
        ("/max 0", "/max 0: expected 1 or more."),
        ("/seed x", "/seed x: expected a whole number."),
        ("/plain maybe", "expected on or off"),
        ("/undo", "Nothing was said yet."),
        ("/retry", "Nothing was said yet."),
        ("/temprature 1", "Did you mean /temperature?"),
        ("/usr/bin", "// begins a message with a slash"),
    ],
)
def test_a_mistake_is_answered_and_changes_nothing(line, sentence):
    talk = conversation()
    outcome = talk.heed(line)
    assert sentence in outcome.notice
    assert not outcome.ends
    assert outcome.question is None
    assert talk == conversation()


def test_a_system_message_that_is_refused_is_not_set():
    def refuse(text):
        raise ValueError(f"no place for {text}.")

    talk = conversation(check_system=refuse)
    assert "no place for Hush." in talk.heed("/system Hush").notice
    assert talk.system == ""


def test_help_names_every_command_and_quit_ends():
    notice = conversation().heed("/help").notice
    assert all(name in notice for name in COMMANDS if name != "/exit")
    assert conversation().heed("/quit").ends
    assert conversation().heed("/exit").ends


def test_undo_and_retry_take_back_the_last_turn_of_everyone_who_had_it():
    talk = conversation(histories=[[], []])
    said(talk, "one", "two")
    talk.ask()
    talk.record(talk.histories[0], "three", answer="only I answered")
    assert talk.heed("/undo").notice == "taken back: three"
    assert [len(history) for history in talk.histories] == [2, 2]
    outcome = talk.heed("/retry")
    assert outcome.question == "two"
    assert [[turn.question for turn in history] for history in talk.histories] == [["one"], ["one"]]


def test_a_retry_is_another_draw_and_a_reset_begins_the_draws_again():
    talk = conversation()
    assert [talk.ask(), talk.ask()] == [0, 1]
    talk.record(talk.histories[0], "question", answer="answer")
    talk.heed("/retry")
    assert talk.ask() == 2
    talk.heed("/reset")
    assert talk.histories == [[]]
    assert talk.ask() == 0
    talk.heed("/seed 8")
    assert talk.ask() == 0


def test_messages_alternate_after_the_system_message():
    turns = [Turn(1, "a", "b")]
    roles = [message["role"] for message in messages(turns, "c", system="s")]
    assert roles == ["system", "user", "assistant", "user"]
    assert [message["content"] for message in messages(turns, "c")] == ["a", "b", "c"]


def test_the_oldest_turns_go_until_the_rest_fits():
    turns = [Turn(number, "q", "a") for number in range(4)]

    def tokenize(left):
        return [turn.number for turn in left] + [99] * 10

    assert fit(turns, tokenize, limit=14) == ([0, 1, 2, 3] + [99] * 10, 0)
    assert fit(turns, tokenize, limit=12) == ([2, 3] + [99] * 10, 2)
    assert fit(turns, tokenize, limit=5) == ([99] * 10, 4)
