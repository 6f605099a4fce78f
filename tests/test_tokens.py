"""Tokens against loops and against the models that make them, what is refused, and that nothing trains."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn

from nextblock import tokens as tokens_module
from nextblock.tokens import (
    FAMILIES,
    KMeansTokenizer,
    Tokenizer,
    TokenizerError,
    fit_kmeans,
    nearest_centroids,
    open_tokenizer,
    token_losses,
    token_targets,
)

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def normalised(pictures):
    """Pictures in [0, 1] as the model sees them."""
    return (pictures - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def pictures():
    """Squares of 8 px in any colour, with some noise."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(2, 3, 4, 5, generator=generator)
    squares = colours.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    return 0.9 * squares + 0.1 * torch.rand(squares.shape, generator=generator)


# ----------------------------------------------------------------------------------------- targets and losses


@pytest.mark.parametrize("start", [0, 1, 3])
def test_targets_are_the_tokens_of_the_blocks_along_the_order(start):
    tokens = torch.arange(2 * 4 * 9).view(2, 4, 9)
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    targets = token_targets(tokens, order, (2, 3), start)
    assert targets.shape == (2, 6 - start, 6)
    for image in range(2):
        for step, position in enumerate(range(start, 6)):
            top, left = divmod(int(order[position]), 3)
            rows = [
                int(tokens[image, top * 2 + row, left * 3 + column])
                for row in range(2)
                for column in range(3)
            ]
            assert targets[image, step].tolist() == rows


def test_the_loss_is_the_mean_negative_log_probability_of_a_blocks_tokens():
    logits, targets = (
        noise(2, 3, 4, 5),
        torch.randint(5, (2, 3, 4), generator=torch.Generator().manual_seed(0)),
    )
    losses = token_losses(logits, targets)
    for image in range(2):
        for step in range(3):
            total = 0.0
            for token in range(4):
                scores = logits[image, step, token].tolist()
                chance = math.exp(scores[targets[image, step, token]]) / sum(map(math.exp, scores))
                total -= math.log(chance)
            assert losses[image, step].item() == pytest.approx(total / 4, rel=1e-5)


def test_guessing_evenly_costs_the_logarithm_of_the_vocabulary():
    assert token_losses(torch.zeros(3, 2, 7), torch.tensor([[0, 6]] * 3)).tolist() == pytest.approx(
        [math.log(7)] * 3
    )


def test_losses_of_half_precision_logits_are_fp32_and_have_gradients():
    logits = noise(2, 3, 5).bfloat16().requires_grad_()
    losses = token_losses(logits, torch.zeros(2, 3, dtype=torch.int64))
    assert losses.dtype == torch.float32
    losses.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(losses, token_losses(logits.detach().float(), torch.zeros(2, 3).long()))


# ------------------------------------------------------------------------------------------ nearest centroids


def test_the_nearest_centroid_is_the_one_at_the_least_distance():
    points, centroids = noise(40, 6), noise(9, 6, seed=1)
    for point, found in zip(points, nearest_centroids(points, centroids).tolist(), strict=True):
        distances = [math.dist(point.tolist(), centroid.tolist()) for centroid in centroids]
        assert found == distances.index(min(distances))


@pytest.mark.parametrize("max_distances", [1, 9, 30, 10**6])
def test_how_many_distances_exist_at_once_changes_nothing(max_distances):
    points, centroids = noise(41, 6), noise(9, 6, seed=1)
    assert torch.equal(
        nearest_centroids(points, centroids, max_distances), nearest_centroids(points, centroids)
    )


def test_of_centroids_equally_near_the_first_is_taken():
    assert nearest_centroids(torch.zeros(2, 3), torch.ones(4, 3)).tolist() == [0, 0]


# ---------------------------------------------------------------------------------------------- the fitting


@pytest.fixture(params=["lloyd", "batches"])
def algorithm(request, monkeypatch):
    """Both ways to fit, whatever the size."""
    if request.param == "batches":
        monkeypatch.setattr(tokens_module, "MAX_LLOYD_PRODUCTS", 0)
    return request.param


def numbers_of_patches(points, centroids):
    return torch.bincount(nearest_centroids(points, centroids), minlength=len(centroids))


def test_clusters_far_apart_are_found(algorithm):
    centres = 10 * torch.eye(4)
    points = (centres[:, None] + 0.1 * noise(4, 50, 4)).flatten(0, 1)
    centroids = fit_kmeans(points, 4, seed=0)
    found = centroids[nearest_centroids(centres, centroids)]
    torch.testing.assert_close(found, centres, atol=0.2, rtol=0)


def test_the_same_patches_and_seed_give_the_same_centroids(algorithm):
    points = noise(300, 6)
    centroids = fit_kmeans(points, 20, seed=3)
    assert torch.equal(centroids, fit_kmeans(points, 20, seed=3))
    assert not torch.equal(centroids, fit_kmeans(points, 20, seed=4))


def test_fitting_leaves_global_randomness_alone(algorithm):
    before = np.random.get_state(legacy=False)["state"]["key"].tolist(), torch.get_rng_state()  # noqa: NPY002 - it is what is checked
    fit_kmeans(noise(300, 6), 20, seed=3)
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == before[0]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])


def test_every_token_is_used_where_most_patches_are_equal(algorithm):
    points = torch.cat([torch.zeros(900, 6), noise(40, 6)])
    assert numbers_of_patches(points, fit_kmeans(points, 32, seed=0)).min() >= 1


def test_as_many_tokens_as_distinct_patches_are_the_patches(algorithm):
    points = torch.cat([torch.zeros(50, 6), noise(7, 6).repeat(3, 1)])
    centroids = fit_kmeans(points, 8, seed=0)
    torch.testing.assert_close(centroids[nearest_centroids(points, centroids)], points, atol=1e-5, rtol=0)


def test_centroids_without_patches_are_moved_to_the_farthest_patches():
    points = torch.tensor([[0.0], [1.0], [2.0], [100.0], [100.0], [50.0]])
    naive = torch.tensor([[0.0], [300.0], [300.0]])
    assert numbers_of_patches(points, naive).tolist() == [6, 0, 0]
    moved = tokens_module._use_all(naive, points)
    assert moved.flatten().tolist() == [0.0, 100.0, 50.0]
    assert naive.flatten().tolist() == [0.0, 300.0, 300.0]


def test_more_tokens_than_distinct_patches_are_refused_with_both_numbers():
    points = torch.cat([torch.zeros(50, 6), noise(7, 6).repeat(3, 1)])
    with pytest.raises(
        ValueError, match=r"71 patches hold only 8 distinct ones, too few for 9 tokens"
    ) as error:
        fit_kmeans(points, 9, seed=0)
    assert "model.vocab_size to at most 8" in str(error.value)


def test_patches_that_fp32_distances_cannot_tell_apart_count_as_one():
    points = torch.full((3, 4), 1000.0)
    points[1, 0] += 1e-3
    points[2] = -1000.0
    with pytest.raises(ValueError, match="3 patches hold only 2 distinct ones, too few for 3 tokens"):
        fit_kmeans(points, 3, seed=0)


# --------------------------------------------------------------------------------------------------- k-means


@pytest.fixture
def kmeans():
    """A tokenizer of 4-px patches, fitted on noise."""
    tokenizer = KMeansTokenizer(vocab_size=12, in_chans=3, patch_size=4)
    tokenizer.fit(tokenizer.patches(noise(8, 3, 16, 16)).flatten(0, 1), seed=0)
    return tokenizer


def test_a_token_is_the_centroid_nearest_to_the_patchs_normalised_pixels(kmeans):
    images = noise(2, 3, 8, 12, seed=5)
    tokens = kmeans(images)
    assert tokens.shape == (2, 2, 3)
    assert len(tokens.unique()) > 3
    for image in range(2):
        for row in range(2):
            for column in range(3):
                patch = images[image, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4].flatten()
                patch = (patch - patch.mean()) / math.sqrt(float(patch.var()) + 1e-6)
                distances = [math.dist(patch.tolist(), centroid.tolist()) for centroid in kmeans.centroids]
                assert int(tokens[image, row, column]) == distances.index(min(distances))


def test_a_tokens_pixels_are_its_centroid(kmeans):
    tokens = torch.tensor([[3, 0], [11, 3]])
    assert torch.equal(kmeans.pixels(tokens), kmeans.centroids[tokens])


def test_flat_patches_have_one_token_whatever_their_grey():
    tokenizer = KMeansTokenizer(vocab_size=2, in_chans=1, patch_size=2)
    images = torch.tensor([0.3, 0.7, 0.3, 0.9]).view(4, 1, 1, 1).expand(4, 1, 2, 2).clone()
    images[3, 0, 0, 0] = 5.0
    tokenizer.fit(tokenizer.patches(images).flatten(0, 1), seed=0)
    first, second, third, odd = tokenizer(images).flatten().tolist()
    assert first == second == third != odd


def test_centroids_are_saved_with_the_model_and_load_strictly(kmeans):
    fresh = KMeansTokenizer(vocab_size=12, in_chans=3, patch_size=4)
    assert kmeans.is_fitted
    assert not fresh.is_fitted
    fresh.load_state_dict(kmeans.state_dict(), strict=True)
    assert list(kmeans.state_dict()) == ["centroids"]
    assert fresh.is_fitted
    assert torch.equal(fresh(noise(1, 3, 8, 8)), kmeans(noise(1, 3, 8, 8)))


def test_a_tokenizer_that_is_not_fitted_is_refused():
    with pytest.raises(ValueError, match="no centroids yet; fit it"):
        KMeansTokenizer(vocab_size=12, in_chans=3, patch_size=4)(noise(1, 3, 8, 8))


def test_kmeans_has_nothing_to_train_and_ignores_autocast(kmeans):
    images = noise(32, 3, 32, 32, seed=7)
    tokens = kmeans(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kmeans.train()(images), tokens)
    assert torch.equal(kmeans(images.requires_grad_()), tokens)
    assert not list(kmeans.parameters())
    assert isinstance(kmeans, Tokenizer)


# ---------------------------------------------------------------------------------------- VQ models, offline

TINY = {
    "ChameleonVQVAE": {
        "embed_dim": 8,
        "num_embeddings": 16,
        "latent_channels": 8,
        "resolution": 16,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 1],
        "num_res_blocks": 1,
    },
    "Emu3VQVAE": {
        "codebook_size": 16,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [2],
        "hidden_size": 32,
        "temporal_downsample_factor": 2,
    },
    "FlavaImageCodebook": {"hidden_size": 8, "vocab_size": 16, "num_blocks_per_group": 1},
    "JanusVQVAE": {
        "embed_dim": 8,
        "num_embeddings": 16,
        "latent_channels": 8,
        "base_channels": 32,
        "channel_multiplier": [1, 1, 1],
        "num_res_blocks": 1,
        "num_patches": 4,
    },
}
SIDES_PX = {name: 8 if name == "FlavaImageCodebook" else 4 for name in TINY}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model of every supported class with random weights, as save_pretrained writes it."""
    import transformers

    made = {}
    for name, settings in TINY.items():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(transformers, name)(getattr(transformers, f"{name}Config")(**settings))
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.5)  # its own initial values give one code everywhere
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
    return made


def opened(folder, token_px=4, vocab_size=16, mean=MEAN, std=STD):
    return open_tokenizer(f"hf:{folder}", mean, std, vocab_size, token_px)


def codes_of(name, folder, pixels):
    """What the model itself gives for pixels as it expects them, image by image."""
    import transformers

    model = getattr(transformers, name).from_pretrained(folder)
    rows, columns = pixels.shape[-2] // SIDES_PX[name], pixels.shape[-1] // SIDES_PX[name]
    found = []
    with torch.no_grad():
        for image in pixels.split(1):
            if name == "FlavaImageCodebook":
                codes = model.get_codebook_indices(image)
            elif name == "Emu3VQVAE":
                codes = model.encode(image, torch.tensor([image.shape[-2:]])).image_tokens[0]
            else:
                codes = model.encode(image).image_tokens
            found.append(codes.reshape(1, rows, columns))
    return torch.cat(found)


def test_every_supported_class_is_tested():
    assert set(TINY) == set(FAMILIES)


@pytest.mark.parametrize("name", TINY)
def test_tokens_are_the_models_codes(name, folders):
    tokenizer = opened(folders[name], SIDES_PX[name])
    seen = pictures()
    pixels = 0.8 * seen + 0.1 if name == "FlavaImageCodebook" else 2 * seen - 1
    tokens = tokenizer(normalised(seen))
    assert torch.equal(tokens, codes_of(name, folders[name], pixels))
    assert len(tokens.unique()) > 2, "one code everywhere shows nothing"
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.vocab_size, tokenizer.token_px) == (16, SIDES_PX[name])


def inputs_of(tokenizer, images, monkeypatch):
    """The pixels that a tokenizer hands to its model."""
    taken = []

    def codes(_, pixels):
        taken.append(pixels)
        return torch.zeros(len(pixels), pixels.shape[-2] // 8, pixels.shape[-1] // 8, dtype=torch.int64)

    monkeypatch.setattr(tokenizer, "_codes", codes)
    monkeypatch.setattr(tokenizer, "token_px", 8)
    tokenizer(images)
    return taken[0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, lambda x: 2 * x - 1),
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 4]}, None),
        ({"rescale_factor": 0.0078, "image_mean": 1.0, "image_std": [1.0]}, lambda x: 1.989 * x - 1),
        ({"do_normalize": False, "image_mean": [9, 9, 9], "image_std": [9, 9, 9]}, lambda x: x),
        ({"do_normalize": False, "do_rescale": False}, lambda x: 255 * x),
    ],
)
def test_pixels_are_scaled_as_the_image_processors_file_says(
    settings, expected, folders, tmp_path, monkeypatch
):
    for file in folders["JanusVQVAE"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    seen = pictures()
    if expected is None:
        mean, std = (torch.tensor(settings[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
        wanted = (seen - mean) / std
    else:
        wanted = expected(seen)
    found = inputs_of(opened(tmp_path), normalised(seen), monkeypatch)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)


def test_pixels_of_dalles_vae_are_those_of_its_own_image_processor(folders, tmp_path, monkeypatch):
    import transformers

    processor: Any = transformers.FlavaImageProcessor(codebook_do_resize=False, codebook_do_center_crop=False)
    levels = (255 * pictures()).to(torch.uint8)
    wanted = processor(list(levels), return_codebook_pixels=True, return_tensors="pt")[
        "codebook_pixel_values"
    ]
    for file in folders["FlavaImageCodebook"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").exists()
    for folder in (folders["FlavaImageCodebook"], tmp_path):
        found = inputs_of(opened(folder, 8), normalised(levels / 255), monkeypatch)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_frozen_tokenizer_is_no_part_of_the_model_that_holds_it(folders):
    model = nn.Linear(2, 2)
    model.tokenizer = opened(folders["ChameleonVQVAE"])  # type: ignore[assignment]
    images = normalised(pictures()).requires_grad_()
    tokens = model.tokenizer(images)
    assert set(model.state_dict()) == {"weight", "bias"}
    assert len(list(model.parameters())) == 2
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.tokenizer(images), tokens)
    assert not any(parameter.requires_grad for parameter in model.tokenizer._module.parameters())


def test_a_hub_name_in_the_cache_opens_without_a_network(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tokenizer"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file in folders["JanusVQVAE"].iterdir():
        (snapshot / file.name).symlink_to(file)
    with pytest.raises(TokenizerError, match="hf:someone/tokenizer cannot be read"):
        opened("someone/tokenizer")  # whether there is an image processor's file is not known
    (repository / ".no_exist" / ("0" * 40)).mkdir(parents=True)
    (repository / ".no_exist" / ("0" * 40) / "preprocessor_config.json").touch()
    images = normalised(pictures())
    assert torch.equal(opened("someone/tokenizer")(images), opened(folders["JanusVQVAE"])(images))


# --------------------------------------------------------------------------------------------------- refusals


def test_a_codebook_of_another_size_is_refused_with_both_numbers(folders):
    with pytest.raises(ValueError, match=r"knows 16 tokens.*vocab_size is 8192; set model.vocab_size 16"):
        opened(folders["JanusVQVAE"], vocab_size=8192)


def test_tokens_of_another_size_are_refused_with_both_numbers(folders):
    with pytest.raises(ValueError, match=r"stands for 4x4 px.*expects 16x16.*set model.token_px 4"):
        opened(folders["JanusVQVAE"], token_px=16)


def test_images_of_other_channels_are_refused(folders):
    with pytest.raises(ValueError, match=r"takes images of 3 channels, but data.mean has 1"):
        opened(folders["JanusVQVAE"], mean=(0.5,), std=(0.5,))


@pytest.mark.parametrize(
    ("config", "named"),
    [({"architectures": ["ViTModel"], "model_type": "vit"}, "ViTModel"), ({"model_type": "vit"}, "none")],
)
def test_other_models_are_refused_naming_what_is_supported(config, named, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"class {named}.*ChameleonVQVAE.*FlavaImageCodebook"):
        opened(tmp_path)


def test_weights_that_lack_a_tensor_are_refused(folders, tmp_path):
    weights = load_file(folders["JanusVQVAE"] / "model.safetensors")
    del weights["quant_conv.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folders["JanusVQVAE"] / "config.json").read_text())
    with pytest.raises(TokenizerError, match=r"lack 1 tensors of a JanusVQVAE, such as quant_conv.weight"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["/no/such/folder", "someone/not-in-the-cache"])
def test_a_name_that_leads_nowhere_is_refused_in_one_line(name):
    with pytest.raises(TokenizerError, match=f"hf:{name} cannot be read.*give a folder") as error:
        opened(name)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TokenizerError, match=r"pip install transformers"):
        opened("anything")
