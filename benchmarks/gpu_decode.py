"""Decoding with our loop, with that of transformers, and as fast as the device could read weights and cache.

Greedy, random weights, bf16 (fp32 on a CPU), all rows of one length, nothing that ends a row. Rates are those of the
tokens after the first: a call for one token, which reads the prompt, is taken off a call for all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, OPTConfig, PreTrainedModel, Qwen2Config

from benchmarks.gpu_bench import Bench, failures
from benchmarks.gpu_machine import device_rate
from benchmarks.zero_report import table
from rlhf.config.stage_configs import SamplingConfig
from rlhf.generation.decode_graphs import DecodeGraphs
from rlhf.generation.generate import Decoding, generate
from rlhf.types import PromptBatch

_QWEN = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
_QWEN |= {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
_OPT = {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32}
_OPT |= {"word_embed_proj_dim": 2048, "max_position_embeddings": 2048, "vocab_size": 50272, "dropout": 0.0}
_TOY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
_TOY_QWEN = _QWEN | _TOY | {"intermediate_size": 128}
_TOY_OPT = _OPT | _TOY | {"ffn_dim": 128, "word_embed_proj_dim": 64}
CONFIGS = {"0.5B (Qwen2.5's shape)": (Qwen2Config, _QWEN, _TOY_QWEN), "OPT-1.3B": (OPTConfig, _OPT, _TOY_OPT)}
HYBRID = "DeepSpeed's hybrid engine on an H100, as stated"
HYBRID_ENGINE = {"OPT-1.3B": {"1": "200", "8": "1,549", "32": "5,956"}}
"""Tokens a second that DeepSpeed states for its hybrid engine on one H100, by batch; lengths are its own."""

Answer = Callable[[int], Tensor]
"""As many new tokens for every row, `[B, count]`."""


def decode(bench: Bench) -> str:
    """Tokens a second per model and batch."""
    sizes: dict[str, Any] = {"batches": [1, 8, 32, 128], "prompt": 256, "new": 128}
    if bench.toy:
        sizes = {"batches": [1, 2], "prompt": 8, "new": 6}
    texts = [f"Prompts of {sizes['prompt']} tokens, {sizes['new']} new ones; the first is not counted."]
    head = ["batch", "ours, tokens/s", "transformers", "ours / transformers", "ours, ms a step", "bandwidth allows"]
    for name in CONFIGS:
        tried = bench.attempt(lambda name=name: _measured(bench, name, sizes))
        stated = HYBRID_ENGINE.get(name, {})
        rows = [[*row, stated.get(row[0], "–")] for row in tried.value["rows"]] if tried.value else []
        what = f"{tried.value['weights'] / 1e9:.2f} GB of weights; {tried.value['rate'] / 1e9:.0f} GB/s" if rows else ""
        lines = table([*head, "ours / that", "equal tokens", HYBRID], rows) if rows else ""
        texts.append(f"### {name}\n\n{what}\n\n{lines}{failures({name: tried})}")
    return "\n\n".join(texts)


def _measured(bench: Bench, name: str, sizes: dict[str, Any]) -> dict[str, Any]:
    return bench.call(measure, device=bench.device, name=name, ends=bench.ends, **sizes)


def measure(device: str, name: str, *, batches: list[int], prompt: int, new: int, ends: float) -> dict[str, Any]:
    """Rows of the table of one model, the bytes of its weights that a step reads, and bytes a second.

    Args:
        device: cuda, or cpu: a toy of the same family.
        name: of the model.
        batches: how many rows.
        prompt: tokens of each.
        new: that follow.
        ends: when no further batch is begun, on the clock of `time.monotonic`.
    """
    model = _model(name, device=device)
    rate = device_rate(device, nbytes=(1 << 30) if device == "cuda" else (1 << 24))
    rows = []
    for batch in batches:
        if time.monotonic() > ends - 10:
            rows.append([str(batch), "skipped: no time is left", *["–"] * 6])
            continue
        try:
            rows.append(_row(model, batch, prompt=prompt, new=new, rate=rate))
        except torch.OutOfMemoryError as error:
            rows.append([str(batch), f"failed: {str(error).splitlines()[0][:100]}", *["–"] * 6])
        if device == "cuda":
            torch.cuda.empty_cache()
    return {"rows": rows, "weights": read_bytes(model), "rate": rate}


def _model(name: str, *, device: str) -> PreTrainedModel:
    kind, shape, toy = CONFIGS[name]
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(kind(**(shape if device == "cuda" else toy))).eval()
    for parameter in model.parameters():  # not the buffers: rotary embeddings are computed in fp32
        parameter.data = parameter.data.to(torch.bfloat16 if device == "cuda" else torch.float32)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True)
    return model


def _row(model: PreTrainedModel, batch: int, *, prompt: int, new: int, rate: float) -> list[str]:
    ids = torch.randint(3, model.config.vocab_size, (batch, prompt), device=model.device)
    contenders = {"ours": _ours(model, ids), "transformers": _theirs(model, ids)}
    step, tokens = {}, {}
    for contender, answer in contenders.items():
        answer(new)  # captures the steps that the timed calls replay
        first, _ = _timed(answer, 1, device=model.device)
        whole, tokens[contender] = _timed(answer, new, device=model.device)
        step[contender] = (whole - first) / (new - 1) if whole > first else math.nan
    floor = (read_bytes(model) + batch * cache_bytes(model, prompt + new // 2)) / rate
    equal = (tokens["ours"] == tokens["transformers"]).float().mean().item()
    speeds = [f"{batch / step[contender]:.0f}" for contender in contenders]
    ratio = f"{step['transformers'] / step['ours']:.2f}"
    return [
        str(batch),
        *speeds,
        ratio,
        f"{1e3 * step['ours']:.2f}",
        f"{batch / floor:.0f}",
        f"{floor / step['ours']:.0%}",
        f"{equal:.0%}",
    ]


def _ours(model: PreTrainedModel, ids: Tensor) -> Answer:
    mask, numbers = torch.ones_like(ids, dtype=torch.bool), torch.arange(len(ids), device=ids.device)
    prompts = PromptBatch(ids, mask, numbers, prompts=("",) * len(ids), columns=({},) * len(ids))

    graphs = DecodeGraphs()

    def answer(count: int) -> Tensor:
        decoding = Decoding(count, [], pad_id=0, sampling=SamplingConfig(temperature=0.0), graphs=graphs)
        return generate(model, prompts, decoding=decoding, seed=0).responses

    return answer


def _theirs(model: PreTrainedModel, ids: Tensor) -> Answer:
    def answer(count: int) -> Tensor:
        mask = torch.ones_like(ids)
        return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count)[:, ids.shape[1] :]

    return answer


def _timed(answer: Answer, count: int, *, device: torch.device) -> tuple[float, Tensor]:
    """Seconds, and the tokens, of which there must be `count` in each row."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    tokens = answer(count)
    if device.type == "cuda":
        torch.cuda.synchronize()
    took = time.perf_counter() - start
    assert tokens.shape[1] == count, f"found {tokens.shape[1]} new tokens, expected {count}"
    return took, tokens


def read_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a step reads whole: all but tables of which it looks rows up."""
    head = model.get_output_embeddings().weight
    tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)} - {id(head)}
    return sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in tables)


def cache_bytes(model: PreTrainedModel, length: int) -> int:
    """Bytes of the keys and values of a row of `length` tokens."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * length * model.dtype.itemsize
