"""Serves a report that follows a run, to browsers on this machine only.

The page is made in this process, from the files that the run writes, so the run itself does nothing for it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from rlhf.tracking.report.page import page
from rlhf.tracking.report.run_folder import can_report, read_run

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
_REFRESH = 10  # seconds after which a browser asks again
_TIMEOUT = 30  # seconds that a connection may stay silent


def serve(folder: Path, *, port: int) -> None:
    """Answer until interrupted.

    Args:
        folder: of the run.
        port: on this machine; 0 takes a free one.

    Raises:
        ValueError: no run is there.
        OSError: the port is taken.
    """
    read_run(folder)
    with server_of(folder, port=port) as server:
        sys.stdout.write(f"http://{HOST}:{server.server_port}\n")
        sys.stdout.flush()
        server.serve_forever()


def server_of(folder: Path, *, port: int) -> HTTPServer:
    """Create the server, bound but not yet answering. A thread per connection: a silent one blocks no other."""
    return ThreadingHTTPServer((HOST, port), partial(_Handler, _LivePage(folder)))


class _LivePage:
    """The newest page, made again only when the run has written something."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._state: list[tuple[str, int]] = []
        self._page = b""
        self._lock = Lock()  # one page at a time: matplotlib's settings belong to the whole process

    def content(self) -> bytes | None:
        """The page; None if the run is not there any more."""
        with self._lock:
            if not can_report(self._folder):
                return None
            state = sorted(self._changes())
            if state != self._state or not self._page:
                run = read_run(self._folder)
                is_over = run.policy is not None and all(stage.is_finished for stage in run.stages)
                self._page = page(run, refresh=0 if is_over else _REFRESH).encode()
                self._state = state
            return self._page

    def _changes(self) -> Iterator[tuple[str, int]]:
        """Every small file with the time it was last written."""
        for path in (path for pattern in ("*.json*", "*/*.json*") for path in self._folder.glob(pattern)):
            with suppress(FileNotFoundError):  # the run may remove a file at any time
                yield str(path), path.stat().st_mtime_ns


class _Handler(BaseHTTPRequestHandler):
    """Serves the page at `/` and nothing else."""

    timeout = _TIMEOUT

    def __init__(self, live: _LivePage, *args: object) -> None:
        self._live = live
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:  # noqa: N802 (the name is http.server's)
        """Answer a browser; a page of another site whose name resolves to this machine gets nothing."""
        host = (self.headers.get("Host") or "").rpartition(":")[0]
        if self.path != "/" or host not in (HOST, "localhost"):
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        with suppress(ConnectionError):  # a browser need not wait for the answer
            self._answer()

    def _answer(self) -> None:
        content = self._live.content()
        if content is None:
            self.send_error(HTTPStatus.GONE, "The run is gone", "Its folder is not there any more.")
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the name is http.server's)
        """Requests are not worth a line each."""
        logger.debug(format, *args)
