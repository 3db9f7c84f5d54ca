"""Chat: a conversation with a model in the terminal, or with two of them side by side.

Every turn renders the whole conversation with the model's own chat template and streams what is drawn. Lines of a pipe
are answered alike, with nothing but answers on stdout. Left out: markdown, tools, a history that outlives the program.
Run: `python run_pipeline.py stage=chat`, or `echo Hello | python run_pipeline.py stage=chat chat.model=MODEL`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from rlhf.chat.chat_model import Answer, Speaker, labels, speaker_tokenizer
from rlhf.chat.conversation import Conversation
from rlhf.chat.terminal import Terminal
from rlhf.config.eval_config import ChatConfig, PromptStyle
from rlhf.config.roles import roles_of
from rlhf.config.run_config import RunConfig
from rlhf.models.causal_lm import causal_lm
from rlhf.models.meta_init import decoder_config, max_positions
from rlhf.models.model_folder import local_folder
from rlhf.runtime import dist, launch
from rlhf.runtime.dist import World
from stages.lifecycle.stage_models import open_engine
from stages.lifecycle.stage_record import is_finished
from stages.setup.compatibility import check_models

log = logging.getLogger(__name__)

_HINT = "Ctrl-C again, Ctrl-D or /quit ends the chat."


def run_chat(run: RunConfig) -> None:
    """Talk until the input ends.

    Raises:
        ValueError: a model cannot be talked to.
    """
    assert run.chat is not None
    terminal = Terminal()
    try:
        with _ended_by_sigterm(), ExitStack() as stack:
            world = dist.start(run.chat.engine.device)
            stack.callback(dist.stop)
            launch.use_threads(run.launch.threads, ranks=1)
            speakers = _load(run, world, stack=stack)
            Chat(terminal, speakers, new_conversation(run, speakers)).talk()
    except KeyboardInterrupt:
        terminal.end_line()
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # whoever read the answers has gone; neither has Python anything to say at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_chat(run: RunConfig, *, ranks: int) -> None:
    """Everything that can be wrong, before anything is trained or loaded.

    Raises:
        ValueError: what was found, what was expected, and what to do.
    """
    config = run.chat
    assert config is not None
    if ranks > 1:
        raise ValueError(
            f"stage=chat: found {ranks} ranks of torchrun; expected one process, which talks. Start it with python; "
            "launch.ranks may be what it is, for the stages before it."
        )
    if config.compare_with is not None and _place(config.compare_with) == _place(roles_of(run, "chat")[0].path):
        raise ValueError(
            f"chat.compare_with={config.compare_with} is chat.model itself; expected another model, or null."
        )
    check_models(run, ["chat"], todo=[stage for stage in run.stages if not is_finished(run, stage)])


def _place(path: str) -> Path:
    return Path(path).expanduser().resolve()


def _load(run: RunConfig, world: World, *, stack: ExitStack) -> list[Speaker]:
    roles = roles_of(run, "chat")
    if run.stages:  # they were made since they could be checked
        check_models(run, ["chat"])
    speakers = []
    for role, label in zip(roles, labels([role.path for role in roles]), strict=True):
        speaker = load_speaker(run, role.path, label=label, world=world)
        stack.enter_context(closing(speaker.engine))
        log.info("%s: %s on %s, %s", label, role.path, world.device, str(speaker.engine.dtype).removeprefix("torch."))
        speakers.append(speaker)
    return speakers


def load_speaker(run: RunConfig, path: str, *, label: str, world: World) -> Speaker:
    """The model at `path`, ready to answer; `engine.close()` ends it."""
    config = run.chat
    assert config is not None
    folder = local_folder(path)
    tokenizer = speaker_tokenizer(run, str(folder))
    engine = open_engine(causal_lm(folder), config=config.engine, world=world)
    return Speaker(label, engine, tokenizer, positions=max_positions(decoder_config(folder)))


def new_conversation(run: RunConfig, speakers: list[Speaker]) -> Conversation:
    """The conversation as the configuration begins it.

    Raises:
        ValueError: somebody takes no system message.
    """
    config = run.chat
    assert config is not None

    def check_system(text: str) -> None:
        for speaker in speakers:
            speaker.check_system(text)

    if config.system:
        try:
            check_system(config.system)
        except ValueError as error:
            raise ValueError(
                f"chat.system={config.system!r}: {error} Leave it empty, or choose another model."
            ) from error
    return Conversation(
        sampling=replace(config.sampling),
        max_response_tokens=config.max_response_tokens,
        seed=config.seed,
        system=config.system,
        plain=_starts_plain(run, config),
        histories=[speaker.history for speaker in speakers],
        check_system=check_system,
    )


def _starts_plain(run: RunConfig, config: ChatConfig) -> bool:
    is_own = _place(roles_of(run, "chat")[0].path).is_relative_to(run.output_dir)
    return config.prompts == PromptStyle.plain or (config.prompts == PromptStyle.plain_if_own and is_own)


class Interrupts:
    """While an answer is drawn, the first Ctrl-C asks for its end; the second does not wait for the next token."""

    def __init__(self) -> None:
        """Nobody has asked."""
        self.asked = False
        self._earlier: Any = None

    def __enter__(self) -> Interrupts:
        self._earlier = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._earlier)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends the program, where Ctrl-C would only end an answer."""
    earlier = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


@dataclass
class Chat:
    """Who talks to whom."""

    terminal: Terminal
    speakers: list[Speaker]
    conversation: Conversation

    def talk(self) -> None:
        """Answer line after line; one Ctrl-C at the prompt is taken for a slip."""
        if self.terminal.interactive:
            self._greet()
        slipped = False
        while True:
            try:
                line = self.terminal.read()
                slipped = False
                if line is None or self._follow(line):
                    return
            except KeyboardInterrupt:
                if slipped or not self.terminal.interactive:
                    raise
                slipped = True
                self.terminal.note(f"\n{_HINT}")

    def _greet(self) -> None:
        for speaker in self.speakers:
            how = "plain text, each line by itself" if speaker.is_plain(self.conversation) else "its chat template"
            self.terminal.note(f"{speaker.label} answers ({how}).")
        self.terminal.note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.")

    def _follow(self, line: str) -> bool:
        """Do what a line asks for; True at the end."""
        outcome = self.conversation.heed(line)
        if outcome.notice:
            self.terminal.note(outcome.notice)
        if outcome.question is not None:
            sample = self.conversation.ask()
            for speaker in self.speakers:
                self._answer(speaker, outcome.question, sample=sample)
        return outcome.ends

    def _answer(self, speaker: Speaker, question: str, *, sample: int) -> None:
        try:
            prompt = speaker.prompt(self.conversation, question)
        except ValueError as error:
            self.terminal.note(f"error: {error}")
            return
        if prompt.forgotten:
            del speaker.history[: prompt.forgotten]
            self.terminal.note(
                f"{speaker.label} has {speaker.positions} positions: forgot the oldest {prompt.forgotten} turns."
            )
        if len(self.speakers) > 1:
            self.terminal.say(f"[{speaker.label}]\n")
        with Interrupts() as interrupts:
            try:
                answer = speaker.answer(
                    prompt.ids, conversation=self.conversation, sample=sample, show=self._shown(interrupts)
                )
            except torch.OutOfMemoryError:
                self.terminal.note("error: the device has no memory left for this answer; /reset or /max may help.")
                return
        self._finish(speaker, question, answer=answer, interrupted=interrupts.asked)

    def _shown(self, interrupts: Interrupts) -> Callable[[str], bool]:
        def show(piece: str) -> bool:
            self.terminal.say(piece)
            return not interrupts.asked

        return show

    def _finish(self, speaker: Speaker, question: str, *, answer: Answer, interrupted: bool) -> None:
        self.terminal.end_answer(answer.text)
        if interrupted and not self.terminal.interactive:
            raise KeyboardInterrupt
        if answer.text or not interrupted:
            self.conversation.record(speaker.history, question, answer=answer.text)
        if not self.terminal.interactive:
            return
        if interrupted:
            kept = "what was said is remembered" if answer.text else "nothing was said, the message is not remembered"
            self.terminal.note(f"(stopped; {kept})")
        elif not answer.ended:
            self.terminal.note("(cut; /max sets where)")
        elif not answer.text:
            self.terminal.note("(ended without a word)")
