"""File systems besides S3, and what is said where one is not installed."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import fsspec.config
import pytest

import mcorefs
from mcorefs.errors import CheckpointError, ReadFault
from mcorefs.remote import parse_path
from mcorefs.remote.objects import Objects
from mcorefs.storage import regular_file
from tests.checkpoints import Fixture, ensure
from tests.hub import hub
from tests.object_store import KEY, SECRET, ObjectStore, s3
from tests.test_mount import in_child
from tests.test_roundtrip import assert_same_files

MOE = "qwen3_moe-tp2-pp2-ep2"


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return ensure([MOE])[MOE]


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with s3() as store:
        yield store


def test_memory(fixture: Fixture) -> None:
    """A file system without requests, that knows no version but when an object was made."""
    memory = fsspec.filesystem("memory")
    memory.put(str(fixture.root), "/objects/run", recursive=True)
    assert fixture.spec.hf_max_shard_size is not None
    with mcorefs.open(
        "memory://objects/run", vocab_size=301, shard_size=fixture.spec.hf_max_shard_size
    ) as checkpoint:
        assert_same_files(checkpoint.files, fixture.hf)
    with mcorefs.open("memory://objects/run") as checkpoint:
        for path in fixture.iteration.glob("*.distcp"):
            name = f"/objects/run/{fixture.iteration.name}/{path.name}"
            memory.pipe_file(name, path.read_bytes())
        with pytest.raises(ReadFault, match="was replaced after the checkpoint was opened"):
            checkpoint.get_tensor("model.norm.weight")


def test_hugging_face_hub(fixture: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        f"run/{path.relative_to(fixture.root)}": path.read_bytes()
        for path in fixture.root.rglob("*")
        if path.is_file()
    }
    assert fixture.spec.hf_max_shard_size is not None
    with hub(files) as address:
        monkeypatch.setitem(fsspec.config.conf, "hf", {"endpoint": address, "token": False})
        with mcorefs.open(
            "hf://org/repo/run", vocab_size=301, shard_size=fixture.spec.hf_max_shard_size
        ) as checkpoint:
            assert_same_files(checkpoint.files, fixture.hf)
        with mcorefs.open("hf://org/repo/run") as checkpoint:
            for name, data in files.items():
                files[name] = data[::-1]
            with pytest.raises(ReadFault, match="was replaced after the checkpoint was opened"):
                checkpoint.get_tensor("model.norm.weight")


def test_multi_storage_client(
    store: ObjectStore,
    fixture: Fixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through its own bridge to fsspec, to the same store, and from a forked process too."""
    store.upload(fixture.root, "msc/run")
    place = {"base_path": "bucket", "endpoint_url": store.endpoint, "region_name": "us-east-1"}
    keys = {"access_key": KEY, "secret_key": SECRET}
    profile = {
        "storage_provider": {"type": "s3", "options": place},
        "credentials_provider": {"type": "S3Credentials", "options": keys},
    }
    (tmp_path / "msc.json").write_text(json.dumps({"profiles": {"store": profile}}))
    monkeypatch.setenv("MSC_CONFIG", str(tmp_path / "msc.json"))
    assert fixture.spec.hf_max_shard_size is not None
    with mcorefs.open(
        "msc://store/msc/run", vocab_size=301, shard_size=fixture.spec.hf_max_shard_size
    ) as checkpoint:
        assert_same_files(checkpoint.files, fixture.hf)
    with mcorefs.open("msc://store/msc/run") as checkpoint:
        in_child(lambda: void(checkpoint.get_tensor("model.norm.weight")), timeout=20)
        for path in fixture.iteration.glob("*.distcp"):
            store.put(f"msc/run/{fixture.iteration.name}/{path.name}", path.read_bytes() + b"!")
        with pytest.raises(ReadFault, match="was replaced after the checkpoint was opened"):
            checkpoint.get_tensor("model.norm.weight")


def void(_: object) -> None:
    pass


@pytest.fixture
def website(fixture: Fixture) -> Iterator[str]:
    """A directory as the simplest of servers shows it: a list of links, and files but no ranges."""
    handler = partial(Quiet, directory=str(fixture.root))
    with QuietServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Whoever wanted a range goes away when all of the file comes."""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_http(fixture: Fixture, website: str) -> None:
    assert fixture.spec.hf_max_shard_size is not None
    with mcorefs.open(
        website, vocab_size=301, shard_size=fixture.spec.hf_max_shard_size
    ) as checkpoint:
        assert_same_files(checkpoint.files, fixture.hf)


def test_a_server_without_ranges_is_refused(fixture: Fixture, website: str) -> None:
    url = f"{website}/{fixture.iteration.name}/__0_0.distcp"
    found, why = regular_file(parse_path(url))
    assert found is not None, why
    with pytest.raises(ReadFault, match="the server does not serve ranges of files"):
        Objects({url: found}, block_bytes=1024).read_into(url, 0, memoryview(bytearray(10)))


def test_one_file_does_not_hide_those_beside_it(website: str) -> None:
    """A directory of which only one file was asked for."""
    file = parse_path(f"{website}/latest_checkpointed_iteration.txt")
    assert file.is_file()
    assert file.stat().st_size == len(file.read_bytes())
    assert (file.parent / "iter_0000100" / ".metadata").is_file()


@pytest.mark.parametrize(
    ("missing", "url", "extra"),
    [
        ("fsspec", "s3://bucket/x", "s3"),
        ("fsspec", "memory://x", "remote"),
        ("s3fs", "s3://bucket/x", "s3"),
        ("gcsfs", "gs://bucket/x", "gs"),
        ("aiohttp", "https://host/x", "remote"),
        ("multistorageclient", "msc://profile/x", "msc"),
    ],
)
def test_what_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, missing: str, url: str, extra: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    if missing != "fsspec":
        monkeypatch.setattr(sys.modules["fsspec.registry"], "_registry", {})
        monkeypatch.setattr(sys.modules["fsspec.registry"], "registry", {})
    monkeypatch.setattr("mcorefs.remote.filesystem._connected", {})
    with pytest.raises(CheckpointError, match=rf"pip install 'mcorefs\[{extra}\]'"):
        mcorefs.open(url)
