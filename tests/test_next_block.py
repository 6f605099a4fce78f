"""The model: what is exact, what is left out, who sees whom, and what is refused.

`slow_prediction` is the definition of every objective: all blocks kept, tokens in raster order, a mask made
of loops, rows chosen afterwards.
"""

from itertools import product
from typing import Any

import jaxtyping
import pytest
import torch
from timm.layers import DropPath
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from torch.nn.functional import conv2d, cosine_similarity, cross_entropy, gelu, interpolate, pad
from torch.testing import assert_close

from nextblock.blocks import normalize_blocks, patchify
from nextblock.models import NextBlockModel
from nextblock.models.vit import rotary_positions
from toy import tiny_config, tiny_images, tiny_model

IMAGES = tiny_images()
ORDER = torch.tensor([3, 0, 5, 1, 4, 2])
ORDERS = torch.tensor([[3, 0, 5, 1, 4, 2], [2, 4, 0, 5, 1, 3]])
PREFIX = torch.tensor([3, 5])
DRAWS = torch.rand(7, 2 * 4, generator=torch.Generator().manual_seed(1))
KERNEL = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(3)) / 8

OBLONG = {"image_size": (24, 16), "block_size": (3, 1)}  # 2x4 blocks of 3x1 patches
OBLONG_ORDER, OBLONG_PREFIX = torch.tensor([6, 2, 0, 7, 1, 3, 5, 4]), torch.tensor([0, 7])
SINGLE = {"image_size": (8, 12), "block_size": 1}
MLP = {"predictor": "mlp", "predictor_depth": 3}
LINEAR = {"predictor": "linear"}
ONE_MAP = {"projection_dim": None, "block_mlp_dim": None}
AIM = {
    **SINGLE,
    **ONE_MAP,
    "patch_norm": True,
    "positions": "sincos",
    "bias": False,
    "weight_init": "xavier_uniform",
    "predictor": "mlp",
    "predictor_extra_norm": True,
    "feature_attention": "full",
}
FULL = {"encoder_attention": "full", "feature_attention": "full"}
DROP_PATH = {"drop_path": 0.6, "depth": 4}
PER_IMAGE = {"order": "per_image"}
MASKED = {"mask_ratio": 0.5, **PER_IMAGE, "feature_attention": "full"}
CLASS = {"class_token": True}
ROPE = {"positions": "rope", "num_heads": 2, "qk_norm": "scale", "layer_scale": 0.5}
TOKENS = {"target": "tokens", "vocab_size": 7}
EMBEDDING = {"target": "embedding"}
IDENTITY = {**EMBEDDING, "predictor": "identity"}
NEPA = {**IDENTITY, **CLASS, **SINGLE, **ROPE, "qk_norm": "plain"}
FEATURES = {"target": "features", "teacher": "none", "teacher_dim": 5}
VISIBLE = {**FEATURES, "predict_visible": True}
WHERE = {"target_positions": True}


@pytest.fixture
def unchecked():
    """Annotations unchecked, as users have them: what is wrong reaches the code."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def own(kind, size=None, **changes):
    """A mask of the predictor's own."""
    return {"predictor_attention": kind, "predictor_block_size": size, **changes}


def teacher(images):
    """Linear features on a grid of its own, half as fine as the model's."""
    return conv2d(images, KERNEL, stride=8)


def model_of(**changes) -> Any:
    """A tiny model whose tokenizer has centroids and whose targets have a teacher, if they need one."""
    model = tiny_model(**changes)
    targets: Any = model.targets
    if model.config.target == "tokens":
        targets.fit(torch.randn(100, 48, generator=torch.Generator().manual_seed(1)), seed=0)
    if model.config.target == "features":
        targets.teacher = teacher
    return model


def slow_positions(config, order):
    """The position in an order of each patch's block."""
    (_, columns), block_columns = config.grid, config.block_grid[1]
    height, width = config.block_px[0] // config.patch_size, config.block_px[1] // config.patch_size
    places = [divmod(n, columns) for n in range(config.num_patches)]
    return [list(order).index(row // height * block_columns + column // width) for row, column in places]


def slow_mask(positions, length=0):
    """(n n): True where query q may attend to key t: its own block, earlier ones, and a prefix."""
    return torch.tensor([[t <= q or t < length for t in positions] for q in positions])


def timms_rope(config):
    rope = RotaryEmbeddingDinoV3(config.embed_dim // config.num_heads, 100.0, rotate_half=True)
    return rope.get_embed(list(config.grid))


def slow_encoder(model, images, mask, masked=None):
    """The class token and all patches, in raster order; `masked` patches are not seen."""
    config, encoder, rope = model.config, model.encoder, {}
    hidden = encoder.patch_embed(images)
    if masked is not None:
        hidden = torch.where(masked[..., None], model.mask_token, hidden)
    if config.positions == "rope":
        rope = {"rope": timms_rope(config)}
    else:
        hidden = hidden + encoder.pos_embed
    if config.class_token:
        hidden = torch.cat([encoder.cls_token.expand(len(images), -1, -1), hidden], dim=1)
    for layer in encoder.blocks:
        hidden = layer(hidden, attn_mask=mask, **rope)
    return encoder.norm(hidden)


def slow_encoding(model, images, order=None):
    """All tokens under the mask of an order; a class token sees itself alone, and all see it."""
    config = model.config
    positions = slow_positions(config, range(config.num_blocks) if order is None else order)
    return slow_encoder(model, images, slow_mask([-1] * config.class_token + positions))


def slow_predictor(model, tokens, mask, places=0):
    """Every token, of use or not, in raster order; `places` are of the targets, if it is told them."""
    config, predictor = model.config, model.predictor
    if config.predictor in ("linear", "identity"):
        return tokens
    front = tokens.shape[1] - config.num_patches
    hidden = predictor.projection(tokens) + pad(predictor.pos_embed, (0, 0, front, 0)) + places
    for layer in predictor.blocks:
        if config.predictor == "transformer":
            hidden = layer(hidden, attn_mask=mask)
            continue
        if config.predictor_extra_norm:
            hidden = hidden + layer.norm1(hidden)
        first, second = layer.mlp.fc1, layer.mlp.fc2
        inner = gelu(layer.norm2(hidden) @ first.weight.T + (first.bias if config.bias else 0))
        hidden = hidden + inner @ second.weight.T + (second.bias if config.bias else 0)
    return predictor.norm(hidden)


def slow_targets(model, images):
    """The target of every block, in raster order."""
    config = model.config
    if config.target == "pixels":
        pixels = patchify(images, config.block_px)
        return normalize_blocks(pixels) if config.norm_pixels else pixels
    if config.target == "embedding":
        of_patch = model.encoder.patch_embed(images).detach()
    elif config.target == "tokens":
        of_patch = model.tokenizer(images).flatten(1)
    else:
        of_patch = interpolate(teacher(images), size=config.grid, mode="bilinear").flatten(2).mT
        of_patch = of_patch / of_patch.norm(dim=-1, keepdim=True)
    return of_patch[:, model.patches_of_blocks]


def slow_loss(config, prediction, true):
    if config.target == "tokens":
        return cross_entropy(prediction, true)
    if config.target == "pixels":
        return ((prediction - true).square() if config.loss == "mse" else (prediction - true).abs()).mean()
    cosine = cosine_similarity(prediction, true, dim=-1).mean()
    return (1 - cosine) * (2 if config.target == "features" else 1)


def slow_prediction(model, images, order=None, prefix=None):
    """The loss, and for each distance a dict {(image, row): (prediction, target)}."""
    config, k, m = model.config, model.config.num_blocks, model.config.patches_per_block
    q, is_masked = int(config.class_token), config.mask_ratio is not None
    orders = (model.orders[0] if order is None else order).expand(len(images), -1).tolist()
    lengths = [0] * len(images) if prefix is None else prefix.tolist()
    hidden_from = config.steps(0).position if is_masked else k
    positions = [slow_positions(config, order) for order in orders]

    def masks(front):
        pairs = zip(positions, [k] * len(images) if is_masked else lengths, strict=True)
        return torch.stack([slow_mask([-1] * front + image, length)[None] for image, length in pairs])

    def at(image, position):
        """The tokens of a block for the predictor, where the class token is a block before the first."""
        return [n for n, other in enumerate([-1] * m * q + positions[image]) if other == position]

    masked = torch.tensor(positions) >= hidden_from if is_masked else None
    tokens = slow_encoder(model, images, masks(q), masked)
    tokens = torch.cat([tokens[:, :q].expand(-1, m * q, -1), tokens[:, q:]], dim=1)
    places: Any = 0
    if config.target_positions:
        places = torch.zeros(*tokens.shape[:2], config.predictor_dim)
        for image, position in product(range(len(images)), range(-q, k - 1)):
            ahead = [n - m * q for n in at(image, position + 1)]
            places[image, at(image, position)] = model.predictor.target_embed[0, ahead]
    hidden = slow_predictor(model, tokens, masks(m * q), places)

    targets, means, rows = slow_targets(model, images), [], []
    for distance, mlp in zip(config.distances, model.predictor.block_mlps, strict=True):
        # Nothing is predicted from the last block, and of masked blocks each predicts itself.
        first, end = (hidden_from, k) if is_masked else (max(0, distance - q), k - (distance == 0))
        losses, found = [], {}
        for image, length in enumerate(lengths):
            for position in range(max(first, length), end):
                prediction = mlp(hidden[image, at(image, position - distance)].T.flatten())
                prediction = prediction if config.target == "pixels" else prediction.view(m, -1)
                true = targets[image, orders[image][position]]
                losses.append(slow_loss(config, prediction, true))
                found[image, position - first] = prediction, true
        means.append(torch.stack(losses).mean())
        rows.append(found)
    return torch.stack(means).mean(), rows


def gradients(model, loss):
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    names, parameters = zip(*named, strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


# Settings, then an order and lengths of prefixes, if they are given.
CASES: dict[str, Any] = {
    "plain": ({},),
    "random order": ({"order": "random"}, ORDER),
    "prefix": ({}, None, PREFIX),
    "oblong blocks": (OBLONG, OBLONG_ORDER, OBLONG_PREFIX),
    "bands": ({"block_size": (1, 6)}, torch.tensor([2, 0, 3, 1]), torch.tensor([2, 0])),
    "two distances": ({"num_predicted_blocks": 2}, ORDER, PREFIX),
    "all distances": ({"num_predicted_blocks": 5}, None, PREFIX),
    "l1": ({"loss": "l1"},),
    "raw pixels": ({"norm_pixels": False}, ORDER),
    "single patches": (SINGLE, None, torch.tensor([1, 5])),
    "drop path": (DROP_PATH, ORDER, PREFIX),
    "mlp, drop path": ({**MLP, **DROP_PATH}, ORDER, PREFIX),
    "mlp": (MLP, None, PREFIX),
    "mlp on oblong blocks": ({**MLP, **OBLONG}, None, OBLONG_PREFIX),
    "mlp, all distances": ({**MLP, "num_predicted_blocks": 5}, ORDER, PREFIX),
    "linear": (LINEAR, ORDER, PREFIX),
    "linear, an MLP for a block": ({**LINEAR, "block_mlp_dim": None}, None, PREFIX),
    "transformer after one linear map": (ONE_MAP, ORDER, PREFIX),
    "aim": (AIM, None, torch.tensor([1, 5])),
    "aim on blocks": ({**AIM, "image_size": (16, 24), "block_size": 2}, ORDER, PREFIX),
    "aim with a transformer": ({**AIM, "predictor": "transformer"}, None, torch.tensor([4, 2])),
    "tokens": (TOKENS, ORDER),
    "tokens, mlp, two distances": ({**TOKENS, **MLP, "num_predicted_blocks": 2}, ORDER, PREFIX),
    "embedding": (EMBEDDING,),
    "embedding, class token": ({**EMBEDDING, **CLASS},),
    "embedding, mlp, per image": ({**EMBEDDING, **CLASS, **PER_IMAGE, "predictor": "mlp"}, ORDERS),
    "embedding, linear, single": ({**EMBEDDING, **SINGLE, **LINEAR},),
    "embedding, two distances": ({**EMBEDDING, **CLASS, "num_predicted_blocks": 2, **PER_IMAGE}, ORDERS),
    "identity": ({**IDENTITY, **CLASS, **PER_IMAGE, **ROPE}, ORDERS),
    "identity, no class token": ({**IDENTITY, "order": "column"},),
    "nepa": (NEPA,),
    "rope": ({**EMBEDDING, **ROPE, **PER_IMAGE}, ORDERS),
    "features": ({**FEATURES, **PER_IMAGE}, ORDERS),
    "features, class token": ({**FEATURES, **CLASS, **SINGLE, "predictor": "mlp", **ROPE},),
    "features, visible": ({**VISIBLE, **CLASS, **PER_IMAGE}, ORDERS),
    "features, visible, linear": ({**VISIBLE, **LINEAR},),
    "positions": ({**VISIBLE, **PER_IMAGE, **WHERE}, ORDERS),
    "positions, class token": ({**EMBEDDING, **CLASS, **PER_IMAGE, **WHERE}, ORDERS),
    "positions, mlp": ({**EMBEDDING, **CLASS, **SINGLE, **WHERE, "predictor": "mlp"},),
    "features, visible, two distances": ({**VISIBLE, **CLASS, "num_predicted_blocks": 2},),
    "masked pixels": ({**MASKED, "predictor": "mlp"}, ORDERS),
    "masked": ({**EMBEDDING, **MASKED}, ORDERS),
    "masked features": ({**FEATURES, **MASKED, **ROPE, "predictor": "mlp"}, ORDERS),
    "masked, one map": ({**EMBEDDING, **MASKED, **SINGLE, **LINEAR, "mask_ratio": 0.75}, ORDERS),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_predictions_targets_and_gradients_are_those_of_the_slow_definition(case):
    changes, *given = CASES[case]
    model = model_of(**changes).train("drop path" in case)
    images = tiny_images(size=model.config.image_size)
    torch.manual_seed(5)  # drop path draws one number an image and layer, however many tokens there are
    out = model(images, *given)
    torch.manual_seed(5)
    expected, rows = slow_prediction(model, images, *given)

    assert_close(out.loss, expected, atol=1e-6, rtol=1e-6)
    for part, found in zip(out.distances, rows, strict=True):
        assert part.kept.nonzero().tolist() == [list(row) for row in found]
        for values in (part.predictions, part.targets, part.block_loss):
            assert not values[~part.kept].any()
        for row, (prediction, target) in found.items():
            assert_close(part.predictions[row], prediction, atol=1e-4, rtol=1e-4)
            assert_close(part.targets[row], target)
    slow = gradients(model, expected)
    for name, gradient in gradients(model, out.loss).items():
        size = max(1.0, float(slow[name].abs().max()))
        assert_close(gradient, slow[name], atol=2e-5 * size, rtol=1e-3, msg=name)


@pytest.mark.parametrize("case", [case for case in CASES if "drop path" not in case])
def test_a_row_sees_the_prefix_and_the_blocks_up_to_where_it_stands_and_no_masked_one(case):
    changes, *given = CASES[case]
    order, prefix = (*given, None, None)[:2]
    model = model_of(**changes)
    config, k = model.config, model.config.num_blocks
    lengths = torch.zeros(2, dtype=torch.int64) if prefix is None else prefix
    orders = (model.orders[0] if order is None else order).expand(2, -1)
    images = tiny_images(size=config.image_size).requires_grad_()
    out = model(images, order, prefix)
    for distance, part in zip(config.distances, out.distances, strict=True):
        which = config.steps(distance)
        assert part.predictions.shape[1] == which.number > 0
        for step in range(which.number):
            output = part.predictions[:, step].square().sum()
            (gradient,) = torch.autograd.grad(output, images, retain_graph=True)
            reached = patchify(gradient, config.block_px).abs().amax(-1).gather(1, orders) > 0
            stands = which.position + (step - distance + 1 if config.mask_ratio is None else 0)
            seen = torch.arange(k) < lengths.clamp(min=stands)[:, None]
            assert torch.equal(reached, part.kept[:, step, None] & seen), (distance, step)


def test_a_branch_is_kept_if_its_number_is_at_least_its_layers_rate_and_scaled_by_its_chance():
    model: Any = tiny_model(**DROP_PATH).train()
    images, rates = tiny_images(7), [0.6 * layer / 3 for layer in range(4)]
    hidden = model.encoder.patch_embed(images) + model.encoder.pos_embed
    mask, kept = slow_mask(slow_positions(model.config, range(6))), 0
    for number, (rate, layer) in enumerate(zip(rates, model.encoder.blocks, strict=True)):
        for branch in (0, 1):
            keeps = DRAWS[:, 2 * number + branch] >= rate
            kept += int(keeps.sum())
            run = layer.mlp(layer.norm2(hidden)) if branch else layer.attn(layer.norm1(hidden), mask)
            hidden = torch.where(keeps[:, None, None], hidden + run / (1 - rate), hidden)
    assert 28 < kept < 56, "some are dropped, some kept"
    seen = []
    model.encoder.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(images, drop_path=DRAWS)
    assert_close(seen[0], hidden[:, model.patches_of_blocks[:-1].flatten()])
    assert not any(isinstance(module, DropPath) for module in model.predictor.modules())


def test_draws_matter_in_training_only_and_without_them_the_global_generator_does():
    model, images = tiny_model(**DROP_PATH).train(), tiny_images(7)
    assert torch.equal(model(images, drop_path=DRAWS).loss, model(images, drop_path=DRAWS).loss)
    assert not torch.equal(model(images).loss, model(images).loss)
    model.eval()
    assert torch.equal(model(images, drop_path=DRAWS).loss, model(images).loss)


@pytest.mark.parametrize("kind", ["mlp", "linear", "transformer"])
def test_neither_the_last_block_nor_after_the_last_attention_any_that_does_not_count_is_computed(kind):
    model: Any = tiny_model(predictor=kind)
    config, predictor, rows = model.config, model.predictor, []
    attending = [*model.encoder.blocks, *(predictor.blocks if kind == "transformer" else [])]
    single = [*predictor.blocks] if kind == "mlp" else []
    for part in (*attending, *single, *predictor.block_mlps):
        part.register_forward_hook(lambda _, inputs, output: rows.append(inputs[0][..., 0].numel()))
    out = model(IMAGES, ORDER, PREFIX)
    count, m = int(out.kept.sum()), config.patches_per_block
    before_the_last = 2 * (config.num_blocks - 1) * m
    assert rows == [before_the_last] * len(attending) + [count * m] * len(single) + [count]


@pytest.mark.parametrize(
    ("changes", "given", "words"),
    [
        ({}, {"prefix_lengths": torch.tensor([6, 0])}, r"0\.\.5 for each .* has 6 blocks\), got \[6, 0\]"),
        ({}, {"prefix_lengths": torch.tensor([-1, 0])}, r"0\.\.5"),
        ({}, {"prefix_lengths": torch.tensor([1, 1, 1])}, r"for each of 2 images .* got \[1, 1, 1\]"),
        ({}, {"block_order": torch.tensor([0, 1, 2, 3, 4, 4])}, r"permutation of 0\.\.5"),
        ({}, {"block_order": torch.tensor([0, 1, 2])}, r"permutation of 0\.\.5"),
        ({}, {"block_order": torch.arange(6)[None]}, r"permutation of 0\.\.5"),
        (DROP_PATH, {"drop_path": DRAWS[:2, :3]}, r"drop_path has shape \(2, 3\); .* \(2, 8\)"),
        ({}, {"images": IMAGES.byte()}, r"torch\.uint8; divide by 255, subtract the mean"),
        ({}, {"images": IMAGES[:, :1]}, "images have 1 channel, the model takes 3"),
        ({}, {"attention": "both"}, "attention is 'both'; it must be 'native', 'causal' or"),
        (CLASS, {"prefix_lengths": PREFIX}, "have no prefix; leave prefix_lengths out"),
        (MASKED, {"prefix_lengths": PREFIX}, "have no prefix"),
        (VISIBLE, {"prefix_lengths": PREFIX}, "have no prefix"),
        (own("causal"), {"prefix_lengths": PREFIX}, "have no prefix"),
        (FULL, {"prefix_lengths": PREFIX}, "have no prefix"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_arguments_that_cannot_be_are_refused_with_what_to_do(changes, given, words):
    model: Any = tiny_model(**changes)
    with pytest.raises(ValueError, match=words):
        (model.encode if "attention" in given else model)(**{"images": IMAGES, **given})


def test_centroids_are_saved_with_the_model_under_the_name_that_files_have():
    fitted, fresh = model_of(**TOKENS), tiny_model(**TOKENS)
    with pytest.raises(ValueError, match="no centroids yet; fit it"):
        fresh(IMAGES)
    assert "tokenizer.centroids" in fitted.state_dict()
    fresh.load_state_dict(fitted.state_dict())
    assert torch.equal(fresh(IMAGES).loss, fitted(IMAGES).loss)
    assert tiny_model(predictor=None, **TOKENS).tokenizer is None
    assert fitted(tiny_images(size=(32, 16))).predictions.shape == (2, 7, 4, 7)


@pytest.mark.parametrize(
    ("changes", "encoder", "predictor", "leaks"),  # blocks in patches
    [
        (own("full"), (2, 2), (4, 6), True),
        (own("causal"), (2, 2), (1, 1), True),
        (own("causal", **SINGLE), (1, 1), (1, 1), False),
        (own("block_causal", 4, image_size=(16, 32)), (2, 2), (4, 4), True),
        (own("block_causal", (1, 6), block_size=(2, 6)), (2, 6), (1, 6), False),
        (own("block_causal"), (2, 2), (2, 2), False),
        (FULL, (4, 6), (4, 6), True),
    ],
)
def test_own_masks_are_honoured_and_refused_in_training_if_they_leak(changes, encoder, predictor, leaks):
    model: Any = tiny_model(**changes)
    config, images, masks = model.config, tiny_images(size=model.config.image_size), []
    for rows, columns in (encoder, predictor):
        places = [divmod(n, config.grid[1]) for n in range(config.num_patches)]
        masks.append(slow_mask([row // rows * 10 + column // columns for row, column in places]))
    hidden = slow_predictor(model, slow_encoder(model, images, masks[0]), masks[1])
    joined = hidden[:, model.patches_of_blocks].transpose(-1, -2).flatten(2)
    expected = model.predictor.block_mlps[0](joined)[:, :-1]
    assert_close(model(images).predictions, expected, atol=1e-4, rtol=1e-4)
    assert model.leaks == leaks
    model.train()
    if leaks:
        with pytest.raises(ValueError, match="tokens see the blocks they should predict"):
            model(images)
    else:
        model(images)


def test_the_scale_of_attention_is_the_one_given():
    plain: Any = tiny_model()
    same, other = tiny_model(qk_scale=8**-0.5), tiny_model(qk_scale=0.5)
    assert_close(same.encode(IMAGES).tokens, plain.encode(IMAGES).tokens)
    assert list(other.state_dict()) == list(plain.state_dict())
    with torch.no_grad():  # scores s q·k are those of queries that are s sqrt(width) times as long
        for layer in (*plain.encoder.blocks, *plain.predictor.blocks):
            queries = layer.attn.qkv.weight.shape[1]
            for part in (layer.attn.qkv.weight, layer.attn.qkv.bias):
                part[:queries] *= 0.5 * 8**0.5
    assert_close(other(IMAGES).predictions, plain(IMAGES).predictions, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("is_assigned", [True, False], ids=["assigned", "copied"])
@pytest.mark.parametrize(
    "changes", [{}, AIM, own("full"), TOKENS, {"positions": "rope", "num_heads": 2}], ids=str
)
def test_a_model_built_without_data_is_complete_once_it_has_its_weights(changes, is_assigned):
    whole = model_of(**changes)
    with torch.device("meta"):
        model = NextBlockModel(whole.config)
    if not is_assigned:
        model.to_empty(device="cpu")
        model.make_buffers()
    model.load_state_dict(whole.state_dict(), assign=is_assigned)
    images = tiny_images(size=whole.config.image_size)
    assert torch.equal(model.eval()(images).predictions, whole(images).predictions)
    assert torch.equal(model.encode(images).tokens, whole.encode(images).tokens)
    assert torch.equal(model.to("cpu").encoder(images), whole.encoder(images))


@pytest.mark.parametrize("grid", [(2, 3), (5, 1), (7, 7)])
def test_rotary_positions_are_those_of_timm_and_a_scale_stretches_them(grid):
    config = tiny_config(image_size=(4 * grid[0], 4 * grid[1]), block_size=1, num_heads=2, embed_dim=32)
    assert_close(rotary_positions(grid, 16), timms_rope(config))
    # Half the angles: sin 2a = 2 sin a cos a.
    sines, cosines = rotary_positions(grid, 16, torch.tensor(0.5)).chunk(2, dim=1)
    assert_close(rotary_positions(grid, 16)[:, :16], 2 * sines * cosines, atol=1e-5, rtol=1e-5)
    model = model_of(**ROPE)
    assert not torch.equal(model(IMAGES, rope_scale=torch.tensor(1.5)).loss, model(IMAGES).loss)


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


@pytest.mark.parametrize(
    "changes", [{"order": "random", "order_seed": 4}, {**ROPE, **CLASS, **PER_IMAGE}, CLASS], ids=str
)
@torch.no_grad()
def test_without_an_order_the_models_first_decides_what_is_seen_and_a_class_token_comes_before_it(changes):
    model = model_of(**changes)
    first, q = model.orders[0], int(model.config.class_token)
    assert (first.tolist() == list(range(6))) == (changes == CLASS)
    assert torch.equal(model(IMAGES).predictions, model(IMAGES, first).predictions)
    expected = slow_encoding(model, IMAGES, first.tolist())[:, q:]
    assert_close(model.encode(IMAGES, "causal").tokens, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", [{**EMBEDDING, **ROPE, "layer_scale": None}, EMBEDDING], ids=str)
def test_layers_add_in_fp32_under_autocast(changes):
    model, seen = model_of(**changes), []
    for layer in model.encoder.blocks:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(IMAGES)
        model.encode(IMAGES)
    assert set(seen) == {torch.float32}


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


@pytest.mark.parametrize(
    ("changes", "lengths", "breaks"),
    [
        ({"drop_path": 0.2}, None, 0),
        (AIM, [1, 3], 1),
        (TOKENS, None, 0),
        ({**IDENTITY, **CLASS, "positions": "rope", "num_heads": 2}, None, 0),
    ],
)
@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_compiled_step_has_one_graph_but_for_the_rows_of_a_prefix(changes, lengths, breaks):
    model = model_of(**changes).train()
    images, order = tiny_images(size=model.config.image_size), torch.arange(model.config.num_blocks)
    prefix = None if lengths is None else torch.tensor(lengths)
    draws = torch.rand(2, 4) if model.config.drop_path else None
    torch._dynamo.reset()
    assert torch._dynamo.explain(model)(images, order, prefix, draws).graph_break_count == breaks
