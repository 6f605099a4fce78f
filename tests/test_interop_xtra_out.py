"""`write_xtra`: official names and settings, exact round trips, and what the layout cannot express."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from nextblock.atomic import WriteError
from nextblock.checkpoint import CheckpointError
from nextblock.interop import xtra
from nextblock.interop.xtra import read_xtra, write_xtra
from nextblock.models import NextBlockModel
from nextblock.models.heads import HeadConfig, ImageClassifier
from toy import tiny_images, tiny_model

GOLDEN = ["xtra_k2", "causal_k1", "attentive_probe", "linear_probe"]
IMAGES = tiny_images(size=(16, 16))


def square_model(seed=0, **changes):
    """A tiny model of square images, as XTRA's are: four blocks, or sixteen of one patch."""
    return tiny_model(seed, image_size=16, **changes)


def square_classifier(head=None, **changes):
    """A classifier on such a model, with a head that the layout knows and statistics that tell."""
    settings = {"kind": "attentive", "num_classes": 3, "layers": (0, 1), "num_heads": 2, **(head or {})}
    classifier = ImageClassifier(square_model(**changes), HeadConfig(**settings)).eval()
    if classifier.head_config.batch_norm:
        classifier.head.get_buffer("norm.running_mean").normal_(generator=torch.Generator().manual_seed(1))
    return classifier


@pytest.fixture
def written(tmp_path):
    """`written(model)`: the content of the file that the model was written to."""

    def write_and_unpickle(model):
        write_xtra(model, tmp_path / "out.ckpt")
        return torch.load(tmp_path / "out.ckpt", weights_only=True)

    return write_and_unpickle


def read_model(content) -> NextBlockModel:
    """`read_xtra` of a file that holds an encoder or a whole model."""
    model = read_xtra(content, "out.ckpt")
    assert isinstance(model, NextBlockModel)
    return model


def read_classifier(content) -> ImageClassifier:
    """`read_xtra` of a file that holds a classifier."""
    classifier = read_xtra(content, "out.ckpt")
    assert isinstance(classifier, ImageClassifier)
    return classifier


def same_tensors(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------------ the reference


@pytest.mark.parametrize("name", GOLDEN)
def test_an_official_file_written_again_has_the_same_names_tensors_and_settings(name, golden_dir, written):
    official = torch.load(golden_dir / f"{name}.ckpt", weights_only=True)
    ours = written(read_xtra(official, name, num_heads=3))
    assert same_tensors(ours["state_dict"], official["state_dict"])
    known = official["hyper_parameters"]
    causal_size = {"enc_block_size", "predictor_block_size"} if name == "causal_k1" else set()
    shared = (ours["hyper_parameters"].keys() & known.keys()) - causal_size  # without blocks it says nothing
    assert len(shared) >= 9
    assert {key: ours["hyper_parameters"][key] for key in shared} == {key: known[key] for key in shared}
    assert official.keys() - {"callbacks"} <= ours.keys()


@pytest.mark.parametrize("name", GOLDEN)
def test_a_written_official_model_is_read_back_the_same_without_being_told_its_heads(
    name, golden_dir, written
):
    model = read_xtra(torch.load(golden_dir / f"{name}.ckpt", weights_only=True), name, num_heads=3)
    again = read_xtra(written(model), "out.ckpt")
    assert same_tensors(again.state_dict(), model.state_dict())
    assert type(again) is type(model)
    if isinstance(model, ImageClassifier):
        assert isinstance(again, ImageClassifier)
        assert again.head_config == model.head_config
        model, again = model.encoder_model, again.encoder_model
    assert again.config == model.config


# ---------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"block_size": 1},
        {"block_size": 4, "predictor": None},
        {"loss": "l1", "norm_pixels": False},
        {"order": "random", "order_seed": 7},
        {"num_predicted_blocks": 2},
        {"mlp_ratio": 48 / 11, "predictor_mlp_ratio": 3.3},
    ],
)
def test_a_model_is_read_back_with_its_weights_and_settings(changes, written):
    model = square_model(**changes)
    again = read_model(written(model))
    assert same_tensors(again.state_dict(), model.state_dict())
    unsaid = {"mlp_ratio", "predictor_mlp_ratio"}  # the shapes tell them, rounded
    if model.config.predictor is None:
        unsaid |= {"projection_dim", "predictor_dim", "predictor_depth", "predictor_heads", "block_mlp_dim"}
    assert again.config == replace(model.config, **{name: getattr(again.config, name) for name in unsaid})
    assert torch.equal(again.encode(IMAGES).tokens, model.encode(IMAGES).tokens)
    if model.predictor is not None:
        assert torch.equal(again(IMAGES).predictions, model(IMAGES).predictions)


@pytest.mark.parametrize(
    "head",
    [
        {"num_queries": 2},
        {"layers": (1,), "norm_layers": True},
        {"layer_pool": "concat", "num_heads": 4},
        {"kind": "linear", "attention": "causal"},
        {"kind": "linear", "batch_norm": False},
    ],
)
def test_a_classifier_is_read_back_with_the_same_answers(head, written):
    classifier = square_classifier(head)
    again = read_classifier(written(classifier))
    assert torch.equal(again(IMAGES), classifier(IMAGES))


def test_a_classifiers_predictor_and_class_names_are_left_out_and_that_is_said(written, caplog):
    classifier = square_classifier()
    classifier.class_names = ("a", "b", "c")
    caplog.set_level("INFO", "nextblock")
    assert classifier.encoder_model.predictor is not None
    assert all(name.startswith(("enc.", "classifier.")) for name in written(classifier)["state_dict"])
    assert read_classifier(written(classifier)).encoder_model.predictor is None
    assert "left out: the encoder's predictor" in caplog.text
    assert "left out: the names of the 3 classes" in caplog.text


def test_an_architecture_with_an_official_name_is_called_by_it(written):
    settings = {"embed_dim": 192, "depth": 12, "num_heads": 3, "predictor": None}
    assert written(square_model(**settings))["hyper_parameters"]["enc_arch"] == "vit_tiny"
    other_mlp = written(square_model(**settings, mlp_ratio=2.0))["hyper_parameters"]
    assert "enc_arch" not in other_mlp
    assert other_mlp["enc_num_heads"] == 3


def test_the_file_holds_only_what_it_names(written, tmp_path):
    content = written(square_model())
    held = sum(tensor.nbytes for tensor in content["state_dict"].values())
    assert (tmp_path / "out.ckpt").stat().st_size < held + 300 * len(content["state_dict"]) + 4000


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"positions": "sincos"}, "model.positions is 'sincos', there it is always 'learned'"),
        ({"bias": False}, "model.bias is False"),
        ({"patch_norm": True}, "model.patch_norm is True"),
        ({"norm_eps": 1e-5}, "model.norm_eps is 1e-05, there it is always 1e-06"),
        ({"prefix": True}, "model.prefix is True"),
        ({"order": "spiral"}, "model.order is 'spiral', there it is always 'raster'"),
        ({"order": "random", "predictor": None}, "model.order is 'random'"),
        ({"predictor": "mlp"}, "model.predictor is 'mlp', there it is always 'transformer'"),
        ({"predictor": "linear"}, "model.predictor is 'linear'"),
        ({"projection_dim": None}, "model.projection_dim is None"),
        ({"block_mlp_dim": None}, "model.block_mlp_dim is None"),
        ({"block_size": (1, 2)}, "model.block_size is (1, 2), there it is always (1, 1)"),
        ({"image_size": (16, 24)}, "model.image_size is (16, 24), there it is always (16, 16)"),
        ({"in_chans": 1}, "model.in_chans is 1"),
        ({"feature_attention": "full"}, "model.feature_attention is 'full'"),
        ({"tokenizer": "kmeans", "vocab_size": 5}, "model.tokenizer is 'kmeans'"),
    ],
)
def test_a_setting_that_xtra_does_not_have_is_refused_by_name(changes, words, tmp_path):
    model = tiny_model(**{"image_size": 16, **changes})
    with pytest.raises(CheckpointError, match="^XTRA files cannot hold this model: .*" + re.escape(words)):
        write_xtra(model, tmp_path / "out.ckpt")
    assert not any(tmp_path.iterdir())


def test_all_that_stands_in_the_way_is_named_at_once(tmp_path):
    with pytest.raises(CheckpointError, match=r"model\.bias is False.*; model\.order is 'checkerboard'"):
        write_xtra(square_model(bias=False, order="checkerboard"), tmp_path / "out.ckpt")


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ({"layers": (0,)}, "the head's layers is (0,), there it is always (1,)"),
        ({"bias": False}, "the head's bias is False"),
        ({"batch_norm": False}, "the head's batch_norm is False"),
        ({"attention": "full"}, "the head's attention is 'full'"),
    ],
)
def test_a_head_that_xtra_does_not_have_is_refused(head, words, tmp_path):
    with pytest.raises(CheckpointError, match=re.escape(words)):
        write_xtra(square_classifier(head), tmp_path / "out.ckpt")


def test_a_directory_is_not_replaced_by_a_file(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match="runs is a directory; name the file"):
        write_xtra(square_model(), tmp_path / "runs")
    assert (tmp_path / "runs" / "thesis.txt").exists()


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "out.ckpt"
    write_xtra(square_model(1), path)
    before = path.read_bytes()

    def save_half(content, target):
        target.write_bytes(before[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(xtra.torch, "save", save_half)
    with pytest.raises(WriteError, match="no space left on device"):
        write_xtra(square_model(2), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
