"""Writes the report of a run, of a stage, or the table of many runs.

    python -m rlhf.tracking.report outputs/RUN            writes outputs/RUN/report.html
    python -m rlhf.tracking.report outputs/RUN/ppo        writes outputs/RUN/ppo/report.html, of that stage alone
    python -m rlhf.tracking.report outputs                writes outputs/index.html, which compares the runs below it
    python -m rlhf.tracking.report outputs/RUN --follow   keeps outputs/RUN/live.html up to date while the run trains

A browser that shows `live.html` loads it again by itself. To see it from another machine, serve the folder with
`python -m http.server --bind 127.0.0.1 --directory outputs/RUN`, and forward its port with
`ssh -L 8000:127.0.0.1:8000 HOST`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rlhf.runtime.atomic_files import write_text
from rlhf.runtime.errors import RunError
from rlhf.tracking.report.page import page, write_index, write_report
from rlhf.tracking.report.run_folder import can_report, read_run

LIVE = "live.html"  # not report.html, which the run itself writes after each stage
_REFRESH = 10  # seconds between two looks at the run, and after which a browser loads the page again


def main() -> None:
    """Run the command line; an error is one sentence."""
    parser = argparse.ArgumentParser(prog="python -m rlhf.tracking.report", description="The report of a run.")
    parser.add_argument("folder", type=Path, help="of a run, of a stage, or of many runs")
    parser.add_argument("--follow", action="store_true", help="keep live.html up to date while the run trains")
    parser.add_argument("--serve", nargs="?", const="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is not None:
        parser.error("--serve is no longer there: use --follow, and open live.html in the folder of the run")
    try:
        if given.follow:
            follow(given.folder)
        else:
            write = write_report if can_report(given.folder) else write_index
            sys.stdout.write(f"{write(given.folder)}\n")
    except (ValueError, OSError, RunError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(0)


def follow(folder: Path) -> None:
    """Write `live.html` whenever the run has written something, until its policy is trained.

    The run itself does nothing for it. The last page does not load itself again.

    Raises:
        ValueError: no run is there.
    """
    written, is_over = None, False
    while not is_over:
        run = read_run(folder)
        is_over = run.policy is not None and all(stage.is_finished for stage in run.stages)
        state = [(stage.name, len(stage.rows), len(stage.samples), stage.is_finished) for stage in run.stages]
        if state != written:
            write_text(folder / LIVE, page(run, refresh=0 if is_over else _REFRESH))
            if written is None:
                sys.stdout.write(f"{folder / LIVE} follows the run\n")
                sys.stdout.flush()
            written = state
        if not is_over:
            time.sleep(_REFRESH)


if __name__ == "__main__":
    main()
