"""A Hub on this machine for tests: enough of its API for the real client, and failures on demand.

GET  /api/models/OWNER/NAME[/revision/REV]     commit and files
HEAD /OWNER/NAME/resolve/REV/PATH              ETag, X-Repo-Commit; a large file redirects to another host name
GET  /cdn/SHA256                               its bytes, with ranges
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import re
import socket
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

LARGE = 1024
"""Files of this many bytes are kept as the Hub keeps large ones."""


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD path" matches.

    status:  answer with this status and `headers` instead.
    cut:     send so many bytes of the body, then close the connection.
    replace: send these bytes instead of the file's.
    """

    match: str
    times: int = 1
    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    replace: bytes | None = None


@dataclass
class Repo:
    """commit -> path -> content; names of commits; who may read it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False


def commit_of(files: Mapping[str, bytes]) -> str:
    """A commit's name that depends on its files."""
    digest = hashlib.sha1(usedforsecurity=False)
    for name, content in sorted(files.items()):
        digest.update(name.encode() + hashlib.sha256(content).digest())
    return digest.hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class HubServer:
    """Serves repositories on a loopback port. `requests` holds what was asked: (method, path, headers)."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.token = ""  # when set, gated repositories are open to it
        self.ranges = True
        server = self

        class Handler(_Handler):
            hub = server

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(
        self, repo: str, files: Mapping[str, bytes], *, commit: str | None = None, gated: bool = False
    ) -> str:
        """Put a commit on a repository's main. Returns its name."""
        name = commit or commit_of(files)
        there = self.repos.setdefault(repo, Repo())
        there.commits[name] = dict(files)
        there.refs["main"] = name
        there.gated = gated
        return name

    def fail(self, match: str, **what: Any) -> None:
        """Let the next requests that match go wrong."""
        self.faults.append(Fault(match, **what))

    def asked(self, pattern: str) -> list[dict[str, str]]:
        """Headers of the requests whose "METHOD path" matches."""
        return [headers for method, path, headers in self.requests if re.search(pattern, f"{method} {path}")]

    def content(self, digest: str) -> bytes:
        for repo in self.repos.values():
            for files in repo.commits.values():
                for content in files.values():
                    if sha256(content) == digest:
                        return content
        raise KeyError(digest)


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, {k.lower(): v for k, v in self.headers.items()}))
        fault = self._fault(f"{self.command} {path}")
        if fault is not None and fault.status:
            return self._send(fault.status, fault.replace or b"", fault.headers)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._info(found[1], found[2] or "main")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(found[1], found[2], found[3], fault)
        if found := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
            return self._bytes(self.hub.content(found[1]), {"ETag": f'"{found[1]}"'}, fault)
        self._send(404, b"", {})

    def _fault(self, what: str) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times > 0 and re.search(fault.match, what):
                fault.times -= 1
                return fault
        return None

    def _commit(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        there = self.hub.repos.get(repo)
        if there is None:
            self._error(401, "RepoNotFound", "Repository not found")
            return None
        name = there.refs.get(revision, revision)
        if name not in there.commits:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return name, there.commits[name]

    def _error(self, status: int, code: str, said: str) -> None:
        self._send(
            status, json.dumps({"error": said}).encode(), {"X-Error-Code": code, "X-Error-Message": said}
        )

    def _info(self, repo: str, revision: str) -> None:
        found = self._commit(repo, revision)
        if found is None:
            return
        name, files = found
        siblings: list[dict[str, Any]] = []
        for path, content in files.items():
            entry = {"rfilename": path, "size": len(content), "blobId": git_hash(content)}
            if len(content) >= LARGE:
                entry["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        body = {"id": repo, "modelId": repo, "sha": name, "private": False, "tags": [], "siblings": siblings}
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _resolve(self, repo: str, revision: str, path: str, fault: Fault | None) -> None:
        found = self._commit(repo, revision)
        if found is None:
            return
        name, files = found
        token = self.headers.get("Authorization")
        if self.hub.repos[repo].gated and (not self.hub.token or token != f"Bearer {self.hub.token}"):
            return self._error(
                401 if token is None else 403, "GatedRepo", f"Access to model {repo} is restricted"
            )
        if path not in files:
            return self._error(404, "EntryNotFound", f"Entry not found: {path}")
        content = files[path]
        common = {"X-Repo-Commit": name}
        if len(content) < LARGE:
            return self._bytes(content, {**common, "ETag": f'"{git_hash(content)}"'}, fault)
        linked = {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
        location = f"http://localhost:{self.hub.port}/cdn/{sha256(content)}"
        self._send(302, b"", {**common, **linked, "Location": location})

    def _bytes(self, content: bytes, headers: Mapping[str, str], fault: Fault | None) -> None:
        start, status, extra = 0, 200, {}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        same = self.headers.get("If-Range") in (None, headers["ETag"])
        if wanted and same and self.hub.ranges:
            start, status = int(wanted[1]), 206
            extra = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        body = (fault.replace if fault and fault.replace is not None else content)[start:]
        self._send(status, body, {**headers, **extra}, cut=fault.cut if fault else None)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], *, cut: int | None = None) -> None:
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "HEAD":
                return
            if cut is None:
                self.wfile.write(body)
                return
            self.wfile.write(body[:cut])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


@contextlib.contextmanager
def hub_server() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server
