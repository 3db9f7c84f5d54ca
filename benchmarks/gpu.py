"""One command for a machine with a GPU and no network: what runs there, how fast, in how much memory.

    python -m benchmarks.gpu                        all that 8 minutes suffice for, into benchmarks/results/gpu.md
    python -m benchmarks.gpu --only step decode     some, which replace theirs
    python -m benchmarks.gpu --minutes 14 --only ppo seven_b --folder /mnt/disk

A section is printed and written as soon as it is done; one that fails is shown with its traceback, and the next one
begins. On a CPU the same sections run at toy sizes, are printed, and written where `--out` says: they show that the
command works. Packages that such a machine may lack must be there before: nothing is installed or downloaded.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu_bench import ROOT, Bench
from benchmarks.gpu_decode import decode
from benchmarks.gpu_machine import copies, tests, versions
from benchmarks.gpu_plan import plan
from benchmarks.gpu_ppo import ppo
from benchmarks.gpu_seven import seven_b
from benchmarks.gpu_train import parity, smoke, step

RESULT = ROOT / "benchmarks/results/gpu.md"


class Section(NamedTuple):
    """A part of the report; its seconds are estimates for one H100 and 8 minutes in all."""

    text: Callable[[Bench], str]
    least: int
    """With less time left it is skipped."""
    most: int
    """After which it is stopped, so that one that hangs does not take the time of all others."""


SECTIONS = {
    section.text.__name__: section
    for section in (
        Section(versions, 10, 40),
        Section(copies, 25, 60),
        Section(tests, 60, 180),
        Section(smoke, 40, 90),
        Section(parity, 30, 75),
        Section(step, 60, 210),
        Section(decode, 40, 120),
        Section(plan, 40, 120),
        Section(ppo, 90, 200),
        Section(seven_b, 150, 280),
    )
}
_USUAL = 8.0  # minutes


@dataclass
class Report:
    """A Markdown file of sections, written whenever one is done, and the same on the terminal."""

    path: Path | None
    title: str
    sections: dict[str, str] = field(default_factory=dict)

    @classmethod
    def at(cls, path: Path | None, title: str, *, keeps: bool) -> Report:
        """A new one, which `keeps` the sections of the one that is there until they are replaced."""
        known = path.read_text() if keeps and path is not None and path.exists() else ""
        _, *parts = re.split(r"^## ", known, flags=re.MULTILINE)
        heads = [part.partition("\n") for part in parts]
        return cls(path, title, {head: text.strip() for head, _, text in heads if head in SECTIONS})

    def put(self, name: str, text: str) -> None:
        """Show and write a section."""
        self.sections[name] = text.strip()
        sys.stdout.write(f"## {name}\n\n{text.strip()}\n\n")
        sys.stdout.flush()
        if self.path is None:
            return
        written = [f"## {key}\n\n{self.sections[key]}\n" for key in SECTIONS if key in self.sections]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("\n".join([f"{self.title}\n", *written]))


def run(names: list[str], *, bench: Bench, report: Report, about: str = "", pace: float = 1.0) -> bool:
    """Run sections in order, as far as there is time; whether all were run, and without an error.

    Args:
        names: of `SECTIONS`.
        bench: device and time.
        report: takes each section.
        about: the device, said in each.
        pace: how much longer than usual a section may take.
    """
    fine = True
    for name in names:
        section, begun, least = SECTIONS[name], time.monotonic(), 0 if bench.toy else SECTIONS[name].least
        if bench.left <= least:
            left = f"{max(bench.left, 0):.0f} s are left, and it needs some {section.least}"
            report.put(name, f"Skipped: {left}; see --only and --minutes.")
            fine = False
            continue
        try:
            text = section.text(bench.within(pace * section.most))
        except Exception:  # noqa: BLE001 (whatever it is, it is shown, and the next section begins)
            text, fine = f"Failed:\n\n```\n{traceback.format_exc().strip()}\n```", False
        title = (section.text.__doc__ or "").splitlines()[0]
        report.put(name, f"{title}\n\n({about}{time.monotonic() - begun:.0f} s)\n\n{text}")
    return fine


def main() -> None:
    """Run what was asked for, and write it where it belongs."""
    arguments = _parser().parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and arguments.out is not None and arguments.out.resolve() == RESULT:
        sys.exit(f"--out {arguments.out}: that file is for what a GPU did, found none here; name another.")
    out = arguments.out or (RESULT if device == "cuda" else None)
    what = torch.cuda.get_device_name() if device == "cuda" else "toy sizes on a CPU, which say nothing of speed"
    command = re.sub(r" --(folder|out)[ =]\S+", "", shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]))
    names = [name for name in SECTIONS if name in (arguments.only or SECTIONS)]
    report = Report.at(out, f"# On a GPU\n\n`{command}`", keeps=arguments.only is not None)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder.resolve()) as folder:
        bench = Bench(device, Path(folder), ends=time.monotonic() + 60 * arguments.minutes)
        about = f"{what}; PyTorch {torch.__version__}, {date.today()}, "
        fine = run(names, bench=bench, report=report, about=about, pace=max(1.0, arguments.minutes / _USUAL))
    sys.exit(0 if fine else 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--minutes", type=float, default=_USUAL, help="that all sections share")
    parser.add_argument("--folder", type=Path, default=Path("outputs/gpu"), help="on the local disk to use")
    parser.add_argument("--out", type=Path, help=f"Markdown file; on a GPU {RESULT.relative_to(ROOT)}")
    return parser


if __name__ == "__main__":
    main()
