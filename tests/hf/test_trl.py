"""TRL's trainers train the same on the engine, by another import, where TRL is installed."""

import pickle
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("trl")

import torch
import trl
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

from rlhf import hf
from rlhf.config.run_config import Embedded
from rlhf.models.embedded import prepare
from tests.hf.runs import close, zero
from tests.ranks import run_on_ranks

COMMON = {
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "learning_rate": 1e-3,
    "disable_tqdm": True,
}
TEXTS = ["a good film", "dull from the first minute", "one to see twice", "I left early", "fine", "loud and empty"]


def write_model(kind, folder):
    """A model and its tokenizer in a folder: TRL loads reference models by their name."""
    words = PreTrainedTokenizerFast.from_pretrained(prepare(Embedded.tiny, folder / "tiny"))
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "num_labels": 1, "pad_token_id": words.pad_token_id}
    kind(Qwen2Config(vocab_size=len(words), **heads, **sizes)).save_pretrained(folder / kind.__name__)
    words.save_pretrained(folder / kind.__name__)


def chats(*answers):
    names = ("chosen", "rejected") if len(answers) == 2 else ("messages",)
    rows = {name: [] for name in names}
    for number in range(24):
        for name, shift in zip(names, answers, strict=True):
            text = TEXTS[(number + shift) % len(TEXTS)] * (1 + shift)
            rows[name].append([{"role": "user", "content": f"film {number}"}, {"role": "assistant", "content": text}])
    return Dataset.from_dict(rows)


def lengths(completions, **_):
    return [float(len(set(str(answer)))) for answer in completions]


def run(module, name, deepspeed, *, models):
    """Losses, norms and what else a trainer logs."""
    options = COMMON | {"output_dir": tempfile.mkdtemp(), "deepspeed": deepspeed}
    kind = Qwen2ForSequenceClassification if name == "Reward" else Qwen2ForCausalLM
    folder = Path(models) / kind.__name__
    data = chats(0) if name == "SFT" else chats(0, 1)
    more = {}
    if name == "GRPO":
        options |= {"num_generations": 4, "max_completion_length": 6, "beta": 0.1}
        more = {"reward_funcs": lengths}
        data = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in TEXTS * 4]})
    args = getattr(module, f"{name}Config")(**options)
    trainer = getattr(module, f"{name}Trainer")(
        model=kind.from_pretrained(folder),
        args=args,
        train_dataset=data,
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
        **more,
    )
    trainer.train()
    names = {"loss", "grad_norm", "reward", "rewards/margins", "kl", "accuracy"}
    logged = [[row[key] for key in sorted(names & row.keys())] for row in trainer.state.log_history if "loss" in row]
    assert (module is hf) == (getattr(trainer, "_engine", None) is not None)
    close(trainer)
    return logged


NAMES = ("SFT", "Reward", "DPO", "GRPO")


def everything(models):
    return {name: (run(trl, name, None, models=models), run(hf, name, zero(3), models=models)) for name in NAMES}


@pytest.fixture(scope="module", params=[1, 2])
def found(request, tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    for kind in (Qwen2ForCausalLM, Qwen2ForSequenceClassification):
        write_model(kind, models)
    return run_on_ranks(everything, request.param, str(models))[0]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_logged_is_the_same(found, name):
    plain, engine = found[name]
    assert len(plain) == 3
    for ours, theirs in zip(engine, plain, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5, rel=1e-5)


def test_arguments_can_be_pickled_as_checkpoints_do():
    args = hf.SFTConfig(output_dir="unused", use_cpu=True, bf16=False)
    assert type(pickle.loads(pickle.dumps(args))) is hf.SFTConfig


def test_other_names_are_those_of_trl():
    assert hf.ModelConfig is trl.ModelConfig
    with pytest.raises(AttributeError, match="NoSuchTrainer"):
        hf.NoSuchTrainer  # noqa: B018
