"""One rank of a measured training run: `python -m benchmarks.zero_run CASE FOLDER`, started by `zero_case.py`.

Every contender trains the same random Llama on the same batches with AdamW and clipping. It runs under the contender's
own Python, so a contender's packages are imported only when it is asked for. Left out: comparing.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {  # name: width, inner width, layers, vocabulary
    "1M": (64, 176, 2, 4096),
    "5M": (256, 704, 4, 4096),
    "6M": (256, 704, 5, 4096),
    "25M": (384, 1024, 7, 16384),
    "60M": (512, 1408, 10, 25600),
    "125M": (768, 2048, 12, 25600),
    "250M": (1024, 2816, 15, 25600),
    "500M": (1280, 3456, 22, 25600),
    "1B": (2048, 5504, 18, 32000),
}
RATE, BETAS, EPS, CLIP = 1e-3, (0.9, 0.95), 1e-8, 1.0
BATCHES = 4  # come again and again, so that there is something to learn
PACKAGES = {
    "ours": "rlhf.engine.engine",
    "deepspeed": "deepspeed",
    "fsdp2": "torch.distributed.fsdp",
    "plain": "torch",
}

Case = dict[str, Any]
Step = Callable[[int], float]  # trains on the batch of this number, and returns the loss of this rank's share


def main() -> None:
    """Train, and write what it cost to `FOLDER/rank<N>.json`."""
    case, folder, rank = json.loads(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"])
    (folder / f"rank{rank}.json").write_text(json.dumps(measure(case, folder)))


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Train as one rank: seconds and loss of every step, and the highest memory in bytes.

    `start_peak` and `peak` are resident memory before and in the timed steps, above the imports (on CUDA of the whole
    run), `resident` is what is left of it at the end. `device_peak` and `device_reserved` are those of the timed steps:
    what tensors took, and what CUDA's allocator took for them.
    """
    torch.set_num_threads(case["threads"])
    importlib.import_module(PACKAGES[case["contender"]])
    before, on_cuda = resident(), case["device"] == "cuda"
    contenders = {"ours": ours, "deepspeed": deepspeed, "fsdp2": fsdp2, "plain": plain}
    step = contenders[case["contender"]](case, folder)
    report: dict[str, Any] = {"cpu_seconds": [], "wall_seconds": [], "losses": []}
    for number in range(case["steps"]):
        if number == case["warmup"]:
            report["start_peak"] = highest_resident() - before
            # Not every system that has GPUs can start the process's own highest value again.
            torch.cuda.reset_peak_memory_stats() if on_cuda else forget_highest_resident()
        cpu, wall = time.process_time(), time.perf_counter()
        report["losses"].append(step(number))
        if on_cuda:  # what was queued belongs to this step
            torch.cuda.synchronize()
        report["cpu_seconds"].append(time.process_time() - cpu)
        report["wall_seconds"].append(time.perf_counter() - wall)
    report["peak"], report["resident"] = highest_resident() - before, resident() - before
    report["device_peak"] = torch.cuda.max_memory_allocated() if on_cuda else 0
    report["device_reserved"] = torch.cuda.max_memory_reserved() if on_cuda else 0
    return report


def ours(case: Case, folder: Path) -> Step:
    """Our engine."""
    from rlhf.config.engine_config import EngineConfig
    from rlhf.config.stage_configs import OptimizerConfig
    from rlhf.engine.engine import build_engine
    from rlhf.models.causal_lm import causal_lm_module
    from rlhf.models.model_spec import assemble
    from rlhf.runtime.dist import start

    world, config = start(case["device"]), llama(case["size"])
    module = causal_lm_module(config)
    spec = assemble(module, RandomWeights(module, device=case["device"]), config=config, new={}, lora=None, seed=0)
    engine = build_engine(
        spec,
        config=EngineConfig(
            zero_stage=case["stage"],
            precision=case["precision"],
            offload_optimizer=case["offload_optimizer"],
            offload_param=case["offload_param"],
            nvme_path=str(folder / "disk"),
            **({"reduce_dtype": case["reduction"]} if case["reduction"] else {}),
            **case["settings"],
        ),
        world=world,
        optimizer=OptimizerConfig(lr=RATE, betas=list(BETAS), eps=EPS, max_grad_norm=CLIP, schedule="constant"),
        total_steps=case["steps"],
    )

    def step(number: int) -> float:
        micro = batch(case, number)[world.rank].to(world.device).chunk(case["accumulation"])
        total = torch.zeros((), device=world.device)
        for ids in micro:
            loss = token_loss(engine(input_ids=ids).logits, ids) / len(micro)
            engine.backward(loss / world.size, last=ids is micro[-1])
            total += loss.detach()
        engine.step()
        return total.item()

    return step


def deepspeed(case: Case, folder: Path) -> Step:
    """DeepSpeed."""
    import deepspeed as peer

    model = filled_llama(case)
    largest = max(parameter.numel() for parameter in model.parameters())
    peer.init_distributed(dist_backend="gloo")
    engine, *_ = peer.initialize(
        model=model,
        model_parameters=model.parameters(),
        config=deepspeed_config(case, folder / "disk", largest=largest),
    )
    del model

    def step(number: int) -> float:
        ids = batch(case, number)[int(os.environ["RANK"])]
        loss = token_loss(engine(input_ids=ids).logits, ids)
        engine.backward(loss)
        engine.step()
        return loss.item()

    return step


def deepspeed_config(case: Case, disk: Path, *, largest: int) -> dict[str, Any]:
    """Its defaults; or, tuned, buckets, tiles and buffers of the model's size and the disk in large requests."""
    zero: dict[str, Any] = {"stage": case["stage"]}
    for part, device in (("offload_optimizer", case["offload_optimizer"]), ("offload_param", case["offload_param"])):
        if device != "none":
            zero[part] = {"device": device} | ({"nvme_path": str(disk)} if device == "nvme" else {})
    config = {
        "train_micro_batch_size_per_gpu": case["sequences"],
        "gradient_clipping": CLIP,
        "bf16": {"enabled": case["precision"] == "bf16"},
        "zero_optimization": zero,
        "optimizer": {"type": "AdamW", "params": {"lr": RATE, "betas": BETAS, "eps": EPS, "weight_decay": 0.0}},
    }
    if case["reduction"]:
        config["communication_data_type"] = case["reduction"]
    if case["tuned"]:
        buckets = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
        zero |= dict.fromkeys(buckets, 5_000_000) | {"sub_group_size": 20_000_000}
        if "offload_optimizer" in zero:
            zero["offload_optimizer"]["pin_memory"] = True
        if "offload_param" in zero:
            buffers = {"pin_memory": True, "buffer_count": 4, "buffer_size": int(1.05 * largest), "max_in_cpu": 0}
            zero["offload_param"] |= buffers
        config["aio"] = {"block_size": 8 << 20, "queue_depth": 32, "single_submit": False, "overlap_events": True}
    return config


def fsdp2(case: Case, _folder: Path) -> Step:
    """FSDP2 by itself, one unit for each block: parameters in fp32, computed in the precision, reduced in fp32."""
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dist.init_process_group("gloo")
    model = filled_llama(case)
    dtype = torch.bfloat16 if case["precision"] == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*model.model.layers, model):
        fully_shard(module, mp_policy=policy, reshard_after_forward=case["stage"] == 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)

    def step(number: int) -> float:
        ids = batch(case, number)[dist.get_rank()]
        loss = token_loss(model(input_ids=ids).logits, ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def plain(case: Case, _folder: Path) -> Step:
    """PyTorch alone in one process, with the batches of all ranks; in bf16, with fp32 masters and gradient sums."""
    case = {**case, "ranks": case["peers"]}
    model = filled_llama(case)
    train = plain_training(model, precision=case["precision"])

    def step(number: int) -> float:
        parts = [p for ids in batch(case, number) for p in ids.to(case["device"]).chunk(case["accumulation"])]
        return train([lambda ids=ids: token_loss(model(input_ids=ids).logits, ids) / len(parts) for ids in parts])

    return step


def plain_training(
    model: nn.Module, *, precision: str, rate: float = RATE
) -> Callable[[list[Callable[[], Tensor]]], float]:
    """A function that takes a step of PyTorch alone: it is given functions of losses, and returns their sum."""
    masters = [nn.Parameter(parameter.detach().clone()) for parameter in model.parameters()]
    if precision == "bf16":
        for parameter in model.parameters():  # not the buffers: rotary embeddings are computed in fp32
            parameter.data = parameter.data.bfloat16()
    else:
        masters = list(model.parameters())
    optimizer = torch.optim.AdamW(masters, lr=rate, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)

    def step(losses: list[Callable[[], Tensor]]) -> float:
        total = torch.zeros((), device=masters[0].device)
        for compute in losses:
            loss = compute()
            loss.backward()
            total += loss.detach()
            _add_to_masters(masters, model)
        nn.utils.clip_grad_norm_(masters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters(), strict=True):
                if master is not parameter:
                    parameter.copy_(master)
        return total.item()

    return step


def _add_to_masters(masters: list[nn.Parameter], model: nn.Module) -> None:
    """Move the gradients of a micro-batch to fp32 sums, where the masters are not the parameters themselves."""
    for master, parameter in zip(masters, model.parameters(), strict=True):
        if master is not parameter:
            gradient, parameter.grad = parameter.grad.float(), None
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)


def llama(size: str) -> LlamaConfig:
    """A Llama of about `size` parameters, embeddings untied, heads of 64."""
    width, inner, layers, vocabulary = SIZES[size]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        tie_word_embeddings=False,
        use_cache=False,
    )


def filled_llama(case: Case) -> LlamaForCausalLM:
    """The model in fp32 on its device, with the weights that all contenders start from."""
    with torch.device(case["device"]):
        model = LlamaForCausalLM(llama(case["size"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial(name, parameter.shape, device=case["device"]))
    return model


def initial(name: str, shape: torch.Size, *, device: str = "cpu") -> Tensor:
    """A parameter's first values, the same in every process that draws them on that kind of device."""
    if len(shape) == 1:
        return torch.ones(shape, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, device=device) * 0.02


class RandomWeights:
    """`initial` values for a model on meta, drawn where that is fast."""

    def __init__(self, module: nn.Module, *, device: str = "cpu") -> None:
        self._shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        self._device = device

    def read(self, name: str, rows: slice) -> Tensor:
        """Rows of a parameter, on the CPU."""
        return initial(name, self._shapes[name], device=self._device)[rows].cpu()


def batch(case: Case, number: int) -> Tensor:
    """Token ids of a step, `[ranks, sequences, length]`."""
    generator = torch.Generator().manual_seed(number % BATCHES)
    vocabulary = SIZES[case["size"]][3]
    return torch.randint(vocabulary, (case["ranks"], case["sequences"], case["length"]), generator=generator)


def token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def resident() -> int:
    """Bytes of this process in memory that are not mapped files (its code)."""
    return _status("VmRSS") - _status("RssFile")


def highest_resident() -> int:
    """The highest `resident()` so far."""
    return _status("VmHWM") - _status("RssFile")


def forget_highest_resident() -> None:
    """Let `highest_resident` start over."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(entry: str) -> int:
    """Bytes of an entry; 0 where the system does not have it."""
    found = re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    main()
