"""The heads that compete, how long they are trained, and that each is the head trained alone."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from torch import nn

from nextblock.config import ModelConfig
from nextblock.errors import UsageError
from nextblock.evaluate.probe.heads import Grid, encoder_candidates, rate_notes
from nextblock.evaluate.probe.settings import ProbeSettings
from nextblock.interop import open_encoder
from nextblock.models.next_block import NextBlockModel
from nextblock.optim import lr_at, parameter_groups
from toy import CONFIG, one_thread, toy_model  # noqa: F401 - a fixture

DEEP = {"image_size": 16, "patch_size": 4, "block_size": 2, "predictor": None}
TIMM = "timm:vit_tiny_patch16_224,pretrained=false,img_size=32"


def settings(**changes):
    return ProbeSettings(**{"model": "RUN", "train": "T", **changes})


def deep_model(width=32, depth=8, heads=2):
    with torch.device("meta"):
        return NextBlockModel(ModelConfig(embed_dim=width, depth=depth, num_heads=heads, **DEEP))


def configs(candidates, head=None):
    return [one.config for one in candidates if one.config is not None and head in (None, one.head)]


# ------------------------------------------------------------------------------------------------ the grid


def test_the_grid_of_xtra_is_its_official_sweep():
    found = encoder_candidates(settings(), deep_model(), 4)
    rates = (1e-4, 3e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 4e-3)
    last6 = [2, 3, 4, 5, 6, 7]
    wanted = {"linear": (0.0, [7], 1), "attentive": (0.1, last6, 16), "ep": (0.1, last6, 1)}
    rows = [
        (one.head, one.lr, one.weight_decay, list(config.layers), config.num_heads)
        for one, config in zip(found, configs(found), strict=True)
    ]
    assert rows == [
        (head, lr, decay, layers, heads) for head, (decay, layers, heads) in wanted.items() for lr in rates
    ]
    assert {one.num_queries for one in configs(found, "ep")} == {32}
    assert all(one.bias for one in configs(found))


def test_the_grid_of_aim_is_the_sweep_of_aimv2_with_aims_heads():
    found = encoder_candidates(settings(recipe="aim"), deep_model(heads=4), 4)
    assert len(found) == 3 * 2 * 7  # the best layers are known for AIM's own sizes only
    assert {one.num_heads for one in configs(found, "attentive")} == {4}
    assert not any(one.bias for one in configs(found))
    known = encoder_candidates(settings(recipe="aim", heads=("ep",)), deep_model(2048, 24, 16), 4)
    assert len({one.layers for one in configs(known)}) == 2


def test_every_setting_is_crossed_with_every_other():
    found = encoder_candidates(
        settings(
            heads=("linear",),
            layers=("last", "each"),
            attention=("native", "full"),
            lr=(1e-3, 1e-2),
            weight_decay=(0.0, 1.0),
        ),
        toy_model(),
        4,
    )
    rows = {
        (config.layers, config.attention, one.lr, one.weight_decay)
        for one, config in zip(found, configs(found), strict=True)
    }
    assert rows == set(product(((0,), (1,)), ("native", "full"), (1e-3, 1e-2), (0, 1)))
    assert len(found) == len(rows)  # "last" and "each" name the same layer once


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ("layer2",)}, "layers is layer2, but the encoder has 2 layers"),
        ({"layers": ("best",)}, "known for AIM's sizes only"),
        ({"tokens": ("class",), "heads": ("linear",)}, "no class token"),
        ({"attentive_heads": 5}, "cannot have 5 attention heads"),
    ],
)
def test_what_an_encoder_lacks_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        encoder_candidates(settings(**changes), toy_model(), 4)


def test_timms_encoders_are_probed_on_their_class_token_and_on_all_tokens():
    config = settings(tokens=("patches", "class", "all"), attention=("full", "native"), lr=(1e-2,))
    found = encoder_candidates(config, open_encoder(TIMM), 4)
    tokens = {head: [one.tokens for one in configs(found, head)] for head in config.heads}
    assert tokens == {
        "linear": ["patches", "class", "all"],
        "attentive": ["patches", "all"],
        "ep": ["patches", "all"],
    }
    assert {one.attention for one in configs(found)} == {"full"}  # which native is too


# ------------------------------------------------------------------------------------------ the schedule


@pytest.mark.parametrize(
    ("images", "batch", "steps", "epochs"),
    [
        (40, 16, 2, 1000),
        (569, 16, 35, 100),
        (1437, 64, 22, 100),
        (50_000, 1024, 48, 100),
        (1_281_167, 1024, 1251, 100),
    ],
)
def test_epochs_and_batches_follow_the_number_of_images(images, batch, steps, epochs):
    plan = settings().schedule(images)
    assert (plan.batch_size, plan.steps_per_epoch, plan.epochs) == (batch, steps, epochs)
    assert plan.warmup_steps == round(epochs / 10 * steps)


def test_what_is_given_stays():
    plan = settings(epochs=3, batch_size=500, warmup_epochs=1.5, recipe="aim").schedule(100)
    assert (plan.epochs, plan.batch_size, plan.steps, plan.warmup_steps) == (3, 100, 3, 2)
    assert settings(epochs=40, recipe="aim", batch_size=10).schedule(100).warmup_steps == 20


# --------------------------------------------------------------------------------------------- the training


def test_a_best_rate_at_the_end_of_the_grid_is_noted_unless_one_inside_is_as_good():
    def row(lr, top1):
        return {"encoder": "model", "head": "linear", "lr": lr, "top1": top1, "is_diverged": False}

    for inside, notes in ((0.8, 1), (0.9, 0)):
        grid = [row(1e-3, 0.9), row(1e-2, inside), row(1e-1, 0.1)]
        grid = [{**one, "is_winner": one["lr"] == 1e-3} for one in grid]
        assert len(rate_notes(grid, [1e-3, 1e-2, 1e-1])) == notes


def test_every_head_of_a_grid_is_bit_for_bit_the_head_trained_alone():
    """Alone: its own batch norm, AdamW, clipping and loss; also beside a head that diverges."""
    config = settings(
        lr=(1e-3, 1e-2, 1e38),
        weight_decay=(0.0, 0.1),
        attentive_heads=4,
        epochs=4,
        batch_size=16,
        warmup_epochs=1.0,
        clip_grad=0.5,
    )
    candidates = encoder_candidates(config, toy_model(), 4)
    columns = list(dict.fromkeys(one.features for one in configs(candidates)))
    seen = [columns.index(one.features) for one in configs(candidates)]
    plan, generator = config.schedule(64), torch.Generator().manual_seed(0)
    batches = [
        (
            tuple(torch.randn(16, *(() if c.pooled else (9,)), 32, generator=generator) for c in columns),
            torch.randint(4, (16,), generator=generator),
        )
        for _ in range(plan.steps)
    ]
    heads = [one.create(32, 4, seed=0) for one in candidates]
    grid = Grid(heads, candidates, seen, config, plan)
    for step, (features, labels) in enumerate(batches):
        grid.learn(features, labels, step)
    grid.finish()
    diverged = 0
    for one, column, head in zip(candidates, seen, heads, strict=True):
        alone = one.create(32, 4, seed=0)
        groups = parameter_groups(alone, one.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=one.lr, betas=(0.9, 0.95), fused=True)
        for step, (features, labels) in enumerate(batches):
            rate = {"start": one.lr / 10, "end": 1e-5, "warmup_steps": plan.warmup_steps}
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, peak=one.lr, total_steps=plan.steps, **rate)
            F.cross_entropy(alone(features[column]), labels).backward()
            nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        for name, value in alone.state_dict().items():
            torch.testing.assert_close(head.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)
        diverged += not all(value.isfinite().all() for value in alone.state_dict().values())
    assert 0 < diverged < len(heads)


def test_a_heads_first_weights_depend_on_seed_and_kind_alone_and_leave_the_global_generator():
    (one, *_, other) = encoder_candidates(settings(heads=("linear",)), toy_model(), 4)
    before = torch.random.get_rng_state()
    weights = [c.create(32, 4, seed).linear.weight for c, seed in ((one, 0), (other, 0), (one, 1))]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.random.get_rng_state(), before)
