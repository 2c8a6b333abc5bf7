"""What of Hugging Face's hub it takes to list and read one repository, on loopback."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY = "org/repo"
_API = f"/api/models/{REPOSITORY}"
_FILES = f"/{REPOSITORY}/resolve/main/"


@contextmanager
def hub(files: Mapping[str, bytes]) -> Iterator[str]:
    """The address of a hub whose repository holds `files`, by path, as they are when asked for."""
    handler = type("Handler", (_Handler,), {"files": files})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: Mapping[str, bytes] = {}

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == _API:
            self._answer(200, {"id": REPOSITORY, "sha": "a" * 40})
        elif path.startswith(f"{_API}/tree/main"):
            inside = path.removeprefix(f"{_API}/tree/main").strip("/")
            names = {str(above) for name in self.files for above in _with_parents(name)}
            found = [name for name in sorted(names) if str(PurePosixPath(name).parent) == inside]
            self._answer(200 if found else 404, [self._entry(name) for name in found])
        elif (data := self.files.get(path.removeprefix(_FILES))) is not None:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            self._answer(206, data[int(first) : int(last) + 1])
        else:
            self._answer(404, {})

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        paths = parse_qs(asked)["paths"]
        self._answer(200, [self._entry(path) for path in paths if path in self.files])

    def _entry(self, name: str) -> dict[str, object]:
        if name not in self.files:
            return {"type": "directory", "oid": "b" * 40, "path": name}
        data = self.files[name]
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return {"type": "file", "oid": oid, "size": len(data), "path": name}

    def _answer(self, status: int, content: object) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _with_parents(name: str) -> list[PurePosixPath]:
    path = PurePosixPath(name)
    return [path, *path.parents]
