"""Random models of six families, small enough to be saved and loaded in every test."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB, PAD, EOS = 128, 120, 121
_IDS = {"vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 122}
_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_GEMMA = {**_IDS, **_SHAPE, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}
_FULL_AND_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES = {
    "llama": lambda: LlamaConfig(**_IDS, **_SHAPE),
    "llama_tied": lambda: LlamaConfig(**_IDS, **_SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_IDS, **_SHAPE, head_dim=8),
    "mistral": lambda: MistralConfig(**_IDS, **_SHAPE, sliding_window=6),
    "gemma2": lambda: Gemma2Config(**_GEMMA, layer_types=_FULL_AND_SLIDING),
    "gemma3": lambda: Gemma3TextConfig(**_GEMMA, layer_types=_FULL_AND_SLIDING),
    "gpt2": lambda: GPT2Config(**_IDS, n_embd=32, n_layer=3, n_head=4, n_positions=128),
    "opt": lambda: OPTConfig(
        **_IDS,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
    ),
}


def with_states():
    """A model with layers that keep a state in place of keys and values."""
    return Lfm2Config(**_IDS, **_SHAPE, layer_types=["conv", "full_attention", "conv"])


def model(family, seed=0):
    """A plain transformers model with weights large enough that its answers differ."""
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(FAMILIES.get(family, with_states)()).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return made


def save(family, folder, seed=0):
    """The same model in `folder`, as transformers writes it."""
    model(family, seed).save_pretrained(folder)
    return folder


def moe(folder):
    """A mixture of experts, whose checkpoint has other tensors than its module."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **_IDS, **_SHAPE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    )
    AutoModelForCausalLM.from_config(config).eval().save_pretrained(folder)
    return folder


def materialized(spec, dtype=torch.float32):
    """The spec's module with its weights, as an engine on one rank makes it."""
    names = {id(parameter): name for name, parameter in spec.module.named_parameters()}
    filled = {
        name: torch.nn.Parameter(
            spec.weights.read(name, slice(None)).clone().to(dtype), requires_grad=name in spec.trainable
        )
        for name in names.values()
    }
    for child in spec.module.modules():
        for key, parameter in list(child.named_parameters(recurse=False, remove_duplicate=False)):
            child.register_parameter(key, filled[names[id(parameter)]])
    return spec.module.eval()


def named_tensors(module):
    """What an engine streams to an export."""
    for name, parameter in module.named_parameters():
        yield name, parameter.detach().cpu()


def tokenizer():
    """One token a word, `w0` to `w127`, as many as the models have."""
    words = {PAD: "<pad>", EOS: "<eos>"}
    backend = Tokenizer(WordLevel({words.get(index, f"w{index}"): index for index in range(VOCAB)}, unk_token="w0"))
    backend.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    made.chat_template = "{% for message in messages %}{{ message['content'] }} <eos> {% endfor %}"
    return made


def padded(lengths, *, side, seed=0, width=None):
    """Random token ids `[B, T]` and their mask, with real tokens below 100."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        where = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, where] = torch.randint(0, 100, (length,), generator=generator)
        mask[row, where] = True
    return ids, mask
