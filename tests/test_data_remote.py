"""Copies of remote files: fetched once, whole, again after failures, within a bound; from http and s3."""

from __future__ import annotations

import http.server
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nextblock.config import DataConfig
from nextblock.data import Source, TrainLoader, eval_batches, open_source
from nextblock.data.sources import remote
from nextblock.data.sources.remote import (
    RemoteError,
    RemoteState,
    expand,
    is_remote,
    local_copy,
    remote_state,
)
from tiny_runs import ALL_RANDOM, assert_same_end, checkpoints, run_toy

pytest.importorskip("aiohttp")


class Server(http.server.ThreadingHTTPServer):
    """Files of the folder `root` at `url`; `faults` say what goes wrong, `asked` counts requests but HEAD."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(root)))
        self.root, self.url = root, f"http://127.0.0.1:{self.server_port}"
        self.asked, self.guard = Counter[str](), threading.Lock()
        self.faults: dict[str, list[str]] = {}


class Handler(http.server.SimpleHTTPRequestHandler):
    """Answers, or fails as it is told."""

    def do_GET(self):
        server, name = self.server, self.path.rpartition("/")[2]
        assert isinstance(server, Server)
        with server.guard:
            server.asked[name] += 1
            fault = server.faults[name].pop(0) if server.faults.get(name) else None
        if fault == "503":
            self.send_error(503)
        elif fault == "cut":
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.connection.close()
        else:
            super().do_GET()

    def log_message(self, format, *words):  # noqa: A002 - the base class's name
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server that fails on demand; between attempts to reach it next to no time passes."""
    monkeypatch.setattr(remote, "RETRY_AFTER_S", (0.01, 0.01, 0.01))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    root = tmp_path / "served"
    root.mkdir()
    running = Server(root)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


@pytest.fixture
def data(tmp_path):
    return DataConfig(cache_dir=str(tmp_path / "cache"), workers=0)


def copies(data: DataConfig) -> list[bytes]:
    return sorted(path.read_bytes() for path in Path(str(data.cache_dir)).glob("remote/*/copy"))


# ------------------------------------------------------------------------------------------ addresses


def test_braces_stand_for_numbers_of_the_width_they_are_written_in():
    assert expand("s3://b/x-{008..011}.tar") == [f"s3://b/x-0{n}.tar" for n in ("08", "09", "10", "11")]
    assert expand("https://h/{0..1}/{1..2}.tar") == [f"https://h/{i}/{j}.tar" for i in (0, 1) for j in (1, 2)]
    assert expand("https://h/one.tar") == ["https://h/one.tar"]
    with pytest.raises(ValueError, match=r"\{5\.\.1\} runs backwards"):
        expand("https://h/{5..1}.tar")


def test_addresses_are_told_from_paths_and_other_sources():
    assert all(map(is_remote, ("https://h/x.tar", "http://h/x.tar", "s3://b/x.tar", "gs://b/x.tar")))
    assert not any(map(is_remote, ("x.tar", "hf:s3", "/s3/x.tar", "digits", "torchvision:CIFAR10")))


# --------------------------------------------------------------------------------------------- copies


def test_a_file_is_fetched_once_and_then_read_from_its_copy(server, data):
    (server.root / "x.tar").write_bytes(b"abc" * 1000)
    first = local_copy(f"{server.url}/x.tar", data)
    second = local_copy(f"{server.url}/x.tar", data)
    assert first == second
    assert first.read_bytes() == b"abc" * 1000
    assert server.asked["x.tar"] == 1


def test_a_file_that_changes_on_the_server_is_fetched_anew(server, data):
    (server.root / "x.tar").write_bytes(b"old")
    os.utime(server.root / "x.tar", (1e9, 1e9))
    local_copy(f"{server.url}/x.tar", data)
    (server.root / "x.tar").write_bytes(b"new")  # as many bytes, another date
    assert local_copy(f"{server.url}/x.tar", data).read_bytes() == b"new"


def test_a_file_that_is_not_what_it_was_when_the_run_began_stops_the_run(server, data):
    (server.root / "x.tar").write_bytes(b"new")
    with pytest.raises(RemoteError, match=r"has changed on the server \(5 bytes, no ETag before, 3 bytes"):
        local_copy(f"{server.url}/x.tar", data, RemoteState(5, None))
    assert copies(data) == []


@pytest.mark.parametrize("fault", ["503", "cut"])
def test_a_server_that_fails_twice_is_asked_again_until_the_file_is_whole(server, data, fault, caplog):
    (server.root / "x.tar").write_bytes(b"abc" * 1000)
    server.faults["x.tar"] = [fault, fault]
    assert local_copy(f"{server.url}/x.tar", data).read_bytes() == b"abc" * 1000
    assert server.asked["x.tar"] == 3
    assert caplog.text.count("next attempt in") == 2


@pytest.mark.parametrize("fault", ["503", "cut"])
def test_a_server_that_keeps_failing_stops_the_run_and_leaves_no_copy(server, data, fault):
    (server.root / "x.tar").write_bytes(b"abc" * 1000)
    server.faults["x.tar"] = [fault] * 4
    with pytest.raises(RemoteError, match=r"x\.tar cannot be fetched, after 4 attempts: .*; run the same"):
        local_copy(f"{server.url}/x.tar", data)
    assert copies(data) == []
    assert local_copy(f"{server.url}/x.tar", data).read_bytes() == b"abc" * 1000


def test_a_file_that_is_not_there_is_refused_at_once(server):
    with pytest.raises(RemoteError, match=r"none\.tar cannot be read: ClientResponseError: 404, .*check the"):
        remote_state(f"{server.url}/none.tar")
    assert server.asked["none.tar"] == 1


def test_a_server_that_is_not_there_is_told_as_such(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(RemoteError, match=r"cannot be fetched, after 4 attempts: .*Cannot connect"):
        remote_state(f"{server.url}/x.tar")


def _copy(url, data):
    local_copy(url, data)


def test_processes_that_need_a_file_at_once_fetch_it_once(server, data):
    (server.root / "x.tar").write_bytes(os.urandom(4_000_000))
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=_copy, args=(f"{server.url}/x.tar", data)) for _ in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * 4
    assert server.asked["x.tar"] == 1


def test_copies_stay_within_the_limit_and_those_used_longest_ago_go_first(server, data):
    small = DataConfig(cache_dir=data.cache_dir, cache_gb=2500e-9)
    for number in range(3):
        (server.root / f"{number}.tar").write_bytes(bytes([number]) * 1000)
    for number in (0, 1, 0, 2):  # 1 is the one not used since
        local_copy(f"{server.url}/{number}.tar", small)
        time.sleep(0.01)  # the clock of files is coarse
    assert copies(small) == [b"\0" * 1000, b"\2" * 1000]


def test_a_copy_that_is_removed_stays_readable_where_it_is_open(server, data):
    small = DataConfig(cache_dir=data.cache_dir, cache_gb=1500e-9)
    for number in range(2):
        (server.root / f"{number}.tar").write_bytes(bytes([number]) * 1000)
    with local_copy(f"{server.url}/0.tar", small).open("rb") as file:
        local_copy(f"{server.url}/1.tar", small)
        assert copies(small) == [b"\1" * 1000]
        assert file.read() == b"\0" * 1000


def test_a_file_larger_than_the_cache_is_refused_before_it_is_fetched(server, data):
    (server.root / "x.tar").write_bytes(bytes(1000))
    small = DataConfig(cache_dir=data.cache_dir, cache_gb=500e-9)
    with pytest.raises(RemoteError, match=r"more than data\.cache_gb 5e-07 allows"):
        local_copy(f"{server.url}/x.tar", small)
    assert server.asked["x.tar"] == 0


# ---------------------------------------------------------------------------------------------- shards


def write_shards(folder: Path, number: int, images: int = 4) -> None:
    """Shards s-0.tar, ... of small noisy PNGs with labels."""
    rng = np.random.default_rng(0)
    for shard in range(number):
        with tarfile.open(folder / f"s-{shard}.tar", "w") as tar:
            for key in range(images):
                picture = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(picture, "PNG")
                for ending, content in (("png", picture.getvalue()), ("cls", b"ab"[key % 2 : key % 2 + 1])):
                    member = tarfile.TarInfo(f"{key:03d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def pixels(source: Source) -> list[bytes]:
    return [source.read(index).numpy().tobytes() for index in range(len(source))]


def test_remote_shards_are_the_source_that_the_local_ones_are(server, data):
    write_shards(server.root, 3)
    there = open_source(f"{server.url}/s-{{0..2}}.tar", data)
    here = open_source(str(server.root / "s-{0..2}.tar"), data)
    assert pixels(there) == pixels(here)
    assert there.labels.tolist() == here.labels.tolist()
    assert there.class_names == here.class_names == ("a", "b")
    assert there.fingerprint == here.fingerprint
    assert there.name(5) == here.name(5) == "s-1.tar/001.png"
    assert [server.asked[f"s-{n}.tar"] for n in range(3)] == [1, 1, 1]


def test_a_second_start_knows_all_names_without_fetching(server, data):
    write_shards(server.root, 3)
    spec = f"{server.url}/s-{{0..2}}.tar"
    first = open_source(spec, data)
    for copy in Path(str(data.cache_dir)).glob("remote/*/copy"):
        copy.unlink()
    second = open_source(spec, data)
    assert second.fingerprint == first.fingerprint
    assert server.asked.total() == 3 + 3  # the shards, and once the indexes that are not there
    second.read(11)  # only its shard is fetched
    assert server.asked["s-2.tar"] == 2
    assert len(copies(data)) == 1


def test_an_index_beside_a_shard_on_the_server_saves_the_first_fetch(server, data, tmp_path):
    write_shards(server.root, 2)
    here = open_source(str(server.root / "s-{0..1}.tar"), data)  # it leaves an index beside each shard
    assert (server.root / "s-0.tar.nextblock-index").is_file()
    os.utime(server.root / "s-0.tar", (1e9, 1e9))  # as it is after an upload
    there = open_source(f"{server.url}/s-{{0..1}}.tar", data)
    assert there.fingerprint == here.fingerprint
    assert server.asked["s-0.tar"] == server.asked["s-1.tar"] == 0
    assert there.read(0).shape == (3, 20, 16)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_index_that_is_older_than_its_shard_stops_the_run_when_that_is_fetched(server, data, workers):
    write_shards(server.root, 1)
    tar = server.root / "s-0.tar"
    open_source(str(tar), data)  # it leaves an index beside the shard
    swap = bytes.maketrans(b"ab", b"ba")
    content = bytearray(tar.read_bytes())
    with tarfile.open(tar) as opened:
        for member in opened.getmembers():
            if member.name.endswith(".cls"):
                place = member.offset_data
                content[place : place + 1] = content[place : place + 1].translate(swap)
    tar.write_bytes(content)
    there = open_source(f"{server.url}/s-0.tar", data)
    with pytest.raises(RemoteError, match=r"s-0\.tar is not what the index beside it on the server says"):
        next(iter(TrainLoader(there, data, image_size=16, seed=0, batch_size=2, workers=workers)))
    again = open_source(f"{server.url}/s-0.tar", data)
    assert [again.class_names[label] for label in again.labels] == ["b", "a", "b", "a"]
    assert again.read(0).shape == (3, 20, 16)


@pytest.mark.parametrize("served", [b"", b"nonsense", b'{"stamp": [1, 2]}\n'])
def test_an_index_of_something_else_on_the_server_is_not_used(server, data, served):
    write_shards(server.root, 1)
    (server.root / "s-0.tar.nextblock-index").write_bytes(served)
    assert len(open_source(f"{server.url}/s-0.tar", data)) == 4
    assert server.asked["s-0.tar"] == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_of_one_shard_changes_no_pixel(server, data, workers, caplog):
    write_shards(server.root, 3)
    here = open_source(str(server.root / "s-{0..2}.tar"), data)
    size_gb = (server.root / "s-0.tar").stat().st_size / 1e9
    small = DataConfig(cache_dir=data.cache_dir, cache_gb=size_gb * 1.5, val_resize_px=16)
    there = open_source(f"{server.url}/s-{{0..2}}.tar", small)
    assert "shards will be fetched over and over" in caplog.text
    shuffled = np.random.default_rng(0).permutation(12)
    batches = [
        list(eval_batches(source, small, 16, 2, indices=shuffled, workers=workers))
        for source in (here, there)
    ]
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.images, other.images)
        assert one.bad == other.bad == ()
    assert len(copies(small)) == 1


def test_a_shard_that_cannot_be_fetched_stops_a_loader_and_is_no_broken_image(server, data):
    write_shards(server.root, 2)
    source = open_source(f"{server.url}/s-{{0..1}}.tar", data)
    for copy in Path(str(data.cache_dir)).glob("remote/*/copy"):
        copy.unlink()
    server.faults["s-1.tar"] = ["503"] * 100
    for workers in (0, 1):
        loader = TrainLoader(source, data, image_size=16, seed=0, batch_size=8, workers=workers)
        with pytest.raises(RemoteError, match=r"s-1\.tar cannot be fetched, after 4 attempts: [^\n]*$"):
            next(iter(loader))


def test_a_shard_that_is_no_tar_or_not_there_is_refused_by_its_address(server, data):
    (server.root / "page.tar").write_bytes(b"<html>" * 200)
    with pytest.raises(ValueError, match=r"^'http://[^ ]*/page\.tar' is no tar \(it begins with b'<html"):
        open_source(f"{server.url}/page.tar", data)
    with pytest.raises(RemoteError, match=r"http://.*/none\.tar cannot be read"):
        open_source(f"{server.url}/none.tar", data)
    with pytest.raises(ValueError, match=r"only tar shards are read from a server"):
        open_source(f"{server.url}/x.zip", data)


# ------------------------------------------------------------------------------------------------ a run


KILLED = """
import sys, signal
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tiny_runs import *
from nextblock.data import open_source
from nextblock.data.sources import remote
remote.RETRY_AFTER_S = (0.01,)
changes = {**ALL_RANDOM, "checkpoint.every": "3st", "monitor.log_every": "1st", "data.cache_dir": sys.argv[4]}
config = settings({**changes, "data.cache_gb": float(sys.argv[5])})
source = open_source(sys.argv[3], config.data)
run_toy(Path(sys.argv[2]), changes, sources={"train": source}, monitors=[SignalAt(5, signal.SIGKILL)])
"""


def test_a_run_from_shards_over_http_is_killed_and_goes_on_bit_for_bit(server, data, tmp_path):
    write_shards(server.root, 3, images=8)
    spec = f"{server.url}/s-{{0..2}}.tar"
    small_gb = (server.root / "s-0.tar").stat().st_size * 1.5 / 1e9  # one shard of three at a time
    arguments = [str(Path(__file__).parent), tmp_path / "run", spec, data.cache_dir, str(small_gb)]
    died = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert checkpoints(tmp_path / "run") == ["step_00000003"]
    Path(str(data.cache_dir), "remote").rename(tmp_path / "lost")  # the resumed run has to fetch again

    changes = {**ALL_RANDOM, "checkpoint.every": "3st", "monitor.log_every": "1st"}
    there = open_source(spec, data)
    resumed = {**changes, "data.cache_dir": data.cache_dir, "data.workers": 2}
    run_toy(tmp_path / "run", resumed, sources={"train": there})
    here = open_source(str(server.root / "s-{0..2}.tar"), data)
    run_toy(tmp_path / "whole", changes, sources={"train": here})
    assert_same_end(tmp_path / "run", tmp_path / "whole", 7)


# -------------------------------------------------------------------------------------------------- s3


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
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(remote, "RETRY_AFTER_S", (0.01,))
    client = boto3.client("s3")
    client.create_bucket(Bucket="pictures")
    yield lambda name, content: client.put_object(Bucket="pictures", Key=name, Body=content)
    client.close()
    running.stop()


def test_a_file_of_s3_is_fetched_once_and_anew_when_it_changes(bucket, data):
    bucket("x.tar", b"old" * 100)
    state = remote_state("s3://pictures/x.tar")
    assert state.size == 300
    assert state.tag
    copy = local_copy("s3://pictures/x.tar", data)
    inode = copy.stat().st_ino
    assert local_copy("s3://pictures/x.tar", data).stat().st_ino == inode
    bucket("x.tar", b"new" * 100)
    assert local_copy("s3://pictures/x.tar", data).read_bytes() == b"new" * 100
    with pytest.raises(RemoteError, match="has changed on the server"):
        bucket("x.tar", b"off" * 100)
        local_copy("s3://pictures/x.tar", data, state)


def test_a_file_that_s3_lacks_is_refused_at_once(bucket):
    with pytest.raises(RemoteError, match=r"s3://pictures/none\.tar cannot be read: FileNotFoundError"):
        remote_state("s3://pictures/none.tar")


def test_shards_of_s3_are_read_like_local_ones(bucket, data, tmp_path, caplog):
    caplog.set_level("INFO")
    write_shards(tmp_path, 2)
    for shard in range(2):
        bucket(f"deep/s-{shard}.tar", (tmp_path / f"s-{shard}.tar").read_bytes())
    there = open_source("s3://pictures/deep/s-{0..1}.tar", data)
    here = open_source(str(tmp_path / "s-{0..1}.tar"), data)
    assert pixels(there) == pixels(here)
    (batch,) = eval_batches(there, DataConfig(val_resize_px=16), 16, batch_size=8, workers=2)
    assert batch.bad == ()
    assert [record.name for record in caplog.records if "botocore" in record.name] == []
