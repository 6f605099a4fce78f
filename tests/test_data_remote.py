"""Shards on a server are the source that local ones are; copies are fetched once, whole, within a bound."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.utils.data import DataLoader

from nextblock.config import DataConfig
from nextblock.data.sources import Source, open_source, remote
from nextblock.data.sources.remote import RemoteError
from sources import archive

pytest.importorskip("aiohttp")


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Files of `root` at `url`; `faults` of a name happen one after the other; `asked` counts but for HEAD.

    It states no length of unknown.tar. Between attempts to reach it next to no time passes.
    """
    monkeypatch.setattr(remote, "RETRY_AFTER_S", (0.01, 0.01, 0.01))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    root, asked, faults, guard = tmp_path / "served", Counter(), defaultdict(list), threading.Lock()
    root.mkdir()
    write_shards(root, 2)
    (root / "unknown.tar").touch()
    (root / "page.tar").write_bytes(b"<html>" * 200)

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            name = self.path[1:]
            with guard:
                asked[name] += 1
                self.fault = faults[name].pop(0) if faults[name] else ""
            return self.send_error(int(self.fault)) if self.fault.isdigit() else super().do_GET()

        def send_header(self, keyword, value):
            if (self.path, keyword) != ("/unknown.tar", "Content-Length"):
                super().send_header(keyword, value)

        def copyfile(self, source, outputfile):
            outputfile.write(source.read(1000 if self.fault == "cut" else -1))

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(root))) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}"
        yield SimpleNamespace(root=root, asked=asked, faults=faults, url=url, spec=url + "/s-{0..1}.tar")
        running.shutdown()


@pytest.fixture
def data(tmp_path):
    return DataConfig(cache_dir=str(tmp_path / "cache"))


def write_shards(folder: Path, number: int) -> None:
    """Shards s-0.tar, ... of images of four pixels, and labels."""
    for shard in range(number):
        images = {f"00{key}.ppm": b"P6 2 2 255 " + bytes([shard, key, 0] * 4) for key in range(4)}
        archive(folder / f"s-{shard}.tar", images | {f"00{key}.cls": "abab"[key] for key in range(4)})


def pixels(source: Source) -> list[tuple[int, ...]]:
    return [tuple(source.read(index)[:2, 0, 0].tolist()) for index in range(len(source))]


def copies(data: DataConfig) -> dict[str, Path]:
    return {path.name[:3]: path for path in sorted(Path(str(data.cache_dir)).glob("remote/*.tar"))}


def lose_copies(data: DataConfig) -> None:
    for path in copies(data).values():
        path.unlink()


def test_remote_shards_are_the_source_that_the_local_ones_are_and_a_second_start_fetches_none(server, data):
    there, here = open_source(server.spec, data), open_source(str(server.root / "s-{0..1}.tar"), data)
    assert pixels(there) == pixels(here) == [(shard, key) for shard in range(2) for key in range(4)]
    assert there.labels.tolist() == here.labels.tolist() == [0, 1] * 4
    assert there.fingerprint == here.fingerprint
    assert there.name(5) == here.name(5) == "s-1.tar/001.ppm"
    assert (server.asked["s-0.tar"], server.asked["s-1.tar"]) == (1, 1)
    lose_copies(data)
    again = open_source(server.spec, data)
    assert again.fingerprint == here.fingerprint
    again.read(7)  # fetches only its shard
    assert (server.asked["s-0.tar"], server.asked["s-1.tar"]) == (1, 2)


def test_an_index_beside_a_shard_on_the_server_saves_the_first_fetch_if_it_is_of_its_size(server, data):
    here = open_source(str(server.root / "s-{0..1}.tar"), data)  # it leaves an index beside each shard
    os.utime(server.root / "s-0.tar", (1e9, 1e9))  # as it is after an upload
    there = open_source(server.spec, data)
    assert there.fingerprint == here.fingerprint
    assert server.asked["s-0.tar"] == server.asked["s-1.tar"] == 0
    assert pixels(there) == pixels(here)
    with (server.root / "s-1.tar").open("ab") as file:
        file.write(bytes(512))
    assert len(open_source(f"{server.url}/s-1.tar", data)) == 4
    assert server.asked["s-1.tar"] == 2


def test_processes_that_need_a_shard_at_once_fetch_it_once(server, data):
    source = open_source(server.spec, data)
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
    assert [*copies(small)] == ["s-0", "s-2"]
    assert pixels(source) == [(shard, key) for shard in range(3) for key in range(4)]


@pytest.mark.parametrize("fault", ["503", "cut"])
def test_a_server_that_fails_twice_is_asked_again_until_the_shard_is_whole(server, data, fault, caplog):
    server.faults["s-0.tar"] = [fault, fault]
    assert len(pixels(open_source(f"{server.url}/s-0.tar", data))) == 4
    assert server.asked["s-0.tar"] == 3
    assert caplog.text.count("next attempt in") == 2


@pytest.mark.parametrize(
    ("spec", "fault", "settings", "asked", "message"),
    [
        ("{url}/s-0.tar", "", {"cache_gb": 500e-9}, 0, r"is larger than data\.cache_gb 5e-07; raise it"),
        ("{url}/unknown.tar", "", {}, 1, r"unknown\.tar: the server states no length"),
        ("{url}/s-0.tar", "403", {}, 1, r"s-0\.tar cannot be read: .*; check the address and access"),
        ("{url}/s-0.tar", "404", {}, 1, r"s-0\.tar cannot be read: .*; check the address and access"),
        ("http://127.0.0.1:1/s-0.tar", "", {}, 0, "cannot be fetched: .*Cannot connect.*; try again later"),
        ("{url}/s-0.tar", "", {"cache_dir": "/dev/null"}, 0, "no copy can be kept .*; set data.cache_dir"),
        ("{url}/page.tar", "", {}, 1, r"^'http://[^ ]*/page\.tar' is not a plain tar"),
        ("{url}/x.zip", "", {}, 0, "only tar shards are read from a server"),
    ],
)
def test_what_cannot_be_had_is_refused_with_a_remedy(server, data, spec, fault, settings, asked, message):
    server.faults["s-0.tar"] = [fault] * 9
    with pytest.raises((RemoteError, ValueError), match=message):
        open_source(spec.format(url=server.url), replace(data, **settings))
    assert server.asked[spec.rpartition("/")[2]] == asked
    assert "s-0" not in copies(data)


def test_a_shard_that_changes_or_cannot_be_had_stops_a_worker_with_one_line(server, data):
    source = open_source(server.spec, data)
    lose_copies(data)
    server.faults["s-0.tar"] = ["503"] * 9
    os.utime(server.root / "s-1.tar", (1e9, 1e9))
    for index, message in ((0, "cannot be fetched"), (4, "has changed on the server")):
        one: Any = [index]
        with pytest.raises(RemoteError, match=rf"^http.*/s-.\.tar {message}.*$") as caught:
            list(DataLoader(one, num_workers=1, collate_fn=lambda found: source.read(*found)))
        assert "\n" not in str(caught.value)
    assert not copies(data)
    again = open_source(f"{server.url}/s-1.tar", data)  # the changed one is another shard
    assert pixels(again) == [(1, key) for key in range(4)]


def test_a_missing_package_is_named_with_what_to_type(monkeypatch, data):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(ValueError, match=r"needs a package .*: pip install fsspec aiohttp s3fs"):
        open_source("https://localhost/x.tar", data)


def test_shards_of_s3_are_read_like_local_ones_by_workers_too(data, tmp_path, monkeypatch, request, caplog):
    moto_server, boto3 = pytest.importorskip("moto.server"), pytest.importorskip("boto3")
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()  # it remembers the server of an address
    running = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    request.addfinalizer(running.stop)
    host, port = running.get_host_and_port()
    settings = {"ENDPOINT_URL": f"http://{host}:{port}", "DEFAULT_REGION": "us-east-1"}
    for name, value in (settings | dict.fromkeys(("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"), "test")).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(remote, "RETRY_AFTER_S", (0.01,))
    client = boto3.client("s3")
    request.addfinalizer(client.close)
    client.create_bucket(Bucket="pictures")
    write_shards(tmp_path, 2)
    for name in ("s-0.tar", "s-1.tar"):
        client.upload_file(str(tmp_path / name), "pictures", f"deep/{name}")
    caplog.set_level("INFO")
    there = open_source("s3://pictures/deep/s-{0..1}.tar", data)
    here = open_source(str(tmp_path / "s-{0..1}.tar"), data)
    lose_copies(data)
    with get_context("fork").Pool(2) as pool:
        assert pool.map(pixels, [there] * 2) == [pixels(here)] * 2
    assert [record.name for record in caplog.records if "botocore" in record.name] == []
    with pytest.raises(RemoteError, match=r"s3://pictures/none\.tar cannot be read: FileNotFoundError"):
        open_source("s3://pictures/none.tar", data)
