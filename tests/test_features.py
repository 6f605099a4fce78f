"""Features: what heads see, the cheap baselines against slow definitions, and how images are cut."""

from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml

from nextblock.checkpoint import save_classifier, save_model
from nextblock.config import DataConfig, RunConfig
from nextblock.data import normalize
from nextblock.evaluate.features import (
    encoder_extract,
    evaluation_data,
    histogram_extract,
    small_pixels_extract,
    untrained,
)
from nextblock.models.heads import HeadConfig, ImageClassifier
from nextblock.settings import to_dict
from tiny_runs import same
from toy import CONFIG, DATA, ToySource, toy_model

ATTENTIVE = HeadConfig(num_classes=4, layers=(0, 1), num_heads=4)
LINEAR = HeadConfig(kind="linear", num_classes=4, layers=(1,))


@pytest.mark.parametrize(("chunk", "passes"), [(2, 3), (100, 1)])
def test_features_are_what_each_head_sees_and_heads_of_one_attention_share_a_pass(chunk, passes, monkeypatch):
    model, images = toy_model(), normalize(ToySource(5).images, DATA.mean, DATA.std)
    heads = [ATTENTIVE, LINEAR, replace(LINEAR, attention="full"), replace(ATTENTIVE, layers=(0,))]
    encode = Mock(side_effect=model.encode)
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(model, "encode", encode)
            found = encoder_extract(model, [head.features for head in heads], chunk=chunk)(images)
        asked = [call.kwargs["attention"] for call in encode.mock_calls]
        assert sorted(asked) == ["full"] * passes + ["native"] * passes
        for features, config in zip(found, heads, strict=True):
            for sample in range(5):
                expected = ImageClassifier(model, config).features(images[[sample]])[0]
                torch.testing.assert_close(features[sample], expected, atol=1e-5, rtol=1e-5)


def test_small_pixels_are_means_of_areas():
    images = torch.randn(2, 3, 32, 48)
    (found,) = small_pixels_extract(images)
    for place, (c, y, x) in enumerate(np.ndindex(3, 16, 16)):
        areas = images[:, c, 2 * y : 2 * y + 2, 3 * x : 3 * x + 3].mean(dim=(1, 2))
        torch.testing.assert_close(found[:, place], areas, atol=1e-6, rtol=1e-7)


def histogram(pixels):
    """Slowly, of pixels from 0 to 255, (c h w): 4 levels of three channels jointly, 32 of each channel."""
    channels, height, width = pixels.shape
    joint, alone = np.zeros(4 ** min(3, channels)), np.zeros((channels, 32))
    for y, x in np.ndindex(height, width):
        levels = [float(value) / 255 * (1 - 1e-9) for value in pixels[:, y, x]]
        joint[sum(int(4 * level) * 4**c for c, level in enumerate(levels[:3]))] += 1
        for c, level in enumerate(levels):
            alone[c, int(32 * level)] += 1
    return np.sqrt(np.concatenate([joint, alone.ravel()]) / (height * width))


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_histograms_are_those_of_the_slow_definition(channels):
    rng = np.random.default_rng(0)
    data = DataConfig(channels=channels, mean=(0.4,) * channels, std=(0.2,) * channels)
    levels = np.array([3, 60, 100, 150, 200, 255], dtype=np.uint8)  # none at an edge of a bin
    images = torch.from_numpy(rng.choice(levels, (2, channels, 5, 7)))
    images[1] = 100  # constant
    (found,) = histogram_extract(data)(normalize(images, data.mean, data.std))
    for image, vector in zip(images.numpy(), found.numpy(), strict=True):
        np.testing.assert_allclose(vector, histogram(image), atol=1e-6)
    assert sorted(found[1].unique().tolist()) == [0, 1]


def test_untrained_is_the_same_network_with_weights_from_the_seed_alone():
    model, before = toy_model(), torch.random.get_rng_state()
    first, again, other = (untrained(model, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert same(first.state_dict(), again.state_dict())
    assert [w.shape for w in first.state_dict().values()] == [w.shape for w in model.state_dict().values()]
    for another in (other, model):
        name = "encoder.pos_embed"
        assert not torch.equal(first.state_dict()[name], another.state_dict()[name])
    assert not first.training
    assert not any(parameter.requires_grad for parameter in first.parameters())


def test_images_are_cut_as_the_run_cut_them_even_in_a_folder_named_checkpoints(tmp_path):
    run = RunConfig(model=CONFIG, data=replace(DATA, train="there", mean=(0.1, 0.2, 0.3), val_resize_px=20))
    for place in (tmp_path / "mine", tmp_path / "checkpoints" / "mine"):
        place.mkdir(parents=True)
        (place / "config.yaml").write_text(yaml.safe_dump(to_dict(run)))
        checkpoint = place / "checkpoints" / "step_00000010"
        for inside in (place, checkpoint, checkpoint / "model.safetensors"):
            assert evaluation_data(str(inside), CONFIG) == replace(run.data, train=None)


def test_images_are_cut_as_a_file_alone_says(tmp_path):
    said = replace(DATA, mean=(0.1, 0.2, 0.3), val_resize_px=20)
    directory = tmp_path / "checkpoints" / "run" / "probe"
    save_classifier(directory, ImageClassifier(toy_model(), ATTENTIVE), data=said)
    for place in (directory, directory / "model.safetensors"):
        found = evaluation_data(str(place), CONFIG)
        assert (found.mean, found.std, found.val_resize_px) == (said.mean, said.std, 20)


@pytest.mark.parametrize(("image_size", "resize_px"), [(256, 300), (224, 256), (56, 64), (16, 18)])
def test_images_of_a_bare_file_of_weights_are_cut_as_officially(tmp_path, image_size, resize_px):
    config = replace(CONFIG, image_size=image_size)
    save_model(tmp_path / "silent.safetensors", toy_model())
    for name in ("weights.ckpt", "silent.safetensors"):
        found = evaluation_data(str(tmp_path / name), config)
        assert (found.val_resize_px, found.mean) == (resize_px, (0.485, 0.456, 0.406))
