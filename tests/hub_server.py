"""A small server of the Hugging Face hub's HTTP protocol on the loopback interface, over local folders.

Enough of it for huggingface_hub's downloads and what is built on them: repository info, file trees, path
infos, and files by HEAD and (ranged) GET with ETag and X-Repo-Commit; errors carry the hub's X-Error-Code.
Uploads: new repositories, and commits of files sent in the request itself (no LFS, no Xet). No tokens: a
repository created without an owner is that of the user "someone".
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_INFO = re.compile(r"/api/(datasets|models)/((?:[^/]+/)?[^/]+?)(?:/revision/([^/]+))?")
_TREE = re.compile(r"/api/(datasets|models)/((?:[^/]+/)?[^/]+)/tree/([^/]+)(?:/(.*))?")
_PATHS = re.compile(r"/api/(datasets|models)/((?:[^/]+/)?[^/]+)/paths-info/([^/]+)")
_CREATE = re.compile(r"/api/repos/create")
_CARD = re.compile(r"/api/validate-yaml")
_MODES = re.compile(r"/api/(models)/((?:[^/]+/)?[^/]+)/preupload/([^/]+)")
_COMMIT = re.compile(r"/api/(models)/((?:[^/]+/)?[^/]+)/commit/([^/]+)")
_FILE = re.compile(r"/(datasets/)?((?:[^/]+/)?[^/]+)/resolve/([^/]+)/(.+)")


class HubServer:
    """Serves repositories while its `with` block runs; then the port is closed.

    repos: {"datasets/OWNER/NAME" or "models/OWNER/NAME": folder}. Each has one commit, also known as "main".
    url: what HF_ENDPOINT has to be. requests: "METHOD /path" of every request so far, in order.
    """

    def __init__(self, repos: Mapping[str, Path]) -> None:
        self.repos = {name: _Repo(name, folder) for name, folder in repos.items()}
        self.requests: list[str] = []
        self.commits: list[tuple[str, str, list[str]]] = []  # repository, message, paths
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "HubServer":
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Repo:
    def __init__(self, name: str, folder: Path | None) -> None:
        self.id = name.split("/", 1)[1]
        paths = sorted(path for path in folder.rglob("*") if path.is_file()) if folder else []
        self.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if folder}
        self.commit()

    def commit(self) -> None:
        """Name the files as they are now."""
        self.oids = {name: _git_blob(content) for name, content in self.files.items()}
        self.sha = hashlib.sha1(json.dumps([self.id, self.oids]).encode()).hexdigest()

    def info(self) -> dict[str, Any]:
        files = [{"rfilename": name} for name in self.files]
        return {"id": self.id, "sha": self.sha, "private": False, "tags": [], "siblings": files}

    def entry(self, path: str) -> dict[str, Any] | None:
        if path in self.files:
            size = len(self.files[path])
            return {"type": "file", "path": path, "size": size, "oid": self.oids[path]}
        if any(name.startswith(f"{path}/") for name in self.files):
            return {"type": "directory", "path": path, "size": 0, "oid": _git_blob(path.encode())}
        return None

    def tree(self, under: str, recursive: bool) -> list[dict[str, Any]]:
        """The files and folders below under; without recursive, only those directly in it."""
        prefix = f"{under}/" if under else ""
        paths: set[str] = set()
        for name in self.files:
            parts = name[len(prefix) :].split("/") if name.startswith(prefix) else []
            depths = range(1, len(parts) + 1) if recursive else range(1, 2)
            paths |= {prefix + "/".join(parts[:depth]) for depth in depths if parts}
        return [entry for path in sorted(paths) if (entry := self.entry(path))]


def _git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _MissingError(Exception):
    """The 404 to answer with; its text is the X-Error-Code."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # the client keeps its connections open

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: `HubServer.requests` has the log."""

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.hub.requests.append(f"{self.command} {url.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            self._route(unquote(url.path), parse_qs(url.query), body)
        except _MissingError as missing:
            # No body without a length, or a kept connection would be out of step.
            message = str(missing)
            self._send(404, {"X-Error-Code": message, "X-Error-Message": message}, b"{}")

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined]

    def _route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        if match := _FILE.fullmatch(path):
            kind, repo_id, revision, name = match.groups()
            self._send_file(self._repo("datasets" if kind else "models", repo_id, revision), name)
        elif match := _TREE.fullmatch(path):
            *where, under = match.groups()
            under = (under or "").strip("/")
            repo = self._repo(*where)
            entries = repo.tree(under, query.get("recursive", ["false"])[0].lower() in ("true", "1"))
            if under and not entries:
                raise _MissingError("EntryNotFound")
            self._send_json(entries)
        elif match := _PATHS.fullmatch(path):
            repo = self._repo(*match.groups())
            form = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
            self._send_json([entry for name in form["paths"] if (entry := repo.entry(name))])
        elif _CREATE.fullmatch(path):
            asked = json.loads(body)
            repo_id = f"{asked['organization'] or 'someone'}/{asked['name']}"
            status = 409 if f"models/{repo_id}" in self.hub.repos else 200  # exist_ok is up to the client
            self.hub.repos.setdefault(f"models/{repo_id}", _Repo(f"models/{repo_id}", None))
            self._send_json({"url": f"{self.hub.url}/{repo_id}"}, status)
        elif _CARD.fullmatch(path):
            self._send_json({"warnings": [], "errors": []})
        elif match := _MODES.fullmatch(path):
            self._repo(*match.groups())
            names = [file["path"] for file in json.loads(body)["files"]]
            self._send_json({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        elif match := _COMMIT.fullmatch(path):
            self._commit(self._repo(*match.groups()), [json.loads(line) for line in body.splitlines()])
        elif match := _INFO.fullmatch(path):
            self._send_json(self._repo(*match.groups()).info())
        else:
            raise _MissingError("RepoNotFound")

    def _repo(self, kind: str, repo_id: str, revision: str | None) -> _Repo:
        repo = self.hub.repos.get(f"{kind}/{repo_id}")
        if repo is None:
            raise _MissingError("RepoNotFound")
        if revision not in (None, "main", repo.sha):
            raise _MissingError("RevisionNotFound")
        return repo

    def _commit(self, repo: _Repo, lines: list[dict[str, Any]]) -> None:
        files = [line["value"] for line in lines if line["key"] == "file"]
        repo.files |= {file["path"]: base64.b64decode(file["content"]) for file in files}
        repo.commit()
        (header,) = (line["value"] for line in lines if line["key"] == "header")
        self.hub.commits.append((repo.id, header["summary"], sorted(file["path"] for file in files)))
        self._send_json({"commitUrl": f"{self.hub.url}/{repo.id}/commit/{repo.sha}", "commitOid": repo.sha})

    def _send_file(self, repo: _Repo, name: str) -> None:
        if name not in repo.files:
            raise _MissingError("EntryNotFound")
        content, status = repo.files[name], 200
        headers = {"ETag": f'"{repo.oids[name]}"', "X-Repo-Commit": repo.sha, "Accept-Ranges": "bytes"}
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, stop = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            content, status = content[start:stop], 206
        self._send(status, headers | {"Content-Type": "application/octet-stream"}, content)

    def _send_json(self, value: Any, status: int = 200) -> None:
        self._send(status, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
