"""Rewards from a model behind HTTP: one request for all responses, repeated where that may help, and with an end.

Start a server, such as `examples/reward_server.py`, then train; `REWARD_URL` names another one:

    python examples/reward_server.py outputs/run/reward/model &
    python run_pipeline.py stage=grpo 'ppo.rewards=[examples/served_reward.py:served]'

The request is {"texts": [...]}, the reply {"scores": [...]} with as many numbers, or null where none applies. A text is
prompt and response, or the list of their messages. Whatever is raised here ends the run with the source and a response,
or, with ppo.reward_on_error=drop, leaves the response out.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from typing import Any

TIMEOUT_S = 30.0  # of one request; all of them together must stay below ppo.reward_timeout_s
TRIES = 6
FIRST_PAUSE_S = 0.5  # then twice as long each time: 15 s in all, in which a server can start
BUSY = (429, 500, 502, 503, 504)  # errors that may go away; others say that the request is wrong

OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # straight there, whatever http_proxy says


def served(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float | None]:
    """The scores that the server gives; every rank asks once for its own responses."""
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    reply = ask(os.environ.get("REWARD_URL", "http://127.0.0.1:8765/score"), {"texts": texts})
    scores = reply.get("scores") if isinstance(reply, dict) else None
    if not isinstance(scores, list) or len(scores) != len(texts):
        raise ValueError(f"the reward server answered {str(reply)[:200]!r}; expected {len(texts)} scores")
    return scores


def ask(url: str, request: dict[str, Any]) -> Any:
    """The reply of the server, after as many tries as it takes.

    Raises:
        ConnectionError: the server is not there, is busy, or takes too long, each time.
        ValueError: it refuses the request, or its reply is no JSON.
    """
    problem, body = "", json.dumps(request).encode()
    for number in range(TRIES):
        if number:
            time.sleep(FIRST_PAUSE_S * 2 ** (number - 1))
        try:
            message = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with OPENER.open(message, timeout=TIMEOUT_S) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            problem = f"HTTP status {error.code}"
            if error.code not in BUSY:
                raise ValueError(f"{url} refused the request: {problem}") from error
        except (OSError, http.client.HTTPException) as error:  # refused, reset, cut off in the middle, or timed out
            problem = str(error) or type(error).__name__
    raise ConnectionError(f"{url} gave no answer in {TRIES} tries; the last one ended with: {problem}")
