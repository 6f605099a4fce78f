"""The model: what is exact, what is left out, who sees whom, and what is refused.

`slow_prediction` is the definition: all blocks kept, tokens in raster order, a mask made of loops, rows
chosen afterwards.
"""

from typing import Any

import jaxtyping
import pytest
import torch
from timm.layers import DropPath
from torch.nn.functional import cross_entropy, gelu
from torch.testing import assert_close

from nextblock.blocks import normalize_blocks, patchify
from nextblock.models import NextBlockModel
from toy import tiny_images, tiny_model

IMAGES = tiny_images()
ORDER = torch.tensor([3, 0, 5, 1, 4, 2])
PREFIX = torch.tensor([3, 5])
MLP = {"predictor": "mlp", "predictor_depth": 3}
SINGLE = {"image_size": (8, 12), "block_size": 1}
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
OBLONG = {"image_size": (24, 16), "block_size": (3, 1)}  # 2x4 blocks of 3x1 patches
DROP_PATH = {"drop_path": 0.6, "depth": 4}
DRAWS = torch.rand(7, 2 * 4, generator=torch.Generator().manual_seed(1))
NEPA = {
    "target": "embedding",
    "predictor": "identity",
    "class_token": True,
    "positions": "rope",
    "num_heads": 2,
}
TOKENS = {"target": "tokens", "vocab_size": 7}


@pytest.fixture
def unchecked():
    """Annotations unchecked, as users have them: what is wrong reaches the code."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def token_model(**changes):
    model: Any = tiny_model(**TOKENS, **changes)
    model.targets.fit(torch.randn(100, 48, generator=torch.Generator().manual_seed(1)), seed=0)
    return model


def slow_mask(config, order, lengths):
    """Positions of the patches' blocks in the order, and (b n n): True where query q may attend to key t."""
    (_, columns), block_columns = config.grid, config.block_grid[1]
    height, width = config.block_px[0] // config.patch_size, config.block_px[1] // config.patch_size
    of_patch = [
        (n // columns // height) * block_columns + n % columns // width for n in range(config.num_patches)
    ]
    positions = [list(order).index(number) for number in of_patch]
    mask = [[[t <= q or t < length for t in positions] for q in positions] for length in lengths]
    return positions, torch.tensor(mask)


def slow_encoder(model, images, mask):
    hidden = model.encoder.patch_embed(images) + model.encoder.pos_embed
    for layer in model.encoder.blocks:
        hidden = layer(hidden, attn_mask=mask)
    return model.encoder.norm(hidden)


def slow_encoding(model, images, order=None):
    _, mask = slow_mask(model.config, order or range(model.config.num_blocks), [0])
    return slow_encoder(model, images, mask)


def slow_predictor(model, tokens, mask):
    """Every token, of use or not, in raster order."""
    config, predictor = model.config, model.predictor
    if config.predictor == "linear":
        return tokens
    hidden = predictor.projection(tokens) + predictor.pos_embed
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


def slow_prediction(model, images, order=None, prefix=None):
    """Loss, and for each distance a dict {(image, row): prediction}; see the module's docstring."""
    config, k = model.config, model.config.num_blocks
    order = list(range(k)) if order is None else order.tolist()
    lengths = [0] * len(images) if prefix is None else prefix.tolist()
    positions, mask = slow_mask(config, order, lengths)
    hidden = slow_predictor(model, slow_encoder(model, images, mask[:, None]), mask[:, None])
    pixels = patchify(images, config.block_px)
    pixels = normalize_blocks(pixels) if config.norm_pixels else pixels
    means, rows = [], []
    for distance, mlp in enumerate(model.predictor.block_mlps, start=1):
        losses, predictions = [], {}
        for image, length in enumerate(lengths):
            for row in range(max(0, length - distance), k - distance):
                tokens = [hidden[image, n] for n in range(len(positions)) if positions[n] == row]
                joined = torch.stack([token[c] for c in range(hidden.shape[-1]) for token in tokens])
                predictions[image, row] = mlp(joined)
                off = predictions[image, row] - pixels[image, order[row + distance]]
                losses.append((off.square() if config.loss == "mse" else off.abs()).mean())
        means.append(torch.stack(losses).mean())
        rows.append(predictions)
    return torch.stack(means).mean(), rows


def gradients(model, loss):
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    names, parameters = zip(*named, strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


CASES = {
    "plain": ({}, None, None),
    "random order": ({"order": "random"}, ORDER, None),
    "prefix": ({}, None, PREFIX),
    "oblong blocks": (OBLONG, torch.tensor([6, 2, 0, 7, 1, 3, 5, 4]), torch.tensor([0, 7])),
    "two distances": ({"num_predicted_blocks": 2}, ORDER, PREFIX),
    "all distances": ({"num_predicted_blocks": 5}, None, PREFIX),
    "l1": ({"loss": "l1"}, None, None),
    "raw pixels": ({"norm_pixels": False}, ORDER, None),
    "single patches": (SINGLE, None, torch.tensor([1, 5])),
    "drop path": (DROP_PATH, ORDER, PREFIX),
    "mlp, drop path": ({**MLP, **DROP_PATH}, ORDER, PREFIX),
    "mlp": (MLP, None, PREFIX),
    "mlp on oblong blocks": ({**MLP, **OBLONG}, None, torch.tensor([0, 7])),
    "mlp, all distances": ({**MLP, "num_predicted_blocks": 5}, ORDER, PREFIX),
    "linear": ({"predictor": "linear"}, ORDER, PREFIX),
    "linear, an MLP for a block": ({"predictor": "linear", "block_mlp_dim": None}, None, PREFIX),
    "transformer after one linear map": (ONE_MAP, ORDER, PREFIX),
    "aim": (AIM, None, torch.tensor([1, 5])),
    "aim on blocks": ({**AIM, "image_size": (16, 24), "block_size": 2}, ORDER, PREFIX),
    "aim with a transformer": ({**AIM, "predictor": "transformer"}, None, torch.tensor([4, 2])),
}


@pytest.mark.parametrize("case", CASES)
def test_the_loss_and_its_gradients_are_those_of_the_slow_definition(case):
    changes, order, prefix = CASES[case]
    model = tiny_model(**changes).train("drop path" in case)
    images = tiny_images(size=model.config.image_size)
    torch.manual_seed(5)  # drop path draws one number an image and layer, however many tokens there are
    out = model(images, order, prefix)
    torch.manual_seed(5)
    expected, rows = slow_prediction(model, images, order, prefix)

    assert_close(out.loss, expected, atol=1e-6, rtol=1e-6)
    for part, predictions in zip(out.distances, rows, strict=True):
        assert part.kept.nonzero().tolist() == [list(row) for row in predictions]
        for values in (part.predictions, part.targets, part.block_loss):
            assert not values[~part.kept].any()
        for row, prediction in predictions.items():
            assert_close(part.predictions[row], prediction, atol=1e-4, rtol=1e-4)
    slow = gradients(model, expected)
    for name, gradient in gradients(model, out.loss).items():
        size = max(1.0, float(slow[name].abs().max()))
        assert_close(gradient, slow[name], atol=2e-5 * size, rtol=1e-3, msg=name)


def test_a_branch_is_kept_if_its_number_is_at_least_its_layers_rate_and_scaled_by_its_chance():
    model: Any = tiny_model(**DROP_PATH).train()
    images, rates = tiny_images(7), [0.6 * layer / 3 for layer in range(4)]
    hidden = model.encoder.patch_embed(images) + model.encoder.pos_embed
    _, mask = slow_mask(model.config, range(6), [0])
    kept = 0
    for number, (rate, layer) in enumerate(zip(rates, model.encoder.blocks, strict=True)):
        for branch in (0, 1):
            keeps = DRAWS[:, 2 * number + branch] >= rate
            kept += int(keeps.sum())
            run = layer.mlp(layer.norm2(hidden)) if branch else layer.attn(layer.norm1(hidden), mask[0])
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
    with pytest.raises(ValueError, match=r"drop_path has shape \(7, 3\); .* \(7, 8\)"):
        model(images, drop_path=DRAWS[:, :3])


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
    assert out.predictions.shape == out.targets.shape == (2, config.num_blocks - 1, config.block_values)


@pytest.mark.parametrize("changes", [{}, OBLONG, {"block_size": (1, 6)}, SINGLE], ids=str)
@pytest.mark.parametrize("kind", ["raster", "random"])
@pytest.mark.parametrize("with_prefix", [False, True])
def test_no_later_block_reaches_an_earlier_prediction(changes, kind, with_prefix):
    model = tiny_model(**changes)
    k = model.config.num_blocks
    order = torch.arange(k) if kind == "raster" else torch.randperm(k, generator=torch.manual_seed(0))
    images = tiny_images(size=model.config.image_size).requires_grad_()
    out = model(images, order, torch.tensor([k // 2, 0]) if with_prefix else None)
    for row in range(k - 1):
        output = out.predictions[:, row].square().sum()
        (gradient,) = torch.autograd.grad(output, images, retain_graph=True)
        reached = patchify(gradient, model.config.block_px).abs().amax(-1)[:, order] > 0
        assert torch.equal(reached, out.kept[:, row, None] & (torch.arange(k) <= row)), row


def test_a_model_of_random_orders_predicts_and_encodes_by_the_first():
    model = tiny_model(order="random", order_seed=4)
    assert model.orders[0].tolist() != list(range(6))
    assert torch.equal(model(IMAGES).predictions, model(IMAGES, model.orders[0]).predictions)
    expected = slow_encoding(model, IMAGES, model.orders[0].tolist())
    assert_close(model.encode(IMAGES).tokens, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("order", "lengths", "words"),
    [
        (None, [6, 0], r"0\.\.5 for each of 2 images \(an image has 6 blocks\), got \[6, 0\]"),
        (None, [-1, 0], r"0\.\.5"),
        (None, [1, 1, 1], r"for each of 2 images .* got \[1, 1, 1\]"),
        ([0, 1, 2, 3, 4, 4], None, r"permutation of 0\.\.5"),
        ([1, 2, 3, 4, 5, 6], None, r"permutation of 0\.\.5"),
        ([0, 1, 2], None, r"permutation of 0\.\.5"),
        ([[0, 1, 2, 3, 4, 5]], None, r"permutation of 0\.\.5"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_an_order_or_a_prefix_that_cannot_be_is_refused(order, lengths, words):
    order, lengths = (None if given is None else torch.tensor(given) for given in (order, lengths))
    with pytest.raises(ValueError, match=words):
        tiny_model()(IMAGES, order, lengths)


@pytest.mark.usefixtures("unchecked")
def test_images_of_bytes_or_other_channels_and_unknown_attention_are_refused_with_what_to_do():
    model: Any = tiny_model()
    for call in (model, model.encode):
        with pytest.raises(ValueError, match=r"torch\.uint8; divide by 255, subtract the mean"):
            call(IMAGES.byte())
        with pytest.raises(ValueError, match="images have 1 channel, the model takes 3"):
            call(IMAGES[:, :1])
    with pytest.raises(ValueError, match="attention is 'bidirectional'; it must be 'native', 'causal' or"):
        model.encode(IMAGES, attention="bidirectional")


@pytest.mark.parametrize("changes", [{}, {"predictor": "mlp", "num_predicted_blocks": 2}], ids=str)
@pytest.mark.parametrize("prefix", [None, PREFIX])
def test_the_loss_of_tokens_is_their_cross_entropy(changes, prefix):
    model, means = token_model(**changes), []
    out, tokens = model(IMAGES, ORDER, prefix), model.tokenizer(IMAGES).flatten(1)
    for distance, part in enumerate(out.distances, start=1):
        expected = tokens[:, model.patches_of_blocks[ORDER[distance:]]] * part.kept[..., None]
        assert torch.equal(part.targets, expected)
        assert not part.predictions[~part.kept].any()
        means.append(cross_entropy(part.predictions[part.kept].flatten(0, 1), expected[part.kept].flatten()))
    assert_close(out.loss, torch.stack(means).mean())
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_centroids_are_saved_with_the_model_under_the_name_that_files_have():
    fitted, fresh = token_model(), tiny_model(**TOKENS)
    with pytest.raises(ValueError, match="no centroids yet"):
        fresh(IMAGES)
    assert "tokenizer.centroids" in fitted.state_dict()
    fresh.load_state_dict(fitted.state_dict())
    assert torch.equal(fresh(IMAGES).loss, fitted(IMAGES).loss)
    assert tiny_model(predictor=None, **TOKENS).tokenizer is None
    assert fitted(tiny_images(size=(32, 16))).predictions.shape == (2, 7, 4, 7)


def own(kind, size=None, **changes):
    return {"predictor_attention": kind, "predictor_block_size": size, **changes}


@pytest.mark.parametrize(
    ("changes", "encoder", "predictor", "leaks"),  # blocks in patches
    [
        (own("full"), (2, 2), (4, 6), True),
        (own("causal"), (2, 2), (1, 1), True),
        (own("causal", **SINGLE), (1, 1), (1, 1), False),
        (own("block_causal", 4, image_size=(16, 32)), (2, 2), (4, 4), True),
        (own("block_causal", (1, 6), block_size=(2, 6)), (2, 6), (1, 6), False),
        (own("block_causal"), (2, 2), (2, 2), False),
        ({"encoder_attention": "full", "feature_attention": "full"}, (4, 6), (4, 6), True),
    ],
)
def test_own_masks_are_honoured_and_refused_in_training_if_they_leak(changes, encoder, predictor, leaks):
    model: Any = tiny_model(**changes)
    config, images, masks = model.config, tiny_images(size=model.config.image_size), []
    for rows, columns in (encoder, predictor):
        places = [divmod(n, config.grid[1]) for n in range(config.num_patches)]
        places = [(row // rows, column // columns) for row, column in places]
        masks.append(torch.tensor([[query >= key for key in places] for query in places]))
    hidden = slow_predictor(model, slow_encoder(model, images, masks[0]), masks[1])
    joined = hidden[:, model.patches_of_blocks].transpose(-1, -2).flatten(2)
    expected = model.predictor.block_mlps[0](joined)[:, :-1]
    assert_close(model(images).predictions, expected, atol=1e-4, rtol=1e-4)
    assert model.leaks == leaks
    if leaks:
        with pytest.raises(ValueError, match="tokens see the blocks they should predict"):
            model.train()(images)
    else:
        model.train()(images)
    with pytest.raises(ValueError, match="have no prefix"):
        model.eval()(images, prefix_lengths=torch.tensor([1, 1]))


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


@pytest.mark.parametrize(
    "changes", [{}, AIM, own("full"), TOKENS, {"positions": "rope", "num_heads": 2}], ids=str
)
def test_a_model_built_without_data_is_complete_once_its_weights_are_assigned(changes):
    whole = token_model() if changes is TOKENS else tiny_model(**changes)
    with torch.device("meta"):
        model = NextBlockModel(whole.config)
    model.load_state_dict(whole.state_dict(), assign=True)
    images = tiny_images(size=whole.config.image_size)
    assert torch.equal(model.eval()(images).predictions, whole(images).predictions)
    assert torch.equal(model.encode(images).tokens, whole.encode(images).tokens)
    assert torch.equal(model.to("cpu").encoder(images), whole.encoder(images))


def test_tables_are_made_anew_after_to_empty():
    model = tiny_model()
    expected, weights = model(IMAGES).loss, {name: t.clone() for name, t in model.state_dict().items()}
    model.to_empty(device="cpu")
    model.make_buffers()
    model.load_state_dict(weights)
    assert torch.equal(model(IMAGES).loss, expected)


@pytest.mark.parametrize(
    ("changes", "lengths", "breaks"),
    [({"drop_path": 0.2}, None, 0), (AIM, [1, 3], 1), (TOKENS, None, 0), (NEPA, None, 0)],
)
@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_compiled_step_has_one_graph_but_for_the_rows_of_a_prefix(changes, lengths, breaks):
    model = (token_model() if changes is TOKENS else tiny_model(**changes)).train()
    images, order = tiny_images(size=model.config.image_size), torch.arange(model.config.num_blocks)
    prefix = None if lengths is None else torch.tensor(lengths)
    draws = torch.rand(2, 4) if model.config.drop_path else None
    torch._dynamo.reset()
    assert torch._dynamo.explain(model)(images, order, prefix, draws).graph_break_count == breaks
