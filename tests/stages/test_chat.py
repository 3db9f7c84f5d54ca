"""Chat as a user has it: through a pipe, in a real terminal, after training, and with the mistakes one makes."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlhf.chat.chat_model import one_prompt
from rlhf.chat.terminal import Terminal, escaped
from rlhf.config.roles import roles_of
from rlhf.config.run_config import Embedded
from rlhf.config.stage_configs import SamplingConfig
from rlhf.generation.generate import Decoding, generate
from rlhf.models.embedded import prepare
from rlhf.models.export import export
from rlhf.models.scalar_head import scalar_head_model
from rlhf.runtime.dist import World, stop
from rlhf.text.tokenize_rows import tokenize_prompt
from rlhf.text.tokenizer import decode, load_tokenizer, stop_token_ids
from stages.chat import Chat, check_chat, load_models, new_conversation
from tests.config.test_configuration import composed

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "dumb"}
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return prepare(Embedded.tiny, tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def endless(model, tmp_path_factory):
    """A model to which all tokens are equally likely: at temperature 0 it says the first, an escape, for ever."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["!"], vocabulary["\u011b"] = vocabulary["\u011b"], vocabulary["!"]  # how byte level writes byte 0x1b
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    save_file({name: weight * 0 for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def changed(model, folder, *, template=None, **config):
    """A copy of a model with another chat template or other values in its config."""
    shutil.copytree(model, folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def run_of(model, *settings, output_dir="nowhere"):
    return composed(
        "experiment=smoke",
        "stage=chat",
        "engine.precision=fp32",
        f"chat.model={model}",
        f"output_dir={output_dir}",
        *settings,
    )


@contextmanager
def chat_of(run):
    """The chat of a run, whose terminal is whatever pytest captures."""
    models = list(load_models(run, World.alone()))
    try:
        yield Chat(Terminal(), models, new_conversation(run, models))
    finally:
        for model in models:
            model.engine.close()
        stop()


def turns_of(chat, place=0):
    """Questions and answers of one of the models."""
    label = chat.models[place].label
    return [(turn.question, turn.answers[label]) for turn in chat.conversation.answered_by(label)]


def alone(model, ids, *, sample, seed, sampling, longest):
    """What `generate` says to a prompt."""
    tokenizer = load_tokenizer(str(model))
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    stops = stop_token_ids(tokenizer, module.generation_config)
    decoding = Decoding(longest, stops, pad_id=tokenizer.pad_token_id, sampling=sampling)
    said = generate(module, one_prompt(ids, sample=sample, device="cpu"), decoding=decoding, seed=seed)
    return decode(tokenizer, said.responses[0].tolist())


@pytest.mark.parametrize("engine", ["zero0", "zero3_cpu"])
def test_a_chat_says_what_generate_says_to_the_rendered_conversation(model, engine, tmp_path):
    run = run_of(
        model, "chat.seed=5", "chat.max_response_tokens=12", "chat.sampling.temperature=1.3", f"engine={engine}"
    )
    sampling = SamplingConfig(temperature=1.3)
    tokenizer = load_tokenizer(str(model))
    with chat_of(run) as chat:
        for line in ("/system Be kind.", "Hello", "And you?"):
            chat.handle(line)
        turns = turns_of(chat)
    expected = [{"role": "system", "content": "Be kind."}]
    for sample, (question, answer) in enumerate(turns):
        expected.append({"role": "user", "content": question})
        ids = tokenize_prompt(tokenizer, {"prompt": expected})
        assert tokenizer.decode(ids) == tokenizer.apply_chat_template(
            expected, tokenize=False, add_generation_prompt=True
        )
        assert answer == alone(model, ids, sample=sample, seed=5, sampling=sampling, longest=12)
        expected.append({"role": "assistant", "content": answer})
    assert [question for question, _ in turns] == ["Hello", "And you?"]
    assert turns[0][1] != turns[1][1]


def test_an_answer_appears_while_it_is_drawn(endless, monkeypatch):
    pieces = []
    with chat_of(run_of(endless, "chat.sampling.temperature=0", "chat.max_response_tokens=5")) as chat:
        monkeypatch.setattr(chat.terminal, "write", pieces.append)
        chat.handle("Hello")
    assert [piece for piece in pieces if piece.strip()] == ["\x1b"] * 5


def test_each_of_two_models_has_its_own_history(model, endless, capsys):
    run = run_of(model, f"chat.compare_with={endless}", "chat.sampling.temperature=0", "chat.max_response_tokens=3")
    with chat_of(run) as chat:
        for line in ("Hello", "Again", "/undo"):
            chat.handle(line)
        first, second = turns_of(chat), turns_of(chat, 1)
        names = [model.label for model in chat.models]
    assert second == [("Hello", "\x1b" * 3)]
    assert [question for question, _ in first] == ["Hello"]
    assert first[0][1] != second[0][1]
    out, err = capsys.readouterr()
    assert out.count(f"[{names[0]}]\n") == out.count(f"[{names[1]}]\n") == 2
    assert out.count(r"\x1b" * 3 + "\n") == 2
    assert "taken back: Again" in err


def test_the_oldest_turns_are_forgotten_with_a_notice(endless, tmp_path, capsys):
    short = changed(endless, tmp_path / "short", max_position_embeddings=120)
    run = run_of(short, "chat.sampling.temperature=0", "chat.max_response_tokens=10")
    with chat_of(run) as chat:
        for number in range(4):
            chat.handle(f"Message number {number}")
        questions = [question for question, _ in turns_of(chat)]
        chat.handle("x" * 200)
        chat.handle("/max 500")
        chat.handle("/reset")
        chat.handle("Short")
        turns = turns_of(chat)
    err = capsys.readouterr().err
    assert questions[-1] == "Message number 3"
    assert "Message number 0" not in questions
    assert "has 120 positions: forgot the oldest 1 turns" in err
    assert "fewer than the 120 positions" in err
    assert [question for question, _ in turns] == ["Short"]
    tokenizer = load_tokenizer(str(short))
    prompt = tokenize_prompt(tokenizer, {"prompt": [{"role": "user", "content": "Short"}]})
    assert len(turns[0][1]) == 120 - len(prompt)


def test_a_template_without_system_role_refuses_and_the_chat_goes_on(model, tmp_path, capsys):
    template = NO_SYSTEM + (model / "chat_template.jinja").read_text()
    strict = changed(model, tmp_path / "strict" / "model", template=template)
    with chat_of(run_of(strict, "chat.max_response_tokens=3")) as chat:
        assert chat.handle("/system Be kind.") is False
        chat.handle("Hello")
        assert chat.conversation.system == ""
        assert len(turns_of(chat)) == 1
    assert "strict/model takes no system message: the chat template refuses" in capsys.readouterr().err
    refused = pytest.raises(
        ValueError, match=r"chat\.system='Be kind': strict/model takes no system message.*not supported"
    )
    with refused, chat_of(run_of(strict, "chat.system=Be kind")):
        pass


def test_without_chat_template_each_line_is_a_prompt_of_its_own(model, tmp_path, capsys):
    bare = changed(model, tmp_path / "bare" / "model")
    (bare / "chat_template.jinja").unlink()
    run = run_of(bare, "chat.seed=2", "chat.max_response_tokens=9")
    tokenizer = load_tokenizer(str(bare))
    with chat_of(run) as chat:
        for line in ("Movie review: This", "Movie review: That", "/system Be kind."):
            chat.handle(line)
        turns = turns_of(chat)
    for sample, (question, answer) in enumerate(turns):
        ids = tokenizer(question).input_ids
        assert answer == alone(bare, ids, sample=sample, seed=2, sampling=run.chat.sampling, longest=9)
    assert len(turns) == 2
    assert "bare/model has no chat template" in capsys.readouterr().err


def test_own_models_of_plain_data_are_talked_to_plainly(model, tmp_path):
    own = tmp_path / "sft" / "model"
    shutil.copytree(model, own)
    style = "chat.prompts=plain_if_own"
    with chat_of(run_of(own, style, output_dir=tmp_path)) as chat:
        assert chat.conversation.plain
    with chat_of(run_of(model, style, output_dir=tmp_path)) as chat:
        assert not chat.conversation.plain
    assert composed("stage=chat").chat.prompts == "plain_if_own"  # the default data are reviews


@pytest.mark.parametrize(
    ("there", "stages", "expected"),
    [
        ([], "chat", "ppo/actor"),
        (["sft/model"], "chat", "sft/model"),
        (["sft/model", "ppo/actor"], "chat", "ppo/actor"),
        (["sft/model", "ppo/actor"], "[sft,chat]", "sft/model"),
        (["sft/model"], "[reward,ppo,chat]", "ppo/actor"),
        (["sft/model", "grpo/actor"], "chat", "grpo/actor"),
        (["sft/model"], "[reward,rloo,chat]", "rloo/actor"),
    ],
)
def test_who_answers_is_the_last_policy_of_the_folder(there, stages, expected, model, tmp_path):
    for product in there:
        shutil.copytree(model, tmp_path / product)
    run = composed("experiment=smoke", f"stage={stages}", f"output_dir={tmp_path}")
    if there or stages != "chat":
        check_chat(run, ranks=1)
        assert roles_of(run, "chat")[0].path == f"{tmp_path}/{expected}"
        return
    with pytest.raises(ValueError, match=rf"chat\.model={tmp_path}/{expected}: there is no such model yet.*sft,reward"):
        check_chat(run, ranks=1)


def test_what_cannot_be_talked_to_is_refused_with_the_name_of_the_setting(model, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    scores = tmp_path / "scores"
    spec = scalar_head_model(model)
    names = dict(spec.module.named_parameters())
    tensors = ((name, spec.weights.read(name, slice(None))) for name in names)
    export(spec.module, tensors, folder=scores, tokenizer=load_tokenizer(str(model)))
    cases = [
        (run_of(tmp_path / "missing"), rf"chat\.model={tmp_path}/missing: .*there is no such folder"),
        (run_of(model, "chat.compare_with=/not/there"), r"chat\.compare_with=/not/there: .*there is no such folder"),
        (run_of(adapter), r"chat\.model=.*PEFT adapter, not a model\. Merge it first"),
        (run_of(scores), r"chat\.model=.*reward model or critic"),
        (run_of(model, f"chat.compare_with={model}/"), r"chat\.compare_with=.* is chat\.model itself"),
        (run_of(model, f"chat.compare_with={tmp_path}/sft/model", output_dir=tmp_path), r"stage=\[sft,chat\]"),
    ]
    for run, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            check_chat(run, ranks=1)
    with pytest.raises(ValueError, match=r"stage=chat: found 2 ranks of torchrun; expected one process"):
        check_chat(run_of(model), ranks=2)
    check_chat(run_of(model), ranks=1)


def test_nothing_steers_the_terminal_but_lines_and_tabs():
    assert escaped("a\n\tb\x1b[2J\r\x07\u202ec") == "a\n\tb\\x1b[2J\\r\\x07\\u202ec"


def command(*words):
    return [sys.executable, str(ROOT / "run_pipeline.py"), "experiment=smoke", *words]


def test_a_pipe_gets_answers_and_nothing_else(endless, tmp_path):
    settings = ["stage=chat", f"chat.model={endless}", "chat.sampling.temperature=0", f"output_dir={tmp_path / 'out'}"]
    done = subprocess.run(
        command(*settings),
        input=b"Movie review:\n\n/max 4\nbad \xff bytes\r\none \\\nmessage\n/nope\nno newline at the end",
        env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == "\n".join([r"\x1b" * 256, *[r"\x1b" * 4] * 3, ""])
    assert b"there is no such command" in done.stderr
    assert b"Traceback" not in done.stderr
    assert not (tmp_path / "out").exists(), "a chat alone writes nothing"


class Screen:
    """A pseudo-terminal with a program in it."""

    def __init__(self, words):
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.execve(words[0], words, ENVIRONMENT)
        self.text = ""
        self._read = 0

    def type(self, text):
        os.write(self._fd, text.encode())

    def wait_for(self, text, *, seconds=600):
        """Read until `text` appears after what was waited for before."""
        end = time.monotonic() + seconds
        while text not in self.text[self._read :]:
            assert time.monotonic() < end, f"waited for {text!r} in {self.text[self._read :][-2000:]!r}"
            if select.select([self._fd], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self._fd, 65536).decode()
                except OSError:  # the program has closed the terminal
                    assert text in self.text[self._read :], self.text[-2000:]
        self._read = self.text.index(text, self._read) + len(text)

    def wait_for_prompt(self):
        """Read a prompt, and wait until the program sleeps: Python forgets an interrupt between prompt and sleep."""
        self.wait_for("> ")
        asleep = 0
        while asleep < 5:
            time.sleep(0.02)
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
            asleep = asleep + 1 if state == "S" else 0

    def exit_status(self):
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = 0
        return status

    def close(self):
        """End the program, where it has not ended."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._fd)


def test_a_conversation_in_a_terminal_after_training(endless, tmp_path):
    settings = [
        "stage=[sft,chat]",
        "sft.max_steps=1",
        "tracking.progress=quiet",
        f"chat.model={endless}",
        "chat.sampling.temperature=0",
        f"output_dir={tmp_path}",
    ]
    with closing(Screen(command(*settings, "chat.max_response_tokens=100000"))) as shown:
        shown.wait_for("Ctrl-D ends.")
        shown.wait_for("> ")
        shown.type("Hello\r")
        shown.wait_for(r"\x1b" * 20)  # the answer is on its way
        shown.type("\x03")
        shown.wait_for("(stopped; what was said is remembered)")
        shown.wait_for("> ")
        shown.type("/max 3\r")
        shown.wait_for("cut at 3 tokens")
        shown.type("a long \\\rmessage\r")
        shown.wait_for(". ")
        shown.wait_for("\r\n" + r"\x1b" * 3 + "\r\n")
        shown.wait_for("(cut; /max sets where)")
        shown.type("/undo\r")
        shown.wait_for("taken back: a long \r\nmessage")
        shown.wait_for_prompt()
        shown.type("\x03")
        shown.wait_for("Ctrl-C again, Ctrl-D or /quit ends the chat.")
        shown.wait_for("> ")
        shown.type("/seed\r")
        shown.wait_for("seed 0, sample 2 comes next")
        shown.wait_for("> ")
        shown.type("\x04")
        assert shown.exit_status() == 0
        assert "Traceback" not in shown.text
        assert "\x1b" not in shown.text.partition("Ctrl-D ends.")[2]


def test_commands_change_the_conversation_and_not_the_configuration(model):
    run = run_of(model, "chat.seed=7", "chat.sampling.top_k=3", "chat.max_response_tokens=4")
    with chat_of(run) as chat:
        assert chat.conversation.sampling == run.chat.sampling
        chat.conversation.handle_line("/top_k 9")
        assert chat.conversation.sampling.top_k == 9
        assert (chat.conversation.seed, chat.conversation.max_response_tokens) == (7, 4)
    assert run.chat.sampling.top_k == 3
