"""Targets, their losses and references against loops; prefixes; k-means."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from nextblock.blocks import normalize_blocks
from nextblock.targets import (
    TokenTargets,
    count_kept_rows,
    draw_prefix_lengths,
    fit_kmeans,
    kept_rows,
    make_targets,
    nearest_centroids,
    spread,
)
from toy import tiny_config

ORDER = torch.tensor([4, 0, 5, 1, 3, 2])


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def token_targets(vocab_size=7) -> TokenTargets:
    targets = make_targets(tiny_config(target="tokens", vocab_size=vocab_size))
    assert isinstance(targets, TokenTargets)
    targets.fit(noise(60, 48, seed=1), seed=0)
    return targets


def true_blocks(images: Tensor) -> Tensor:
    """The pixels (b 6 192) of the blocks along the order."""
    places = [divmod(block, 3) for block in ORDER.tolist()]
    blocks = [images[:, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] for row, column in places]
    return torch.stack(blocks, dim=1).flatten(2)


def patches_of(blocks: Tensor) -> Tensor:
    """Their patches (b steps 4 48)."""
    pixels = blocks.unflatten(2, (3, 8, 8))
    corners = [(0, 0), (0, 4), (4, 0), (4, 4)]
    patches = [pixels[..., row : row + 4, column : column + 4].flatten(2) for row, column in corners]
    return torch.stack(patches, dim=2)


def test_a_block_is_normalised_by_its_own_mean_and_unbiased_deviation():
    pixels = noise(2, 3, 7).double()
    values = pixels.numpy()
    deviation = np.sqrt(values.var(-1, ddof=1, keepdims=True) + 1e-6)
    expected = (values - values.mean(-1, keepdims=True)) / deviation
    np.testing.assert_allclose(normalize_blocks(pixels), expected, atol=1e-12)
    assert torch.equal(normalize_blocks(torch.full((1, 2, 12), 3.7)), torch.zeros(1, 2, 12)), "flat ones too"


@pytest.mark.parametrize("norm", [True, False])
def test_pixel_targets_are_the_blocks_along_the_order_in_fp32_and_are_drawn_as_the_true_pixels(norm):
    targets, images = make_targets(tiny_config(norm_pixels=norm)), noise(2, 3, 16, 24).bfloat16()
    found = targets.of_blocks(images, ORDER)
    assert (found.shape, found.dtype) == ((2, 6, 192), torch.float32)
    true = true_blocks(images.float())
    torch.testing.assert_close(found, normalize_blocks(true) if norm else true)
    torch.testing.assert_close(targets.to_pixels(found, found, true), true, atol=1e-5, rtol=1e-5)


def test_reference_losses_of_pixels_are_the_distances_to_zero_and_to_the_block_before():
    targets, images = make_targets(tiny_config()), noise(2, 3, 16, 24)
    blocks = targets.of_blocks(images, ORDER)
    found = targets.reference_losses(blocks)
    copied = (blocks[:, 1:] - blocks[:, :-1]).square().mean((1, 2))
    torch.testing.assert_close(found["zero"], blocks[:, 1:].square().mean((1, 2)))
    torch.testing.assert_close(found["copy_previous"], copied)
    torch.testing.assert_close(found["zero"], torch.full((2,), 191 / 192), atol=1e-5, rtol=0)
    same = targets.of_blocks(noise(1, 3, 8, 8).repeat(1, 1, 2, 3), ORDER)
    assert targets.reference_losses(same)["copy_previous"].item() == 0
    masked = make_targets(tiny_config(mask_ratio=0.5, order="per_image", feature_attention="full"))
    found = masked.reference_losses(blocks)
    assert list(found) == ["zero"], "a masked block has no visible one before it to be copied"
    torch.testing.assert_close(found["zero"], blocks[:, 3:].square().mean((1, 2)))


def test_token_targets_are_the_nearest_centroids_of_normalised_patches_along_the_order():
    targets, images = token_targets(), noise(2, 3, 16, 24)
    found = targets.of_blocks(images, ORDER)
    assert found.dtype == torch.int64
    for pixels, token in zip(patches_of(true_blocks(images)).flatten(0, 2), found.flatten(), strict=True):
        pixels = (pixels - pixels.mean()) / math.sqrt(float(pixels.var()) + 1e-6)
        distances = [math.dist(pixels.tolist(), c.tolist()) for c in targets.tokenizer.centroids]
        assert int(token) == distances.index(min(distances))


@pytest.mark.parametrize("changes", [{}, {"loss": "l1"}, {"target": "tokens"}, {"target": "embedding"}])
def test_losses_are_computed_in_fp32_from_outputs_of_any_precision(changes):
    targets = make_targets(tiny_config(vocab_size=7, **changes))
    outputs = targets.shaped(noise(2, 3, targets.outputs).bfloat16())
    true = torch.ones(2, 3, 4, dtype=torch.int64) if "tokens" in changes.values() else outputs.float().flip(0)
    found = targets.losses(outputs, true)
    assert found.dtype == torch.float32
    assert torch.equal(found, targets.losses(outputs.float(), true))


def test_reference_losses_of_tokens_are_the_vocabulary_and_the_entropy():
    found = token_targets().reference_losses(torch.tensor([[[0, 0], [0, 3]], [[3, 5], [5, 5]]]))
    entropy = -sum(p * math.log(p) for p in (3 / 8, 2 / 8, 3 / 8))
    assert found["uniform"].tolist() == pytest.approx([math.log(7)] * 2)
    assert found["frequency"].tolist() == pytest.approx([entropy] * 2)


def test_tokens_are_drawn_as_centroids_with_the_mean_and_deviation_of_the_true_patch():
    targets, images, logits = token_targets(), noise(2, 3, 16, 24), noise(2, 6, 4, 7, seed=2)
    true = true_blocks(images)
    drawn = patches_of(targets.to_pixels(logits, targets.of_blocks(images, ORDER), true)).flatten(0, 2)
    tokens = logits.argmax(-1).flatten()
    for found, token, pixels in zip(drawn, tokens, patches_of(true).flatten(0, 2), strict=True):
        expected = targets.tokenizer.centroids[token] * torch.sqrt(pixels.var() + 1e-6) + pixels.mean()
        torch.testing.assert_close(found, expected)


def draw(seed, samples, num_blocks, visit=0):
    return draw_prefix_lengths(seed, [visit] * len(samples), samples, num_blocks)


@pytest.mark.parametrize("num_blocks", [2, 7, 16])
def test_prefix_lengths_are_uniform_from_1_to_all_but_one(num_blocks):
    counts = torch.bincount(draw(0, list(range(6000)), num_blocks), minlength=num_blocks)
    assert (len(counts), counts[0]) == (num_blocks, 0)
    expected, freedom = 6000 / (num_blocks - 1), num_blocks - 2
    chi_square = float((counts[1:] - expected).square().sum() / expected)
    assert chi_square <= freedom + 4 * (2 * freedom) ** 0.5


def test_a_length_is_a_function_of_seed_visit_and_sample_alone():
    samples = list(range(3000))
    first = draw(0, samples, 16)
    others = (draw(0, samples, 16, visit=1), draw(0, [s + 1 for s in samples], 16), draw(1, samples, 16))
    for other in others:
        agree = (first == other).double().mean().item()
        assert abs(agree - 1 / 15) < 4 * (1 / 15 * 14 / 15 / 3000) ** 0.5
    assert draw(0, [9, 2], 16).tolist() == [int(first[9]), int(first[2])]


@pytest.mark.parametrize("num_blocks", [2, 4, 9])
def test_a_row_is_kept_if_its_target_lies_behind_the_prefix_and_the_count_agrees(num_blocks):
    lengths = torch.arange(num_blocks)
    for distance in range(1, num_blocks):
        steps = num_blocks - distance
        kept = kept_rows(steps, distance, lengths)
        expected = [[row + distance >= length for row in range(steps)] for length in lengths.tolist()]
        assert kept.tolist() == expected
        assert kept.any(1).all(), "the last block is always left to predict"
        assert count_kept_rows(lengths, num_blocks, distance) == kept.sum()


@pytest.mark.parametrize("max_distances", [1, 30, 10**6])
def test_the_nearest_centroid_is_the_first_at_the_least_distance(max_distances):
    points, centroids = noise(41, 6), noise(9, 6, seed=1)
    found = nearest_centroids(points, centroids, max_distances).tolist()
    for point, number in zip(points, found, strict=True):
        distances = [math.dist(point.tolist(), centroid.tolist()) for centroid in centroids]
        assert number == distances.index(min(distances))
    assert nearest_centroids(torch.zeros(2, 3), torch.ones(4, 3)).tolist() == [0, 0]


@pytest.fixture(params=["lloyd", "batches"])
def algorithm(request, monkeypatch):
    """Both ways to fit, whatever the size."""
    if request.param == "batches":
        monkeypatch.setattr("nextblock.targets.MAX_LLOYD_PRODUCTS", 0)
    return request.param


def test_clusters_far_apart_are_found(algorithm):
    centres = 10 * torch.eye(4)
    points = (centres[:, None] + 0.1 * noise(4, 50, 4)).flatten(0, 1)
    centroids = fit_kmeans(points, 4, seed=0)
    found = centroids[nearest_centroids(centres, centroids)]
    torch.testing.assert_close(found, centres, atol=0.2, rtol=0)


def test_a_fit_is_a_function_of_patches_and_seed_and_leaves_global_randomness_alone(algorithm):
    before = np.random.get_state(legacy=False)["state"]["key"].tolist(), torch.get_rng_state()  # noqa: NPY002 - it is what is checked
    points = noise(300, 6)
    centroids = fit_kmeans(points, 20, seed=3)
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == before[0]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[1])
    assert torch.equal(centroids, fit_kmeans(points, 20, seed=3))
    assert not torch.equal(centroids, fit_kmeans(points, 20, seed=4))


def test_flat_patches_do_not_crowd_out_the_others(algorithm):
    points = torch.cat([torch.zeros(900, 6), 10 * noise(40, 6)])
    used = nearest_centroids(points, fit_kmeans(points, 32, seed=0)).unique()
    assert len(used) >= 30


def test_as_many_tokens_as_distinct_patches_are_the_patches_and_more_are_refused(algorithm):
    points = torch.cat([torch.zeros(50, 6), noise(7, 6).repeat(3, 1)])
    centroids = fit_kmeans(points, 8, seed=0)
    torch.testing.assert_close(centroids[nearest_centroids(points, centroids)], points, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"71 patches contain only 8 distinct ones, .* at most 8"):
        fit_kmeans(points, 9, seed=0)


def test_the_spread_of_vectors_is_0_on_a_line_and_near_1_in_all_directions():
    line = torch.tensor([1.0, 2.0, 3.0]) * torch.tensor([1.0, -2.0, 0.5, -0.1])[:, None]
    assert spread(line) == pytest.approx(0, abs=1e-6)
    assert spread(torch.eye(8)) == pytest.approx(7 / 8)
    pairs = torch.nn.functional.normalize(noise(5, 3), dim=1)
    assert spread(pairs) == pytest.approx(1 - float((pairs @ pairs.T).square().mean()), abs=1e-6)
