"""Writes the report of a run, of a stage, of many runs, or serves one while it trains.

    python -m rlhf.tracking.report outputs/RUN            writes outputs/RUN/report.html
    python -m rlhf.tracking.report outputs/RUN/ppo        writes outputs/RUN/ppo/report.html, of that stage alone
    python -m rlhf.tracking.report outputs                writes outputs/index.html, which compares the runs below it
    python -m rlhf.tracking.report outputs/RUN --serve    shows it at http://127.0.0.1:8080 and keeps it up to date

Left out: access from other machines; forward the port, for example with `ssh -L 8080:127.0.0.1:8080 HOST`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rlhf.tracking.report.index import write_index
from rlhf.tracking.report.live import serve
from rlhf.tracking.report.page import write_report
from rlhf.tracking.report.run_folder import can_report


def main() -> None:
    """Run the command line; an error is one sentence."""
    parser = argparse.ArgumentParser(prog="python -m rlhf.tracking.report", description="The report of a run.")
    parser.add_argument("folder", type=Path, help="of a run, of a stage, or of many runs")
    parser.add_argument("--serve", nargs="?", type=int, const=8080, metavar="PORT", help="show it while it trains")
    arguments = parser.parse_args()
    try:
        if arguments.serve is not None:
            serve(arguments.folder, port=arguments.serve)
        else:
            write = write_report if can_report(arguments.folder) else write_index
            sys.stdout.write(f"{write(arguments.folder)}\n")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(0)


if __name__ == "__main__":
    main()
