"""Serves a reward model over HTTP on the loopback device, for `examples/served_reward.py`.

    python examples/reward_server.py outputs/run/reward/model --port 8765

It is the least that works; vLLM, TGI or your own service can take its place. A request is {"texts": [...]}, each one a
string or a list of messages, and the reply is {"scores": [...]}.
"""

from __future__ import annotations

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

BATCH = 16


class RewardModel:
    """A model with one output, and its tokenizer."""

    def __init__(self, path: str) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1).to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="right")
        self.lock = threading.Lock()  # each request has a thread of its own

    @torch.no_grad()
    def scores(self, texts: list[Any]) -> list[float]:
        """One score for each text or conversation."""
        plain = [text if isinstance(text, str) else self._rendered(text) for text in texts]
        with self.lock:
            return [
                score for start in range(0, len(plain), BATCH) for score in self._batch(plain[start : start + BATCH])
            ]

    def _rendered(self, messages: list[dict[str, Any]]) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False))

    def _batch(self, texts: list[str]) -> list[float]:
        batch = self.tokenizer(texts, return_tensors="pt", padding=True).to(self.model.device)
        logits = self.model(batch.input_ids, attention_mask=batch.attention_mask).logits  # [B, 1]
        scores: list[float] = logits[:, 0].float().tolist()
        return scores


class Handler(BaseHTTPRequestHandler):
    """Answers requests; what is wrong with one is said with status 400."""

    reward: RewardModel

    def do_POST(self) -> None:  # noqa: N802 - the name that http.server calls
        """Score the texts of one request."""
        body: dict[str, Any]
        try:
            texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["texts"]
            body, status = {"scores": self.reward.scores(texts)}, 200
        except Exception as error:  # noqa: BLE001 - the server goes on
            body, status = {"error": f"{type(error).__name__}: {error}"}, 400
        reply = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_: Any) -> None:
        """Keep silent."""


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or hub id of a reward model")
    parser.add_argument("--port", type=int, default=8765)
    words = parser.parse_args()
    Handler.reward = RewardModel(words.model)
    with ThreadingHTTPServer(("127.0.0.1", words.port), Handler) as server:
        print(f"serving {words.model} at http://127.0.0.1:{server.server_port}/score", flush=True)  # noqa: T201
        server.serve_forever()


if __name__ == "__main__":
    main()
