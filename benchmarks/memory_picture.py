"""Draws where the memory of a full fine-tune goes, by ZeRO stage and offload device, from the plan, as SVG.

python -m benchmarks.memory_picture > docs/memory.svg
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

from benchmarks.memory_examples import GB, MACHINE, example_run
from rlhf.memory_plan.plan import Phase, Place
from rlhf.memory_plan.planner import plan_stage

RANKS, SHAPE = 8, "7.6B"
SETTINGS = {
    "ZeRO 0": "engine=zero0",
    "ZeRO 1": "engine=zero1",
    "ZeRO 2": "engine=zero2",
    "ZeRO 3": "engine=zero3",
    "ZeRO 3, optimizer on the host": "engine=zero3 engine.offload_optimizer=cpu",
    "ZeRO 3, everything on NVMe": "engine=zero3_nvme engine.nvme_path=/disk",
}
GROUPS = {
    "weights": ("working parameters", "gathered weights"),
    "gradients": ("gradients",),
    "masters and moments": ("master weights", "moments"),
    "activations, logits": ("activations", "logits and loss"),
    "the rest": (),
}
_COLOURS = ("#3b6fb6", "#d98c3f", "#5a9a68", "#9a6bb0", "#8a8f98")
_FONT = 'font-family="sans-serif" font-size="13"'
_LEFT, _ROW, _WIDTH, _HALF = 210, 44, 860, 15


def main() -> None:
    """Print the picture."""
    with tempfile.TemporaryDirectory() as folder:
        sys.stdout.write(picture(Path(folder)))


def picture(folder: Path) -> str:
    """The SVG: for each setting a bar of the device, and below it one of host and disk together, of one rank."""
    bars = {name: bars_of(settings, folder=folder) for name, settings in SETTINGS.items()}
    most = max(sum(bar.values()) for pair in bars.values() for bar in pair)
    scale = (_WIDTH - _LEFT - 90) / most
    height = 70 + _ROW * len(bars)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" {_FONT}>',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="22" font-size="14">Full fine-tuning of {SHAPE} parameters in bf16, one of {RANKS} ranks, '
        "planned: GB of the device, and below it of host and disk</text>",
    ]
    for number, (name, colour) in enumerate(zip(GROUPS, _COLOURS, strict=True)):
        x = 12 + 165 * number
        parts.append(
            f'<rect x="{x}" y="34" width="12" height="12" fill="{colour}"/><text x="{x + 18}" y="45">{name}</text>'
        )
    for number, (name, pair) in enumerate(bars.items()):
        y = 64 + _ROW * number
        parts.append(f'<text x="12" y="{y + 16}">{name}</text>')
        for place, bar in enumerate(pair):
            parts.append(_bar(bar, y=y + place * (_HALF + 1), scale=scale, faded=place == 1))
    return "\n".join([*parts, "</svg>", ""])


def bars_of(settings: str, *, folder: Path) -> tuple[Counter[str], Counter[str]]:
    """Bytes by group of the largest phase of training: on the device, and beside it."""
    run = example_run(
        SHAPE, f"stage=sft {settings} engine.activation_checkpointing=true checkpoint.every=0", folder=folder
    )
    plan = plan_stage(run, "sft", machine=replace(MACHINE, ranks=RANKS, local_ranks=RANKS))
    phase = next(phase for phase in plan.phases if phase.name == "train")
    return grouped(phase, Place.device), grouped(phase, Place.host) + grouped(phase, Place.disk)


def grouped(phase: Phase, place: Place) -> Counter[str]:
    """Bytes of a place by group; the process itself is left out."""
    found: Counter[str] = Counter()
    for item in phase.items:
        if item.place is place and item.part != "runtime":
            found[next((name for name, parts in GROUPS.items() if item.part in parts), "the rest")] += item.bytes
    return found


def _bar(bar: Counter[str], *, y: int, scale: float, faded: bool) -> str:
    x, parts = float(_LEFT), []
    for name, colour in zip(GROUPS, _COLOURS, strict=True):
        width = bar[name] * scale
        opacity = ' fill-opacity="0.45"' if faded else ""
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_HALF}" fill="{colour}"{opacity}/>')
        x += width
    total = bar.total() / GB
    text = f'<text x="{x + 6:.1f}" y="{y + 12}">{total:,.1f}{" host, disk" * faded}</text>' if total >= 0.05 else ""
    return "".join([*parts, text])


if __name__ == "__main__":
    main()
