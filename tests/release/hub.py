"""A Hub on this machine: the endpoints that huggingface_hub 2.4 calls for a push, and connections that can be cut.

It keeps what it is given as the real one does: large files by their SHA-256, refused if that is not theirs, and a commit that
is applied as a whole or not at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_loopbackloopbackloopbackloopback"
_BASE_CARD = {"license": "other", "license_name": "tiny-1", "license_link": "LICENSE"}


class CutError(Exception):
    """The connection ends here, without an answer."""


class LoopbackHub:
    """State of the Hub, and how it fails.

    Attributes:
        repos: (private, files by path) by repository.
        large: large files by SHA-256.
        stored: how many bytes came by PUT.
        commits: summaries, in order.
        at: called with (stage, before or after) around the work of each request; raises `CutError` to cut the connection.
    """

    def __init__(self) -> None:
        self.repos: dict[str, tuple[bool, dict[str, bytes]]] = {}
        self.large: dict[str, bytes] = {}
        self.stored = 0
        self.commits: list[str] = []
        self.requests: list[str] = []
        self.at: Callable[[str, str], None] = lambda stage, when: None
        self.refusal: tuple[int, str] | None = None
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def files(self, repo: str) -> dict[str, bytes]:
        return self.repos[repo][1]

    def cut_once(self, stage: str, when: str = "before") -> None:
        """Cuts the next connection at this stage, before the work or between it and its answer."""

        def at(stage_now: str, when_now: str) -> None:
            if (stage_now, when_now) == (stage, when):
                self.at = lambda stage, when: None
                raise CutError

        self.at = at

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: LoopbackHub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on standard error."""

    def _route(self) -> None:
        path = self.path.partition("?")[0]
        self.state.requests.append(f"{self.command} {path}")
        routes: tuple[tuple[str, str, str, Callable[..., tuple[int, Any]]], ...] = (
            ("POST", r"/api/repos/create", "create", self._create),
            ("POST", r"/api/validate-yaml", "validate", self._validate),
            ("POST", r"/api/models/(.+)/preupload/main", "preupload", self._preupload),
            ("POST", r"/(.+)\.git/info/lfs/objects/batch", "batch", self._batch),
            ("PUT", r"/large/(\w+)", "put", self._put),
            ("POST", r"/large/(\w+)/verify", "verify", self._verify),
            ("POST", r"/api/models/(.+)/commit/main", "commit", self._commit),
            ("GET", r"/api/models/(.+?)(?:/revision/main)?", "info", self._info),
        )
        try:
            for method, pattern, stage, answer in routes:
                match = re.fullmatch(pattern, path)
                if method == self.command and match:
                    self.state.at(stage, "before")
                    body = self._body(stage)
                    # A signed address carries its own right.
                    if stage != "put" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                        self._send(401, {"error": "Invalid username or password."})
                        return
                    if self.state.refusal is not None:
                        status, text = self.state.refusal
                        self._send(status, {"error": text})
                        return
                    status, content = answer(body, *match.groups())
                    self.state.at(stage, "after")
                    self._send(status, content)
                    return
            self._send(404, {"error": f"no such endpoint: {self.command} {path}"})
        except (CutError, ConnectionError):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_POST = do_PUT = _route  # noqa: N815

    def _body(self, stage: str) -> bytes:
        length = int(self.headers.get("Content-Length", 0))
        half = self.rfile.read(length // 2)
        self.state.at(stage, "half")
        return half + self.rfile.read(length - len(half))

    def _send(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _create(self, body: bytes) -> tuple[int, Any]:
        wish = json.loads(body)
        repo = f"{wish['organization'] or 'me'}/{wish['name']}"
        if not repo.startswith("me/"):
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        if repo in self.state.repos:
            return 409, {"error": "You already created this model repo", "url": f"{self.state.url}/{repo}"}
        self.state.repos[repo] = (wish.get("visibility") == "private", {})
        return 200, {"url": f"{self.state.url}/{repo}"}

    def _info(self, _: bytes, repo: str) -> tuple[int, Any]:
        if repo == "someone/base":
            return 200, {"id": repo, "siblings": [], "cardData": _BASE_CARD}
        if repo not in self.state.repos:
            return 404, {"error": "Repository not found"}
        return 200, {"id": repo, "sha": "0" * 40, "private": self.state.repos[repo][0], "siblings": []}

    def _validate(self, body: bytes) -> tuple[int, Any]:
        metadata = json.loads(body)["content"].split("---\n")[1]
        return (200 if isinstance(yaml.safe_load(metadata), dict) else 400), {}

    def _preupload(self, body: bytes, repo: str) -> tuple[int, Any]:
        answers = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(".safetensors")
            have = self.state.files(repo).get(file["path"])
            oid = None if have is None else hashlib.sha256(have).hexdigest() if large else _git_hash(have)
            answers.append(
                {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        return 200, {"files": answers}

    def _batch(self, body: bytes, repo: str) -> tuple[int, Any]:
        objects = []
        for wanted in json.loads(body)["objects"]:
            address = f"{self.state.url}/large/{wanted['oid']}"
            actions = {"upload": {"href": address}, "verify": {"href": f"{address}/verify"}}
            objects.append(wanted if wanted["oid"] in self.state.large else {**wanted, "actions": actions})
        return 200, {"transfer": "basic", "objects": objects}

    def _put(self, body: bytes, oid: str) -> tuple[int, Any]:
        if hashlib.sha256(body).hexdigest() != oid:
            return 400, {"error": "not what was announced"}
        self.state.large[oid] = body
        self.state.stored += len(body)
        return 200, {}

    def _verify(self, body: bytes, oid: str) -> tuple[int, Any]:
        return (200, {}) if oid in self.state.large else (404, {"error": "never arrived"})

    def _commit(self, body: bytes, repo: str) -> tuple[int, Any]:
        lines = [json.loads(line) for line in body.splitlines()]
        new = dict(self.state.files(repo))
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            else:
                new[value["path"]] = self.state.large[value["oid"]]
        self.state.repos[repo] = (self.state.repos[repo][0], new)
        self.state.commits.append(lines[0]["value"]["summary"])
        return 200, {"commitUrl": f"{self.state.url}/{repo}/commit/{'1' * 40}", "commitOid": "1" * 40}


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
