"""A Hugging Face Hub on loopback: one data set, whose files lie in a folder."""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """The server's side that a test steers and asks."""

    name: str
    revisions: dict[str, Path]
    """Folder of each revision."""
    url: str = ""
    gets: Counter[str] = field(default_factory=Counter)
    """Requests for files by their name."""
    status: int | None = None
    """Answer everything with this status."""
    code: str = ""
    """The error that a refusal names."""


def files_of(folder: Path) -> dict[str, Path]:
    """All files by their names."""
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}


def commit_of(folder: Path) -> str:
    """Forty hexadecimal digits that depend on names and contents."""
    digest = hashlib.sha1()
    for name, file in files_of(folder).items():
        digest.update(f"{name} {len(content := file.read_bytes())} ".encode() + content)
    return digest.hexdigest()


@contextmanager
def serve_hub(name: str, folder: Path) -> Iterator[Hub]:
    """Serve the data set OWNER/NAME on a free port of 127.0.0.1."""
    hub = Hub(name, {"main": folder})

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(is_get=False)

        def do_GET(self) -> None:
            self._answer(is_get=True)

        def _answer(self, *, is_get: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            api, files = f"/api/datasets/{hub.name}", f"/datasets/{hub.name}/resolve/"
            if hub.status is not None:
                return self._send(b"no", is_get=is_get, status=hub.status, headers={"X-Error-Code": hub.code})
            if path == api or path.startswith(f"{api}/revision/"):
                folder = self._folder(path.removeprefix(api).removeprefix("/revision/") or "main")
                if folder is None:
                    return self._send(b"no", is_get=is_get, status=404, headers={"X-Error-Code": "RevisionNotFound"})
                siblings = [{"rfilename": name} for name in files_of(folder)]
                info = {"id": hub.name, "sha": commit_of(folder), "siblings": siblings}
                return self._send(json.dumps(info).encode(), is_get=is_get, type="application/json")
            if path.startswith(f"{api}/tree/"):
                folder = self._folder(path.removeprefix(f"{api}/tree/").partition("/")[0])
                assert folder is not None
                entries = [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
                    for name, file in files_of(folder).items()
                ]
                return self._send(json.dumps(entries).encode(), is_get=is_get, type="application/json")
            revision, _, name = path.removeprefix(files).partition("/")
            folder = self._folder(revision) if path.startswith(files) else None
            if folder is None or not (folder / name).is_file():
                code = "EntryNotFound" if folder else "RepoNotFound"
                return self._send(b"no", is_get=is_get, status=404, headers={"X-Error-Code": code})
            hub.gets[name] += is_get
            content = (folder / name).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            headers = {"X-Repo-Commit": commit_of(folder), "ETag": f'"{etag}"'}
            return self._send(content, is_get=is_get, headers=headers)

        def _folder(self, revision: str) -> Path | None:
            commits = {commit_of(folder): folder for folder in hub.revisions.values()}
            return (hub.revisions | commits).get(revision)

        def _send(
            self,
            content: bytes,
            *,
            is_get: bool,
            status: int = 200,
            type: str = "application/octet-stream",
            headers: dict[str, str] | None = None,
        ) -> None:
            self.send_response(status)
            for key, value in {"Content-Type": type, "Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if is_get:
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
