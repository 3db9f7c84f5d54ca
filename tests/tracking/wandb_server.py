"""A W&B server on the loopback that remembers what it is sent: enough protocol for a run without artifacts."""

import gzip
import http.server
import json
import re
import threading
from contextlib import contextmanager


class Server(http.server.ThreadingHTTPServer):
    """W&B as it should be (`normal`), or with a fault.

    `reject` turns everybody away, `swallow` takes a run but never its rows, `no tables` takes only runs and numbers.
    """

    daemon_threads = True

    def __init__(self, behaviour):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour, self.rows, self.upserts, self.released = behaviour, [], [], threading.Event()
        self.views = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(behaviour="normal"):
    """A running server, stopped at the end."""
    server = Server(behaviour)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
        operation = re.search(r"(?:query|mutation)\s+(\w+)", body.decode())
        other = operation and operation[1] not in {"UpsertBucket", "CreateRunFiles", "RunResumeStatus"}
        if self.server.behaviour == "reject" or (self.server.behaviour == "no tables" and other):
            self._answer({}, status=401)
        elif self.path.endswith("graphql"):
            self._answer({"data": self._graphql(json.loads(body))})
        elif self.path.endswith("file_stream"):
            self._take_rows(json.loads(body))
        else:
            self._answer({}, status=404)

    def do_GET(self):
        self._answer({}, status=404)

    def do_PUT(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self._answer({})

    def log_message(self, *args):
        pass

    def _take_rows(self, message):
        if self.server.behaviour == "swallow":
            self.server.released.wait()
        history = message.get("files", {}).get("wandb-history.jsonl", {"content": []})
        self.server.rows += [json.loads(line) for line in history["content"]]
        self._answer({})

    def _graphql(self, request):
        operation = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])[1]
        variables = request.get("variables") or {}
        entity = {"id": "e", "name": "team"}
        if operation == "UpsertBucket":
            self.server.upserts.append(variables)
            project = {"id": "p", "name": "project", "entity": entity}
            bucket = {"id": "b", "name": variables["name"], "config": "{}", "historyLineCount": 0, "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.server.url}/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if operation == "UpsertView2":
            self.server.views.append(variables)
            return {"upsertView": {"view": {"id": "v", "name": variables["name"]}, "inserted": True}}
        if "viewer" in request["query"].lower():
            viewer = {"id": "u", "username": "somebody", "entity": "team", "flags": "{}", "teams": {"edges": []}}
            return {"viewer": viewer | {"apiKeys": {"edges": []}, "admin": False, "email": "", "name": "somebody"}}
        return {"RunResumeStatus": {"model": {"id": "m", "name": "p", "entity": entity, "bucket": None}}}.get(
            operation, {}
        )

    def _answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
