"""Which parameters decay, and the learning rate at the schedule's corners."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from nextblock.config import OptimConfig
from nextblock.optim import build_optimizer, lr_at, parameter_groups, set_lr
from toy import tiny_model


def test_matrices_and_learned_positions_decay_biases_and_norms_do_not_and_what_is_frozen_is_left_out():
    model = tiny_model()
    model.register_parameter("relative_bias", torch.nn.Parameter(torch.zeros(3, 3)))
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def grouped():
        groups = parameter_groups(model, 0.05)
        assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
        return [sorted(names[id(parameter)] for parameter in group["params"]) for group in groups]

    decayed, rest = grouped()
    is_rest = {name: name.endswith("bias") or "norm" in name for name in names.values()}
    assert decayed == sorted(name for name in is_rest if not is_rest[name])
    assert rest == sorted(name for name in is_rest if is_rest[name])
    assert {"encoder.pos_embed", "predictor.pos_embed", "encoder.patch_embed.proj.weight"} <= set(decayed)
    assert {"encoder.norm.weight", "encoder.blocks.1.norm2.weight", "predictor.norm.bias"} <= set(rest)
    model.encoder.requires_grad_(False)
    assert grouped() == [
        [name for name in part if not name.startswith("encoder.")] for part in (decayed, rest)
    ]


def test_a_step_is_that_of_adamws_definition():
    model = torch.nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.5, betas=(0.9, 0.95), eps=1e-8))
    set_lr(optimizer, 0.1)
    model(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        gradient, decay = parameter.grad, 0.5 if name == "weight" else 0.0
        assert gradient is not None
        # at the first step both moments, corrected, are the gradient and its square
        moved = before[name] * (1 - 0.1 * decay) - 0.1 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), moved)


schedule = partial(lr_at, peak=1e-3, start=1e-4, end=1e-6)


@pytest.mark.parametrize(
    ("step", "warmup", "total", "rate"),
    [
        (0, 0, 100, 1e-3),
        (0, 1, 100, 1e-4),
        (1, 1, 100, 1e-3),
        *((step, 10, 110, 1e-4 * (step + 1)) for step in range(10)),  # in a line up to the peak
        (10, 10, 110, 1e-3),
        (60, 10, 110, (1e-3 + 1e-6) / 2),
        (110, 10, 110, 1e-6),
        (500, 10, 110, 1e-6),  # beyond the end
        (10, 10, 10, 1e-3),  # all warm-up: no division by zero
        *((step, 10, 5, 1e-4 * (step + 1)) for step in range(5)),  # shorter than its warm-up
    ],
)
def test_the_rate_rises_in_a_line_and_falls_in_a_cosine(step, warmup, total, rate):
    assert schedule(step, warmup_steps=warmup, total_steps=total) == pytest.approx(rate)


def test_the_cosine_is_the_recursion_of_the_official_scheduler():
    """lr(t) - end = (1 + cos(pi t/T)) / (1 + cos(pi (t-1)/T)) (lr(t-1) - end), t from the warm-up's end."""
    rate = 1e-3
    for t in range(1, 90):
        ratio = (1 + math.cos(math.pi * t / 90)) / (1 + math.cos(math.pi * (t - 1) / 90))
        rate = 1e-6 + ratio * (rate - 1e-6)
        assert schedule(10 + t, warmup_steps=10, total_steps=100) == pytest.approx(rate)
