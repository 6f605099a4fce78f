"""The hub: real requests of huggingface_hub against a small server that keeps and returns what is pushed."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
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

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Requests)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.log: list[str] = []
        self.tokens: set[str | None] = set()
        self.status: tuple[int, str] | None = None  # the answer to everything
        self.address = f"http://127.0.0.1:{self.server_port}"


class Requests(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, format, *args):  # noqa: A002 - the name that it has in the base class
        pass

    def do_GET(self):
        self.server.log.append(f"{self.command} {self.path}")
        self.server.tokens.add(self.headers.get("authorization"))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        content, code, headers = self.reply(self.path.split("?")[0].strip("/").split("/"), body)
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_GET  # noqa: N815 - so they are called

    def reply(self, parts, body) -> tuple[Any, int, dict[str, str]]:
        repos, address, answer = self.server.repos, self.server.address, {}
        repo = "/".join(parts[2:4])
        if self.server.status is not None:
            return _failure(*self.server.status)
        match parts:
            case ["api", "repos", "create"]:
                told = json.loads(body)
                repo = f"{told['organization']}/{told['name']}"
                repos.setdefault(repo, {})
                answer = {"url": f"{address}/{repo}"}
            case ["api", "models", _, _, "preupload", *_]:
                rule = {"uploadMode": "regular", "shouldIgnore": False}
                answer = {"files": [{"path": file["path"], **rule} for file in json.loads(body)["files"]]}
            case ["api", "models", _, _, "commit", *_]:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                answer = {"commitUrl": f"{address}/{repo}/commit/{REVISION}", "commitOid": REVISION}
            case ["api", "models", *_] if repo not in repos:
                return _failure(404, "RepoNotFound")
            case ["api", "models", _, _, "tree", *_]:
                entry = {"type": "file", "size": 0, "oid": ""}
                answer = [{**entry, "path": path} for path in repos[repo]]
            case ["api", "models", _, _, "revision", revision] if revision not in ("main", REVISION):
                return _failure(404, "RevisionNotFound")
            case ["api", "models", *_]:
                siblings = [{"rfilename": path} for path in repos[repo]]
                answer = {"id": repo, "sha": REVISION, "siblings": siblings}
            case [user, name, "resolve", _, *path]:
                content = repos[f"{user}/{name}"]["/".join(path)]
                etag = hashlib.sha1(content, usedforsecurity=False).hexdigest()
                return content, 200, {"ETag": f'"{etag}"', "X-Repo-Commit": REVISION}
            case _:
                answer = {"errors": [], "warnings": []}
        return answer, 200, {}


def _failure(code, error):
    return {"error": error}, code, {"X-Error-Code": error}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty hub, an empty cache, and a token."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    constants = {"ENDPOINT": server.address, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False}
    constants["HUGGINGFACE_CO_URL_TEMPLATE"] = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in constants.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, tiny_model())
    return path


def test_a_source_is_asked_for_and_fetched_once_and_read_from_the_cache_without_network(
    hub, tmp_path, model_file, monkeypatch
):
    hub.repos["me/vit"] = {"model.safetensors": model_file.read_bytes()}
    snapshot = fetch("hf:me/vit")
    hub.log.clear()
    fetch("hf:me/vit")
    once = list(hub.log)
    assert not [line for line in once if "resolve" in line]
    hub.log.clear()
    convert("hf:me/vit", tmp_path / "out")
    assert hub.log == once
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch("hf:me/vit") == fetch(f"hf:me/vit@{REVISION}") == snapshot
    assert torch.equal(load("hf:me/vit")(tiny_images()).loss, tiny_model()(tiny_images()).loss)
    assert hub.log == once
    with pytest.raises(HubError, match=r"hf:me/other could not be reached.*unset HF_HUB_OFFLINE"):
        fetch("hf:me/other")
    with pytest.raises(HubError, match=r"hf:me/vit could not be reached.*give a path"):
        push(tmp_path, "hf:me/vit")


WANTED = ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("names", "fetched"),
    [
        ([*WANTED, "pytorch_model.bin", "optimizer.pt", "optimizer.zip", "logs/train.txt", "run.py"], WANTED),
        (["best.pt"], ["best.pt"]),
        (["a.bin", "a.safetensors"], ["a.safetensors"]),
        (["backbone.pth", "head.pth"], ["backbone.pth", "head.pth"]),
    ],
)
def test_what_is_the_model_of_a_repository_is_fetched_and_nothing_else(names, fetched, hub):
    hub.repos["me/vit"] = dict.fromkeys(names, b"content")
    assert sorted(path.name for path in fetch("hf:me/vit").iterdir()) == fetched


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
    with pytest.raises(HubError, match=r"no file 3b\.pth in it.*weight files are: 600m_backbone\.pth, 1b"):
        fetch("hf:me/aim/3b.pth")


def test_a_named_backbone_and_its_head_make_a_classifier(hub, golden_dir):
    files = [golden_dir / f"aim_nano_{part}.pth" for part in ("backbone", "head")]
    hub.repos["me/aim"] = {file.name: file.read_bytes() for file in files}
    backbone, head = (f"hf:me/aim/{file.name}" for file in files)
    assert isinstance(load(backbone, head=head, num_heads=3, probe_layers=(1, 2)), ImageClassifier)


@pytest.mark.parametrize(
    ("spec", "status", "words"),
    [
        ("hf:me/none", None, r"hf:me/none is not on the hub, or is private: .*hf auth login"),
        ("hf:me/vit@v9", None, "no such revision"),
        ("hf:me/vit", (403, "GatedRepo"), "is gated: accept its terms"),
        ("push", (403, "Forbidden"), r"hf:me/vit is refused by the hub \(status 403\): log in"),
        ("push", (500, "Oops"), r"hf:me/vit failed .*500.*try it again"),
        ("hf:me/vit", "no hub", "could not be reached, and is not in the cache"),
    ],
)
def test_every_failure_of_the_hub_is_told_by_its_cause(spec, status, words, hub, monkeypatch, tmp_path):
    hub.repos["me/vit"] = {"config.json": b"{}"}
    if status == "no hub":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    else:
        hub.status = status
    with pytest.raises(HubError, match=words):
        push(tmp_path, "hf:me/vit") if spec == "push" else fetch(spec)


@pytest.mark.parametrize("spec", ["hf:", "hf:vit", "hf:me/", "hf:me/vit//x", "hf:me/vit@", "hf:me/v..it"])
def test_what_names_no_repository_is_refused(spec, hub):
    with pytest.raises(ValueError, match="write hf:USER/NAME"):
        fetch(spec)


def test_only_whole_directories_are_pushed_to_the_main_branch(model_file):
    for spec in ("hf:me/vit/x.bin", "hf:me/vit@v1"):
        with pytest.raises(ValueError, match="whole directories are pushed, to the main branch: hf:me/vit"):
            push(model_file, spec)
    with pytest.raises(ValueError, match="only nextblock and timm go to the hub"):
        convert(model_file, "hf:me/vit", to="onnx")


def test_a_model_that_is_pushed_is_the_same_when_it_is_pulled(hub, tmp_path, model_file):
    convert(model_file, "hf:me/whole")
    assert 'nextblock.load("hf:me/whole")' in hub.repos["me/whole"]["README.md"].decode()
    images = tiny_images()
    assert torch.equal(load("hf:me/whole")(images).loss, tiny_model()(images).loss)
    done = convert(model_file, "hf:me/vit", to="timm", license="mit")
    assert done.place == f"{hub.address}/me/vit"
    assert "Bearer hf_of_the_test" in hub.tokens
    assert sorted(hub.repos["me/vit"]) == WANTED
    card = hub.repos["me/vit"]["README.md"].decode()
    assert 'timm.create_model("hf-hub:me/vit"' in card
    assert "license: mit" in card
    expected = tiny_model().encode(images).tokens
    assert torch.equal(load_model("hf:me/vit").encode(images).tokens, expected)
    vit: Any = timm.create_model("hf-hub:me/vit", pretrained=True, cache_dir=tmp_path / "timm").eval()
    assert torch.equal(vit.forward_features(images), expected)
