"""Features: against one image at a time, one pass for all heads, and what they need."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from nextblock.checkpoint import save_classifier, save_model
from nextblock.config import ModelConfig, RunConfig
from nextblock.data import TooManyBadImages, normalize
from nextblock.data.sources import SubsetSource
from nextblock.evaluate.features import (
    check_bad,
    check_same_classes,
    collect_features,
    encoder_extract,
    evaluation_data,
    iterate_features,
    pixel_extract,
    untrained,
)
from nextblock.models.heads import HeadConfig, ImageClassifier
from nextblock.settings import to_dict
from toy import CONFIG, DATA, ToySource, one_thread, toy_model  # noqa: F401 - a fixture

CPU = torch.device("cpu")
ATTENTIVE = HeadConfig(num_classes=4, layers=(0, 1), num_heads=4)
LINEAR = HeadConfig(kind="linear", num_classes=4, layers=(1,))


def batches(extract, source, **settings):
    return iterate_features(extract, source, DATA, 16, **{"batch_size": 5, "device": CPU, **settings})


@pytest.mark.parametrize("chunk", [2, 100])
def test_features_are_what_each_head_sees_of_each_image(chunk):
    model, source = toy_model(), ToySource(12)
    found = collect_features(
        batches(encoder_extract(model, [ATTENTIVE.features, LINEAR.features], chunk=chunk), source)
    )
    assert found.samples.tolist() == list(range(12))
    for features, config in zip(found.features, (ATTENTIVE, LINEAR), strict=True):
        classifier = ImageClassifier(model, config)
        for sample in range(12):
            image = normalize(source.read(sample)[None], DATA.mean, DATA.std)
            with torch.no_grad():
                expected = classifier.features(image)[0]
            torch.testing.assert_close(features[sample], expected, atol=1e-5, rtol=1e-5)


def test_heads_of_one_attention_share_one_pass(monkeypatch):
    model, asked = toy_model(), []
    encode = model.encode
    monkeypatch.setattr(
        model, "encode", lambda images, attention: asked.append(attention) or encode(images, attention)
    )
    heads = [ATTENTIVE, LINEAR, replace(LINEAR, attention="full"), replace(ATTENTIVE, layers=(0,))]
    encoder_extract(model, [head.features for head in heads])(torch.randn(3, 3, 16, 16))
    assert sorted(asked) == ["full", "native"]


def test_pixel_features_are_the_normalised_pixels():
    source = ToySource(3)
    found = collect_features(batches(pixel_extract, source))
    expected = normalize(source.images, DATA.mean, DATA.std).reshape(3, -1)
    torch.testing.assert_close(found.features[0], expected)


def test_features_come_in_the_order_of_the_indices_without_unreadable_images():
    source = ToySource(12, bad={3, 7})
    found = collect_features(batches(pixel_extract, source, indices=np.array([9, 3, 1, 7, 0]), batch_size=1))
    assert found.samples.tolist() == [9, 1, 0]
    assert [bad.sample for bad in found.bad] == [3, 7]
    assert found.bad[0].name == "toy-0[3]"


def test_features_carry_no_gradient():
    found = collect_features(batches(encoder_extract(toy_model(), [LINEAR.features]), ToySource(4)))
    assert not found.features[0].requires_grad


def test_a_source_without_a_readable_image_is_refused():
    with pytest.raises(ValueError, match=r"none of the images could be read \(4 bad, the first: toy-0\[0\]"):
        collect_features(batches(pixel_extract, ToySource(4, bad=range(4))))


def test_more_bad_images_than_allowed_stop_the_work():
    source = ToySource(10, bad=range(6))
    found = collect_features(batches(pixel_extract, source))
    check_bad(found.bad, source, replace(DATA, max_bad_fraction=0.6))
    with pytest.raises(TooManyBadImages, match=r"6 of the 10 images of toy-0 cannot be read.*\n  toy-0\[0\]"):
        check_bad(found.bad, source, DATA)


def test_untrained_is_the_same_network_with_weights_from_the_seed_alone():
    model = toy_model()
    before = torch.random.get_rng_state()
    first, again, other = untrained(model, 1), untrained(model, 1), untrained(model, 2)
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
        assert weight.shape == model.state_dict()[name].shape
    for another in (other, model):
        name = "encoder.pos_embed"
        assert not torch.equal(first.state_dict()[name], another.state_dict()[name])
    assert not first.training
    assert not any(parameter.requires_grad for parameter in first.parameters())


def test_a_subset_is_a_source_of_its_images():
    source = ToySource(12, bad={5})
    subset = SubsetSource(source.spec, source, np.array([5, 2, 11]))
    assert len(subset) == 3
    assert subset.labels.tolist() == [1, 2, 3]
    assert subset.class_names == source.class_names
    assert torch.equal(subset.read(2), source.images[11])
    assert subset.name(0) == "toy-0[5]"
    assert subset.fingerprint != SubsetSource(source.spec, source, np.array([5, 2, 10])).fingerprint
    with pytest.raises(IndexError, match="image 3 of 3"):
        subset.read(3)


def test_sources_of_other_classes_are_refused_with_the_differences():
    train = ToySource(4)
    check_same_classes(train, ToySource(8, seed=1))
    with pytest.raises(ValueError, match=r"only toy-0 has b, d; only toy-1 has e; give two sources"):
        check_same_classes(train, ToySource(4, seed=1, class_names=("a", "c", "e")))
    with pytest.raises(ValueError, match="their order differs"):
        check_same_classes(train, ToySource(4, seed=1, class_names=("b", "a", "c", "d")))


def test_images_are_cut_as_the_run_cut_them(tmp_path):
    run = RunConfig(model=CONFIG, data=replace(DATA, train="there", mean=(0.1, 0.2, 0.3), val_resize_px=20))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(run)))
    for place in (tmp_path, tmp_path / "checkpoints" / "step_00000010"):
        assert evaluation_data(str(place), CONFIG) == replace(run.data, train=None)


def test_images_are_cut_as_a_file_alone_says(tmp_path):
    said = replace(DATA, mean=(0.1, 0.2, 0.3), val_resize_px=20)
    classifier = ImageClassifier(toy_model(), ATTENTIVE)
    save_classifier(tmp_path / "checkpoints" / "run" / "probe", classifier, data=said)
    directory = tmp_path / "checkpoints" / "run" / "probe"
    for place in (directory, directory / "model.safetensors"):
        found = evaluation_data(str(place), CONFIG)
        assert (found.mean, found.std, found.val_resize_px) == (said.mean, said.std, 20)
    save_model(tmp_path / "silent.safetensors", toy_model())
    assert evaluation_data(str(tmp_path / "silent.safetensors"), CONFIG).val_resize_px == 18


def test_a_run_in_a_folder_named_checkpoints_is_found(tmp_path):
    run = RunConfig(model=CONFIG, data=replace(DATA, val_resize_px=20))
    place = tmp_path / "checkpoints" / "mine"
    place.mkdir(parents=True)
    (place / "config.yaml").write_text(yaml.safe_dump(to_dict(run)))
    checkpoint = place / "checkpoints" / "step_00000010"
    for inside in (place, checkpoint, checkpoint / "model.safetensors"):
        assert evaluation_data(str(inside), CONFIG).val_resize_px == 20


@pytest.mark.parametrize(("image_size", "resize_px"), [(256, 300), (224, 256), (56, 64)])
def test_images_of_a_bare_file_of_weights_are_cut_as_officially(tmp_path, image_size, resize_px):
    config = ModelConfig(image_size=image_size, patch_size=14 if image_size % 14 == 0 else 16, predictor=None)
    found = evaluation_data(str(tmp_path / "weights.ckpt"), config)
    assert found.val_resize_px == resize_px
    assert found.mean == (0.485, 0.456, 0.406)
