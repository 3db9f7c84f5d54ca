"""Every model that a run names is examined before the first stage trains, alone and beside the others."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf.config.roles import maker_of
from rlhf.config.run_config import Embedded
from rlhf.models.embedded import prepare
from rlhf.runtime.dist import World
from rlhf.text.tokenizer import load_tokenizer, template_fingerprint
from stages.lifecycle.stage_record import StageRecord, model_files, write_record
from stages.setup.compatibility import check_made, check_models
from tests import fakes
from tests.config.test_configuration import composed

SHAPE = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
TODO = ["sft", "reward", "ppo"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return prepare(Embedded.tiny, tmp_path_factory.mktemp("tiny") / "model")


def llama(folder, *, kind=LlamaForCausalLM, tokenizer=None, **settings):
    """A model that fits the tokenizer in the folder `tokenizer`, or in its own."""
    if tokenizer is not None:
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    config = LlamaConfig(**SHAPE, num_labels=1, pad_token_id=0, **{"vocab_size": 259, **settings})
    kind(config).save_pretrained(folder)
    return folder


@pytest.fixture
def reward(base, tmp_path):
    return llama(tmp_path / "given_reward", kind=LlamaForSequenceClassification, tokenizer=base)


def pipeline(base, tmp_path, *overrides):
    words = ["experiment=smoke", "model=path", f"model.path={base}", f"output_dir={tmp_path / 'out'}"]
    return composed(*words, *overrides)


def copy(folder, to):
    shutil.copytree(folder, to)
    return to


def cut(file, size):
    file.write_bytes(file.read_bytes()[:size])


def only_pickles(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def sharded(folder):
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="60KB")
    (folder / "model.safetensors").unlink()
    return sorted(folder.glob("*.safetensors"))


def missing_shard(folder):
    sharded(folder)[1].unlink()


def shard_of_another_model(folder):
    first, second, *_ = sharded(folder)
    shutil.copyfile(first, second)


def without_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_shape(folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"intermediate_size": 100}))


def more_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)


FAULTS = [
    (only_pickles, r"`\.bin` files only"),
    (missing_shard, r"model-00002-of-.*not there"),
    (shard_of_another_model, r"index\.json looks for \d+ tensors in files that lack them"),
    (lambda folder: cut(folder / "model.safetensors", 4), r"model\.safetensors is damaged.*header too small"),
    (lambda folder: cut(folder / "model.safetensors", 300), r"model\.safetensors is damaged"),
    (lambda folder: cut(folder / "model.safetensors", -1), r"model\.safetensors is damaged.*not fully covered"),
    (lambda folder: (folder / "model.safetensors").unlink(), r"holds no weights"),
    (without_a_tensor, r"1 parameters of LlamaForCausalLM have no value, such as \['model\.norm\.weight'\]"),
    (other_shape, r"has shape \(176, 64\), but `config\.json` makes it \(100, 64\)"),
    (lambda folder: (folder / "config.json").unlink(), r"no `config\.json`"),
    (lambda folder: cut(folder / "config.json", 50), r"cannot read its `config\.json`"),
    (lambda folder: cut(folder / "generation_config.json", 9), r"cannot read its `generation_config\.json`"),
    (lambda folder: cut(folder / "tokenizer.json", 500), r"found no tokenizer there that loads"),
    (more_tokens, r"1 tokens that the model has no row for, such as '<new>' with the id 259: .*259 rows"),
]


@pytest.mark.parametrize(("fault", "sentence"), FAULTS)
def test_a_reference_that_cannot_be_used_is_named_before_sft(base, tmp_path, fault, sentence):
    bad = copy(base, tmp_path / "bad")
    fault(bad)
    run = pipeline(base, tmp_path, f"ppo.reference={bad}")
    with pytest.raises(ValueError, match=rf"^ppo\.reference={bad}: .*{sentence}"):
        check_models(run, TODO, todo=TODO)


@pytest.mark.parametrize("role", ["sft.init_from", "reward.init_from", "ppo.actor", "ppo.critic", "eval.baseline"])
def test_every_role_is_examined(base, tmp_path, role):
    bad = copy(base, tmp_path / "bad")
    cut(bad / "model.safetensors", 300)
    run = pipeline(base, tmp_path, "stage=[sft,reward,ppo,eval]", f"{role}={bad}")
    with pytest.raises(ValueError, match=rf"^{role}={bad}: .*model\.safetensors is damaged"):
        check_models(run, [*TODO, "eval"], todo=TODO)


def test_good_models_are_let_through(base, reward, tmp_path):
    llama(tmp_path / "reference", tokenizer=base)
    words = [f"ppo.reference={tmp_path / 'reference'}", f"ppo.reward={reward}", f"ppo.critic={base}"]
    check_models(pipeline(base, tmp_path, *words), TODO, todo=TODO)


def test_what_a_stage_will_make_is_examined_through_what_it_is_made_from(base, tmp_path):
    other = llama(fakes.chat_tokenizer(tmp_path / "other"), vocab_size=400)
    run = pipeline(base, tmp_path, f"reward.init_from={other}")
    with pytest.raises(ValueError, match=r"^ppo\.reward=.* has another vocabulary than ppo\.actor="):
        check_models(run, TODO, todo=TODO)
    run = pipeline(base, tmp_path, "ppo.max_response_tokens=1800")
    with pytest.raises(ValueError, match=r"^ppo\.actor=.*it has 2048 positions, but .* = 512 \+ 1800"):
        check_models(run, TODO, todo=TODO)


@pytest.mark.parametrize("role", ["reference", "reward", "critic"])
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"vocab_size": 258}, r"1 tokens that the model has no row for"),
        ({"max_position_embeddings": 64}, r"it has 64 positions, but ppo\.max_prompt_tokens"),
    ],
)
def test_the_models_of_a_stage_are_compared(base, tmp_path, role, settings, sentence):
    kind = LlamaForCausalLM if role == "reference" else LlamaForSequenceClassification
    small = llama(tmp_path / "small", kind=kind, tokenizer=base, **settings)
    actor = llama(tmp_path / "actor", tokenizer=base, vocab_size=259)
    words = {"actor": actor, "reward": llama(tmp_path / "scores", kind=LlamaForSequenceClassification, vocab_size=300)}
    AutoTokenizer.from_pretrained(base).save_pretrained(words["reward"])
    run = pipeline(base, tmp_path, *(f"ppo.{name}={path}" for name, path in (words | {role: small}).items()))
    with pytest.raises(ValueError, match=rf"^ppo\.{role}={small}.*{sentence}"):
        check_models(run, ["ppo"])


def test_rows_that_are_no_tokens_may_be_missing_and_tokens_may_not(base, reward, tmp_path, caplog):
    actor = llama(tmp_path / "actor", tokenizer=base, vocab_size=300)  # padded, as models of one family differ in size
    check_models(pipeline(base, tmp_path, f"ppo.actor={actor}", f"ppo.reward={reward}"), ["ppo"])
    assert "ppo.reward=" in caplog.text
    assert "has an embedding of 259 rows, ppo.actor=" in caplog.text


@pytest.mark.parametrize("setting", ["ppo.actor", "eval.model"])
def test_a_reward_model_does_not_speak(base, reward, tmp_path, setting):
    words = {f"eval.{name}": base for name in ("model", "baseline", "reference")}
    words |= {"ppo.reward": reward, "eval.reward": reward}
    words = [f"{name}={path}" for name, path in (words | {setting: reward}).items()]
    run = pipeline(base, tmp_path, "stage=[ppo,eval]", *words)
    with pytest.raises(ValueError, match=rf"{setting}=.*reward model or critic, which gives scores"):
        check_models(run, [setting.split(".")[0]])


def test_tokens_that_nothing_writes_may_lack_a_row(base, tmp_path, caplog):
    odd = copy(base, tmp_path / "odd")
    tokenizer = AutoTokenizer.from_pretrained(odd)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    tokenizer.save_pretrained(odd)
    with caplog.at_level(logging.WARNING):
        check_models(pipeline(odd, tmp_path), ["sft"])
    assert "no row for, such as '<image>' with the id 259" in caplog.text
    tokenizer.chat_template = "{{ '<image>' }}" + tokenizer.chat_template
    tokenizer.save_pretrained(odd)
    with pytest.raises(ValueError, match="no row for, such as '<image>'"):
        check_models(pipeline(odd, tmp_path), ["sft"])


def test_code_of_a_tokenizer_is_never_run_nor_asked_about(base, tmp_path, monkeypatch):
    bad = copy(base, tmp_path / "bad")
    (bad / "evil.py").write_text("raise SystemExit('executed')")
    settings = json.loads((bad / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "Homemade"}
    (bad / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("somebody was asked"))
    with pytest.raises(ValueError, match=r"needs code that it brings along, which is never run here"):
        check_models(pipeline(bad, tmp_path), ["sft"])


def made(run, stage, base):
    """What a finished stage leaves, in its folder."""
    folder = copy(base, Path(run.output_dir) / stage / "model")
    record = StageRecord(stage, template_fingerprint(load_tokenizer(str(base))), pad_id=0)
    write_record(record, folder, files=model_files(folder))
    return folder


def test_what_this_run_has_made_is_examined_again_when_it_is_used(base, tmp_path):
    run = pipeline(base, tmp_path)
    folder = made(run, "sft", base)
    check_made(run, "reward", made=TODO, world=World.alone())
    (folder / "model.safetensors").write_bytes(b"\0" + (folder / "model.safetensors").read_bytes()[1:])
    check_made(run, "sft", made=TODO, world=World.alone())  # made from nothing of this run
    check_made(run, "reward", made=["reward"], world=World.alone())  # nothing that this run has made just now
    with pytest.raises(ValueError, match=r"^reward\.init_from=.*model\.safetensors is not what was written"):
        check_made(run, "reward", made=TODO, world=World.alone())


def test_a_copied_model_brings_its_seal_and_may_have_notes(base, tmp_path):
    folder = made(pipeline(base, tmp_path), "sft", base)
    away = copy(folder, tmp_path / "away")
    (away / "README.md").write_text("mine")
    (away / "notes.txt").write_text("mine too")
    run = pipeline(base, tmp_path, f"sft.init_from={away}")
    check_models(run, ["sft"])
    data = bytearray((away / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (away / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=rf"{away}/model\.safetensors is not what was written"):
        check_models(run, ["sft"])
    (away / "stage.json").unlink()
    check_models(run, ["sft"])


@pytest.mark.parametrize(
    ("path", "maker"),
    [("sft/model", "sft"), ("sft/best/model", "sft"), ("ppo/critic", "ppo"), ("sft/modle", None), ("base", None)],
)
def test_the_maker_of_a_model_is_known_by_its_folder(tmp_path, path, maker):
    run = pipeline("/none", tmp_path)
    assert maker_of(run, f"{run.output_dir}/{path}") == maker
    assert maker_of(run, path) is None


def test_a_reference_can_follow_an_actor_of_its_own_architecture_alone(base, tmp_path):
    moves = ("ppo.lora.rank=0", "ppo.reference_update_every=2")
    check_models(pipeline(base, tmp_path, f"ppo.reference={base}", *moves), TODO, todo=TODO)
    other = llama(tmp_path / "other", tokenizer=base)
    check_models(pipeline(base, tmp_path, f"ppo.reference={other}", "ppo.lora.rank=0"), TODO, todo=TODO)
    with pytest.raises(ValueError, match=r"ppo.reference=.*/other has other parameters than ppo.actor=.*every=0"):
        check_models(pipeline(base, tmp_path, f"ppo.reference={other}", *moves), TODO, todo=TODO)
