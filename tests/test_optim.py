"""Which parameters decay, and the learning rate at the schedule's corners."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch

from nextblock.config import OptimConfig
from nextblock.optim import build_optimizer, lr_at, parameter_groups, set_lr
from toy import tiny_model

# ----------------------------------------------------------------------------------------------------- groups


def names_of(model, parameters):
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return [by_id[id(parameter)] for parameter in parameters]


def test_weights_and_learned_positions_decay_biases_and_norms_do_not():
    model = tiny_model()
    groups = parameter_groups(model, 0.05)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    decayed, rest = (set(names_of(model, group["params"])) for group in groups)
    assert len(groups[0]["params"]) + len(groups[1]["params"]) == len(list(model.parameters()))
    assert decayed | rest == {name for name, _ in model.named_parameters()}
    assert {"encoder.pos_embed", "predictor.pos_embed", "encoder.patch_embed.proj.weight"} <= decayed
    assert {"encoder.blocks.0.attn.qkv.weight", "predictor.block_mlps.0.2.weight"} <= decayed
    assert {"encoder.norm.weight", "encoder.blocks.1.norm2.weight", "predictor.norm.bias"} <= rest
    assert all(not name.endswith("bias") and "norm" not in name for name in decayed)
    assert all(name.endswith("bias") or "norm" in name for name in rest)


def test_a_matrix_with_bias_in_its_name_does_not_decay():
    model = torch.nn.ParameterDict({"relative_bias": torch.zeros(3, 3), "weight": torch.zeros(3, 3)})
    decayed, rest = (names_of(model, group["params"]) for group in parameter_groups(model, 0.1))
    assert (decayed, rest) == (["weight"], ["relative_bias"])


def test_frozen_parameters_are_in_no_group():
    model = tiny_model()
    model.encoder.requires_grad_(False)
    groups = parameter_groups(model, 0.05)
    names = names_of(model, [p for group in groups for p in group["params"]])
    assert names
    assert all(name.startswith("predictor.") for name in names)


def test_the_optimizer_is_adamw_of_the_settings():
    config = OptimConfig(lr=3e-4, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.3)
    optimizer = build_optimizer(tiny_model(), config)
    set_lr(optimizer, 2e-4)
    assert isinstance(optimizer, torch.optim.AdamW)
    for group, decay in zip(optimizer.param_groups, (0.3, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["eps"]) == (2e-4, (0.8, 0.9), 1e-7)
        assert group["weight_decay"] == decay


def test_a_step_is_that_of_adamws_definition():
    model = torch.nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5, betas=(0.9, 0.95), eps=1e-8))
    model(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        gradient, decay = parameter.grad, 0.5 if name == "weight" else 0.0
        assert gradient is not None
        # at the first step both moments, corrected, are the gradient and its square
        moved = before[name] * (1 - 0.1 * decay) - 0.1 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), moved)


# --------------------------------------------------------------------------------------------------- schedule

schedule = partial(lr_at, peak=1e-3, start=1e-4, end=1e-6)


@pytest.mark.parametrize(
    ("step", "warmup", "total", "rate"),
    [
        (0, 10, 100, 1e-4),
        (0, 0, 100, 1e-3),
        (0, 1, 100, 1e-4),
        (1, 1, 100, 1e-3),
        (10, 10, 10, 1e-3),  # all warm-up: no division by zero
        (500, 10, 100, 1e-6),  # beyond the end
    ],
)
def test_the_rate_at_the_corners(step, warmup, total, rate):
    assert schedule(step, warmup_steps=warmup, total_steps=total) == pytest.approx(rate)


def test_warm_up_rises_in_a_line_and_its_last_step_has_the_peak():
    rates = [schedule(step, warmup_steps=10, total_steps=100) for step in range(10)]
    steps = [b - a for a, b in itertools.pairwise(rates)]
    assert steps == pytest.approx([1e-4] * 9)
    assert rates[-1] == pytest.approx(1e-3)


def test_the_cosine_begins_at_the_peak_is_half_way_in_the_middle_and_ends_one_step_after_the_last():
    rate = partial(schedule, warmup_steps=10, total_steps=110)
    assert rate(10) == pytest.approx(1e-3)
    assert rate(60) == pytest.approx((1e-3 + 1e-6) / 2)
    assert rate(110) == pytest.approx(1e-6)
    assert 1e-6 < rate(109) < 1.3e-6


def test_the_cosine_is_the_recursion_of_the_official_scheduler():
    """lr(t) - end = (1 + cos(pi t/T)) / (1 + cos(pi (t-1)/T)) (lr(t-1) - end), t from the warm-up's end."""
    rate = 1e-3
    for t in range(1, 90):
        ratio = (1 + math.cos(math.pi * t / 90)) / (1 + math.cos(math.pi * (t - 1) / 90))
        rate = 1e-6 + ratio * (rate - 1e-6)
        assert schedule(10 + t, warmup_steps=10, total_steps=100) == pytest.approx(rate)


def test_a_run_shorter_than_its_warm_up_only_rises():
    rates = [schedule(step, warmup_steps=10, total_steps=5) for step in range(5)]
    assert rates == sorted(rates)
    assert rates[-1] < 1e-3
