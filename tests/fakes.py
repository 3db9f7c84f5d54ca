"""Small real tokenizers, made without a network: byte-level BPE, saved as folders that AutoTokenizer loads."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = (
    "the movie is great and the film is bad",
    "Human: what is the name of this film? Assistant: it is the best movie of the year.",
    "user system assistant question answer hello there good morning",
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

MARKED_CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.role == "assistant" %}{% generation %}{{ message.content }}{% endgeneration %}\
{% else %}{{ message.content }}{% endif %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def byte_level_tokenizer(folder: Path | str, *, special_tokens: list[str], vocab_size: int = 400, **settings) -> Path:
    """Save a byte-level BPE of at most `vocab_size` tokens; `settings` go to PreTrainedTokenizerFast."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=special_tokens,
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)
    return Path(folder)


def chat_tokenizer(folder: Path | str, *, chat_template: str = CHAT_TEMPLATE) -> Path:
    """ChatML: turns end with `<|im_end|>`, which is not the EOS; a pad token of its own."""
    return byte_level_tokenizer(
        folder,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"],
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        chat_template=chat_template,
    )


def pad_is_eos_tokenizer(folder: Path | str) -> Path:
    """The EOS is the only special token, and the pad token as well (like a GPT-2 that somebody prepared)."""
    return byte_level_tokenizer(
        folder, special_tokens=["<|endoftext|>"], eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def bare_tokenizer(folder: Path | str) -> Path:
    """Puts a BOS in front of every text; no chat template, no pad token."""
    return byte_level_tokenizer(
        folder, special_tokens=["<s>", "</s>"], bos_token="<s>", eos_token="</s>", add_bos_token=True
    )


def byte_fallback_tokenizer(folder: Path | str) -> Path:
    """SentencePiece style: a visible space in front of a word, a token `<0x..>` for each byte, no pad token."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], byte_fallback=True, unk_token="<unk>"
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return Path(folder)
