"""Checks that the models of a run can be used, each on its own and all together, without reading any weights.

For every role of every stage: the files are complete and readable, the weights fit the configuration, the embedding has
a row for every token, the positions suffice for the longest sequence, and all models of a stage use the same tokens.
A model that an earlier stage will make is checked through the one it will be made from, and again once it exists.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache, partial
from operator import attrgetter
from pathlib import Path

from rlhf.chat.chat_model import chat_tokenizer
from rlhf.config.engine_config import Attention
from rlhf.config.roles import BUILT_ON, Role, maker_of, origin_of, roles_of
from rlhf.config.run_config import STAGES, RunConfig
from rlhf.config.stage_configs import ModelKind
from rlhf.memory_plan.planner import machine_of
from rlhf.models.attention import check_attention, check_padding_free
from rlhf.models.causal_lm import causal_lm_module, generation_config
from rlhf.models.embedded import prepare
from rlhf.models.model_folder import ModelFolder, local_folder
from rlhf.models.model_spec import decoder_config, max_positions
from rlhf.models.scalar_head import HEAD, classifier_config, classifier_module
from rlhf.models.weights import plain_keys
from rlhf.runtime.dist import World, broadcast_object
from rlhf.text.tokenizer import Tokenizer, load_tokenizer, stop_token_ids, template_fingerprint
from stages.lifecycle.session import stage_tokenizer
from stages.lifecycle.stage_record import check_seal, is_finished, read_record

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFacts:
    """A model that can be loaded."""

    folder: Path
    rows: int
    """Rows of its embedding: it can read token ids below this."""
    positions: int
    """The longest sequence that it was made for, in tokens."""
    has_scores: bool
    """Whether it has a scalar head that was trained."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of each parameter by name."""


def validate_model(
    folder: Path,
    head: ModelKind,
    *,
    num_layers: int = 0,
    attention: Attention | None = None,
    padding_free: bool | None = None,
    on_cuda: bool = False,
) -> ModelFacts:
    """Check that the model in `folder` can be loaded with the head `head`, reading no more than headers of files.

    Args:
        folder: with `config.json` and safetensors.
        head: the head it will be used with; a scalar head need not exist yet.
        num_layers: use only the first layers; 0 all.
        attention: how it is to attend, None as transformers chooses.
        padding_free: whether it must be able to compute without padding.
        on_cuda: whether it will compute on a GPU.

    Raises:
        ValueError: a file is missing or damaged, tensors are missing or do not have the shape that `config.json` gives
            them, or the model cannot be used.
    """
    if (folder / "adapter_config.json").is_file():
        ModelFolder(folder)  # its error says what to do with an adapter
    config, files = decoder_config(folder), ModelFolder(folder)
    if head is ModelKind.causal_lm:
        if HEAD in files:
            raise ValueError(f"{folder} is a reward model or critic, which gives scores; expected one that speaks.")
        module = causal_lm_module(config)
        keys = plain_keys(module, files)
        generation_config(folder)
    else:
        module = classifier_module(classifier_config(folder, num_layers))
        keys = plain_keys(module, files, optional={HEAD})
    check_attention(module, attention, on_cuda=on_cuda)
    check_padding_free(module, padding_free, attention=attention)
    if keys is None:
        log.warning("%s: transformers converts its tensors; whether all are there shows when it is loaded.", folder)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    return ModelFacts(folder, int(config.vocab_size), max_positions(config), HEAD in files, shapes)


class _Inspector:
    """Inspects models and loads tokenizers for a run, each once: roles often share a folder."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.on_cuda = machine_of(run, ranks=1).device.type == "cuda"
        self.facts, self.check_seal = cache(validate_model), cache(check_seal)
        self._plain, self._own = cache(load_tokenizer), cache(partial(stage_tokenizer, run))

    def tokenizer(self, role: Role, folder: Path, *, is_made: bool) -> Tokenizer:
        """The tokenizer as the stage will load it: with the run's chat template and pad token, or without."""
        if role.stage == "chat":
            return chat_tokenizer(str(folder), chat_template=self.run.model.chat_template)
        is_first = role == roles_of(self.run, role.stage)[0]
        return self._own(str(folder)) if is_made or is_first else self._plain(str(folder))


@dataclass(frozen=True)
class _Inspected:
    """A model that was inspected, in its role."""

    role: Role
    facts: ModelFacts
    tokenizer: Tokenizer
    template: str | None
    """Fingerprint of the template that a stage of ours trained it with, or will; None for other models."""


def check_models(run: RunConfig, stages: Iterable[str], *, todo: Collection[str] = ()) -> None:
    """Check the models of `stages`; models that stages of `todo` will make, through the ones they will be made from.

    Raises:
        ValueError: a model cannot be used; the message names its setting, the reason, and what to do.
    """
    origins = {role: origin_of(run, role, todo=todo) for stage in stages for role in roles_of(run, stage)}
    folders = {path: _folder(run, role, path=path) for role, path in origins.items()}
    if run.model.embedded is not None and run.model.path in folders:
        prepare(run.model.embedded, folders[run.model.path])
    inspector, members = _Inspector(run), dict[str, list[_Inspected]]()
    for role, path in origins.items():
        try:
            member = _examined(inspector, role, folder=folders[path], is_made=path != role.path)
        except ValueError as error:
            raise ValueError(f"{role}: {error}") from error
        members.setdefault(role.stage, []).append(member)
    for stage, together in members.items():
        if stage != "chat":
            for member in together:
                _check_together(member, together)


def check_made(run: RunConfig, stage: str, *, made: Collection[str], world: World) -> None:
    """Check the models of `stage` again if stages of `made` have made one of them; all ranks must call it.

    Raises:
        ValueError: on the first rank; the others exit silently.
    """
    if not any(maker_of(run, role.path) in made for role in roles_of(run, stage)):
        return
    error: Exception | None = None
    if world.is_main:
        try:
            check_models(run, [stage])
        except (ValueError, OSError) as found:
            error = found
    if broadcast_object(error is not None):
        raise error or SystemExit(1)


def _folder(run: RunConfig, role: Role, *, path: str) -> Path:
    """The folder of the model at `path`, from which `role` starts or will be made."""
    if run.model.embedded is not None and path == run.model.path:
        return Path(path).expanduser()
    try:
        return local_folder(path)
    except ValueError as error:
        raise ValueError(
            f"{role}: there is no such model yet ({error}) {_advice(run, role)} another, as in {role.setting}=MODEL"
            f"{f', or do without, as in {role.setting}=null' if role.optional else ''}."
        ) from error


def _advice(run: RunConfig, role: Role) -> str:
    """Advice on a missing model, up to the word before "another"."""
    maker = maker_of(run, role.path)
    if maker is None:
        return "Name"
    last = role.stage if role.stage in STAGES else maker
    needed = {*BUILT_ON[last], last, *BUILT_ON[maker], maker}
    needed = {stage for stage in needed if not is_finished(run, stage)} | set(run.stages)
    chosen = [stage for stage in STAGES if stage in needed] + [use for use in run.uses if use == role.stage]
    return f"Run the stages that make it first, as in 'stage=[{','.join(map(run.title, chosen))}]', or name"


def _examined(inspector: _Inspector, role: Role, *, folder: Path, is_made: bool) -> _Inspected:
    record = None if is_made else read_record(folder)
    if record is not None:
        inspector.check_seal(folder)
    engine = role.engine_config(inspector.run)
    facts = inspector.facts(
        folder,
        role.kind,
        num_layers=role.num_layers,
        attention=engine.attention,
        padding_free=engine.padding_free,
        on_cuda=inspector.on_cuda,
    )
    if role.gives_scores and not facts.has_scores and not is_made:
        without = f", or set {role.setting}=null" if role.optional else ""
        raise ValueError(
            "it is a language model without a scalar head; expected a reward model, an "
            f"AutoModelForSequenceClassification with one label. Train one with stage=reward{without}."
        )
    tokenizer = inspector.tokenizer(role, folder, is_made=is_made)
    _check_tokens(tokenizer, facts)
    _check_positions(inspector.run, role, facts=facts)
    trained_with = record.template if record else template_fingerprint(tokenizer) if is_made else None
    return _Inspected(role, facts, tokenizer, trained_with)


def _check_tokens(tokenizer: Tokenizer, facts: ModelFacts) -> None:
    """Every token that can occur needs an embedding row; one the template never writes may lack it (Gemma 3 1B)."""
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= facts.rows}
    if not beyond:
        return
    rare = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    rare -= {tokenizer.bos_token_id, tokenizer.pad_token_id, *stop_token_ids(tokenizer)}
    template = str(tokenizer.chat_template or "")
    used = [token for token, index in beyond.items() if index not in rare or token in template]
    token = min(used or beyond, key=lambda name: beyond[name])
    said = (
        f"its tokenizer has {len(beyond)} tokens that the model has no row for, such as {token!r} with the id "
        f"{beyond[token]}: its embedding has {facts.rows} rows"
    )
    if used:
        raise ValueError(
            f"{said}. Take the tokenizer that belongs to the model, or give it rows once with "
            f"`model.resize_token_embeddings({max(beyond.values()) + 1})`."
        )
    log.warning("%s: %s; a text that has one of them could not be read", facts.folder, said)


def _check_positions(run: RunConfig, role: Role, *, facts: ModelFacts) -> None:
    """The longest sequence of the stage must fit into the model's positions."""
    config = run.stage_config(role.stage)
    names = config.longest_sequence(role.name)
    sizes = [int(attrgetter(name)(config)) for name in names]
    if sum(sizes) > facts.positions:
        settings = " + ".join(f"{role.stage}.{name}" for name in names)
        raise ValueError(
            f"it has {facts.positions} positions, but {settings} = {' + '.join(map(str, sizes))}; expected at most "
            f"that many together."
        )


def _check_together(member: _Inspected, together: list[_Inspected]) -> None:
    """A model must understand the tokens that the other models of its stage write."""
    first = together[0]
    if member is first:
        return
    _check_vocabulary(member, first)
    if member.role.follows and member.facts.shapes != first.facts.shapes:
        raise ValueError(
            f"{member.role} has other parameters than {first.role}, towards which it is to be moved "
            "(ppo.reference_update_every); expected a model of the same architecture. Name one, or set "
            "ppo.reference_update_every=0."
        )
    for writer in together:
        if writer.role.generates and member.facts.rows < writer.facts.rows:
            last = max(writer.tokenizer.get_vocab().values())
            said = (
                f"{member.role} has an embedding of {member.facts.rows} rows, {writer.role} one of {writer.facts.rows}"
            )
            if member.facts.rows <= last:
                raise ValueError(
                    f"{said}: it could not read the token {last}. Choose a model of the same size of vocabulary, or "
                    f"give it rows once with `model.resize_token_embeddings({writer.facts.rows})`."
                )
            log.warning("%s; those that it lacks are no tokens, and should never be written", said)
    if member.role.gives_scores and member.template not in (None, template_fingerprint(first.tokenizer)):
        raise ValueError(
            f"{member.role} was trained with another chat template or other special tokens than those of {first.role}. "
            f"Train both from the same model, or set model.chat_template for both."
        )
    if member.role.generates and template_fingerprint(member.tokenizer) != template_fingerprint(first.tokenizer):
        log.warning("%s has another chat template than %s, and is asked with that one", member.role, first.role)


def _check_vocabulary(member: _Inspected, first: _Inspected) -> None:
    theirs, ours = member.tokenizer.get_vocab(), first.tokenizer.get_vocab()
    added = first.tokenizer.added_tokens_decoder  # models of one family may call a reserved token by another name
    differing = [token for token, index in theirs.items() if ours.get(token, index) != index]
    differing += [token for token, index in ours.items() if token not in theirs and index not in added]
    if differing or len(theirs) < len(ours):
        raise ValueError(
            f"{member.role} has another vocabulary than {first.role} ({len(theirs)} tokens against {len(ours)}, "
            f"{len(differing)} of them with other ids): it would read other text than the other writes. "
            f"Choose a model of the same family."
        )
