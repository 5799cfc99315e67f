"""A small server with the addresses of the Hugging Face hub, for the real huggingface_hub client.

Repositories are folders: ``root/OWNER/NAME/...``, or ``root/OWNER/NAME@REVISION/...`` for a revision
other than main.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest


class Hub:
    """The server. `downloads` lists what was fetched, as ``OWNER/NAME/FILE``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.closed = False
        self.downloads: list[str] = []
        self.commits: list[dict[str, Any]] = []
        self.private: set[str] = set()
        self.gated: set[str] = set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Refuse connections; those that are open end without an answer."""
        self.closed = True
        self._server.shutdown()
        self._server.server_close()

    def folder(self, repository: str, revision: str = "main") -> Path | None:
        """The folder of a repository at a branch or commit."""
        owner, name = repository.split("/")
        for folder in sorted((self.root / owner).glob(f"{name}*")):
            base, _, at = folder.name.partition("@")
            if base == name and revision in (at or "main", self.commit(folder)):
                return folder
        return None

    def commit(self, folder: Path) -> str:
        return hashlib.sha1(str(folder.relative_to(self.root)).encode()).hexdigest()

    def info(self, folder: Path) -> dict[str, Any]:
        files = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
        id = f"{folder.parent.name}/{folder.name.partition('@')[0]}"
        return {
            "id": id,
            "modelId": id,
            "sha": self.commit(folder),
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": file} for file in files],
        }


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def parse_request(self) -> bool:
        self.close_connection = self.hub.closed
        return not self.hub.closed and super().parse_request()

    def do_HEAD(self) -> None:
        self.do_GET(with_body=False)

    def do_GET(self, with_body: bool = True) -> None:
        address = urlsplit(self.path)
        parts = [unquote(part) for part in address.path.strip("/").split("/")]
        if parts[:2] == ["api", "models"] and len(parts) == 2:
            author = parse_qs(address.query).get("author", [""])[0]
            folders = sorted(f for f in (self.hub.root / author).glob("*") if "@" not in f.name)
            return self._json([self.hub.info(folder) for folder in folders])
        if parts[:2] == ["api", "models"] and len(parts) in (4, 6):
            repository, revision = "/".join(parts[2:4]), parts[5] if len(parts) == 6 else "main"
            folder = self._folder(repository, revision)
            return None if folder is None else self._json(self.hub.info(folder))
        if len(parts) > 4 and parts[2] == "resolve":
            folder = self._folder("/".join(parts[:2]), parts[3])
            return None if folder is None else self._file(folder, "/".join(parts[4:]), with_body)
        return self._error(404, "EntryNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            repository = f"{asked.get('organization') or 'me'}/{asked['name']}"
            (self.hub.root / repository).mkdir(parents=True, exist_ok=True)
            self.hub.private |= (
                {repository} if "private" in (asked.get("visibility"), *asked) else set()
            )
            return self._json({"url": f"{self.hub.url}/{repository}"})
        repository = "/".join(parts[2:4])
        folder = self._folder(repository, "main")
        if folder is None:
            return None
        if parts[4] == "preupload":
            asked = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in asked]
            return self._json({"files": modes})
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            if line["key"] == "file":
                file = folder / line["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(line["value"]["content"]))
            elif line["key"] == "deletedFile":
                (folder / line["value"]["path"]).unlink()
        self.hub.commits.append({"repository": repository, **lines[0]["value"]})
        commit = self.hub.commit(folder)
        return self._json({"commitUrl": f"{self.hub.url}/{repository}/commit/{commit}",
                           "commitOid": commit, "hookOutput": ""})  # fmt: skip

    def _folder(self, repository: str, revision: str) -> Path | None:
        if repository in self.hub.gated:
            self._error(403, "GatedRepo")
            return None
        folder = self.hub.folder(repository, revision)
        if folder is None:
            known = self.hub.folder(repository) is not None
            self._error(404, "RevisionNotFound" if known else "RepoNotFound")
        return folder

    def _file(self, folder: Path, name: str, with_body: bool) -> None:
        file = folder / name
        if not file.is_file():
            return self._error(404, "EntryNotFound", self.hub.commit(folder))
        data = file.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", self.hub.commit(folder))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self._end(data, with_body)
        if with_body:
            self.hub.downloads.append(f"{folder.relative_to(self.hub.root)}/{name}")

    def _json(self, value: Any) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self._end(json.dumps(value).encode())

    def _error(self, status: int, code: str, commit: str | None = None) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self._end(b"{}", self.command != "HEAD")

    def _end(self, data: bytes, with_body: bool = True) -> None:
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)


@contextmanager
def serving(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub at `root` for the client in this process, with a cache of its own.

    HF_ENDPOINT is set too, for other processes; in this one it was read at the import of the client.
    """
    hub = Hub(root)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in (
        ("ENDPOINT", hub.url),
        ("HUGGINGFACE_CO_URL_TEMPLATE", template),
        ("HF_HUB_CACHE", str(cache)),
        ("HF_HUB_DISABLE_XET", True),
    ):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    try:
        yield hub
    finally:
        hub.close()
