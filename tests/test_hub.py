"""The hub: real requests of huggingface_hub against a small server that speaks its protocol; a cache by hand.

The server keeps what is pushed to it and gives it back, so a push and a pull go the whole way but for the
machine at the other end.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import timm
import torch

from nextblock.checkpoint import CheckpointError, save_model
from nextblock.interop import load, load_model
from nextblock.interop.convert import convert
from nextblock.interop.hub import HubError, fetch, push
from nextblock.models.heads import ImageClassifier
from toy import tiny_images, tiny_model

REVISION = "a" * 40


class Hub(ThreadingHTTPServer):
    """Repositories as {name: {path: content}}; `log` has every request's method and path."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Requests)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.log: list[str] = []
        self.tokens: set[str | None] = set()
        self.status: dict[str, tuple[int, str]] = {}
        self.address = f"http://127.0.0.1:{self.server_port}"


class Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        assert isinstance(self.server, Hub)
        return self.server

    def log_message(self, format, *args):  # noqa: A002 - the name that it has in the base class
        pass

    def answer(self, content: Any = b"", code: int = 200, headers: Mapping[str, str] | None = None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def seen(self):
        """Log a request; give its path's parts, or None if it was answered by a failure."""
        self.hub.log.append(f"{self.command} {self.path}")
        self.hub.tokens.add(self.headers.get("authorization"))
        for repo, (code, error) in self.hub.status.items():
            if repo in self.path or self.path == "/api/repos/create":
                self.answer({"error": error}, code, {"X-Error-Code": error})
                return None
        return self.path.split("?")[0].strip("/").split("/")

    def do_GET(self):
        parts = self.seen()
        if parts is None:
            return
        if parts[:2] == ["api", "models"]:
            files = self.hub.repos.get("/".join(parts[2:4]))
            if files is None:
                self.answer({"error": "no"}, 404, {"X-Error-Code": "RepoNotFound"})
            elif parts[4:5] == ["tree"]:
                self.answer(
                    [{"type": "file", "path": p, "size": len(c), "oid": _oid(c)} for p, c in files.items()]
                )
            elif parts[5:] and parts[5] not in ("main", REVISION):
                self.answer({"error": "no"}, 404, {"X-Error-Code": "RevisionNotFound"})
            else:
                self.answer(
                    {
                        "id": "/".join(parts[2:4]),
                        "sha": REVISION,
                        "siblings": [{"rfilename": path} for path in files],
                    }
                )
        elif "resolve" in parts:
            content = self.hub.repos["/".join(parts[:2])]["/".join(parts[4:])]
            self.answer(content, headers={"ETag": f'"{_oid(content)}"', "X-Repo-Commit": REVISION})
        else:
            self.answer({}, 404)

    do_HEAD = do_GET  # noqa: N815 - so it is called

    def do_POST(self):
        body = self.body()
        parts = self.seen()
        if parts is None:
            return
        if parts == ["api", "repos", "create"]:
            told = json.loads(body)
            self.hub.repos.setdefault(f"{told['organization']}/{told['name']}", {})
            self.answer({"url": f"{self.hub.address}/{told['organization']}/{told['name']}"})
        elif "preupload" in parts:
            files = [file["path"] for file in json.loads(body)["files"]]
            self.answer(
                {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]}
            )
        elif "commit" in parts:
            repo = "/".join(parts[2:4])
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.hub.repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.hub.address}/{repo}/commit/{REVISION}", "commitOid": REVISION})
        else:
            self.answer({"errors": [], "warnings": []})

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)


def _oid(content):
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty hub, an empty cache, and a token."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        server.address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """A cache made by hand, and no network: the folder of the snapshot of me/vit."""
    repo = tmp_path / "cache" / "models--me--vit"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(REVISION)
    snapshot = repo / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def model_file(tmp_path):
    save_model(tmp_path / "model.safetensors", tiny_model())
    return tmp_path / "model.safetensors"


# ------------------------------------------------------------------------------------------------------- pull


def test_without_network_the_cache_is_read_and_nothing_else(offline, tmp_path):
    save_model(offline / "model.safetensors", tiny_model())
    assert fetch("hf:me/vit") == offline
    assert fetch(f"hf:me/vit@{REVISION}") == offline
    found = load("hf:me/vit")
    assert torch.equal(found(tiny_images()).loss, tiny_model()(tiny_images()).loss)
    with pytest.raises(HubError, match=r"hf:me/other is not in the cache.*unset HF_HUB_OFFLINE"):
        fetch("hf:me/other")
    with pytest.raises(HubError, match="hf:me/vit cannot be pushed to without a network: connect"):
        push(tmp_path, "hf:me/vit")


def test_weights_configuration_and_card_are_fetched_and_nothing_else(hub):
    wanted = ("config.json", "model.safetensors", "README.md")
    others = ("pytorch_model.bin", "optimizer.pt", "optimizer.zip", "logs/train.txt", "run.py")
    hub.repos["me/vit"] = dict.fromkeys((*wanted, *others), b"content")
    folder = fetch("hf:me/vit")
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == sorted(wanted)


@pytest.mark.parametrize(
    ("names", "fetched"),
    [
        (["best.pt"], ["best.pt"]),
        (["a.bin", "a.safetensors"], ["a.safetensors"]),
        (["backbone.pth", "head.pth"], ["backbone.pth", "head.pth"]),
        ([f"checkpoints/step_0000000{i}/model.safetensors" for i in (1, 2)], ["model.safetensors"]),
    ],
)
def test_what_is_the_model_of_a_repository_is_fetched(names, fetched, hub):
    hub.repos["me/vit"] = dict.fromkeys(names, b"content")
    assert sorted(path.name for path in fetch("hf:me/vit").rglob("*") if path.is_file()) == fetched


def test_of_several_weight_files_none_is_fetched_until_one_is_named(hub):
    names = ("600m_backbone.pth", "1b_backbone.pth", "README.md", "config.json")
    hub.repos["me/aim"] = dict.fromkeys(names, b"content")
    several = r"\(1b_backbone.pth, 600m_backbone.pth\); name one of them: hf:me/aim/1b_back"
    with pytest.raises(CheckpointError, match=several):
        fetch("hf:me/aim")
    assert not [line for line in hub.log if "resolve" in line]
    file = fetch("hf:me/aim/600m_backbone.pth")
    assert {path.name for path in file.parent.iterdir()} == set(names) - {"1b_backbone.pth"}
    assert fetch(f"hf:me/aim/1b_backbone.pth@{REVISION}").read_bytes() == b"content"
    with pytest.raises(
        HubError, match=r"no file 3b\.pth in it.*its weight files are: 600m_backbone\.pth, 1b"
    ):
        fetch("hf:me/aim/3b.pth")


def test_a_named_backbone_and_its_head_make_a_classifier(hub, golden_dir):
    files = [golden_dir / f"aim_nano_{part}.pth" for part in ("backbone", "head")]
    hub.repos["me/aim"] = {file.name: file.read_bytes() for file in files}
    names = [f"hf:me/aim/{file.name}" for file in files]
    assert isinstance(load(names[0], head=names[1], num_heads=3, probe_layers=(1, 2)), ImageClassifier)


def test_every_failure_of_the_hub_is_told_by_its_cause(hub, monkeypatch, tmp_path):
    hub.repos["me/vit"] = {"config.json": b"{}"}
    for spec, words in (
        ("hf:me/none", r"hf:me/none is not on the hub, or is private: .*hf auth login"),
        ("hf:me/vit@v9", "no such revision"),
    ):
        with pytest.raises(HubError, match=words):
            fetch(spec)
    for status, do, words in (
        ((403, "GatedRepo"), fetch, "is gated: accept its terms"),
        ((403, "Forbidden"), lambda spec: push(tmp_path, spec), r"refuses hf:me/vit \(status 403\): log in"),
        ((500, "Oops"), lambda spec: push(tmp_path, spec), r"failed for hf:me/vit .*500.*try it again"),
    ):
        hub.status["me/vit"] = status
        with pytest.raises(HubError, match=words):
            do("hf:me/vit")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HubError, match="not in the cache, and the hub could not be asked"):
        fetch("hf:me/vit")


@pytest.mark.parametrize("spec", ["hf:", "hf:vit", "hf:me/", "hf:me/vit//x", "hf:me/vit@", "hf:me/v..it"])
def test_what_names_no_repository_is_refused(spec, hub):
    with pytest.raises(ValueError, match="write hf:USER/NAME"):
        fetch(spec)


@pytest.mark.parametrize(
    ("do", "words"),
    [
        (lambda src: push(src, "hf:me/vit/x.bin"), "names a file; whole directories are pushed: hf:me/vit"),
        (lambda src: push(src, "hf:me/vit@v1"), "pushed to the main branch"),
        (lambda src: convert(src, "hf:me/vit", to="onnx"), "only nextblock and timm go to the hub"),
    ],
)
def test_a_file_a_revision_and_a_graph_are_no_places_to_push_to(do, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        do(model_file(tmp_path))


# ------------------------------------------------------------------------------------------------------- push


def test_a_folder_is_pushed_as_it_is_with_the_users_token(hub, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "out" / "model.safetensors").write_bytes(bytes(range(256)))
    assert push(tmp_path / "out", "hf:me/vit") == f"{hub.address}/me/vit"
    assert hub.repos["me/vit"] == {
        "README.md": b"---\nlicense: mit\n---\n",
        "model.safetensors": bytes(range(256)),
    }
    assert "Bearer hf_of_the_test" in hub.tokens


def test_a_model_that_is_pushed_is_the_same_when_it_is_pulled(hub, tmp_path):
    convert(model_file(tmp_path), "hf:me/whole")
    assert 'nextblock.load("hf:me/whole")' in hub.repos["me/whole"]["README.md"].decode()
    images = tiny_images()
    assert torch.equal(load("hf:me/whole")(images).loss, tiny_model()(images).loss)
    done = convert(model_file(tmp_path), "hf:me/vit", to="timm", license="mit")
    assert done.place == f"{hub.address}/me/vit"
    assert sorted(hub.repos["me/vit"]) == ["README.md", "config.json", "model.safetensors"]
    card = hub.repos["me/vit"]["README.md"].decode()
    assert 'timm.create_model("hf-hub:me/vit"' in card
    assert "license: mit" in card
    expected = tiny_model().encode(images).tokens
    assert torch.equal(load_model("hf:me/vit").encode(images).tokens, expected)
    vit: Any = timm.create_model("hf-hub:me/vit", pretrained=True, cache_dir=tmp_path / "timm").eval()
    assert torch.equal(vit.forward_features(images), expected)


def test_a_source_on_the_hub_is_asked_for_once_and_fetched_once(hub, tmp_path):
    hub.repos["me/vit"] = {"model.safetensors": model_file(tmp_path).read_bytes()}
    fetch("hf:me/vit")
    hub.log.clear()
    fetch("hf:me/vit")
    once = list(hub.log)
    assert not [line for line in once if "resolve" in line]
    hub.log.clear()
    convert("hf:me/vit", tmp_path / "out")
    assert hub.log == once
