"""A hub for tests: model info, files with ranges and redirects, and what can go wrong on the way.

    GET  /api/models/ORG/NAME/revision/REV?blobs=True   commit and files, with sizes and hashes
    GET  /ORG/NAME/resolve/COMMIT/FILE                   the bytes; large files by a redirect
    GET  /cdn/ETAG                                       where that leads

Every request is kept in `requests`, as (path, Range). `cuts`: file name → after how many bytes of
an answer its connection is cut, once for each number in the list.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE_BYTES = 10_000  # from here on a file is LFS: its hash is a SHA-256, its bytes on the CDN


def etag(content: bytes) -> str:
    if len(content) >= LARGE_BYTES:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class FakeModel:
    files: dict[str, bytes]
    revisions: dict[str, str] = field(default_factory=lambda: {"main": "a" * 40})
    gated: bool = False
    private: bool = False


class QuietServer(ThreadingHTTPServer):
    """Does not mind clients that were killed."""

    def handle_error(self, request: Any, address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            super().handle_error(request, address)


class FakeHub:
    """Serves `models` on a free port of this machine."""

    def __init__(self) -> None:
        self.models: dict[str, FakeModel] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.tokens: dict[str, str | None] = {}  # path → who asked for it last, says the request
        self.cdn = ""  # where large files are, if not on this host: a URL
        self.cuts: dict[str, list[int]] = {}
        self.damaged: set[str] = set()
        self.ranges = True
        self.busy = 0  # answers of status 503 that come first
        self.flowing = threading.Event()  # cleared: where bytes are cut, nothing is closed
        self.flowing.set()
        self.server = QuietServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def add(self, name: str, files: dict[str, bytes], **options: Any) -> FakeModel:
        self.models[name] = FakeModel(files, **options)
        return self.models[name]

    def fetched(self, part: str) -> list[str | None]:
        """The Range of every request whose path ends with `part`."""
        return [range for path, range in self.requests if path.endswith(part)]

    def close(self) -> None:
        self.flowing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def _handler(hub) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                hub.requests.append((path, self.headers.get("Range")))
                hub.tokens[path] = self.headers.get("Authorization")
                if hub.busy:
                    hub.busy -= 1
                    self.fail(503, "")
                elif info := re.fullmatch(r"/api/models/(.+?)(?:/revision/(.+))?", path):
                    self.info(info[1], info[2] or "main")
                elif file := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
                    self.resolve(*file.groups())
                elif cdn := re.fullmatch(r"/cdn/(.+)", path):
                    self.send(cdn[1].split("/", 2)[2], hub.blob(cdn[1]))
                else:
                    self.fail(404, "")

            do_HEAD = do_GET

            def info(self, name: str, revision: str) -> None:
                model = hub.models.get(name)
                if model is None or model.private:
                    return self.fail(401, "RepoNotFound")
                commit = model.revisions.get(revision)
                if commit is None and revision in model.revisions.values():
                    commit = revision
                if commit is None:
                    return self.fail(404, "RevisionNotFound")
                files = []
                for file, content in model.files.items():
                    each: dict[str, Any] = {
                        "rfilename": file,
                        "size": len(content),
                        "blobId": hashlib.sha1(content).hexdigest(),
                    }
                    if len(content) >= LARGE_BYTES:
                        each["lfs"] = {
                            "sha256": etag(content), "size": len(content), "pointerSize": 134,
                        }  # fmt: skip
                    else:
                        each["blobId"] = etag(content)
                    files.append(each)
                body = {"id": name, "sha": commit, "siblings": files}
                self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

            def resolve(self, name: str, commit: str, file: str) -> None:
                model = hub.models[name]
                if model.gated:
                    return self.fail(403, "GatedRepo")
                if file not in model.files:
                    return self.fail(404, "EntryNotFound")
                content = model.files[file]
                if len(content) < LARGE_BYTES:
                    return self.send(file, content)
                self.answer(
                    302,
                    b"",
                    {
                        "Location": f"{hub.cdn}/cdn/{name}/{file}",
                        "X-Linked-Etag": f'"{etag(content)}"',
                        "X-Linked-Size": str(len(content)),
                        "X-Xet-Hash": "0" * 64,
                        "X-Repo-Commit": commit,
                    },
                )

            def send(self, file: str, content: bytes) -> None:
                if file in hub.damaged:
                    content = content[:-1] + bytes([content[-1] ^ 1])
                status, headers = 200, {"ETag": f'"{etag(content)}"', "Accept-Ranges": "bytes"}
                wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                if wanted and hub.ranges:
                    start, total = int(wanted[1]), len(content)
                    if start >= total:
                        return self.fail(416, "")
                    status, content = 206, content[start:]
                    headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
                self.answer(status, content, headers, hub.cut(file))

            def fail(self, status: int, code: str) -> None:
                self.answer(status, b"", {"X-Error-Code": code} if code else {})

            def answer(
                self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None
            ) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "HEAD":
                    return
                self.wfile.write(body if cut is None else body[:cut])
                if cut is not None:
                    self.wfile.flush()
                    hub.flowing.wait()
                    self.close_connection = True

        return Handler

    def blob(self, path: str) -> bytes:
        organisation, name, file = path.split("/", 2)
        return self.models[f"{organisation}/{name}"].files[file]

    def cut(self, file: str) -> int | None:
        """After how many bytes this answer ends too early."""
        left = self.cuts.get(file)
        return left.pop(0) if left else None
