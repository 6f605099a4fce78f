"""Completion: cached as recomputed, the statistics by their definition, what is given, what is refused."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import nextblock
from nextblock.blocks import normalize_blocks, patchify
from nextblock.checkpoint import save_model
from nextblock.config import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from nextblock.data import eval_batches, normalize, open_source
from nextblock.interop import load_model
from nextblock.models.completion import complete
from tiny_runs import call_cli, refused
from toy import tiny_images, tiny_model

UPPER = torch.tensor([True, True, True, False, False, False])
SPREAD = torch.tensor([False, True, False, False, True, False])


def model_of(**changes):
    """A tiny model; a tokenizer has centroids, and predictions have the size of normalised pixels."""
    model = tiny_model(**changes)
    if model.tokenizer is not None:
        model.tokenizer.centroids.copy_(normalize_blocks(patchify(tiny_images(), (4, 4))[0, :12]))
    return model


def some_order(seed, k):
    """A repeatable order of k blocks."""
    return torch.randperm(k, generator=torch.Generator().manual_seed(seed))


AIM = {"prefix": True, "predictor": "mlp", "block_size": 1, "positions": "sincos", "patch_norm": True}
ROPE = {"positions": "rope", "class_token": True, "qk_norm": "scale", "layer_scale": 0.5}
MASKED = {"mask_ratio": 0.5, "order": "per_image", "feature_attention": "full"}
KINDS = {
    "xtra": {},
    "one patch": {"block_size": 1, "order": "spiral"},
    "oblong": {"block_size": (1, 3), "layer_scale": 0.5},
    "bands": {"block_size": (2, 6)},
    "aim": {**AIM, "bias": False, "projection_dim": None},
    "prefix": {"prefix": True, "order": "checkerboard"},
    "rope": {**ROPE, "embed_dim": 48},
    "class token": {"class_token": True, "target_positions": True, "qk_norm": "plain"},
    "where": {"target_positions": True, "order": "per_image", "qk_scale": 0.3},
    "masked": MASKED,
    "tokens": {"target": "tokens", "vocab_size": 12, "block_size": (2, 3)},
    "ahead": {"num_predicted_blocks": 2, "predictor": "linear", "norm_pixels": False},
    "another size": {"image_size": (32, 24), "block_size": (1, 3)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_keys_that_are_kept_give_the_images_that_forward_gives(kind):
    model, images = model_of(**KINDS[kind]), tiny_images()
    k = replace(model.config, image_size=(16, 24)).num_blocks
    for seed in (None, 1):
        order = None if seed is None else some_order(seed, k)
        given = torch.zeros(k, dtype=torch.bool)
        count = 0 if model.config.class_token and seed else k // 3 + 1
        given[some_order(2, k)[:count]] = True
        fast, slow = (complete(model, images, given, order=order, cached=cached) for cached in (True, False))
        assert torch.equal(fast.order, slow.order)
        assert sorted(fast.order.tolist()) == list(range(k))
        assert fast.given == int(given.sum()) == given[fast.order[: fast.given]].sum()
        size = slow.images.abs().max()
        torch.testing.assert_close(fast.images / size, slow.images / size, atol=1e-5, rtol=0)
        original, completed = (patchify(x, model.config.block_px) for x in (images, fast.images))
        assert torch.equal(original[:, given], completed[:, given])
        assert ((original != completed).any(-1).all(0) == ~given).all()


def test_given_blocks_are_the_prefix_of_a_model_that_was_trained_with_prefixes():
    model, images = tiny_model(prefix=True, norm_pixels=False), tiny_images()
    first = complete(model, images, UPPER).images[:, :, 8:, :8].flatten(1)
    with torch.no_grad():
        prefixed, causal = (
            model(images, prefix_lengths=n).predictions[:, 2] for n in (torch.tensor([3, 3]), None)
        )
    torch.testing.assert_close(first, prefixed, atol=1e-4, rtol=1e-4)
    assert (first - causal).abs().max() > 1e-2


def test_masked_blocks_are_predicted_in_any_number_if_cached():
    model, images = tiny_model(**{**MASKED, "mask_ratio": 0.67}), tiny_images()
    assert not torch.equal(complete(model, images, UPPER).images, images)
    with pytest.raises(ValueError, match="predicts 4 blocks, not 3; omit cached"):
        complete(model, images, UPPER, cached=False)


@pytest.mark.parametrize("cached", [True, False])
def test_hidden_pixels_are_not_looked_at_and_the_models_mode_stays(cached):
    model, images = tiny_model().train(), tiny_images()
    expected = complete(model, images, UPPER, cached=cached).images
    images[:, :, 8:] = float("nan")
    assert torch.equal(complete(model, images, UPPER, cached=cached).images, expected)
    assert (model.training, expected.requires_grad) == (True, False)


def test_the_last_block_has_its_neighbours_mean_deviation_and_their_pixels_along_the_edges():
    model, images = tiny_model(), tiny_images()
    given = torch.arange(6) < 5
    completed = complete(model, images, given).images.double()
    with torch.no_grad():
        pattern = model(images).predictions[:, -1].view(2, 3, 8, 8).double()
    above, left = images[:, :, :8, 16:].double(), images[:, :, 8:, 8:16].double()
    for image in range(2):
        deviation = (above[image].std() + left[image].std()) / 2
        for channel in range(3):
            theirs = torch.cat([above[image, channel, -1], left[image, channel, :, -1]])
            ours = torch.cat([pattern[image, channel, 0], pattern[image, channel, :, 0]])
            expected = pattern[image, channel] * deviation + (theirs - deviation * ours).mean()
            torch.testing.assert_close(completed[image, channel, 8:, 16:], expected, atol=1e-4, rtol=1e-4)


def test_without_a_shared_edge_a_block_has_the_mean_of_the_nearest():
    order = torch.tensor([0, 4, 1, 2, 3, 5])
    completed = complete(tiny_model(), tiny_images(), torch.arange(6) == 0, order=order).images
    means = (completed[..., :8, :8].mean((2, 3)), completed[..., 8:, 8:16].mean((2, 3)))
    torch.testing.assert_close(*means)


@pytest.mark.parametrize("target", ["pixels", "tokens"])
def test_white_stays_exactly_white_and_other_colours_too(target):
    model = model_of(target=target, vocab_size=12)
    colours = torch.tensor([[255, 255, 255], [250, 128, 3]], dtype=torch.uint8)
    images = normalize(colours[:, :, None, None].expand(-1, -1, 16, 24), IMAGENET_MEAN, IMAGENET_STD)
    for given in (UPPER, SPREAD):
        assert torch.equal(complete(model, images, given).images, images)


def test_tokens_become_the_likeliest_centroids():
    model, images = model_of(target="tokens", vocab_size=12), tiny_images()
    completed = complete(model, images, torch.arange(6) < 5).images[:, :, 8:, 16:]
    assert model.tokenizer is not None
    with torch.no_grad():
        centroids = model.tokenizer.centroids[model(images).predictions[:, -1].argmax(-1)]
    for found, wanted in zip(patchify(completed, (4, 4)).flatten(0, 1), centroids.flatten(0, 1), strict=True):
        found, wanted = (one.view(3, 16) - one.view(3, 16).mean(1, keepdim=True) for one in (found, wanted))
        scale = (found * wanted).sum() / wanted.square().sum()
        torch.testing.assert_close(found, scale * wanted, atol=1e-4, rtol=1e-4)


def test_from_a_class_token_alone_the_first_block_has_the_statistics_of_all_data():
    model, images = tiny_model(class_token=True), tiny_images()
    completed = complete(model, images, torch.zeros(6, dtype=torch.bool)).images
    with torch.no_grad():
        first = model(images).predictions[:, 0].view(2, 3, 8, 8)
    torch.testing.assert_close(completed[:, :, :8, :8], first, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "given", "words"),
    [
        ({"predictor": None}, UPPER, "cannot predict blocks"),
        ({"target": "embedding"}, UPPER, "vectors .model.target embedding."),
        ({"encoder_attention": "full", "feature_attention": "full"}, UPPER, "later blocks"),
        ({"predictor_attention": "causal"}, UPPER, "later blocks"),
        ({}, UPPER[:4], "an image has 6 blocks"),
    ],
)
def test_what_cannot_be_completed_is_refused(changes, given, words):
    with pytest.raises(ValueError, match=words):
        complete(tiny_model(**changes), tiny_images(), given)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A tiny model's file."""
    path = tmp_path_factory.mktemp("complete") / "model.safetensors"
    save_model(path, tiny_model(image_size=16), data=DataConfig(val_resize_px=16))
    return path


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ([], [0, 1]),
        (["--given_rows", "0.5"], [0, 1]),
        (["--given", "3", "--order", "reverse"], [1, 2, 3]),
        (["--given_blocks", "3,0"], [0, 3]),
    ],
)
def test_the_command_draws_what_was_given_and_writes_its_errors(file, tmp_path, capsys, words, given):
    words = ["--model", file, "--data", "digits:split=test", "--out", tmp_path, "--num_images", "1", *words]
    code, out, _ = call_cli(capsys, "complete", *words, "--workers", "0", "--device", "cpu", "--json")
    assert code == 0
    values, found = json.loads(out.splitlines()[-1]), json.loads((tmp_path / "completions.json").read_text())
    assert found["given"] == given
    assert sorted(found["order"][: len(given)]) == given
    assert values["rows"] == found["images"]
    with Image.open(values["picture"]) as picture:
        assert picture.format == "PNG"


def test_errors_are_those_of_hidden_pixels_beside_two_fillings(file, tmp_path):
    how = {"model": file, "data": "digits:split=test", "out": tmp_path, "num_images": 1}
    row = nextblock.complete(**how, workers=0, device="cpu").rows[0]
    data = DataConfig(val_resize_px=16, workers=0)
    source = open_source("digits:split=test", data)
    (batch,) = eval_batches(source, data, (16, 16), 1, torch.tensor([len(source) // 2]).numpy())
    true, given = batch.images / 255, torch.arange(4) < 2
    columns = true[..., :8, :].unflatten(3, (2, 8)).mean((2, 4))
    completed = complete(load_model(file).eval(), normalize(batch.images, data.mean, data.std), given).images
    mean, std = (torch.tensor(x)[:, None, None] for x in (data.mean, data.std))
    filled = {
        "loss": (completed * std + mean).clamp(0, 1)[..., 8:, :],
        "given_mean": true[..., :8, :].mean((2, 3), keepdim=True),
        "nearest_given": columns.repeat_interleave(8, -1)[:, :, None],
    }
    for name, pixels in filled.items():
        assert row[name] == pytest.approx(float((pixels - true[..., 8:, :]).square().mean()), abs=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--given", "1", "--given_blocks", "1"], "given and given_blocks exclude each other"),
        (["--given", "4"], "hide at least one"),
        (["--given_blocks", "0,1,2,3"], "all 4 blocks are given; hide at least one"),
        (["--given", "0"], "no block is given"),
        (["--given_blocks", "1,4"], "an image's blocks are 0 to 3"),
        (["--given_rows", "0.4"], "gives 0 of 2 rows of blocks; choose another share"),
        (["--order", "spirals"], "did you mean spiral?"),
    ],
)
def test_what_is_given_must_make_sense(file, tmp_path, capsys, words, message):
    words = ["--model", file, "--data", "digits", "--out", tmp_path / "x", "--workers", "0", *words]
    assert message in refused(call_cli(capsys, "complete", *words))
    assert not (tmp_path / "x").exists()


def test_the_benchmark_compares_equal_images(monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    monkeypatch.setattr("sys.argv", ["complete", "--quick", "--json", "--rounds", "1"])
    importlib.import_module("complete").main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["largest_difference"] < 1e-4
    assert [row["budget"] for row in found["rows"]] == 2 * ["at least 4.0"]
