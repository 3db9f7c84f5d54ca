"""Chat: a conversation in the terminal with a model, or with two of them that answer the same.

Every turn renders the whole conversation with the model's own chat template and streams the answer. Lines of a pipe are
answered alike. Left out: markdown, tools, a history that outlives the program.
Run: `python run_pipeline.py stage=chat`, or `echo Hello | python run_pipeline.py stage=chat chat.model=MODEL`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rlhf.chat.chat_model import ChatModel, chat_tokenizer, labels
from rlhf.chat.conversation import Conversation, Turn
from rlhf.chat.terminal import Terminal, interrupts
from rlhf.config.eval_config import PromptStyle
from rlhf.config.roles import roles_of
from rlhf.config.run_config import RunConfig
from rlhf.models.model_folder import local_folder
from rlhf.models.model_spec import decoder_config, max_positions
from rlhf.runtime import dist
from rlhf.runtime.cores import use_cores
from rlhf.runtime.dist import World
from stages.lifecycle.stage_models import open_model
from stages.lifecycle.stage_record import is_finished
from stages.setup.compatibility import check_models

log = logging.getLogger(__name__)


def run_chat(run: RunConfig) -> None:
    """Chat until the input ends.

    Raises:
        ValueError: a model cannot be used.
    """
    config, terminal = run.chat, Terminal()
    assert config is not None
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the engines are closed on the way
    try:
        with ExitStack() as stack:
            world = dist.start(config.engine.device)
            stack.callback(dist.stop)
            use_cores(world, run.launch)
            if run.stages:  # the first check came before the stages that made the models
                check_models(run, ["chat"])
            models = []
            for model in load_models(run, world):
                stack.callback(model.engine.close)
                models.append(model)
            Chat(terminal, models, new_conversation(run, models)).run()
    except KeyboardInterrupt:
        terminal.end_line()
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of the answers is gone; without this Python complains again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_chat(run: RunConfig, *, ranks: int) -> None:
    """Check the settings and models of the chat, before any stage runs.

    Raises:
        ValueError: what was found, what was expected, and what to do.
    """
    config = run.chat
    assert config is not None
    if ranks > 1:
        raise ValueError(
            f"stage=chat: found {ranks} ranks of torchrun; expected one process. Start it with python; launch.ranks "
            "may stay as it is, for the stages before it."
        )
    model, *others = (Path(role.path).expanduser().resolve() for role in roles_of(run, "chat"))
    if model in others:
        raise ValueError(
            f"chat.compare_with={config.compare_with} is chat.model itself; expected another model, or null."
        )
    check_models(run, ["chat"], todo=[stage for stage in run.stages if not is_finished(run, stage)])


def load_models(run: RunConfig, world: World) -> Iterator[ChatModel]:
    """Open the models of the chat, one after the other."""
    roles = roles_of(run, "chat")
    for role, label in zip(roles, labels([role.path for role in roles]), strict=True):
        folder = local_folder(role.path)
        tokenizer = chat_tokenizer(str(folder), chat_template=run.model.chat_template)
        engine = open_model(run, role, world=world)
        log.info("%s: %s on %s, %s", label, role.path, world.device, str(engine.dtype).removeprefix("torch."))
        yield ChatModel(label, engine, tokenizer, positions=max_positions(decoder_config(folder)))


def new_conversation(run: RunConfig, models: list[ChatModel]) -> Conversation:
    """The conversation with the settings of the run.

    Raises:
        ValueError: a model takes no system message.
    """
    config = run.chat
    assert config is not None

    def check_system(text: str) -> None:
        for model in models:
            model.check_system(text)

    if config.system:
        try:
            check_system(config.system)
        except ValueError as error:
            raise ValueError(
                f"chat.system={config.system!r}: {error} Leave it empty, or choose another model."
            ) from error
    path = Path(roles_of(run, "chat")[0].path).expanduser().resolve()
    is_own = path.is_relative_to(run.output_dir)
    return Conversation(
        sampling=replace(config.sampling),
        max_response_tokens=config.max_response_tokens,
        seed=config.seed,
        system=config.system,
        plain=config.prompts is PromptStyle.plain or (config.prompts is PromptStyle.plain_if_own and is_own),
        check_system=check_system,
    )


@dataclass
class Chat:
    """The loop: read a line, run its command or let every model answer it."""

    terminal: Terminal
    models: list[ChatModel]
    conversation: Conversation

    def run(self) -> None:
        """Handle line after line; a single Ctrl-C at the prompt does not end the chat."""
        if self.terminal.interactive:
            for model in self.models:
                how = "plain text, each line by itself" if model.is_plain(self.conversation) else "its chat template"
                self.terminal.note(f"{model.label} answers ({how}).")
            self.terminal.note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D ends.")
        interrupted = False
        while True:
            try:
                line = self.terminal.read()
                interrupted = False
                if line is None or self.handle(line):
                    return
            except KeyboardInterrupt:
                if interrupted or not self.terminal.interactive:
                    raise
                interrupted = True
                self.terminal.note("\nCtrl-C again, Ctrl-D or /quit ends the chat.")

    def handle(self, line: str) -> bool:
        """Do what a line asks for; True ends the chat."""
        result = self.conversation.handle_line(line)
        if result.notice:
            self.terminal.note(result.notice)
        if result.question is not None:
            turn = self.conversation.begin_turn(result.question)
            for model in self.models:
                self._answer(model, turn)
        return result.ends

    def _answer(self, model: ChatModel, turn: Turn) -> None:
        ids = self._prompt(model, turn.question)
        if ids is None:
            return
        if len(self.models) > 1:
            self.terminal.write(f"[{model.label}]\n")

        def on_text(piece: str) -> bool:
            self.terminal.write(piece)
            return not received

        with interrupts() as received:
            try:
                text, ended = model.answer(ids, conversation=self.conversation, sample=turn.sample, on_text=on_text)
            except torch.OutOfMemoryError:
                self.terminal.note("error: the device has no memory left for this answer; /reset or /max may help.")
                return
        self.terminal.end_answer(text)
        if received and not self.terminal.interactive:
            raise KeyboardInterrupt
        if text or not received:
            turn.answers[model.label] = text
        if self.terminal.interactive:
            self._note_end(text, ended=ended, interrupted=bool(received))

    def _prompt(self, model: ChatModel, question: str) -> list[int] | None:
        """The tokens to answer; None, and a note, if there is no prompt that the model can answer."""
        try:
            ids, forgotten = model.fit_prompt(self.conversation, question)
        except ValueError as error:
            self.terminal.note(f"error: {error}")
            return None
        if forgotten:
            for turn in self.conversation.answered_by(model.label)[:forgotten]:
                del turn.answers[model.label]
            self.terminal.note(f"{model.label} has {model.positions} positions: forgot the oldest {forgotten} turns.")
        return ids

    def _note_end(self, text: str, *, ended: bool, interrupted: bool) -> None:
        if interrupted:
            kept = "what was said is remembered" if text else "nothing was said, the message is not remembered"
            self.terminal.note(f"(stopped; {kept})")
        elif not ended:
            self.terminal.note("(cut; /max sets where)")
        elif not text:
            self.terminal.note("(ended without a word)")
