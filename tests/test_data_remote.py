"""Shards on a server are the source that local ones are; copies are fetched once, whole, within a bound."""

from __future__ import annotations

import http.server
import os
import threading
import time
from collections import Counter
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from nextblock.config import DataConfig
from nextblock.data.sources import Source, open_source, remote
from nextblock.data.sources.remote import RemoteError
from test_data_tar import write

pytest.importorskip("aiohttp")


class Server(http.server.ThreadingHTTPServer):
    """Files of the folder `root` at `url`; `faults` say what goes wrong, `asked` counts requests but HEAD."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(root)))
        self.root, self.url = root, f"http://127.0.0.1:{self.server_port}"
        self.asked, self.guard = Counter[str](), threading.Lock()
        self.faults: dict[str, list[str]] = {}
        self.states_length = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is wanted here."""


class Handler(http.server.SimpleHTTPRequestHandler):
    """Answers, or fails as it is told."""

    def do_HEAD(self):
        assert isinstance(self.server, Server)
        if self.server.states_length:
            super().do_HEAD()
        else:
            self.send_response(200)
            self.end_headers()

    def do_GET(self):
        server, name = self.server, self.path.rpartition("/")[2]
        assert isinstance(server, Server)
        with server.guard:
            server.asked[name] += 1
            fault = server.faults[name].pop(0) if server.faults.get(name) else None
        path = server.root / name
        if fault and fault.isdigit():
            self.send_error(int(fault))
        elif path.exists() and (fault == "cut" or not server.states_length):
            self.send_response(200)
            if fault == "cut":
                self.send_header("Content-Length", str(path.stat().st_size))
            self.end_headers()
            self.wfile.write(path.read_bytes()[:1000])
            self.close_connection = True
        else:
            super().do_GET()

    def log_message(self, format, *words):  # noqa: A002 - the base class's name
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of two shards that fails on demand; between attempts to reach it next to no time passes."""
    monkeypatch.setattr(remote, "RETRY_AFTER_S", (0.01, 0.01, 0.01))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    root = tmp_path / "served"
    root.mkdir()
    write_shards(root, 2)
    running = Server(root)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.fixture
def data(tmp_path):
    return DataConfig(cache_dir=str(tmp_path / "cache"))


def write_shards(folder: Path, number: int) -> None:
    """Shards s-0.tar, ... of images of four pixels, and labels."""
    for shard in range(number):
        members = {}
        for key in range(4):
            members[f"{key:03d}.ppm"] = b"P6 2 2 255 " + bytes([shard, key, 0] * 4)
            members[f"{key:03d}.cls"] = b"ab"[key % 2 :][:1]
        write(folder / f"s-{shard}.tar", members)


def pixels(source: Source) -> list[tuple[int, ...]]:
    return [tuple(source.read(index)[:2, 0, 0].tolist()) for index in range(len(source))]


def copies(data: DataConfig) -> list[str]:
    return sorted(path.name[:3] for path in Path(str(data.cache_dir)).glob("remote/*.tar"))


def lose_copies(data: DataConfig) -> None:
    for path in Path(str(data.cache_dir)).glob("remote/*.tar"):
        path.unlink()


def test_remote_shards_are_the_source_that_the_local_ones_are_and_a_second_start_fetches_none(server, data):
    spec = f"{server.url}/s-{{0..1}}.tar"
    there, here = open_source(spec, data), open_source(str(server.root / "s-{0..1}.tar"), data)
    assert pixels(there) == pixels(here) == [(shard, key) for shard in range(2) for key in range(4)]
    assert there.labels.tolist() == here.labels.tolist() == [0, 1] * 4
    assert there.fingerprint == here.fingerprint
    assert there.name(5) == here.name(5) == "s-1.tar/001.ppm"
    assert (server.asked["s-0.tar"], server.asked["s-1.tar"]) == (1, 1)
    lose_copies(data)
    again = open_source(spec, data)
    assert again.fingerprint == here.fingerprint
    again.read(7)  # fetches only its shard
    assert (server.asked["s-0.tar"], server.asked["s-1.tar"]) == (1, 2)


def test_an_index_beside_a_shard_on_the_server_saves_the_first_fetch(server, data):
    here = open_source(str(server.root / "s-{0..1}.tar"), data)  # it leaves an index beside each shard
    os.utime(server.root / "s-0.tar", (1e9, 1e9))  # as it is after an upload
    there = open_source(f"{server.url}/s-{{0..1}}.tar", data)
    assert there.fingerprint == here.fingerprint
    assert server.asked["s-0.tar"] == server.asked["s-1.tar"] == 0
    assert pixels(there) == pixels(here)


def test_an_index_of_a_shard_of_another_size_is_not_used(server, data):
    shard = server.root / "s-0.tar"
    open_source(str(shard), data)
    shard.write_bytes(shard.read_bytes() + bytes(512))
    assert len(open_source(f"{server.url}/s-0.tar", data)) == 4
    assert copies(data) == ["s-0"]


def test_processes_that_need_a_shard_at_once_fetch_it_once(server, data):
    source = open_source(f"{server.url}/s-{{0..1}}.tar", data)
    lose_copies(data)
    with get_context("fork").Pool(4) as pool:
        assert pool.map(pixels, [source] * 4) == [pixels(source)] * 4
    assert (server.asked["s-0.tar"], server.asked["s-1.tar"]) == (2, 2)


def test_copies_stay_within_the_bound_and_those_used_longest_ago_go_first(server, data, caplog):
    write_shards(server.root, 3)
    size_gb = (server.root / "s-0.tar").stat().st_size / 1e9
    small = DataConfig(cache_dir=data.cache_dir, cache_gb=size_gb * 2.5)
    source = open_source(f"{server.url}/s-{{0..2}}.tar", small)
    assert "shards will be fetched over and over; set data.cache_gb to" in caplog.text
    for index, kept in ((0, "s-0"), (4, "s-1"), (0, "s-0"), (8, "s-2"), (1, "s-0")):
        source.read(index)
        assert kept in copies(small)
        time.sleep(0.02)  # the clock of files is coarse
    assert copies(small) == ["s-0", "s-2"]
    assert pixels(source) == [(shard, key) for shard in range(3) for key in range(4)]


def test_no_shard_larger_than_the_cache_or_of_unknown_length_is_fetched(server, data):
    with pytest.raises(RemoteError, match=r"is larger than data\.cache_gb 5e-07; raise it"):
        open_source(f"{server.url}/s-0.tar", DataConfig(cache_dir=data.cache_dir, cache_gb=500e-9))
    assert server.asked["s-0.tar"] == 0
    server.states_length = False
    with pytest.raises(RemoteError, match=r"s-0\.tar: the server states no length"):
        open_source(f"{server.url}/s-0.tar", data)
    assert copies(data) == []


@pytest.mark.parametrize("fault", ["503", "cut"])
def test_a_server_that_fails_twice_is_asked_again_until_the_shard_is_whole(server, data, fault, caplog):
    server.faults["s-0.tar"] = [fault, fault]
    assert len(pixels(open_source(f"{server.url}/s-0.tar", data))) == 4
    assert server.asked["s-0.tar"] == 3
    assert caplog.text.count("next attempt in") == 2


@pytest.mark.parametrize("status", ["403", "404"])
def test_what_may_not_be_read_or_a_server_that_is_not_there_is_told_as_such(server, data, status):
    server.faults["s-0.tar"] = [status] * 9
    with pytest.raises(RemoteError, match=r"s-0\.tar cannot be read: .*; check the address and access"):
        open_source(f"{server.url}/s-0.tar", data)
    assert server.asked["s-0.tar"] == 1
    with pytest.raises(RemoteError, match=r"cannot be fetched: .*Cannot connect.*; try again later"):
        open_source("http://127.0.0.1:1/s-0.tar", data)


class Images(Dataset):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, index: int) -> object:
        return self.source.read(index)


def test_a_shard_that_changes_or_cannot_be_had_stops_a_worker_with_one_line(server, data):
    source = open_source(f"{server.url}/s-{{0..1}}.tar", data)
    lose_copies(data)
    server.faults["s-0.tar"] = ["503"] * 9
    os.utime(server.root / "s-1.tar", (1e9, 1e9))
    for index, message in ((0, "cannot be fetched"), (4, "has changed on the server")):
        with pytest.raises(RemoteError, match=rf"^http.*/s-.\.tar {message}.*$") as caught:
            list(DataLoader(Images(source), sampler=[index], num_workers=1))
        assert "\n" not in str(caught.value)
    assert copies(data) == []
    again = open_source(f"{server.url}/s-1.tar", data)  # the changed one is another shard
    assert pixels(again) == [(1, key) for key in range(4)]


def test_a_cache_that_cannot_be_written_and_what_is_no_tar_are_refused_with_a_remedy(server, data, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RemoteError, match=r"no copy can be kept in .*; set data\.cache_dir"):
        open_source(f"{server.url}/s-0.tar", DataConfig(cache_dir=str(tmp_path / "file")))
    (server.root / "page.tar").write_bytes(b"<html>" * 200)
    with pytest.raises(ValueError, match=r"^'http://[^ ]*/page\.tar' is not a plain tar"):
        open_source(f"{server.url}/page.tar", data)
    with pytest.raises(ValueError, match="only tar shards are read from a server"):
        open_source(f"{server.url}/x.zip", data)


def test_a_missing_package_is_named_with_what_to_type(monkeypatch, data):
    monkeypatch.setitem(__import__("sys").modules, "aiohttp", None)
    with pytest.raises(ValueError, match=r"needs a package .*: pip install fsspec aiohttp s3fs"):
        open_source("https://localhost/x.tar", data)


@pytest.fixture
def bucket(monkeypatch):
    """An s3-compatible server with one bucket, and how to put a file into it."""
    moto_server = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()  # it remembers the server of an address
    running = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(remote, "RETRY_AFTER_S", (0.01,))
    client = boto3.client("s3")
    client.create_bucket(Bucket="pictures")
    yield lambda name, content: client.put_object(Bucket="pictures", Key=name, Body=content)
    client.close()
    running.stop()


def test_shards_of_s3_are_read_like_local_ones_by_workers_too(bucket, data, tmp_path, caplog):
    caplog.set_level("INFO")
    write_shards(tmp_path, 2)
    for shard in range(2):
        bucket(f"deep/s-{shard}.tar", (tmp_path / f"s-{shard}.tar").read_bytes())
    there = open_source("s3://pictures/deep/s-{0..1}.tar", data)
    here = open_source(str(tmp_path / "s-{0..1}.tar"), data)
    lose_copies(data)
    with get_context("fork").Pool(2) as pool:
        assert pool.map(pixels, [there] * 2) == [pixels(here)] * 2
    assert [record.name for record in caplog.records if "botocore" in record.name] == []
    with pytest.raises(RemoteError, match=r"s3://pictures/none\.tar cannot be read: FileNotFoundError"):
        open_source("s3://pictures/none.tar", data)
