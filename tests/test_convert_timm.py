"""Classifiers on timm's own encoders leave as any other: what opens them again, and what cannot hold them."""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import yaml

from nextblock.checkpoint import CheckpointError, read_data, save_classifier
from nextblock.config import ModelConfig
from nextblock.evaluate.features import evaluation_data
from nextblock.interop import initialize, load, load_model, open_encoder
from nextblock.interop.convert import convert
from nextblock.models import NextBlockModel, TimmEncoder
from nextblock.models.heads import HeadConfig, ImageClassifier
from toy import DATA, one_thread  # noqa: F401 - a fixture

TOKEN = "timm:test_vit,pretrained=false,img_size=32"  # a class token
REGISTERS = "timm:test_vit2,pretrained=false"  # registers alone, of its usual size
EVA = "timm:eva02_tiny_patch14_224,pretrained=false,img_size=28,in_chans=1"
HEAD = HeadConfig(num_classes=3, layers=(0, 5), kind="linear")
CUT = replace(DATA, mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.2), val_resize_px=40, val_crop="squash")


def tuned(spec) -> Any:
    """A classifier whose encoder is not as timm's name alone gives it."""
    encoder: Any = open_encoder(spec)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.25)
    return ImageClassifier(encoder, HEAD, ("a", "b", "c")).eval()


def cut_for(classifier):
    channels = classifier.encoder_model.config.in_chans
    return replace(CUT, channels=channels, mean=CUT.mean[:channels], std=CUT.std[:channels])


@pytest.fixture
def saved(tmp_path):
    classifier = tuned(TOKEN)
    save_classifier(tmp_path / "head", classifier, data=CUT)
    return classifier, tmp_path / "head"


def some_images(model):
    config = model.config
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, config.in_chans, *config.image_size, generator=generator)


def same_encoder(found, expected):
    images = some_images(expected)
    with torch.no_grad():
        ours, theirs = found.encode(images), expected.encode(images)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert all(torch.equal(one, other) for one, other in zip(ours.prefix, theirs.prefix, strict=True))
    return True


# --------------------------------------------------------------------------------------------- the encoder


def test_the_encoder_of_a_classifier_is_opened_with_its_weights_and_its_cut(saved):
    classifier, place = saved
    for path in (place, place / "model.safetensors"):
        found = open_encoder(path)
        assert isinstance(found, TimmEncoder)
        assert same_encoder(found, classifier.encoder_model)
        data = evaluation_data(str(path), found.config)
        assert (data.mean, data.val_resize_px, data.val_crop) == (CUT.mean, 40, "squash")


def test_a_model_of_ours_starts_from_its_patches_and_otherwise_it_is_refused_as_timms_is(saved):
    with pytest.raises(CheckpointError, match=r"cls_token.*As model\.init it can be started from"):
        load_model(saved[1])
    vit = saved[0].encoder_model.encoder
    config = ModelConfig(
        image_size=32, patch_size=16, block_size=1, embed_dim=64, depth=6, num_heads=2, predictor=None
    )
    model = NextBlockModel(config)
    initialize(model, saved[1])
    started = model.encoder.state_dict()["blocks.3.attn.qkv.weight"]
    assert torch.equal(started, vit.state_dict()["blocks.3.attn.qkv.weight"])


# --------------------------------------------------------------------------------------------- other formats


@pytest.mark.parametrize("spec", [TOKEN, REGISTERS, EVA])
def test_to_timm_goes_the_encoder_which_timm_and_the_commands_open(spec, tmp_path):
    classifier = tuned(spec)
    data = cut_for(classifier)
    save_classifier(tmp_path / "head", classifier, data=data)
    convert(tmp_path / "head", tmp_path / "net", to="timm")
    vit = classifier.encoder_model.encoder
    theirs: Any = timm.create_model(f"local-dir:{tmp_path / 'net'}", pretrained=True).eval()
    images = some_images(classifier.encoder_model)
    with torch.no_grad():
        assert torch.equal(theirs.forward_features(images), vit.forward_features(images))
        assert torch.equal(theirs(images), vit(images))
    spec = f"timm:local-dir:{tmp_path / 'net'}"
    found = open_encoder(spec)
    assert same_encoder(found, classifier.encoder_model)
    told = evaluation_data(spec, found.config)
    assert (told.mean, told.std, told.channels) == (data.mean, data.std, data.channels)
    assert (told.val_resize_px, told.val_crop) == (40, "squash")


def test_to_our_own_format_it_goes_with_its_head(saved, tmp_path):
    convert(saved[1], tmp_path / "copy", license="mit")
    classifier, found = saved[0], load(tmp_path / "copy")
    assert isinstance(found.encoder_model, TimmEncoder)
    images = some_images(classifier.encoder_model)
    assert torch.equal(found(images), classifier(images))
    assert found.class_names == ("a", "b", "c")
    first, second = (read_data(place / "model.safetensors") for place in (saved[1], tmp_path / "copy"))
    assert first == second


@pytest.mark.parametrize("to", ["nextblock", "timm"])
def test_the_card_tells_the_architecture_and_no_licence_that_nobody_named(saved, tmp_path, to):
    convert(saved[1], tmp_path / "out", to=to)
    card = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert head["weights_origin"] == "head, trained with nextblock on timm's test_vit"
    assert head["weights_license"] == "unspecified"
    assert "| encoder | timm's test_vit, 64 wide, 6 layers |" in card
    assert "| validation crop | squash |" in card


def test_its_image_size_and_its_heads_are_its_own_and_onnx_cannot_hold_it(saved, tmp_path):
    with pytest.raises(ValueError, match=r"images of \(32, 32\) px.*stays so; leave image_size out"):
        convert(saved[1], tmp_path / "out", to="timm", image_size=48)
    with pytest.raises(ValueError, match="has its own attention heads, as it tells itself, and not 3"):
        open_encoder(saved[1], num_heads=3)
    with pytest.raises(ValueError, match="on timm's test_vit, which the format onnx cannot hold; write it"):
        convert(saved[1], tmp_path / "out", to="onnx")
    assert not (tmp_path / "out").exists()
