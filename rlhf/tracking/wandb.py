"""One stage as one Weights & Biases run: the only file that imports wandb.

It never asks for a key, never waits long for a network, prints nothing, and keeps everything under the output folder.
Models stay where the stage wrote them: artifacts refer to them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import wandb

from rlhf.config.run_config import TrackingConfig, WandbMode
from rlhf.runtime.atomic_files import write_text
from rlhf.tracking.jsonl_log import valid_json
from rlhf.tracking.metric_registry import STEP

logger = logging.getLogger(__name__)

_REACH_SECONDS = 3.0
_INIT_SECONDS = 20.0
_FINISH_SECONDS = 60.0
_CLOSED = "closed"  # a file beside an offline log that was not cut by a kill
_ASKED_FOR, _NO_KEY = "asked for", "there is no API key"


def why_offline(wanted: WandbMode) -> str:
    """Say why W&B will be offline, without a prompt and within a few seconds; empty if it will be online.

    Args:
        wanted: online, offline, or auto (online when there is a key and its server can be reached).

    Raises:
        ValueError: online was asked for and is not possible.
    """
    assert wanted is not WandbMode.disabled, "a disabled W&B has no run"
    if wanted is WandbMode.offline:
        return _ASKED_FOR
    obstacle = _obstacle()
    if obstacle and wanted is WandbMode.online:
        raise _cannot_be_online(obstacle)
    return obstacle


def default_entity() -> str:
    """The team or user that the key belongs to.

    Raises:
        ValueError: W&B cannot be asked, or names nobody.
    """
    with asking_server():
        found = wandb.Api(timeout=int(_INIT_SECONDS)).default_entity
    if not found:
        raise ValueError("W&B names nobody to whom the API key belongs; expected --entity NAME.")
    return str(found)


@contextlib.contextmanager
def asking_server() -> Iterator[None]:
    """Context for requests to W&B: never prompts for a key, and turns every failure into one sentence.

    Raises:
        ValueError: there is no key or no network, or the server refused.
    """
    obstacle = _obstacle()
    if obstacle:
        raise ValueError(f"W&B cannot be asked: {obstacle}. Run `wandb login` or set WANDB_API_KEY; check the network.")
    try:
        yield
    except (wandb.Error, OSError, TypeError, KeyError) as error:  # the last two for a malformed answer
        raise ValueError(f"W&B did not do it ({error}). Look at the key, the entity and the project.") from error


def _cannot_be_online(obstacle: object) -> ValueError:
    return ValueError(
        f"tracking.wandb=online: {obstacle}. Run `wandb login` or set WANDB_API_KEY, check the network, or use "
        "tracking.wandb=offline and `wandb sync` later."
    )


def _obstacle() -> str:
    """The reason why this machine cannot be online; empty if it can."""
    # mode: with WANDB_MODE=offline in the environment, login would say that there is no key.
    session = wandb.setup(wandb.Settings(silent=True, mode="online"))
    try:
        has_key = wandb.login(prompt=False, verify=False)
    except wandb.errors.AuthenticationError as error:
        return f"the API key cannot be used ({error})"
    if not has_key:
        return _NO_KEY
    server = session.settings.base_url
    return "" if _reachable(server) else f"{server} did not answer within {_REACH_SECONDS:.0f} seconds"


def _reachable(url: str) -> bool:
    """True if the server, or the proxy in front of it, accepts a connection."""
    server = urlsplit(url)
    proxy = None if proxy_bypass(server.hostname or "") else getproxies().get(server.scheme)
    if proxy:
        server = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = (server.hostname or "", server.port or (80 if server.scheme == "http" else 443))
    connected = threading.Event()

    def connect() -> None:
        with contextlib.suppress(OSError):
            socket.create_connection(address, timeout=_REACH_SECONDS).close()
            connected.set()

    # In a thread: a socket's timeout does not cover a slow name server.
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(_REACH_SECONDS)
    return connected.is_set()


class WandbRun:
    """The W&B run of one stage: grouped with the run's other stages, and continued under the same id when resumed."""

    def __init__(
        self, folder: Path, *, root: Path, stage: str, config: TrackingConfig, run_name: str, run_config: dict[str, Any]
    ) -> None:
        """Start or continue the run of `folder`, which holds its id. Group: `run_name`; W&B's files go below `root`.

        Raises:
            ValueError: online was asked for and is not possible.
        """
        # Else wandb keeps copies of tables and its own log in the home folder, and reports errors to its makers.
        os.environ["WANDB_DATA_DIR"] = os.environ["WANDB_CACHE_DIR"] = str(root / "wandb")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        offline = why_offline(config.wandb)
        arguments = {
            "project": config.project,
            "entity": config.entity,
            "group": run_name,
            "job_type": stage,
            "name": f"{run_name}/{folder.relative_to(root)}",
            "id": _run_id(folder, stage),
            "resume": "allow",
            "config": run_config,
            "dir": str(root),
        }
        self._name = f"{run_name}-{stage}"
        self._run = _start(arguments, wanted=config.wandb, offline=offline)
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)
        self._table: wandb.Table | None = None

    @property
    def is_offline(self) -> bool:
        """True if no server has seen what was logged before."""
        return bool(self._run.offline)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one row."""
        self._run.log({STEP: step, **metrics})

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows to the table `samples`; each call sends only what is new."""
        if self._table is None:
            columns: list[str | int] = ["step", *rows[0]]
            self._table = wandb.Table(columns=columns, log_mode="INCREMENTAL", allow_mixed_types=True)
        for row in rows:
            self._table.add_data(step, *valid_json(row).values())
        try:
            self._run.log({STEP: step, "samples": self._table})
        except wandb.Error as error:  # online, a table needs the server at once, where plain numbers can wait
            logger.warning("W&B did not take the samples of step %d (%s); samples.jsonl has them.", step, error)

    def alert(self, title: str, text: str) -> None:
        """Have W&B notify everyone who asked for it; offline, with the next sync."""
        self._run.alert(title=title, text=text, level="WARN")

    def models(self, folders: Mapping[str, Path]) -> None:
        """Refer to folders as model artifacts, which W&B links to the run; the files stay where they are."""
        for name, folder in folders.items():
            artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", f"{self._name}-{name}"), type="model")
            artifact.add_reference(folder.resolve().as_uri(), checksum=False)
            try:
                self._run.log_artifact(artifact)
            except wandb.Error as error:  # online, an artifact needs the server at once
                logger.warning("W&B did not take note of the model in %s (%s).", folder, error)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set final values of the run."""
        self._run.summary.update(dict(values))

    def finish(self, *, failed: bool) -> None:
        """End the run. An upload that does not end in time is given up; the data stay on disk."""
        log = Path(self._run.settings.sync_dir)
        try:
            self._run.finish(exit_code=int(failed))
            if self.is_offline:
                (log / _CLOSED).touch()
        except TimeoutError:
            logger.warning("W&B did not take everything in time; run `wandb sync %s`.", log)


def _run_id(folder: Path, stage: str) -> str:
    """The id in the stage's folder; a new unique one the first time.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / "wandb_id"
    if not file.exists():
        write_text(file, f"{stage}-{secrets.token_hex(6)}\n")
    found = file.read_bytes()
    if not re.fullmatch(rb"[\w-]+\n", found):
        raise ValueError(f"{file} is damaged: found {found[:40]!r}, expected an id. Remove it for a new W&B run.")
    return found.decode().strip()


def _start(arguments: dict[str, Any], *, wanted: WandbMode, offline: str) -> wandb.Run:
    """Start the run; offline, for the reason `offline`, or if the server refuses and online was not insisted on."""
    settings = wandb.Settings(
        silent=True,
        console="off",
        init_timeout=_INIT_SECONDS,
        finish_timeout=_FINISH_SECONDS,
        finish_timeout_raises=True,
    )
    if not offline:
        try:
            run = wandb.init(mode="online", settings=settings, **arguments)
            logger.info("W&B: %s", run.url)
            return run
        except wandb.Error as error:
            if wanted is WandbMode.online:
                raise _cannot_be_online(error) from error
            offline = str(error)
            wandb.teardown()  # else the id of the attempt counts as in use
    level = logging.INFO if offline in (_ASKED_FOR, _NO_KEY) else logging.WARNING
    folder = Path(arguments["dir"]) / "wandb"
    for log in folder.glob(f"offline-run-*-{arguments['id']}"):
        # A kill tears the last record, at which `wandb sync` gives up. `Tracker.rewind` logs all rows again.
        if not (log / _CLOSED).exists():
            shutil.rmtree(log)
    logger.log(level, "W&B is offline (%s); see the charts with `wandb leet %s`.", offline, folder)
    return wandb.init(mode="offline", settings=settings, **arguments)
