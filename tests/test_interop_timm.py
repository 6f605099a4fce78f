"""timm's format: what is written opens in timm and transformers as the same function, and comes back."""

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer

from nextblock.checkpoint import CheckpointError, read_data
from nextblock.config import DataConfig, ModelConfig, pair
from nextblock.errors import UsageError
from nextblock.evaluate.features import seeded
from nextblock.interop import initialize, load, load_model
from nextblock.interop.cards import Provenance
from nextblock.interop.convert import write_timm
from nextblock.interop.files import LoadOptions
from nextblock.interop.load import recorded_data
from nextblock.interop.timm import from_timm, is_timm_directory, read_timm, read_timm_weights
from nextblock.interop.timm_models import NextBlockViT
from nextblock.interop.timm_spec import open_timm_encoder, read_timm_data, timm_model, timm_settings
from nextblock.models import NextBlockModel
from nextblock.models.vit import positions_of
from nextblock.settings import to_dict
from toy import tiny_images, tiny_model

XTRA = ModelConfig(
    image_size=(16, 24), patch_size=4, block_size=2, embed_dim=24, depth=3, num_heads=3, predictor=None
)
AIM = replace(XTRA, block_size=1, positions="sincos", bias=False, patch_norm=True, feature_attention="full")
CONFIGS = {
    "xtra": XTRA,
    "xtra, random orders": replace(XTRA, order="random", order_seed=3, block_size=(2, 3)),
    "xtra, full attention": replace(XTRA, feature_attention="full"),
    "aim": AIM,
    "aim, as trained": replace(AIM, norm_eps=1e-5),
    "aim, causal": replace(AIM, feature_attention="causal", order="spiral"),
}
STOCK = ("xtra, full attention", "aim")
UNMASKED = replace(XTRA, block_size=1, feature_attention="full")
CLASS = replace(UNMASKED, class_token=True, layer_scale=0.1, qk_norm="scale")
NEWER = {
    "nepa": replace(CLASS, positions="rope", qk_norm="plain", norm_eps=1e-12),
    "rotary": replace(UNMASKED, positions="rope"),
    "rotary, normed": replace(UNMASKED, positions="rope", qk_norm="scale", norm_eps=1e-12),
    "class token": CLASS,
    "class token, patch norm": replace(AIM, class_token=True, norm_eps=1e-12),
}
"""Encoders with parts that nextblock_vit lacks."""
PREDICTOR = {"predictor": "transformer", "predictor_dim": 16, "predictor_heads": 2, "predictor_depth": 1}
DATA = DataConfig(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), val_resize_px=19)
FROM_TEST = Provenance(origin="a test", license="mit")
TINY_VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
PLAIN = {**TINY_VIT, "num_classes": 0, "class_token": False, "global_pool": "avg", "fc_norm": False}
IMAGES, SQUARE, LARGER = tiny_images(), tiny_images(size=(16, 16)), (32, 48)


def randomly_changed(model):
    """Evaluation mode, and every trained weight matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def encoder(config):
    with seeded(0):
        return randomly_changed(NextBlockModel(config))


def tiny_vit(**changes) -> Any:
    with seeded(1):
        return randomly_changed(VisionTransformer(**{**PLAIN, **changes}))


def masked_vit(**changes) -> Any:
    with seeded(0):
        return NextBlockViT(**{**TINY_VIT, "block_size": 2, **changes})


def written(model, directory, data=DATA, **settings):
    address = f"local-dir:{directory.name}"
    write_timm(model, directory, address=address, data=data, provenance=FROM_TEST, **settings)
    return directory


def opened(directory, **settings) -> Any:
    return timm.create_model(f"local-dir:{directory}", pretrained=True, **settings).eval()


def saved_by_timm(directory, **changes) -> Any:
    """A directory as timm's users write it."""
    with seeded(2):
        vit = randomly_changed(timm.create_model("vit_base_patch16_224", **{**PLAIN, **changes}))
    save_for_hf(vit, directory, model_args={**PLAIN, **changes}, safe_serialization="both")
    return vit


def changed_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def assert_same(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module", params=[*CONFIGS, *NEWER])
def case(request, tmp_path_factory):
    """A model of each kind, its class in timm, and where it is written without its predictor."""
    kind = request.param
    config = NEWER[kind] if kind in NEWER else replace(CONFIGS[kind], **PREDICTOR)
    timms = Eva if config.positions == "rope" else VisionTransformer
    model = encoder(config)
    directory = written(model, tmp_path_factory.mktemp("timm") / "out")
    return model, timms if kind in (*STOCK, *NEWER) else NextBlockViT, directory


def test_what_is_written_opens_in_timm_as_the_same_encoder_whose_head_and_channels_can_change(case):
    model, timms, directory = case
    vit, expected, q = opened(directory), model.encode(IMAGES), int(model.config.class_token)
    assert type(vit) is timms
    assert_same(vit.forward_features(IMAGES)[:, q:], expected.tokens)
    assert_same(vit(IMAGES), expected.tokens.mean(dim=1))
    # timm's epsilon is 1e-6: for a smaller one, tokens are larger by a power of two until the last norm.
    scale = 1024 if model.config.norm_eps < 1e-6 else 1
    layers = vit.forward_intermediates(IMAGES, output_fmt="NLC", intermediates_only=True)
    assert_same([torch.as_tensor(layer) / scale for layer in layers], list(expected.layers))
    # transformers gives num_classes itself, so it must not stand among the arguments
    assert "num_classes" not in json.loads((directory / "config.json").read_text())["model_args"]
    vit = opened(directory, num_classes=10)
    assert vit(IMAGES).shape == (2, 10)
    vit.reset_classifier(num_classes=5)
    assert vit(IMAGES).shape == (2, 5)
    maps = opened(directory, features_only=True, out_indices=[0, 2])(IMAGES)
    assert [m.shape for m in maps] == [(2, 24, 4, 6)] * 2
    assert opened(directory, in_chans=1).forward_features(IMAGES[:, :1]).shape == (2, q + 24, 24)


def test_it_comes_back_from_its_directory_or_a_weight_file_alone(case, tmp_path):
    model, _, directory = case
    alone, pickled = tmp_path / "alone.safetensors", tmp_path / "pickled"
    shutil.copy(directory / "model.safetensors", alone)
    pickled.mkdir()  # has no metadata, but the settings lie beside it
    shutil.copy(directory / "config.json", pickled)
    torch.save(load_file(alone), pickled / "pytorch_model.bin")
    assert is_timm_directory(directory)
    for src in (directory, directory / "model.safetensors", alone, pickled, pickled / "pytorch_model.bin"):
        found = load_model(src)
        assert found.config == replace(model.config, predictor=None)
        weights = zip(found.encoder.state_dict().items(), model.encoder.state_dict().items(), strict=True)
        assert all(one == other and torch.equal(w, v) for (one, w), (other, v) in weights)
        assert torch.equal(found.encode(IMAGES).tokens, model.encode(IMAGES).tokens)
    assert recorded_data(alone) == DATA


def test_newer_parts_that_timm_cannot_have_are_refused(tmp_path):
    causal = encoder(replace(CLASS, feature_attention="causal"))
    with pytest.raises(UsageError, match=r"timm has no mask for .*\(--attention full\)"):
        written(causal, tmp_path / "out")
    vit = opened(written(causal, tmp_path / "full", attention="full"))
    assert_same(vit.forward_features(IMAGES)[:, 1:], causal.encode(IMAGES, "full").tokens)
    with pytest.raises(UsageError, match=r"model\.norm_eps 1e-05 cannot be converted to it"):
        written(encoder(replace(CLASS, norm_eps=1e-5)), tmp_path / "out")
    with pytest.raises(UsageError, match=r"does not support model\.qk_scale"):
        written(encoder(replace(UNMASKED, qk_scale=0.5)), tmp_path / "out")
    file = tmp_path / "full" / "model.safetensors"
    weights, name = load_file(file), "blocks.1.attn.q_norm.bias"
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
    save_file(weights | {name: torch.ones(8)}, file, metadata)
    with pytest.raises(CheckpointError, match=f"{name} is not 0, and model"):
        load_model(tmp_path / "full")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", ["xtra", "aim", "aim, as trained"])
def test_transformers_opens_the_same_directory_as_the_same_function(name, tmp_path):
    from transformers import AutoModel

    model = encoder(CONFIGS[name])
    found = AutoModel.from_pretrained(written(model, tmp_path / "out")).eval()
    outputs, expected = found(IMAGES, output_hidden_states=True), model.encode(IMAGES)
    assert_same(outputs.last_hidden_state, expected.tokens)
    assert_same(outputs.pooler_output, expected.tokens.mean(dim=1))
    assert len(outputs.hidden_states) == 3


@torch.no_grad()
def test_the_golden_tokens_of_official_xtra_come_out_of_timm(golden_dir, golden, tmp_path):
    tensors = golden("xtra_k2")
    vit = opened(written(load(golden_dir / "xtra_k2.ckpt", num_heads=3), tmp_path / "out"))
    assert_same(vit.forward_features(tensors["images"]), tensors["encoder_tokens"], 1e-4)


def test_images_are_cut_and_normalised_in_timm_as_in_the_run(tmp_path):
    model = encoder(replace(XTRA, image_size=16, depth=1))
    for crop in ("center", "squash"):
        data, directory = replace(DATA, val_crop=crop), tmp_path / crop
        settings = resolve_model_data_config(opened(written(model, directory, data)))
        assert (tuple(settings["mean"]), tuple(settings["std"])) == (DATA.mean, DATA.std)
        assert settings["crop_mode"] == crop
        assert ("Resize(size=19, interpolation=bicubic" in str(create_transform(**settings))) == (
            crop == "center"
        )
        weights = directory / "model.safetensors"
        assert read_timm_data(directory) == read_timm_data(weights) == read_data(weights) == data
    for resize_px in range(16, 60, 3):  # timm rounds
        data = replace(DATA, val_resize_px=resize_px)
        assert read_timm_data(written(model, tmp_path / f"{resize_px}", data)) == data


def test_other_image_sizes_are_those_of_the_model(case, tmp_path):
    model, timms, directory = case
    images, resized, larger = tiny_images(size=LARGER), opened(directory), tmp_path / "larger"
    vits, expected = [opened(written(model, larger, image_size=LARGER))], model.encode(images).tokens
    if timms is NextBlockViT:  # timm 1.0.26 takes every grid for square when it resamples
        resized.set_input_size(img_size=LARGER)
        vits += [resized, opened(directory, img_size=LARGER)]
    for vit in vits:
        assert_same(vit.forward_features(images)[:, int(model.config.class_token) :], expected)
    back, data = read_timm(larger), read_timm_data(larger)
    assert pair(back.config.image_size) == LARGER
    assert_same(back.encode(images).tokens, expected)
    assert data is not None
    assert data.val_resize_px == 38


def test_other_sizes_masks_and_arguments_of_a_masked_model_are_refused(tmp_path):
    with pytest.raises(ValueError, match="blocks of 8x8 px; use image_size 16x24 or 16x32, or att"):
        written(encoder(XTRA), tmp_path / "out", image_size=(16, 28))
    assert not (tmp_path / "out").exists()
    vit = masked_vit()
    with pytest.raises(ValueError, match="cannot be cut into blocks of 2x2"):
        vit.set_input_size(img_size=(16, 28))
    masked_vit(attention="full").set_input_size(img_size=(16, 28))  # without a mask, no blocks need to fit
    with pytest.raises(ValueError, match="made for patches of 4 px"):
        vit.set_input_size(img_size=(16, 16), patch_size=(8, 8))
    with pytest.raises(ValueError, match="has its own mask"):
        vit(SQUARE, attn_mask=torch.ones(16, 16, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"no argument \['qk_norm'\]"):
        masked_vit(qk_norm=True)


def test_activation_checkpointing_recomputes_every_layer_and_changes_no_gradient():
    calls, gradients = [], []
    for recompute in (False, True):
        vit = masked_vit().train()
        vit.set_grad_checkpointing(recompute)
        count = []
        for block in vit.blocks:
            block.norm1.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        vit.forward_features(SQUARE).square().sum().backward()
        calls.append(len(count))
        gradients.append(vit.patch_embed.proj.weight.grad)
    assert calls == [2, 4]
    assert_same(gradients[0], gradients[1], 1e-6)


def test_a_masked_model_that_timm_saved_comes_back_with_its_mask(tmp_path):
    vit = opened(written(encoder(XTRA), tmp_path / "out"), num_classes=3)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    save_for_hf(vit, tmp_path / "tuned", model_args=told["model_args"])
    assert torch.equal(load_model(tmp_path / "tuned").encode(IMAGES).tokens, vit.forward_features(IMAGES))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"init_values": 0.5, "proj_bias": False, "qkv_bias": False},
        {"qkv_bias": False},
        {"embed_norm_layer": "layernorm"},
        {"img_size": (16, 24), "mlp_ratio": 48 / 11},
        {"num_classes": 7, "drop_path_rate": 0.1},
        {"global_pool": "map"},
    ],
)
def test_a_directory_that_timm_wrote_and_its_files_are_the_same_function(changes, tmp_path):
    vit = saved_by_timm(tmp_path, **changes)
    images = tiny_images(size=vit.patch_embed.img_size)
    final, layers = vit.forward_intermediates(images, output_fmt="NLC")
    for path in (tmp_path, tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin"):
        model, data = load_model(path), recorded_data(path)  # by config.json, which lies beside a file too
        encoded = model.encode(images)
        assert_same([encoded.tokens, *encoded.layers], [final, *layers])
        assert model.config.feature_attention == "full"
        assert data is not None
        assert data.mean == (0.5, 0.5, 0.5)
    assert timm_settings(tmp_path)["license"] == "apache-2.0"


@pytest.mark.parametrize(
    ("changes", "tokens", "positions"),
    [
        ({"class_token": True, "global_pool": "token"}, "cls_token", 1),
        ({"reg_tokens": 2}, "reg_token", 2),
        ({"class_token": True, "reg_tokens": 4, "no_embed_class": True}, "cls_token, reg_token", 0),
    ],
)
def test_tokens_beside_the_patches_are_refused_or_left_out_and_listed(changes, tokens, positions, caplog):
    vit = tiny_vit(**changes)
    with pytest.raises(CheckpointError, match=rf"{tokens}.*would be different.*model\.init"):
        from_timm(vit, "timm")
    with caplog.at_level(logging.INFO):
        model = from_timm(vit, "timm", drop_prefix_tokens=True)
    assert f"left out of timm: {tokens}" in caplog.text
    bare = read_timm_weights(vit.state_dict(), "file", LoadOptions(num_heads=3, drop_prefix_tokens=True))
    for found in (model, bare):
        assert torch.equal(positions_of(found.encoder), vit.pos_embed[:, positions:])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qk_norm": True}, r"attn\.k_norm is LayerNorm"),
        ({"scale_mlp_norm": True}, r"mlp\.norm is LayerNorm"),
        ({"pre_norm": True}, "norm_pre is LayerNorm"),
        ({"final_norm": False}, "norm is Identity"),
        ({"pos_embed": "none"}, "lacks 'pos_embed'"),
        ({"act_layer": "gelu_tanh"}, r"mlp\.act is GELUTanh\(\), here GELU"),
        ({"norm_layer": "layernorm", "embed_norm_layer": "layernormfp32"}, r"norm is LayerNormFp32"),
        ({"mlp_layer": timm.layers.SwiGLU}, r"blocks\.0\.mlp is SwiGLU"),
        ({"attn_layer": "diff"}, "attn is DiffAttention"),
        ({"block_fn": ResPostBlock}, "timm ResPostBlock"),
    ],
)
def test_what_the_encoder_cannot_do_is_refused_by_name(changes, words):
    with pytest.raises(CheckpointError, match=words):
        from_timm(tiny_vit(**changes), "timm")


def test_names_of_timm_are_read(caplog):
    sizes = {"image_size": 32, "patch_size": 16, "block_size": 1, "embed_dim": 64, "depth": 6, "num_heads": 2}
    fresh, model = "timm:test_vit,pretrained=false", tiny_model(mlp_ratio=3, **sizes)
    with caplog.at_level(logging.INFO):
        report = initialize(model, fresh)
    assert report.resampled == ("encoder.pos_embed",)
    assert all(name.startswith("predictor.") for name in report.fresh)
    assert "cls_token" in caplog.text
    data = read_timm_data(f"{fresh},img_size=80")
    assert data is not None
    assert (data.std, data.val_resize_px) == ((0.5, 0.5, 0.5), 84)
    for name, words in (("test_vit", r"cls_token.*as model\.init"), ("test_resnet", "timm ResNet; only")):
        with pytest.raises(CheckpointError, match=words):
            load(f"timm:{name},pretrained=false")


def test_a_bare_state_dict_is_the_same_function_and_needs_its_heads(tmp_path, caplog):
    vit = tiny_vit(init_values=0.3)
    torch.save({"state_dict": vit.state_dict()}, tmp_path / "vit.bin")
    with pytest.raises(CheckpointError, match=r"how many attention heads .*24 wide, 2 layers.*num_heads="):
        load(tmp_path / "vit.bin")
    model = load_model(tmp_path / "vit.bin", num_heads=3)
    assert_same(model.encode(SQUARE).tokens, vit.forward_features(SQUARE))
    assert "no mask recorded; loaded as a timm ViT with full attention" in caplog.text
    official = tiny_vit(embed_dim=192, depth=12)
    assert read_timm_weights(official.state_dict(), "vit.pth", LoadOptions()).config.num_heads == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask_token": torch.zeros(1, 24)}, "unexpected: encoder.mask_token"),
        ({"norm.weight": None}, r"missing: encoder\.norm\.weight"),
        ({"pos_embed": torch.zeros(1, 15, 24)}, "no square grid"),
        ({"blocks.1.mlp.fc2.bias": None}, r"missing: encoder\.blocks\.1\.mlp\.fc2\.bias"),
        ({"blocks.0.ls1.gamma": torch.ones(24), "blocks.0.attn.proj.weight": None}, r"cted: .*0\.ls1"),
        ({"blocks.0.ls1.gamma": torch.ones(7)}, r"unexpected: encoder\.blocks\.0\.ls1"),
        ({"epoch": 3}, r"holds 'epoch' of type int"),
    ],
)
def test_a_state_dict_that_is_no_encoder_of_this_kind_is_refused(changes, words, tmp_path):
    weights = {**tiny_vit().state_dict(), **changes}
    torch.save({name: t for name, t in weights.items() if t is not None}, tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=words):
        read_timm(tmp_path / "vit.pth", LoadOptions(num_heads=3, drop_prefix_tokens=True))


OWN = {"format_version": 1, "model": to_dict(XTRA)}
FULL = {"format_version": 1, "model": to_dict(replace(XTRA, feature_attention="full"))}
DIFFERENT = "describe different encoders.*nextblock_vit with attention causal"


@pytest.mark.parametrize(
    ("config", "metadata", "words"),
    [
        ("{", OWN, r"config\.json is not JSON"),  # all of these would be opened under full attention, or not
        ("[]", OWN, r"config\.json holds a list"),
        ({"nextblock": FULL}, OWN, DIFFERENT),
        ({"architecture": "vit_base_patch16_224"}, OWN, DIFFERENT),
        ({"architecture": "vit_base_patch16_224"}, None, DIFFERENT),
        ({"model_args": {"attention": "full"}}, OWN, DIFFERENT),
        ({"model_args": [1]}, OWN, r"config\.json is damaged: model_args is a list"),
        ({"nextblock": {"model": {"sides": 3}}}, None, '"nextblock" of .* are damaged'),
        ({"nextblock": {**OWN, "model": {"sides": 3}}}, None, "are damaged .unknown setting 'sides'"),
        ({}, {**OWN, "format_version": 9}, "format version 9, this release reads up to 1; upgrade"),
        ({}, "{", '"nextblock" of .* are damaged'),
    ],
)
def test_damaged_and_contradicting_settings_are_refused(config, metadata, words, tmp_path):
    directory = written(encoder(XTRA), tmp_path / "out")
    weights = load_file(directory / "model.safetensors")
    told = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file(weights, directory / "model.safetensors", {"nextblock": told} if metadata else None)
    if isinstance(config, str):
        (directory / "config.json").write_text(config)
    else:
        changed_json(directory / "config.json", **config)
    # timm itself opens some of them as another encoder
    for src in (directory, directory / "model.safetensors", f"timm:local-dir:{directory}"):
        with pytest.raises(CheckpointError, match=words):
            open_timm_encoder(src) if isinstance(src, str) else load(src)


def test_damaged_missing_and_strange_weights_are_refused(tmp_path):
    directory = written(encoder(XTRA), tmp_path / "out")
    file = directory / "model.safetensors"
    with pytest.raises(UsageError, match=r"nextblock wrote .*; give the file alone"):
        timm_model(f"timm:vit_tiny_patch16_224,checkpoint={file}")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not complete"):
        load(directory)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"no weights beside its config\.json: looked for model"):
        load(directory)
    (directory / "config.json").write_text('{"architectures": ["ViTModel"]}')  # not timm's
    assert not is_timm_directory(directory)


NO_CROP = {"mean": [0.5], "std": [0.5], "crop_pct": 0, "input_size": [3, 16, 16]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "vit_of_tomorrow"}, r"Unknown model .vit_of_tomorrow.*upgrade timm"),
        ({"model_args": {**PLAIN, "depth": "two"}}, "timm cannot give"),
        ({"model_args": {**PLAIN, "depth": 3}}, r"missing: blocks\.2\.norm1\.weight"),
        ({"pretrained_cfg": NO_CROP}, "damaged mean"),
    ],
)
def test_settings_that_timm_cannot_use_are_refused(changes, words, tmp_path):
    saved_by_timm(tmp_path)
    changed_json(tmp_path / "config.json", **changes)
    with pytest.raises(CheckpointError, match=words):
        read_timm(tmp_path)
        read_timm_data(tmp_path)


def test_files_are_checked_in_several_threads_and_the_process_stays_as_it_was(tmp_path):
    weights = timm.create_model("test_vit").state_dict()
    plain, random = torch.nn.Module.load_state_dict, torch.get_rng_state()

    def refusal(name):
        try:
            open_timm_encoder(f"timm:test_vit,checkpoint={tmp_path / name}.pth")
        except CheckpointError as error:
            return str(error)
        return "none"

    for name, change, words in (
        ("whole", {}, "none"),
        ("cut", {"norm.weight": None}, "do not fit that model: norm.weight"),
        ("nan", {"norm.weight": torch.full((64,), torch.nan)}, "NaN or inf in 1 tensor (norm.weight)"),
    ):
        some = {key: tensor for key, tensor in (weights | change).items() if tensor is not None}
        torch.save(some, tmp_path / f"{name}.pth")
        with ThreadPoolExecutor(3) as pool:
            assert all(words in found for found in pool.map(refusal, [name] * 4))
    saved_by_timm(tmp_path / "vit")
    load(tmp_path / "vit")
    assert torch.nn.Module.load_state_dict is plain
    assert torch.equal(torch.get_rng_state(), random)
