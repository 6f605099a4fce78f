"""Encoders of timm: against timm itself, features against their slow definition, and what is refused."""

import json
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf

from nextblock.checkpoint import CheckpointError, save_classifier, save_model
from nextblock.data import eval_batches, normalize, open_source
from nextblock.evaluate.features import encoder_extract, evaluation_data, untrained
from nextblock.interop import load, load_classifier, open_encoder
from nextblock.interop.hub import HubError
from nextblock.models import NextBlockModel, TimmEncoder
from nextblock.models.heads import FeatureConfig, HeadConfig, ImageClassifier, pool_features
from toy import one_thread, toy_model  # noqa: F401 - a fixture

TOKEN = "timm:test_vit,pretrained=false,img_size=32"  # a class token
REGISTERS = "timm:test_vit2,pretrained=false,img_size=32"  # registers alone, pooled by the mean
BOTH = "timm:vit_small_patch14_reg4_dinov2,pretrained=false,img_size=28"  # class token and four registers
EVA = "timm:eva02_tiny_patch14_224,pretrained=false,img_size=28"
BARE = "timm:test_vit_relpos,pretrained=false,img_size=32"  # neither; timm fails if asked for them
PREFIXES = {TOKEN: (1, True), REGISTERS: (1, False), BOTH: (5, True), EVA: (1, True), BARE: (0, False)}


@pytest.fixture(scope="module")
def encoders():
    """All of them, with norms that are no identities."""
    opened = {spec: open_encoder(spec) for spec in PREFIXES}
    generator = torch.Generator().manual_seed(0)
    for model in opened.values():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.data += torch.rand(parameter.shape, generator=generator)
    return opened


def some_images(model, count=2):
    height, width = model.config.image_size
    return torch.randn(
        count, model.config.in_chans, height, width, generator=torch.Generator().manual_seed(1)
    )


def encode(model, **settings):
    with torch.no_grad():
        return model.encode(some_images(model), **settings)


# --------------------------------------------------------------------------------------- against timm itself


@pytest.mark.parametrize("spec", PREFIXES)
def test_class_and_register_tokens_are_told_from_patches(encoders, spec):
    model = encoders[spec]
    prefix_tokens, has_class_token = PREFIXES[spec]
    assert isinstance(model, TimmEncoder)
    assert model.config.has_class_token == has_class_token
    encoded = encode(model)
    assert encoded.has_class_token == has_class_token
    assert len(encoded.layers) == len(encoded.prefix) == model.config.depth
    assert encoded.prefix[0].shape == (2, prefix_tokens, model.config.embed_dim)
    assert encoded.tokens.shape == (2, 4, model.config.embed_dim)
    assert not model.training


@pytest.mark.parametrize("spec", [TOKEN, BOTH])
def test_tokens_are_timms_forward_features(encoders, spec):
    model = encoders[spec]
    with torch.no_grad():
        expected = model.encoder.forward_features(some_images(model))
    encoded = encode(model)
    torch.testing.assert_close(encoded.tokens, expected[:, PREFIXES[spec][0] :])
    whole = torch.cat([encoded.prefix[-1], encoded.layers[-1]], dim=1)
    torch.testing.assert_close(model.final_norm(whole), expected)


@pytest.mark.parametrize("spec", [REGISTERS, EVA, BARE])
def test_where_timm_pools_before_its_norm_the_last_layer_is_its_forward_features(encoders, spec):
    model = encoders[spec]
    with torch.no_grad():
        expected = model.encoder.forward_features(some_images(model))
    encoded = encode(model)
    torch.testing.assert_close(torch.cat([encoded.prefix[-1], encoded.layers[-1]], dim=1), expected)
    assert model.final_norm is model.encoder.fc_norm
    torch.testing.assert_close(encoded.tokens, model.final_norm(encoded.layers[-1]))


@pytest.mark.parametrize("spec", PREFIXES)
def test_each_layer_is_what_a_hook_on_timms_block_sees(encoders, spec):
    model, seen = encoders[spec], []
    hooks = [
        block.register_forward_hook(lambda _block, _inputs, output: seen.append(output))
        for block in model.encoder.blocks
    ]
    encoded = encode(model)
    for hook in hooks:
        hook.remove()
    for layer, prefix, output in zip(encoded.layers, encoded.prefix, seen, strict=True):
        assert torch.equal(torch.cat([prefix, layer], dim=1), output)


def test_full_attention_is_its_own_and_causal_is_refused(encoders):
    model = encoders[TOKEN]
    assert torch.equal(encode(model, attention="full").tokens, encode(model).tokens)
    with pytest.raises(ValueError, match="test_vit was not trained with a causal mask; use attention native"):
        encode(model, attention="causal")


# ------------------------------------------------------------------------------------------------- features


def slow_features(model, encoded, layers, tokens, *, norm, concat):
    """Image by image, token by token."""
    images = []
    for image in range(2):
        vectors = []
        for layer in layers:
            prefix, patches = encoded.prefix[layer][image], encoded.layers[layer][image]
            one = [*prefix, *patches] if tokens == "all" else list(patches)
            if norm:
                one, prefix = (
                    [model.final_norm(token) for token in one],
                    [model.final_norm(t) for t in prefix],
                )
            mean = sum(one) / len(one)
            class_token = prefix[0] if len(prefix) else None
            kinds = {"patches": [mean], "all": [mean], "class": [class_token], "joined": [class_token, mean]}
            vectors.append(kinds[tokens])
        if concat:  # the class tokens of all layers first
            images.append(torch.cat([vector for kind in zip(*vectors, strict=True) for vector in kind]))
        else:
            kinds = zip(*vectors, strict=True)
            images.append(torch.cat([torch.stack(kind).mean(dim=0) for kind in kinds]))
    return torch.stack(images)


@pytest.mark.parametrize("tokens", ["patches", "class", "joined", "all"])
@pytest.mark.parametrize(("norm", "concat"), [(False, False), (True, False), (True, True)])
def test_features_are_their_slow_definition(encoders, tokens, norm, concat):
    model = encoders[BOTH]
    config = FeatureConfig(
        layers=(1, 4), tokens=tokens, norm_layers=norm, layer_pool="concat" if concat else "mean"
    )
    encoded = encode(model)
    with torch.no_grad():
        found = pool_features(encoded, config, model.final_norm)
        expected = slow_features(model, encoded, (1, 4), tokens, norm=norm, concat=concat)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.shape[-1] == config.width(model.config.embed_dim)


def test_all_tokens_unpooled_are_prefix_and_patches(encoders):
    model = encoders[BOTH]
    encoded = encode(model)
    found = pool_features(encoded, FeatureConfig(layers=(2,), tokens="all", pooled=False), model.final_norm)
    assert torch.equal(found, torch.cat([encoded.prefix[2], encoded.layers[2]], dim=1))


@pytest.mark.parametrize("spec", [REGISTERS, BARE])
@pytest.mark.parametrize("tokens", ["class", "joined"])
def test_a_register_is_not_taken_for_a_class_token(encoders, spec, tokens):
    model = encoders[spec]
    with pytest.raises(ValueError, match=f"tokens {tokens}: this encoder has no class token; use patches"):
        pool_features(encode(model), FeatureConfig(layers=(0,), tokens=tokens), model.final_norm)


def test_the_extract_of_evaluation_takes_class_tokens(encoders):
    model = encoders[TOKEN]
    wanted = [FeatureConfig(layers=(5,), tokens=tokens, norm_layers=True) for tokens in ("class", "patches")]
    with torch.no_grad():
        class_token, patches = encoder_extract(model, wanted, chunk=1)(some_images(model))
        head = model.encoder.forward_head(model.encoder.forward_features(some_images(model)), pre_logits=True)
    torch.testing.assert_close(class_token, head)
    torch.testing.assert_close(patches, encode(model).tokens.mean(dim=1))


def test_untrained_is_the_same_architecture_with_weights_of_the_seed(encoders):
    model = encoders[TOKEN]
    first, again, other = untrained(model, 1), untrained(model, 1), untrained(model, 2)
    assert first.config == model.config
    name = "encoder.blocks.0.attn.qkv.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], model.state_dict()[name])


# ------------------------------------------------------------------------------------------------ on the disk


@pytest.mark.parametrize(("spec", "tokens"), [(TOKEN, "joined"), (EVA, "class"), (REGISTERS, "patches")])
def test_a_classifier_comes_back_from_its_directory_without_a_network(tmp_path, encoders, spec, tokens):
    head = HeadConfig(num_classes=3, layers=(0, 5), kind="linear", tokens=tokens, layer_pool="concat")
    classifier = ImageClassifier(encoders[spec], head, ("a", "b", "c")).eval()
    save_classifier(tmp_path / "head", classifier)
    for back in (load_classifier(tmp_path / "head"), load(tmp_path / "head" / "model.safetensors")):
        assert isinstance(back.encoder_model, TimmEncoder)
        assert back.class_names == ("a", "b", "c")
        assert back.head_config == head
        assert back.encoder_model.config == encoders[spec].config
        with torch.no_grad():
            images = some_images(encoders[spec])
            assert torch.equal(back(images), classifier(images))


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_weights_come_from_a_file_with_their_positions_resampled(tmp_path, name):
    told = timm.create_model("test_vit", img_size=32)  # with a classifier, which is left out
    if name.endswith(".pth"):
        torch.save({"state_dict": told.state_dict()}, tmp_path / name)
    else:
        save_file(told.state_dict(), tmp_path / name)
    same = open_encoder(f"timm:test_vit,checkpoint={tmp_path / name},img_size=32")
    for key, weight in same.encoder.state_dict().items():
        assert torch.equal(weight, told.state_dict()[key]), key
    larger = open_encoder(f"timm:test_vit,checkpoint={tmp_path / name},img_size=48")
    assert larger.config.image_size == (48, 48)
    weights, name = larger.encoder.state_dict(), "blocks.3.mlp.fc1.weight"
    assert weights["pos_embed"].shape[1] == 3 * 3 + 1
    assert torch.equal(weights[name], told.state_dict()[name])


def test_a_size_that_only_a_directory_tells_is_kept(tmp_path):
    built = timm.create_model("test_vit", img_size=32, num_classes=0)
    save_for_hf(built, tmp_path / "net", model_args={"img_size": 32, "num_classes": 0})
    model = open_encoder(f"timm:local-dir:{tmp_path / 'net'}")
    assert isinstance(model, TimmEncoder)
    assert model.config.architecture == "test_vit"
    assert model.config.image_size == (32, 32)
    usual: Any = built.pretrained_cfg
    told = evaluation_data(f"timm:local-dir:{tmp_path / 'net'}", model.config)
    assert (told.mean, told.std) == (usual["mean"], usual["std"])
    assert told.val_resize_px == int(32 / usual["crop_pct"])
    assert torch.equal(model.encoder.state_dict()["pos_embed"], built.state_dict()["pos_embed"])
    save_classifier(
        tmp_path / "head", ImageClassifier(model, HeadConfig(kind="linear", num_classes=2, layers=(5,)))
    )
    assert load_classifier(tmp_path / "head").encoder_model.config == model.config


def test_a_network_that_its_name_does_not_give_again_is_refused(tmp_path):
    built = timm.create_model("test_vit", img_size=32, num_classes=0, reg_tokens=2)
    save_for_hf(built, tmp_path / "net", model_args={"img_size": 32, "num_classes": 0, "reg_tokens": 2})
    with pytest.raises(
        CheckpointError, match=r"2 of its tensors \(encoder.pos_embed, encoder.reg_token\) are not as"
    ):
        open_encoder(f"timm:local-dir:{tmp_path / 'net'}")


def test_images_are_normalised_as_timm_says_and_cut_for_the_size_asked_for():
    plain = "timm:test_vit,pretrained=false"
    usual = evaluation_data(plain, open_encoder(plain).config)
    small = evaluation_data(TOKEN, open_encoder(TOKEN).config)
    assert (usual.val_resize_px, small.val_resize_px) == (168, 33)  # 160 / 0.95 and 32 / 0.95
    assert small.mean == (0.5, 0.5, 0.5)
    grey = "timm:test_vit,pretrained=false,img_size=32,in_chans=1"
    model = open_encoder(grey)
    assert model.config.in_chans == evaluation_data(grey, model.config).channels == 1
    assert encode(model).tokens.shape == (2, 4, 64)


def cut_otherwise(directory, **settings):
    """A network of timm in a directory, whose images are to be cut so; its spec."""
    built = timm.create_model("test_vit", img_size=32, num_classes=0)
    told: Any = built.pretrained_cfg
    told.update(settings)
    save_for_hf(built, directory, model_args={"img_size": 32, "num_classes": 0})
    return f"timm:local-dir:{directory}"


@pytest.mark.parametrize("crop_pct", [0.8, 1.0])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("shape", [(500, 375), (375, 500)])
def test_an_image_is_cut_as_by_timms_own_transform(tmp_path, crop_mode, crop_pct, shape):
    spec = cut_otherwise(tmp_path / "net", crop_mode=crop_mode, crop_pct=crop_pct)
    model = open_encoder(spec)
    assert isinstance(model, TimmEncoder)
    photo = Image.fromarray(load_sample_images().images[0]).resize(shape)
    (tmp_path / "images").mkdir()
    photo.save(tmp_path / "images" / "photo.png")
    data = evaluation_data(spec, model.config, workers=0)
    (batch,) = eval_batches(open_source(str(tmp_path / "images"), data), data, model.config.image_size, 1)
    ours = normalize(batch.images, data.mean, data.std)[0]
    told = resolve_model_data_config(model.encoder) | {"input_size": (3, 32, 32)}
    expected: Any = create_transform(**told, is_training=False)
    levels = (ours - expected(photo)).abs() * torch.tensor(data.std)[:, None, None] * 255
    assert levels.max() < 8  # Pillow's rounding of what it holds between two passes is not torch's
    assert levels.mean() < 0.3


def test_what_timm_would_do_in_another_way_is_told_at_opening(tmp_path, caplog):
    caplog.set_level("INFO", "nextblock")
    open_encoder(TOKEN)
    assert not caplog.messages
    spec = cut_otherwise(tmp_path / "net", crop_mode="squash", interpolation="bilinear")
    open_encoder(spec)
    assert caplog.messages == [f"{spec}: timm resizes its images by bilinear, here it is done by bicubic"]
    caplog.clear()
    open_encoder("timm:test_vit3,pretrained=false")
    assert "its attention pooling is not used" in caplog.text


def test_classifiers_that_tell_prefix_tokens_and_no_crop_are_read(tmp_path, encoders):
    head = HeadConfig(num_classes=3, layers=(5,), kind="linear")
    save_classifier(tmp_path / "head", ImageClassifier(encoders[TOKEN], head, ("a", "b", "c")))
    path = tmp_path / "head" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    settings = json.loads(metadata["config"])
    settings["model"]["prefix_tokens"] = 1
    for name in ("crop_mode", "interpolation"):
        del settings["model"][name]
    save_file(load_file(path), path, {**metadata, "config": json.dumps(settings)})
    assert load_classifier(path).encoder_model.config == encoders[TOKEN].config


# ------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: {f"encoder.{key}": one for key, one in w.items()}, r"cls_token, .* more"),
        (
            lambda w: {key: one for key, one in w.items() if "3.mlp.fc1.w" not in key},
            r"3\.mlp\.fc1\.weight \(",
        ),
        (lambda w: {**w, "blocks.0.ls1.gamma": w["norm.weight"]}, r"blocks\.0\.ls1\.gamma \("),
    ],
)
def test_weights_that_do_not_cover_the_model_are_refused_by_name(tmp_path, change, told):
    torch.save(change(timm.create_model("test_vit").state_dict()), tmp_path / "some.pth")
    with pytest.raises(CheckpointError, match=rf"do not fit that model: .*{told}"):
        open_encoder(f"timm:test_vit,checkpoint={tmp_path / 'some.pth'}")


def test_heads_and_what_else_is_beside_the_layers_may_be_there_or_not(tmp_path):
    weights = timm.create_model("test_vit3").state_dict()
    kept = {key: one for key, one in weights.items() if not key.startswith(("attn_pool", "head"))}
    assert len(kept) < len(weights) - 2
    beside = ("head_dist.weight", "mask_token", "decoder_blocks.0.norm1.weight")
    for name, some in (("kept", kept), ("more", weights | dict.fromkeys(beside, torch.zeros(2)))):
        torch.save(some, tmp_path / f"{name}.pth")
        found = open_encoder(f"timm:test_vit3,checkpoint={tmp_path / name}.pth").state_dict()
        assert all(torch.equal(found[f"encoder.{key}"], one) for key, one in kept.items())


def test_without_a_network_the_message_names_what_helps(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    spec = "timm:test_vit,img_size=48"
    with pytest.raises(HubError, match=f"{spec},checkpoint=FILE, .* {spec},pretrained=false"):
        open_encoder(spec)
    with pytest.raises(HubError, match=r"or give the path of a copy: timm:local-dir:DIR$"):
        open_encoder("timm:hf-hub:me/vit")


def test_an_encoder_of_timm_is_no_classifier(tmp_path):
    for spec in (TOKEN, cut_otherwise(tmp_path / "net").removeprefix("timm:local-dir:")):
        with pytest.raises(CheckpointError, match="holds no classification head; `nextblock probe`"):
            load_classifier(spec)


@pytest.mark.parametrize(
    "name", ["resnet18", "test_convnext", "swin_tiny_patch4_window7_224", "test_efficientnet"]
)
def test_networks_without_layers_of_tokens_are_refused(name):
    with pytest.raises(CheckpointError, match=f"{name} is no transformer .* evaluation takes timm's vision"):
        open_encoder(f"timm:{name},pretrained=false")


def test_attention_heads_are_timms_to_tell():
    with pytest.raises(ValueError, match="tells its attention heads itself; leave num_heads out"):
        open_encoder(TOKEN, num_heads=2)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "timm:vit_tiny_patch16_225,pretrained=false",
            "timm has no model .* did you mean 'vit_tiny_patch16_",
        ),
        ("timm:test_vit,pretrained=no", "cannot read 'pretrained=no'; options of timm:NAME are pretrained"),
        ("timm:test_vit,image_size=32", "cannot read 'image_size=32'"),
        ("timm:test_vit,img_size=0", "cannot read 'img_size=0'"),
        ("timm:test_vit,", "cannot read ''"),
    ],
)
def test_unknown_names_and_options_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        open_encoder(spec)


def test_files_that_do_not_fit_or_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"there\.pth is no file; give the path of the weights"):
        open_encoder(f"timm:test_vit,checkpoint={tmp_path / 'there.pth'}")
    torch.save(timm.create_model("test_vit3").state_dict(), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"do not fit that model: .*more .*another shape"):
        open_encoder(f"timm:test_vit,checkpoint={tmp_path / 'other.pth'}")
    for name in ("empty.pth", "cut.safetensors"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(CheckpointError, match=f"timm cannot give .*{name}"):
            open_encoder(f"timm:test_vit,checkpoint={tmp_path / name}")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    ran = tmp_path / "ran"

    class Code:
        def __reduce__(self):
            return (ran.touch, ())

    torch.save({"state_dict": Code()}, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match="timm cannot give"):
        open_encoder(f"timm:test_vit,checkpoint={tmp_path / 'code.pth'}")
    assert not ran.exists()


def test_a_models_file_comes_back_as_ours(tmp_path):
    save_model(tmp_path / "model.safetensors", toy_model())
    found = open_encoder(tmp_path / "model.safetensors")
    assert isinstance(found, NextBlockModel)
    assert not encode_ours(found).has_class_token
    with pytest.raises(ValueError, match="tokens class: this encoder has no class token"):
        pool_features(encode_ours(found), FeatureConfig(layers=(1,), tokens="class"), found.final_norm)


def encode_ours(model):
    with torch.no_grad():
        return model.encode(torch.zeros(1, 3, 16, 16))
