"""Commands change what they say, and nothing else; histories are taken back and cut as wholes."""

import pytest

from rlhf.chat.conversation import COMMANDS, Conversation, Turn, messages
from rlhf.config.stage_configs import SamplingConfig


def conversation(**settings):
    return Conversation(SamplingConfig(temperature=0.7), max_response_tokens=9, seed=3, **settings)


def answered(talk, question, *labels):
    for label in labels:
        talk.turns[-1].answers[label] = f"{label}'s answer to {question}"


@pytest.mark.parametrize(
    ("line", "question"),
    [("Hello", "Hello"), ("  indented", "  indented"), ("//usr is a folder", "/usr is a folder"), ("a\n/b", "a\n/b")],
)
def test_a_line_is_a_question(line, question):
    assert conversation().handle_line(line).question == question


@pytest.mark.parametrize("line", ["", "   ", "\t"])
def test_an_empty_line_asks_nothing(line):
    assert conversation().handle_line(line) == ("", None, False)


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
    outcome = talk.handle_line(line)
    assert read(talk) == value
    assert outcome.question is None
    assert outcome.notice


def test_a_command_without_a_value_shows_and_keeps_it():
    talk = conversation()
    assert talk.handle_line("/temperature").notice == "temperature 0.7"
    assert "9 tokens" in talk.handle_line("/max").notice
    assert talk.handle_line("/seed").notice == "seed 3, sample 0 comes next"
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
    outcome = talk.handle_line(line)
    assert sentence in outcome.notice
    assert not outcome.ends
    assert outcome.question is None
    assert talk == conversation()


def test_a_system_message_that_is_refused_is_not_set():
    def refuse(text):
        raise ValueError(f"no place for {text}.")

    talk = conversation(check_system=refuse)
    assert "no place for Hush." in talk.handle_line("/system Hush").notice
    assert talk.system == ""


def test_help_names_every_command_and_quit_ends():
    notice = conversation().handle_line("/help").notice
    assert all(name in notice for name in COMMANDS if name != "/exit")
    assert conversation().handle_line("/quit").ends
    assert conversation().handle_line("/exit").ends


def test_undo_and_retry_take_back_the_last_turn_of_everyone_who_had_it():
    talk = conversation()
    for question, *labels in (("one", "x", "y"), ("two", "x", "y"), ("three", "x"), ("nobody answered",)):
        talk.begin_turn(question)
        answered(talk, question, *labels)
    assert talk.handle_line("/undo").notice == "taken back: three"
    assert [len(talk.answered_by(label)) for label in ("x", "y")] == [2, 2]
    assert talk.handle_line("/retry").question == "two"
    assert [[turn.question for turn in talk.answered_by(label)] for label in ("x", "y")] == [["one"], ["one"]]


def test_a_retry_is_another_draw_and_a_reset_begins_the_draws_again():
    talk = conversation()
    assert [talk.begin_turn("question").sample, talk.begin_turn("question").sample] == [0, 1]
    answered(talk, "question", "x")
    assert talk.handle_line("/retry").question == "question"
    assert talk.begin_turn("question").sample == 2
    talk.handle_line("/reset")
    assert talk.turns == []
    assert talk.begin_turn("question").sample == 0
    talk.handle_line("/seed 8")
    assert talk.begin_turn("question").sample == 0


def test_messages_alternate_after_the_system_message():
    turns = [Turn("a", 0, {"x": "b", "y": "other"})]
    roles = [message["role"] for message in messages(turns, "c", label="x", system="s")]
    assert roles == ["system", "user", "assistant", "user"]
    assert [message["content"] for message in messages(turns, "c", label="x")] == ["a", "b", "c"]
