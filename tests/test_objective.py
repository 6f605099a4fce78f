"""Targets and losses against loops, what is kept, and what no model at all would cost."""

from __future__ import annotations

import math

import pytest
import torch

from nextblock.blocks import patchify
from nextblock.objective import (
    baseline_losses,
    block_losses,
    block_targets,
    combine,
    kept_rows,
    normalize_blocks,
)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------- targets


def test_a_block_is_normalised_by_its_own_mean_and_unbiased_deviation():
    pixels = noise(2, 3, 7).double()
    for image in range(2):
        for block in range(3):
            values = pixels[image, block].tolist()
            mean = sum(values) / 7
            variance = sum((v - mean) ** 2 for v in values) / 6
            expected = [(v - mean) / math.sqrt(variance + 1e-6) for v in values]
            assert normalize_blocks(pixels)[image, block].tolist() == pytest.approx(expected, abs=1e-12)


def test_a_flat_block_is_normalised_to_zero():
    assert torch.equal(normalize_blocks(torch.full((1, 2, 12), 3.7)), torch.zeros(1, 2, 12))


@pytest.mark.parametrize("start", [0, 1, 2])
@pytest.mark.parametrize("normalize", [True, False])
def test_targets_are_the_blocks_along_the_order_from_a_position_on(start, normalize):
    images, order = noise(2, 3, 8, 12), torch.tensor([4, 0, 5, 1, 3, 2])
    targets = block_targets(images, order, (4, 4), normalize=normalize, start=start)
    for row, position in enumerate(range(start, 6)):
        top, left = divmod(int(order[position]), 3)
        pixels = images[:, :, top * 4 : top * 4 + 4, left * 4 : left * 4 + 4].reshape(2, -1)
        expected = normalize_blocks(pixels) if normalize else pixels
        torch.testing.assert_close(targets[:, row], expected)
    assert targets.shape == (2, 6 - start, 48)


def test_targets_of_half_precision_images_are_fp32():
    order = torch.arange(4)
    assert block_targets(noise(1, 3, 8, 8).bfloat16(), order, (4, 4), normalize=True).dtype == torch.float32


# ----------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize(("loss", "power"), [("mse", 2), ("l1", 1)])
def test_a_blocks_loss_is_the_mean_over_its_pixel_values(loss, power):
    predictions, targets = noise(2, 3, 5), noise(2, 3, 5, seed=1)
    for image in range(2):
        for block in range(3):
            pairs = zip(predictions[image, block].tolist(), targets[image, block].tolist(), strict=True)
            expected = sum(abs(p - t) ** power for p, t in pairs) / 5
            assert block_losses(predictions, targets, loss)[image, block].item() == pytest.approx(expected)


def test_losses_of_half_precision_predictions_are_fp32():
    assert block_losses(noise(1, 2, 8).half(), noise(1, 2, 8), "mse").dtype == torch.float32


@pytest.mark.parametrize("distance", [1, 2, 3])
def test_a_row_is_kept_if_its_target_lies_behind_the_prefix(distance):
    k, lengths = 6, torch.tensor([0, 1, 2, 4, 5])
    steps = k - distance
    kept = kept_rows(len(lengths), steps, distance, lengths)
    for image, length in enumerate(lengths.tolist()):
        for row in range(steps):
            assert kept[image, row].item() == (row + distance >= length)
        assert kept[image].any(), "the last block is always left to predict"


def test_without_a_prefix_all_rows_are_kept():
    assert kept_rows(2, 5, 1, None).all()


def test_combine_divides_each_distance_and_averages_them():
    near, far = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4.0, 0.0]])
    assert combine([near, far], [3, 1]).item() == pytest.approx((2.0 + 4.0) / 2)


def test_parts_of_a_batch_add_up_to_its_loss_by_the_batchs_divisors():
    losses = noise(5, 3).abs()
    whole = combine([losses], [15])
    parts = sum(combine([part], [15]) for part in losses.split([1, 3, 1]))
    torch.testing.assert_close(parts, whole)


# -------------------------------------------------------------------------------------------------- baselines


def test_the_baselines_are_what_loops_give():
    images, order = noise(2, 3, 8, 8), torch.tensor([2, 0, 3, 1])
    pixels = block_targets(images, order, (4, 4), normalize=True, start=0)
    found = baseline_losses(pixels[:, 1:], pixels[:, 0], "mse")
    for image in range(2):
        zero = [pixels[image, i].square().mean().item() for i in range(1, 4)]
        copied = [(pixels[image, i] - pixels[image, i - 1]).square().mean().item() for i in range(1, 4)]
        assert found["zero"][image].item() == pytest.approx(sum(zero) / 3, rel=1e-5)
        assert found["copy_previous"][image].item() == pytest.approx(sum(copied) / 3, rel=1e-5)


def test_predicting_zero_costs_p_minus_1_over_p_under_normalised_pixels():
    pixels = normalize_blocks(patchify(noise(3, 3, 8, 8), (4, 4)))
    zero = baseline_losses(pixels[:, 1:], pixels[:, 0], "mse")["zero"]
    torch.testing.assert_close(zero, torch.full((3,), 47 / 48), atol=1e-5, rtol=0)


def test_copying_costs_nothing_where_all_blocks_are_alike():
    tile = noise(1, 3, 4, 4)
    pixels = patchify(tile.repeat(1, 1, 2, 3), (4, 4))
    found = baseline_losses(pixels[:, 1:], pixels[:, 0], "l1")
    assert found["copy_previous"].item() == 0
    assert found["zero"].item() == pytest.approx(tile.abs().mean().item())
