"""The part of the hub's interface that one commit and one download need, over a dictionary."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class Hub(BaseHTTPRequestHandler):
    files: dict[str, bytes]
    seen: list[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append(f"POST {self.path}")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if asked["name"] == "forbidden":
                return self._reply({"error": "not yours"}, 403)
            return self._reply(
                {"url": f"http://{self.headers['Host']}/{name}", "name": name, "id": name}
            )
        if self.path == "/api/validate-yaml":
            assert json.loads(body)["content"].startswith("---\n")
            return self._reply({"errors": [], "warnings": []})
        repo = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            return self._reply({"files": files})
        assert "/commit/" in self.path, self.path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                value = line["value"]
                assert value["encoding"] == "base64"
                self.files[f"{repo}/{value['path']}"] = base64.b64decode(value["content"])
        self._reply(
            {
                "commitUrl": f"http://{self.headers['Host']}/{repo}/commit/{'a' * 40}",
                "commitOid": "a" * 40,
            }
        )

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.seen.append(f"{self.command} {self.path}")
        repo, _, rest = self.path.strip("/").partition("/resolve/")
        data = self.files.get(f"{repo}/{rest.partition('/')[2]}")
        if data is None:
            known = any(name.startswith(f"{repo}/") for name in self.files)
            code = "EntryNotFound" if known else "RepoNotFound"
            return self._reply({"error": "no such thing"}, 404, {"X-Error-Code": code})
        tag = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": "a" * 40}
        self._send(200, data, tag)

    def _reply(
        self, content: Any, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self._send(status, json.dumps(content).encode(), headers or {})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def hub() -> Iterator[tuple[str, type[Hub]]]:
    """Address and state of a hub on this machine."""
    own = type("OwnHub", (Hub,), {"files": {}, "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), own)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", own
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
