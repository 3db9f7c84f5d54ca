"""A model hub on the loopback that keeps what it is sent: enough protocol for one upload."""

import base64
import hashlib
import http.server
import json
import threading
from contextlib import contextmanager


class Hub(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.created, self.objects, self.commits, self.validated = {}, [], {}, [], []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving():
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.headers.get("authorization") != "Bearer hf_good":
            self._answer({"error": "Invalid credentials"}, status=401)
        elif self.path.startswith("/api/whoami"):
            self._answer({"name": "me", "type": "user", "orgs": [], "auth": {}})
        else:
            self._answer({"sha": "0" * 40, "id": "me/policy", "private": True, "siblings": []})

    def do_POST(self):
        body = self._body()
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._answer({"url": f"{self.server.url}/me/policy"})
        elif self.path == "/api/validate-yaml":
            self.server.validated += [json.loads(body)["content"]]
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            wanted = [{"path": file["path"], "uploadMode": _mode(file["path"])} for file in json.loads(body)["files"]]
            self._answer({"files": [{**file, "shouldIgnore": False} for file in wanted]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self._answer(
                {"transfer": "basic", "objects": [self._place(entry) for entry in json.loads(body)["objects"]]}
            )
        elif "/commit/" in self.path:
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._answer({}, status=404)

    def do_PUT(self):
        body = self._body()
        self.server.objects[hashlib.sha256(body).hexdigest()] = body
        self._answer({})

    def _place(self, entry):
        action = {"upload": {"href": f"{self.server.url}/store/{entry['oid']}"}}
        return {"oid": entry["oid"], "size": entry["size"], "actions": action}

    def _commit(self, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.commits.append(value["summary"])
            elif line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.objects[value["oid"]]
        self._answer({"commitUrl": f"{self.server.url}/me/policy/commit/1", "commitOid": "1" * 40, "success": True})

    def _body(self):
        if self.headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def _mode(path):
    return "lfs" if path.endswith(".safetensors") else "regular"
