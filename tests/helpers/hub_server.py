"""A small stand-in of the Hub's HTTP API: enough of it for huggingface_hub to log in, make repositories and upload."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

TOKEN = "hf_stand_in"


class HubServer(ThreadingHTTPServer):
    """Holds what was uploaded.

    Attributes:
        repositories: id to file name to content.
        commits: (id, first line of the message) of each.
        refuse: path that is answered with 403, if any.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[tuple[str, str]] = []
        self.refuse = ""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """What makes huggingface_hub in another process use this server."""
        known = {"HF_TOKEN": token} if token else {}
        return {
            "HF_ENDPOINT": self.address,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **known,
        }


class Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, data: object, code: int = 200) -> None:
        text = json.dumps(data).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def allowed(self) -> bool:
        path = urlparse(self.path).path
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/objects/"):
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.server.refuse and self.server.refuse in path:
            self.answer({"error": "You have read access but not the required permissions."}, 403)
        else:
            return True
        return False

    def do_GET(self) -> None:
        if not self.allowed():
            return
        path = urlparse(self.path).path
        if path == "/api/whoami-v2":
            self.answer({"type": "user", "name": "owner", "orgs": []})
        elif path.startswith("/api/models/"):
            name = "/".join(path.split("/")[3:5])
            if name not in self.server.repositories:
                self.answer({"error": "Repository not found"}, 404)
                return
            files = [{"rfilename": file} for file in self.server.repositories[name]]
            self.answer({"id": name, "sha": "0" * 40, "siblings": files})
        else:
            self.answer({"error": f"no GET {path}"}, 404)

    def do_PUT(self) -> None:
        content = self.body()
        oid = urlparse(self.path).path.rsplit("/", 1)[-1]
        assert hashlib.sha256(content).hexdigest() == oid, "what came is not what was announced"
        self.server.objects[oid] = content
        self.answer({})

    def do_POST(self) -> None:
        body = self.body()
        if not self.allowed():
            return
        path = urlparse(self.path).path
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'owner'}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            self.answer({"url": f"{self.server.address}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            told = [
                {"path": path, "uploadMode": modes[path.endswith((".safetensors", ".png"))], "shouldIgnore": False}
                for path in (file["path"] for file in files)
            ]
            self.answer({"files": told})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.answer(
                {
                    "transfer": "basic",
                    "objects": [
                        {**item, "actions": {"upload": {"href": f"{self.server.address}/objects/{item['oid']}"}}}
                        for item in json.loads(body)["objects"]
                    ],
                }
            )
        elif "/commit/" in path:
            self.commit("/".join(path.split("/")[3:5]), body)
        else:
            self.answer({"error": f"no POST {path}"}, 404)

    def commit(self, name: str, body: bytes) -> None:
        files = self.server.repositories[name]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                self.server.commits.append((name, value["summary"]))
            elif entry["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        address = f"{self.server.address}/{name}"
        self.answer({"success": True, "commitOid": "1" * 40, "commitUrl": f"{address}/commit/{'1' * 40}"})


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """A server on a free port of this machine, while the block runs."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
