"""A real S3 server on loopback (moto's), that notes what is asked of it and can be made to fail."""

from __future__ import annotations

import logging
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from s3fs import S3FileSystem

from mcorefs.remote import filesystem

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse

BUCKET = "bucket"
KEY, SECRET = "AKIATHEKEYOFTHETEST", "the-secret-of-the-test"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    """Below the bucket."""
    bytes_asked: str | None

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


_SIGNED = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, Signature=test"

Trouble = Callable[[Request], tuple[str, str] | None]
"""What to answer instead: (status, S3's code); None: what S3 answers."""


class ObjectStore:
    """The server, with one bucket."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self._app = DomainDispatcherApplication(create_backend_app)
        self.requests: list[Request] = []
        self.trouble: Trouble = lambda request: None
        self.port = 0
        self.start()
        self._put("", b"")

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, at the port of before if there was one."""
        from werkzeug.serving import make_server

        self._server = make_server("127.0.0.1", self.port, self._answer, threaded=True)
        self.port = self._server.port
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Refuse connections from now on; what is stored stays."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def put(self, path: str, data: bytes) -> None:
        self._put(path, data)

    def delete(self, path: str) -> None:
        self._send("DELETE", path, None)

    def upload(self, directory: Path, prefix: str) -> str:
        """The URL of what is now a copy of `directory`."""
        for file in sorted(directory.rglob("*")):
            if file.is_file():
                self.put(f"{prefix}/{file.relative_to(directory)}", file.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    @contextmanager
    def failing(self, trouble: Trouble) -> Iterator[None]:
        self.trouble = trouble
        try:
            yield
        finally:
            self.trouble = lambda request: None

    @contextmanager
    def noted(self) -> Iterator[list[Request]]:
        """The requests that the block makes."""
        self.requests = []
        yield self.requests

    def _put(self, path: str, data: bytes) -> None:
        self._send("PUT", path, data)

    def _send(self, method: str, path: str, data: bytes | None) -> None:
        url = f"{self.endpoint}/{BUCKET}/{path}"
        headers = {"Content-Type": "application/octet-stream", "Authorization": _SIGNED}
        request = urllib.request.Request(url, data, headers, method=method)
        urllib.request.urlopen(request, timeout=10).close()

    def _answer(self, environ: dict[str, Any], respond: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"].removeprefix(f"/{BUCKET}").lstrip("/")
        request = Request(environ["REQUEST_METHOD"], path, environ.get("HTTP_RANGE"))
        self.requests.append(request)
        if (wrong := self.trouble(request)) is not None:
            status, code = wrong
            body = f"<Error><Code>{code}</Code><Message>as the test wants it</Message></Error>"
            respond(status, [("Content-Type", "application/xml")])
            return [body.encode()]
        answer: Iterable[bytes] = self._app(environ, respond)
        return answer


@contextmanager
def s3() -> Iterator[ObjectStore]:
    """A store that this process and its children find by their environment."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store = ObjectStore()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", store.endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setattr(filesystem, "_connected", {})  # to the store of another test
        S3FileSystem.clear_instance_cache()
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # or it is botocore's patience that is tested
        yield store
    store.stop()
