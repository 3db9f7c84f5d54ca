"""AdamW on the CPU: GB/s against an in-place pass over memory, alone and with bf16 gradients and weights around it.

All contenders run in one process, in turn, under the peer's Python where there is one. On one thread a round counts
process time, which other load on the machine changes least; on more, wall clock, which means nothing on a busy machine.
`python -m benchmarks.zero_adam N ROUNDS` is that process, its threads are `OMP_NUM_THREADS`. Left out: GPUs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf.config.stage_configs import OptimizerConfig
from rlhf.engine.adam_kernel import AdamKernel, ParameterSlice

_TENSORS = 4
_CONFIG = {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
BYTES = {  # moved for each element: what is read and written at the least
    "in-place pass": 8,
    "fp32, ours": 28,
    "fp32, torch fused": 28,
    "fp32, DeepSpeed": 28,
    "bf16, ours": 28,
    "bf16, torch fused + 2 passes": 28,
    "bf16, DeepSpeed + 2 passes": 28,
}


def compare(python: str | None, *, elements: int, rounds: int, threads: int) -> str:
    """A table of times and rates; DeepSpeed is in it when `python` has it."""
    from benchmarks.zero_report import spread, table

    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}
    command = [python or sys.executable, "-m", "benchmarks.zero_adam", str(elements), str(rounds)]
    root = Path(__file__).parents[1]
    answer = subprocess.run(command, env=environment, cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds: dict[str, list[float]] = json.loads(answer.splitlines()[-1])
    ceiling = seconds["in-place pass"]
    rows = []
    for name, times in seconds.items():
        rates = [BYTES[name] * elements / 1e9 / t for t in times]
        shares = [BYTES[name] / 8 * c / t for t, c in zip(times, ceiling, strict=True)]
        peer = seconds.get(f"{name[:4]}, DeepSpeed" + (" + 2 passes" if name.startswith("bf16") else ""))
        faster = [p / t for p, t in zip(peer, times, strict=True)] if peer else None
        cells = [spread([1e3 * t for t in times], 1), spread(rates, 1), spread(shares)]
        rows.append([name, *cells, spread(faster) if faster else "–"])
    skipped = "" if python else "DeepSpeed was skipped: no Python with it was named (--peer).\n\n"
    what = f"{elements / 1e6:.0f} M elements in {_TENSORS} tensors, {threads} thread(s), {rounds} alternating rounds, "
    what += f"{'CPU time' if threads == 1 else 'wall clock'}. "
    what += "GB/s counts the 28 bytes that an update must move, and no copies between passes.\n\n"
    return (
        what + skipped + table(["", "ms", "GB/s", "of the in-place pass", "speed over DeepSpeed (bf16: aim 1.5)"], rows)
    )


def measure(elements: int, rounds: int) -> dict[str, list[float]]:
    """Seconds by contender and round; a first round is dropped."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    contenders = {"in-place pass": in_place_pass(elements)} | ours(elements) | torch_fused(elements)
    if importlib.util.find_spec("deepspeed"):
        contenders |= deepspeed(elements)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, update in contenders.items():
            start = clock()
            update()
            if number > 0:
                seconds[name].append(clock() - start)
    return seconds


Update = Callable[[], None]


def in_place_pass(elements: int) -> Update:
    """The ceiling: every element read and written once, nothing allocated."""
    values = torch.ones(elements)
    return lambda: values.mul_(1.0000001)


def ours(elements: int) -> dict[str, Update]:
    """The engine's kernel: gradients cast and weights handed on tile by tile."""
    kernel, step, values = AdamKernel(OptimizerConfig(**_CONFIG), torch.device("cpu")), torch.ones(()), Values(elements)

    def update(gradients: list[Tensor], narrow: list[Tensor] | None) -> None:
        pieces = [
            ParameterSlice(str(index), 0, True, step, weight, gradient, mean, square)
            for index, (weight, gradient, mean, square) in enumerate(
                zip(values.weights, gradients, values.means, values.squares, strict=True)
            )
        ]
        for tile in kernel.update(pieces, lr=1e-4, scale=1.0):
            if narrow is not None:
                for piece in tile:
                    narrow[int(piece.name)][piece.start : piece.start + piece.weight.numel()].copy_(piece.weight)

    return {
        "fp32, ours": lambda: update(values.gradients, None),
        "bf16, ours": lambda: update(values.narrow_gradients, values.narrow_weights),
    }


def torch_fused(elements: int) -> dict[str, Update]:
    """`torch.optim.AdamW(fused=True)`."""
    values = Values(elements)
    parameters = values.as_parameters()
    optimizer = torch.optim.AdamW(parameters, fused=True, **_CONFIG)
    return {
        "fp32, torch fused": optimizer.step,
        "bf16, torch fused + 2 passes": lambda: _in_passes(optimizer.step, values, parameters),
    }


def deepspeed(elements: int) -> dict[str, Update]:
    """`DeepSpeedCPUAdam`, which takes gradients of the weights' type only."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    values = Values(elements)
    parameters = values.as_parameters()
    optimizer = DeepSpeedCPUAdam(parameters, **_CONFIG)
    return {
        "fp32, DeepSpeed": optimizer.step,
        "bf16, DeepSpeed + 2 passes": lambda: _in_passes(optimizer.step, values, parameters),
    }


class Values:
    """Weights, gradients and moments of `_TENSORS` flat tensors, the first two also in bf16."""

    def __init__(self, elements: int) -> None:
        def make(factor: float) -> list[Tensor]:
            return [torch.randn(elements // _TENSORS).mul_(factor) for _ in range(_TENSORS)]

        self.weights, self.gradients, self.means, self.squares = make(0.02), make(1e-3), make(0.0), make(0.0)
        self.narrow_gradients = [gradient.bfloat16() for gradient in self.gradients]
        self.narrow_weights = [weight.bfloat16() for weight in self.weights]

    def as_parameters(self) -> list[nn.Parameter]:
        """The weights with their gradients; the moments go, an optimizer makes its own."""
        self.means, self.squares = [], []
        parameters = [nn.Parameter(weight) for weight in self.weights]
        for parameter, gradient in zip(parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return parameters


@torch.no_grad()
def _in_passes(step: Update, values: Values, parameters: list[nn.Parameter]) -> None:
    """Cast all gradients, update, cast all weights."""
    torch._foreach_copy_(values.gradients, values.narrow_gradients)
    step()
    torch._foreach_copy_(values.narrow_weights, [parameter.detach() for parameter in parameters])


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]))) + "\n")
