"""Files: what is written comes back, whole or not at all; what fits is taken over, what does not is named."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nextblock.atomic import WriteError, write_aside, write_text
from nextblock.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_strictly,
    read_data,
    read_model,
    save_classifier,
    save_model,
)
from nextblock.config import DataConfig, OptimConfig
from nextblock.errors import UsageError
from nextblock.models import NextBlockModel
from nextblock.models.heads import HeadConfig, ImageClassifier
from nextblock.optim import build_optimizer
from nextblock.settings import to_dict
from nextblock.train.state import find_intact, load_state
from tiny_runs import save_checkpoint
from toy import tiny_images, tiny_model

STATE = {"step": 3, "scaler": {}}
EMBEDDING = {"target": "embedding", "positions": "rope", "class_token": True}


def same_weights(first, second):
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def files_in(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.fixture
def path(tmp_path):
    """A model file."""
    save_model(tmp_path / "model.safetensors", tiny_model(), data=DataConfig())
    return tmp_path / "model.safetensors"


def rewrite(path, change: Callable[[dict], dict] = dict, **metadata):
    """Write a model file again with its weights changed, or what it says of itself; None: not said."""
    with safe_open(path, framework="pt") as file:
        told = {**file.metadata(), **metadata}
    told = {name: value for name, value in told.items() if value is not None}
    save_file({name: w.clone() for name, w in change(load_file(path)).items()}, path, told)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"predictor": None, "feature_attention": "full"},
        {"num_predicted_blocks": 2, "order": "random", "order_seed": 3, "drop_path": 0.1, "loss": "l1"},
        {"image_size": (24, 16), "block_size": (3, 1), "positions": "sincos"},
        {"mask_ratio": 0.5, "order": "per_image", "feature_attention": "full", "target": "embedding"},
        {**EMBEDDING, "num_heads": 2, "qk_norm": "scale", "layer_scale": 0.1, "predictor": "identity"},
    ],
    ids=str,
)
def test_a_model_comes_back_with_its_settings_and_weights_drawn_by_nobody(changes, tmp_path):
    model, path = tiny_model(**changes), tmp_path / "model.safetensors"
    save_model(path, model)
    content, state = path.read_bytes(), torch.get_rng_state()
    found = read_model(path)
    assert isinstance(found, NextBlockModel)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.config == model.config
    assert same_weights(found, model)
    assert not found.training
    images = tiny_images(size=model.config.image_size)
    assert torch.equal(found.encode(images).tokens, model.encode(images).tokens)
    if model.predictor is not None:
        assert torch.equal(found(images).predictions, model(images).predictions)
    assert all(torch.equal(found.get_buffer(name), table) for name, table in model.named_buffers())
    trained, trained_before = ([p.requires_grad for p in one.parameters()] for one in (found, model))
    assert trained == trained_before
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(1)
    assert path.read_bytes() == content


@pytest.mark.parametrize(("kind", "class_names"), [("linear", None), ("attentive", ("cat", "dog", "cow"))])
def test_a_classifier_comes_back_with_its_head_and_class_names(kind, class_names, tmp_path):
    head = HeadConfig(kind=kind, num_classes=3, layers=(0, 1), layer_pool="concat", num_heads=4, bias=False)
    classifier = ImageClassifier(tiny_model(), head, class_names)
    classifier(tiny_images(4))  # moves the running statistics
    classifier.eval()
    save_classifier(tmp_path / "heads" / "best", classifier)
    assert files_in(tmp_path) == ["heads", "heads/best", "heads/best/model.safetensors"]
    found = read_model(tmp_path / "heads" / "best" / "model.safetensors")
    assert isinstance(found, ImageClassifier)
    assert (found.head_config, found.class_names) == (head, class_names)
    assert same_weights(found, classifier)
    assert found.head.norm.num_batches_tracked == 1
    assert torch.equal(found(tiny_images()), classifier(tiny_images()))


def test_a_model_file_says_what_it_is_and_how_its_images_are_cut_where_that_is_known(path, tmp_path):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["format_version"]) == ("nextblock", "1")
    assert (metadata["kind"], json.loads(metadata["config"])["block_size"]) == ("model", 2)
    data = DataConfig(train="DIR", mean=(0.5,), std=(0.25,), val_resize_px=32, val_crop="squash")
    recorded = replace(data, train=None)
    save_model(path, tiny_model(), data=data)
    checkpoint = save_checkpoint(tmp_path / "checkpoints", tiny_model(), STATE, 1, data=data)
    classifier = ImageClassifier(tiny_model(), HeadConfig(kind="linear", num_classes=3, layers=(0,)))
    save_classifier(tmp_path / "head", classifier, data=data)
    for directory in (tmp_path, checkpoint, tmp_path / "head"):
        assert read_data(directory / "model.safetensors") == recorded
        read_model(directory / "model.safetensors")
    before = json.dumps({"mean": [0.5], "std": [0.25], "val_resize_px": 32})  # there was another crop
    for told, expected in ((before, replace(recorded, val_crop="center")), (None, None)):
        rewrite(path, data=told)
        assert read_data(path) == expected


@pytest.mark.parametrize("place", ["os.fsync", "nextblock.checkpoint.save_file", "pathlib.Path.replace"])
def test_a_full_disk_leaves_the_checkpoint_of_the_same_step_as_it_was(place, tmp_path, monkeypatch):
    for seed in (1, 2):  # the second replaces the first
        path = save_checkpoint(tmp_path, tiny_model(seed), STATE, 1)
    files, move = files_in(tmp_path), Path.replace

    def fails(*arguments, **_):
        if place.endswith("replace") and arguments[0] == path:
            return move(*arguments)  # the old one moves away, and comes back when the new name fails
        monkeypatch.undo()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(place, fails)
    with pytest.raises(WriteError, match=r"step_00000001.*No space left.*before is intact; make room"):
        save_checkpoint(tmp_path, tiny_model(seed=3), STATE, 1)
    assert files_in(tmp_path) == files
    assert find_intact(tmp_path) == path
    assert same_weights(read_model(path / "model.safetensors"), tiny_model(2))


def test_an_interrupted_write_leaves_nothing_behind_and_no_file_replaces_a_directory(tmp_path):
    target = tmp_path / "mine" / "thesis.txt"
    target.parent.mkdir()
    target.write_text("years")
    with pytest.raises(KeyboardInterrupt), write_aside(target) as aside:
        aside.write_text("half of wh")
        raise KeyboardInterrupt
    with pytest.raises(UsageError, match="mine is a directory; name a file"):
        write_text(target.parent, "a picture")
    assert files_in(tmp_path) == ["mine", "mine/thesis.txt"]
    assert target.read_text() == "years"


def test_what_a_killed_process_left_half_written_is_not_seen_and_cleared_by_the_next(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    left = tmp_path / ".writing-step_00000002"
    left.mkdir()
    (left / "junk").write_bytes(b"half")
    assert latest_checkpoint(tmp_path) is None
    path = save_checkpoint(tmp_path, tiny_model(), STATE, 2)
    names = ("checksums.json", "model.safetensors", "optimizer.safetensors", "state.json")
    assert files_in(tmp_path) == [path.name, *(f"{path.name}/{name}" for name in names)]
    for name in ("step_00000009", "step_100000000", "step_99999999", "step_x", "other"):
        shutil.copytree(path, tmp_path / name)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_100000000"


def own_settings(**changes):
    return json.dumps({**to_dict(tiny_model().config), **changes})


DAMAGED = {
    "newer": ({"format_version": "2"}, "format version 2, this release reads up to 1; upgrade"),
    "of another maker": ({"format": "x"}, "was not written by nextblock"),
    "unknown kind": ({"kind": "x"}, "kind 'x'"),
    "no settings": ({"config": None}, "KeyError: 'config'"),
    "a list": ({"config": "[]"}, "is damaged"),
    "cut": ({"config": own_settings()[:40]}, "JSONDecodeError"),
    "deep": ({"config": "[" * 100_000}, "RecursionError"),
    "unknown setting": ({"config": own_settings(blok_size=2)}, "unknown setting 'blok_size'"),
    "data cut": ({"data": '{"mean": [0.5'}, "JSONDecodeError"),
    "wide": ({"config": own_settings(embed_dim=3 * 2**20)}, "do not fit the model"),
    "beyond numbers": ({"config": own_settings(mlp_ratio=1e300)}, "is damaged"),
    "deep network": ({"config": own_settings(depth=10**9)}, "1000000000 layers"),
    "large images": ({"config": own_settings(image_size=800_000)}, "40000000000 patches"),
    "predictor": ({"config": own_settings(predictor_depth=10**9)}, "1000000000 layers"),
}


@pytest.mark.parametrize(("changes", "words"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_model_file_is_refused_with_its_name_and_the_cause(changes, words, path):
    rewrite(path, **changes)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors[^|]*{re.escape(words)}"):
        read_model(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.999])
def test_a_model_file_that_is_not_complete_is_refused(share, path, tmp_path):
    content = path.read_bytes()[: int(share * path.stat().st_size)]
    checkpoint = save_checkpoint(tmp_path, tiny_model(), STATE, 3)
    earlier = f"remove {checkpoint} to resume from the"
    for file, remedy in {path: "take an intact copy", checkpoint / path.name: earlier}.items():
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"the file is not complete: {remedy}"):
            read_model(file)


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(value, path, tmp_path):
    def spoil(weights):
        weights["encoder.norm.bias"][3] = value
        return weights

    model = tiny_model()
    spoil(model.state_dict())
    message = r"NaN or inf in 1 tensor \(encoder.norm.bias\); it was not saved"
    with pytest.raises(CheckpointError, match=message):
        save_model(tmp_path / "new.safetensors", model)
    assert files_in(tmp_path) == ["model.safetensors"]
    rewrite(path, spoil)
    message = r"model\.safetensors contains NaN or inf in 1 tensor \(encoder.norm.bias\); take"
    with pytest.raises(CheckpointError, match=message):
        read_model(path)


def test_half_precision_and_large_finite_weights_are_read_as_fp32(path):
    def change(weights):
        weights["encoder.norm.bias"].fill_(3e38)  # the sum is infinite
        return {name: weight.bfloat16() for name, weight in weights.items()}

    rewrite(path, change)
    found = read_model(path)
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}
    assert torch.equal(found.state_dict()["encoder.norm.weight"], torch.ones(24))


BEFORE = "remove it to resume from the one"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        *(("optimizer.safetensors", content, BEFORE) for content in (None, 0, -1)),
        ("state.json", None, "earlier version of nextblock.*--model.init"),
        *(("state.json", content, BEFORE) for content in (0, -1)),
        *(("state.json", text, f"is no training state.*{BEFORE}") for text in ("{}", "[]", "3")),
    ],
)
def test_a_training_state_that_is_damaged_is_refused_with_what_to_do(name, content, words, tmp_path):
    model = tiny_model()
    path = save_checkpoint(tmp_path, model, STATE, 3)
    whole = (path / name).read_text()
    (path / name).unlink()
    if content is not None:
        (path / name).write_text(content if isinstance(content, str) else whole[:content])
    with pytest.raises(CheckpointError, match=f"step_00000003.*{words}"):
        load_state(path, model, build_optimizer(model, OptimConfig()))


def test_what_does_not_fit_is_listed_by_name():
    model = tiny_model()
    weights = dict(model.state_dict())
    del weights["encoder.norm.bias"]
    weights["encoder.cls_token"] = torch.zeros(1, 1, 24)
    weights["encoder.norm.weight"] = torch.zeros(25)
    weights["encoder.pos_embed"] = weights["encoder.pos_embed"].to(torch.complex64)
    weights["encoder.patch_embed.proj.bias"] = torch.zeros(24, dtype=torch.int8)
    with pytest.raises(CheckpointError) as caught:
        load_strictly(model, weights, "FILE")
    assert str(caught.value).splitlines() == [
        "the weights of FILE do not fit the model; take an intact copy of it:",
        "  missing: encoder.norm.bias",
        "  unexpected: encoder.cls_token",
        "  shape of encoder.norm.weight: (25,) in the file, (24,) in the model",
        "  dtype of encoder.pos_embed: torch.complex64 in the file, torch.float32 in the model",
        "  dtype of encoder.patch_embed.proj.bias: torch.int8 in the file, torch.float32 in the model",
    ]
    assert same_weights(model, tiny_model()), "nothing was loaded"
