"""Embeddings, features, masked blocks: against loops; who sees whom; copying does not solve it."""

from typing import Any

import pytest
import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from torch.nn.functional import conv2d, cosine_similarity, interpolate, layer_norm
from torch.testing import assert_close

from nextblock.blocks import patchify
from nextblock.models.vit import rotary_positions
from test_next_block import gradients, slow_mask
from toy import tiny_images, tiny_model

IMAGES = tiny_images()
ORDERS = torch.tensor([[3, 0, 5, 1, 4, 2], [2, 4, 0, 5, 1, 3]])
PER_IMAGE = {"order": "per_image"}
SINGLE = {"image_size": (8, 12), "block_size": 1}
EMBEDDING = {"target": "embedding"}
FEATURES = {"target": "features", "teacher": "none", "teacher_dim": 5}
CLASS = {"class_token": True}
ROPE = {"positions": "rope", "num_heads": 2, "qk_norm": "scale", "layer_scale": 0.5}
MASKED = {"mask_ratio": 0.5, "order": "per_image", "feature_attention": "full"}
IDENTITY = {**EMBEDDING, "predictor": "identity"}
KERNEL = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3)) / 8


def teacher(images):
    """Linear features on a grid of its own, half as fine as the model's."""
    return conv2d(images, KERNEL, stride=8)


def model_of(**changes) -> Any:
    model: Any = tiny_model(**changes)
    if model.config.target == "features":
        model.targets.teacher = teacher
    return model


def timms_rope(head_dim, grid):
    return RotaryEmbeddingDinoV3(head_dim, 100.0, rotate_half=True).get_embed(list(grid))


def slow_tokens(model, image, order):
    """One image's embedded patches, its tokens (class token, then raster order), its patches' positions."""
    config, encoder = model.config, model.encoder
    positions, mask = slow_mask(config, order, [0])
    embedded = encoder.patch_embed.proj(image[None]).flatten(2).transpose(1, 2)
    hidden, mask, rope = embedded, mask[0], {}
    if config.mask_ratio is not None:
        hidden = hidden.clone()
        masked = [n for n, position in enumerate(positions) if position >= config.steps(0).position]
        hidden[0, masked] = model.mask_token
        mask = torch.ones_like(mask)
    if config.positions == "rope":
        rope = {"rope": timms_rope(config.embed_dim // config.num_heads, config.grid)}
    else:
        hidden = hidden + encoder.pos_embed
    if config.class_token:
        hidden = torch.cat([encoder.cls_token, hidden], dim=1)
        # It sees itself alone, and all see it.
        mask = torch.tensor([[True] + [False] * len(positions)] + [[True, *row] for row in mask.tolist()])
    for layer in encoder.blocks:
        hidden = layer(hidden, attn_mask=mask, **rope)
    return embedded, encoder.norm(hidden), positions


def slow_loss(model, images, orders):
    """The loss, block by block, and the predictions of every distance by (image, row)."""
    config, k, m = model.config, model.config.num_blocks, model.config.patches_per_block
    behind = int(config.class_token)
    losses: list[list[Any]] = [[] for _ in config.distances]
    for number, image in enumerate(images):
        order = orders[number].tolist()
        embedded, tokens, positions = slow_tokens(model, image, order)
        of_position = [[n for n, p in enumerate(positions) if p == position] for position in range(k)]
        if config.target == "embedding":
            targets = embedded[0].detach()
        else:
            targets = interpolate(teacher(image[None]), size=config.grid, mode="bilinear")[0]
            targets = targets.flatten(1).T
        # The class token stands for a whole block before the first.
        tokens = torch.cat([tokens[:, :behind].expand(-1, m * behind, -1), tokens[:, behind:]], dim=1)
        front = m * behind
        if config.predictor in ("transformer", "mlp"):
            predictor = model.predictor
            places = torch.zeros(front + len(positions), config.predictor_dim)
            for n in range(len(positions)):
                places[front + n] = predictor.pos_embed[0, n]
            if config.target_positions:
                for position in range(-behind, k - 1):
                    mine = range(m) if position < 0 else [front + n for n in of_position[position]]
                    for own, theirs in zip(mine, of_position[position + 1], strict=True):
                        places[own] = places[own] + predictor.target_embed[0, theirs]
            at = torch.tensor([-1] * front + positions)
            allowed = at[:, None] >= at[None]
            allowed = torch.ones_like(allowed) if config.mask_ratio is not None else allowed
            hidden = predictor.projection(tokens) + places
            for layer in predictor.blocks:
                hidden = layer(hidden, **({"attn_mask": allowed} if predictor.mixes_tokens else {}))
            tokens = predictor.norm(hidden)
        for which, distance in enumerate(config.distances):
            for position in range(k):
                stands = position - distance
                is_hidden = position >= config.steps(0).position
                if not -behind <= stands < k - 1 and not (config.mask_ratio and is_hidden):
                    continue
                if config.mask_ratio and not is_hidden:
                    continue
                mine = range(m) if stands < 0 else [front + n for n in of_position[stands]]
                made = torch.stack([tokens[0, n] for n in mine])
                if config.predictor != "identity":
                    made = model.predictor.block_mlps[which](made.T.flatten()).view(m, -1)
                true = targets[of_position[position]]
                off = 1 - cosine_similarity(made, true, dim=-1).mean()
                losses[which].append(off * (2 if config.target == "features" else 1))
    return torch.stack([torch.stack(part).mean() for part in losses]).mean()


CASES = {
    "embedding": EMBEDDING,
    "embedding, class token": {**EMBEDDING, **CLASS},
    "embedding, mlp, per image": {**EMBEDDING, **CLASS, **PER_IMAGE, "predictor": "mlp"},
    "embedding, linear, single": {**EMBEDDING, **SINGLE, "predictor": "linear"},
    "embedding, two distances": {**EMBEDDING, **CLASS, "num_predicted_blocks": 2, **PER_IMAGE},
    "identity": {**IDENTITY, **CLASS, **PER_IMAGE, **ROPE},
    "identity, no class token": {**IDENTITY, "order": "column"},
    "nepa": {**IDENTITY, **CLASS, **SINGLE, **ROPE, "qk_norm": "plain"},
    "rope": {**EMBEDDING, **ROPE, **PER_IMAGE},
    "features": {**FEATURES, **PER_IMAGE},
    "features, class token": {**FEATURES, **CLASS, **SINGLE, "predictor": "mlp", **ROPE},
    "features, visible": {**FEATURES, **CLASS, **PER_IMAGE, "predict_visible": True},
    "features, visible, linear": {**FEATURES, "predict_visible": True, "predictor": "linear"},
    "positions": {**FEATURES, **PER_IMAGE, "target_positions": True, "predict_visible": True},
    "positions, class token": {**EMBEDDING, **CLASS, **PER_IMAGE, "target_positions": True},
    "positions, mlp": {**EMBEDDING, **CLASS, **SINGLE, "target_positions": True, "predictor": "mlp"},
    "masked": {**EMBEDDING, **MASKED},
    "masked features": {**FEATURES, **MASKED, **ROPE, "predictor": "mlp"},
    "masked, one map": {**EMBEDDING, **MASKED, **SINGLE, "predictor": "linear", "mask_ratio": 0.75},
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_of_vectors_are_those_of_the_loops(case):
    model = model_of(**CASES[case])
    images = tiny_images(size=model.config.image_size)
    is_own = model.config.order == "per_image"
    out = model(images, ORDERS if is_own else None)
    expected = slow_loss(model, images, ORDERS if is_own else model.orders.expand(2, -1))
    assert_close(out.loss, expected, atol=1e-6, rtol=1e-6)
    slow = gradients(model, expected)
    for name, gradient in gradients(model, out.loss).items():
        size = max(1.0, float(slow[name].abs().max()))
        assert_close(gradient, slow[name], atol=2e-5 * size, rtol=1e-3, msg=name)


def test_nepas_objective_is_ours_less_one():
    model = model_of(**CASES["nepa"], norm_eps=1e-5)
    images, encoder = tiny_images(3, (8, 12)), model.encoder
    clean = torch.stack([encoder.patch_embed.proj.weight.flatten(1) @ p for p in patchify(images, (4, 4)).mT])
    clean = clean.mT + encoder.patch_embed.proj.bias
    hidden = torch.cat([encoder.cls_token.expand(3, -1, -1), clean], dim=1)
    rope = timms_rope(12, (2, 3))
    for layer in encoder.blocks:
        hidden = layer(hidden, rope=rope, is_causal=True)
    hidden = layer_norm(hidden, (24,), encoder.norm.weight, encoder.norm.bias, 1e-5)
    one, other = (x / x.norm(dim=-1, keepdim=True) for x in (hidden[:, :-1], clean.detach()))
    loss = -(one * other).sum(-1).mean()
    assert_close(model(images).loss - 1, loss, atol=1e-6, rtol=0)
    theirs = gradients(model, loss)
    for name, gradient in gradients(model, model(images).loss).items():
        assert_close(gradient, theirs[name], atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        IDENTITY,
        {**IDENTITY, **CLASS, **ROPE},
        {**EMBEDDING, **CLASS, "num_predicted_blocks": 3},
        {**EMBEDDING, **PER_IMAGE, **CLASS, "target_positions": True},
        {**EMBEDDING, **SINGLE, **PER_IMAGE, "predictor": "mlp"},
        {**FEATURES, **PER_IMAGE, "predict_visible": True, "target_positions": True},
        {**FEATURES, **CLASS, "predict_visible": True, "num_predicted_blocks": 2},
        {**FEATURES, **CLASS, **PER_IMAGE, **ROPE, "predict_visible": True},
        {**EMBEDDING, **MASKED},
        {**FEATURES, **MASKED, **ROPE, "mask_ratio": 0.3},
        {**MASKED, "predictor": "mlp"},
    ],
    ids=str,
)
def test_a_row_sees_the_blocks_up_to_where_it_stands_and_no_masked_one(changes):
    model = model_of(**changes)
    config, k = model.config, model.config.num_blocks
    orders = ORDERS if config.order == "per_image" else torch.arange(k).expand(2, -1)
    images = tiny_images(size=config.image_size).requires_grad_()
    out = model(images, ORDERS if config.order == "per_image" else None)
    for distance, part in zip(config.distances, out.distances, strict=True):
        which = config.steps(distance)
        assert part.predictions.shape[1] == which.number > 0
        for step in range(which.number):
            output = part.predictions[:, step].square().sum()
            (gradient,) = torch.autograd.grad(output, images, retain_graph=True)
            reached = patchify(gradient, config.block_px).abs().amax(-1).gather(1, orders) > 0
            seen = which.position + step - distance + 1 if config.mask_ratio is None else which.position
            assert torch.equal(reached, (torch.arange(k) < seen).expand(2, -1)), (distance, step)


def test_no_gradient_reaches_the_targets():
    model = model_of(**EMBEDDING)
    assert not model.targets_of(IMAGES, ORDERS).requires_grad
    weight = model.encoder.patch_embed.proj.weight
    (found,) = torch.autograd.grad(model(IMAGES).loss, weight)
    # The same targets from a copy: all that is left is the input's part.
    other, embedded = model_of(**EMBEDDING), model.encoder.patch_embed.proj(IMAGES).detach().flatten(2).mT
    make = other.targets.of_blocks
    other.targets.of_blocks = lambda images, order, _: make(images, order, embedded)
    (expected,) = torch.autograd.grad(other(IMAGES).loss, other.encoder.patch_embed.proj.weight)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("grid", [(2, 3), (5, 1), (7, 7)])
def test_rotary_positions_are_those_of_timm_and_a_scale_stretches_them(grid):
    assert_close(rotary_positions(grid, 16), timms_rope(16, grid))
    # Half the angles: sin 2a = 2 sin a cos a.
    sines, cosines = rotary_positions(grid, 16, torch.tensor(0.5)).chunk(2, dim=1)
    assert_close(rotary_positions(grid, 16)[:, :16], 2 * sines * cosines, atol=1e-5, rtol=1e-5)
    model = model_of(**CASES["nepa"])
    images = tiny_images(2, (8, 12))
    assert not torch.equal(model(images, rope_scale=torch.tensor(1.5)).loss, model(images).loss)


@pytest.mark.parametrize("changes", [{**ROPE, **CLASS}, {**ROPE, "layer_scale": None}, CLASS], ids=str)
@torch.no_grad()
def test_the_encoder_by_itself_is_encoding_without_a_mask(changes):
    model = model_of(**changes)
    q = int(model.config.class_token)
    found, alone = model.encode(IMAGES, "full"), model.encoder(IMAGES)
    assert_close(alone[:, q:], found.tokens, atol=1e-5, rtol=1e-5)
    assert found.has_class_token == bool(q) == (len(found.prefix) == 2)
    if q:
        assert_close(alone[:, :1], model.final_norm(found.prefix[-1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{**ROPE, **CLASS, **PER_IMAGE}, CLASS], ids=str)
@torch.no_grad()
def test_causal_features_are_those_of_the_order_with_the_class_token_before_it(changes):
    model = model_of(**changes)
    found = model.encode(IMAGES, "causal")
    for number, image in enumerate(IMAGES):
        _, tokens, _ = slow_tokens(model, image, model.orders[0].tolist())
        assert_close(found.tokens[number], tokens[0, 1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{**EMBEDDING, **ROPE, "layer_scale": None}, EMBEDDING], ids=str)
def test_layers_add_in_fp32_under_autocast(changes):
    model, seen = model_of(**changes), []
    for layer in model.encoder.blocks:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(IMAGES)
        model.encode(IMAGES)
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("changes", [CLASS, MASKED, {**FEATURES, "predict_visible": True}], ids=str)
def test_a_prefix_is_refused_by_models_that_have_none(changes):
    with pytest.raises(ValueError, match="have no prefix; leave prefix_lengths out"):
        model_of(**changes)(IMAGES, ORDERS, torch.tensor([1, 2]))


@pytest.mark.parametrize("changes", [{}, EMBEDDING, FEATURES], ids=["pixels", "embedding", "features"])
@pytest.mark.parametrize("leaks", [False, True])
def test_noise_is_predicted_only_under_a_mask_that_shows_it(changes, leaks):
    """Why a mask's polarity matters: inverted, it shows what is to be predicted, and copying is learned."""
    one_layer = {"depth": 1, "embed_dim": 32, "num_heads": 2, "predictor": "linear", "block_mlp_dim": None}
    model = model_of(image_size=8, block_size=1, in_chans=1, **one_layer, **changes).train()
    if changes is FEATURES:  # of each patch alone: a coarser teacher would show one patch in the next
        kernel = KERNEL[:, :1, :4, :4]
        model.targets.teacher = lambda images: conv2d(images, kernel, stride=4)
    model.encoder.patch_embed.requires_grad_(requires_grad=False)
    if leaks:
        model.mask.fill_(value=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(80):
        loss = model(torch.randn(16, 1, 8, 8, generator=generator)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    targets = model.targets_of(torch.randn(256, 1, 8, 8, generator=generator), model.orders[0])
    references = {name: loss.mean().item() for name, loss in model.targets.reference_losses(targets).items()}
    share = sum(losses[-20:]) / 20 / references["mean" if changes else "zero"]
    assert share < 0.95 if leaks else share > 0.98
