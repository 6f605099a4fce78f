"""Encoders of timm, and classifiers on them: against timm itself, on the disk, and what is refused."""

import json
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_sample_images
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf
from torch.testing import assert_close

from nextblock.checkpoint import CheckpointError, read_data, save_classifier
from nextblock.data import eval_batches, normalize, open_source
from nextblock.evaluate.features import evaluation_data, untrained
from nextblock.interop import initialize, load, load_classifier, load_model, open_encoder
from nextblock.interop.convert import convert
from nextblock.interop.hub import HubError
from nextblock.models import TimmEncoder
from nextblock.models.heads import FeatureConfig, HeadConfig, ImageClassifier, pool_features
from test_load import Malicious
from toy import DATA, tiny_model

TOKEN = "timm:test_vit,pretrained=false,img_size=32"  # a class token
REGISTERS = "timm:test_vit2,pretrained=false,img_size=32"  # registers alone, pooled by the mean
BOTH = "timm:vit_small_patch14_reg4_dinov2,pretrained=false,img_size=28"  # class token and four registers
EVA = "timm:eva02_tiny_patch14_224,pretrained=false,img_size=28"
BARE = "timm:test_vit_relpos,pretrained=false,img_size=32"  # neither; timm fails if asked for them
PREFIXES = {TOKEN: (1, True), REGISTERS: (1, False), BOTH: (5, True), EVA: (1, True), BARE: (0, False)}
POOLED_FIRST = (REGISTERS, EVA, BARE)  # by timm, before its norm
CUT = replace(DATA, mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.2), val_resize_px=40, val_crop="squash")


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


@pytest.fixture(scope="module")
def vit_weights():
    """Weights of timm's network of this name for 32-px images, with its classifier."""
    return timm.create_model("test_vit", img_size=32).state_dict()


def some_images(model):
    shape = 2, model.config.in_chans, *model.config.image_size
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def encode(model, **settings):
    with torch.no_grad():
        return model.encode(some_images(model), **settings)


def assert_same_encoder(found, expected):
    ours, theirs = encode(found), encode(expected)
    assert torch.equal(ours.tokens, theirs.tokens)
    assert all(torch.equal(one, other) for one, other in zip(ours.prefix, theirs.prefix, strict=True))


@pytest.mark.parametrize("spec", PREFIXES)
def test_tokens_prefixes_and_layers_are_timms(encoders, spec):
    model, seen = encoders[spec], []
    (prefix_tokens, has_class_token), config = PREFIXES[spec], model.config
    with torch.no_grad():
        expected = model.encoder.forward_features(some_images(model))
    hooks = [b.register_forward_hook(lambda *call: seen.append(call[-1])) for b in model.encoder.blocks]
    encoded = encode(model)
    for hook in hooks:
        hook.remove()
    assert not model.training
    assert encoded.has_class_token == config.has_class_token == has_class_token
    assert encoded.prefix[0].shape == (2, prefix_tokens, config.embed_dim)
    assert encoded.tokens.shape == (2, 4, config.embed_dim)
    whole = [torch.cat(parts, dim=1) for parts in zip(encoded.prefix, encoded.layers, strict=True)]
    assert len(seen) == config.depth
    assert all(torch.equal(found, output) for found, output in zip(whole, seen, strict=True))
    if spec in POOLED_FIRST:
        assert model.final_norm is model.encoder.fc_norm
        assert_close(whole[-1], expected)
        assert_close(encoded.tokens, model.final_norm(encoded.layers[-1]))
    else:
        assert_close(model.final_norm(whole[-1]), expected)
        assert_close(encoded.tokens, expected[:, prefix_tokens:])


def slow_features(model, encoded, layers, tokens, *, norm, concat):
    """Image by image, token by token."""
    apply = model.final_norm if norm else lambda token: token
    images = []
    for image in range(2):
        vectors = []
        for layer in layers:
            prefix = [apply(token) for token in encoded.prefix[layer][image]]
            patches = [apply(token) for token in encoded.layers[layer][image]]
            one = [*prefix, *patches] if tokens == "all" else patches
            mean = sum(one) / len(one)
            kinds = {"patches": [mean], "all": [mean], "class": prefix[:1], "joined": [prefix[0], mean]}
            vectors.append(kinds[tokens])
        kinds = list(zip(*vectors, strict=True))  # the class tokens of all layers first
        images.append(torch.cat([torch.cat(kind) if concat else torch.stack(kind).mean(0) for kind in kinds]))
    return torch.stack(images)


@pytest.mark.parametrize("tokens", ["patches", "class", "joined", "all"])
@pytest.mark.parametrize(("norm", "concat"), [(False, False), (True, False), (True, True)])
@torch.no_grad()
def test_features_are_their_slow_definition(encoders, tokens, norm, concat):
    model, pool = encoders[BOTH], "concat" if concat else "mean"
    encoded = encode(model)
    config = FeatureConfig(layers=(1, 4), tokens=tokens, norm_layers=norm, layer_pool=pool)
    found = pool_features(encoded, config, model.final_norm)
    expected = slow_features(model, encoded, (1, 4), tokens, norm=norm, concat=concat)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.shape[-1] == config.width(model.config.embed_dim)
    if tokens in ("patches", "all"):
        unpooled = pool_features(encoded, replace(config, pooled=False), model.final_norm)
        assert_close(unpooled.mean(dim=1), found)
    if tokens == "all":
        config = FeatureConfig(layers=(2,), tokens="all", pooled=False)
        whole = torch.cat([encoded.prefix[2], encoded.layers[2]], dim=1)
        assert torch.equal(pool_features(encoded, config, model.final_norm), whole)


@pytest.mark.parametrize("spec", [REGISTERS, BARE, "ours"])
@pytest.mark.parametrize("tokens", ["class", "joined"])
def test_a_register_is_not_taken_for_a_class_token(encoders, spec, tokens):
    model = encoders.get(spec) or tiny_model()
    with torch.no_grad():
        encoded = model.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=f"tokens {tokens}: this encoder has no class token; use patches"):
        pool_features(encoded, FeatureConfig(layers=(0,), tokens=tokens), model.final_norm)


def test_untrained_is_the_same_architecture_with_weights_of_the_seed(encoders):
    model, name = encoders[TOKEN], "blocks.0.attn.qkv.weight"
    assert untrained(model, 1).config == model.config
    first, again, other = (untrained(model, seed).encoder.state_dict()[name] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, model.encoder.state_dict()[name])


def test_weights_come_from_a_file_with_their_positions_resampled(tmp_path, vit_weights):
    torch.save({"state_dict": vit_weights}, tmp_path / "weights.pth")
    save_file(vit_weights, tmp_path / "weights.safetensors")
    for name in ("weights.pth", "weights.safetensors"):
        spec = f"timm:test_vit,checkpoint={tmp_path / name}"
        same, larger = (open_encoder(f"{spec},img_size={size}") for size in (32, 48))
        for key, weight in same.encoder.state_dict().items():  # the classifier is left out
            assert torch.equal(weight, vit_weights[key]), key
        weights, key = larger.encoder.state_dict(), "blocks.3.mlp.fc1.weight"
        assert larger.config.image_size == (48, 48)
        assert weights["pos_embed"].shape[1] == 3 * 3 + 1
        assert torch.equal(weights[key], vit_weights[key])


def saved_by_timm(directory, cut=None, **settings):
    """A directory as timm writes it, whose images are to be cut so; its spec and the network."""
    settings = {"img_size": 32, "num_classes": 0, **settings}
    built: Any = timm.create_model("test_vit", **settings)
    built.pretrained_cfg.update(cut or {})
    save_for_hf(built, directory, model_args=settings)
    return f"timm:local-dir:{directory}", built


def test_a_size_that_only_a_directory_tells_is_kept(tmp_path):
    spec, built = saved_by_timm(tmp_path / "net", {"crop_pct": 0.8})
    model = open_encoder(spec)
    assert isinstance(model, TimmEncoder)
    assert (model.config.architecture, model.config.image_size) == ("test_vit", (32, 32))
    usual, told = built.pretrained_cfg, evaluation_data(spec, model.config)
    assert (told.mean, told.std) == (usual["mean"], usual["std"])
    assert told.val_resize_px == int(32 / usual["crop_pct"])
    assert torch.equal(model.encoder.state_dict()["pos_embed"], built.state_dict()["pos_embed"])
    head = HeadConfig(kind="linear", num_classes=2, layers=(5,))
    save_classifier(tmp_path / "head", ImageClassifier(model, head))
    assert load_classifier(tmp_path / "head").encoder_model.config == model.config


def test_a_network_that_its_name_does_not_give_again_is_refused(tmp_path):
    spec, _ = saved_by_timm(tmp_path, reg_tokens=2)
    words = r"2 of its tensors \(encoder.pos_embed, encoder.reg_token\) are not as"
    with pytest.raises(CheckpointError, match=words):
        open_encoder(spec)


@pytest.mark.parametrize(
    ("crop_mode", "crop_pct", "shape"),
    [("center", 0.8, (500, 375)), ("squash", 0.8, (375, 500)), ("border", 1.0, (375, 500))],
)
def test_an_image_is_cut_as_by_timms_own_transform(tmp_path, crop_mode, crop_pct, shape):
    spec, _ = saved_by_timm(tmp_path / "net", {"crop_mode": crop_mode, "crop_pct": crop_pct})
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


def saved_classifier(spec, directory, tokens: Any = "patches") -> Any:
    """A classifier whose encoder is not as timm's name alone gives it, and how its images are cut."""
    encoder: Any = open_encoder(spec)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.25)
    channels = encoder.config.in_chans
    data = replace(CUT, channels=channels, mean=CUT.mean[:channels], std=CUT.std[:channels])
    head = HeadConfig(num_classes=3, layers=(0, 5), kind="linear", tokens=tokens, layer_pool="concat")
    classifier = ImageClassifier(encoder, head, ("a", "b", "c")).eval()
    save_classifier(directory, classifier, data=data)
    return classifier, data


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    place = tmp_path_factory.mktemp("saved") / "head"
    return saved_classifier(TOKEN, place)[0], place


SPECS = [(TOKEN, "joined"), (EVA + ",in_chans=1", "class"), (REGISTERS.split(",img_size")[0], "patches")]


@pytest.mark.parametrize(("spec", "tokens"), SPECS)
def test_a_classifier_comes_back_and_its_encoder_goes_to_timm_which_opens_it(spec, tokens, tmp_path):
    head, own, net = (tmp_path / name for name in ("head", "own", "net"))
    classifier, data = saved_classifier(spec, head, tokens)
    images, vit = some_images(classifier.encoder_model), classifier.encoder_model.encoder
    convert(head, own)
    card = yaml.safe_load((own / "README.md").read_text().split("---")[1])
    architecture = classifier.encoder_model.config.architecture
    assert card["weights_origin"] == f"head, trained with nextblock on timm's {architecture}"
    assert card["weights_license"] == "unspecified"
    for back in (load_classifier(head), load(head / "model.safetensors"), load(own)):
        assert isinstance(back.encoder_model, TimmEncoder)
        assert (back.class_names, back.head_config) == (("a", "b", "c"), classifier.head_config)
        assert back.encoder_model.config == classifier.encoder_model.config
        assert torch.equal(back(images), classifier(images))
    assert read_data(own / "model.safetensors") == read_data(head / "model.safetensors")
    convert(head, net, to="timm")
    theirs: Any = timm.create_model(f"local-dir:{net}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(theirs.forward_features(images), vit.forward_features(images))
        assert torch.equal(theirs(images), vit(images))
    for src in (head, head / "model.safetensors", f"timm:local-dir:{net}"):
        found = open_encoder(src)
        assert isinstance(found, TimmEncoder)
        assert_same_encoder(found, classifier.encoder_model)
        told = evaluation_data(str(src), found.config)
        assert (told.mean, told.std, told.channels) == (data.mean, data.std, data.channels)
        assert (told.val_resize_px, told.val_crop) == (40, "squash")


def test_a_model_of_ours_starts_from_its_patches(saved):
    sizes = {"image_size": 32, "patch_size": 16, "block_size": 1, "embed_dim": 64, "depth": 6, "num_heads": 2}
    model, key = tiny_model(predictor=None, **sizes), "blocks.3.attn.qkv.weight"
    initialize(model, saved[1])
    expected = saved[0].encoder_model.encoder.state_dict()[key]
    assert torch.equal(model.encoder.state_dict()[key], expected)


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda place: load_model(place), r"cls_token.*You can still use it as model\.init"),
        (lambda place: open_encoder(place, num_heads=3), "records its own attention heads, not 3"),
        (lambda _: open_encoder(TOKEN, num_heads=2), "records its attention heads; leave num_heads out"),
        (lambda _: encode(open_encoder(TOKEN), attention="causal"), "causal mask; use attention native"),
        (
            lambda place: convert(place, "out", "timm", image_size=48),
            r"size of \(32, 32\) px; leave image_size",
        ),
        (lambda place: convert(place, "out", "timm", attention="causal"), "encoder, which has no mask"),
        (lambda place: convert(place, "out", "onnx"), "a timm encoder, which onnx does not support"),
    ],
)
def test_what_an_encoder_of_timm_cannot_do_is_refused(action, words, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((CheckpointError, ValueError), match=words):
        action(saved[1])
    assert not list(tmp_path.iterdir())


def test_classifiers_that_tell_prefix_tokens_and_no_crop_are_read(tmp_path, saved):
    path, old = saved[1] / "model.safetensors", tmp_path / "old.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    settings = json.loads(metadata["config"])
    settings["model"]["prefix_tokens"] = 1
    for name in ("crop_mode", "interpolation"):
        del settings["model"][name]
    save_file(load_file(path), old, {**metadata, "config": json.dumps(settings)})
    assert load_classifier(old).encoder_model.config == saved[0].encoder_model.config


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: {f"encoder.{key}": w[key] for key in w}, "fit that model: .*cls_token, .* more"),
        (lambda w: {k: w[k] for k in w if "3.mlp.fc1.w" not in k}, r"fit .*: .*3\.mlp\.fc1\.weight \("),
        (lambda w: {**w, "blocks.0.ls1.gamma": w["norm.weight"]}, r"fit .*: .*blocks\.0\.ls1\.gamma \("),
        (lambda w: timm.create_model("test_vit3").state_dict(), "fit that model: .*more .*another shape"),
        (lambda w: {"state_dict": Malicious("ran")}, "timm cannot give"),
    ],
)
def test_weights_that_do_not_fit_or_run_code_are_refused(change, told, vit_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(change(vit_weights), "some.pth")
    with pytest.raises(CheckpointError, match=told):
        open_encoder("timm:test_vit,checkpoint=some.pth")
    assert not (tmp_path / "ran").exists()


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "empty.pth").touch()
    for name, words in (("empty.pth", r"timm cannot give .*empty\.pth"), ("absent.pth", "is no file")):
        with pytest.raises(CheckpointError, match=words):
            open_encoder(f"timm:test_vit,checkpoint={tmp_path / name}")


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
    sized = "timm:test_vit,img_size=48"
    with pytest.raises(HubError, match=f"{sized},checkpoint=FILE, .* {sized},pretrained=false"):
        open_encoder(sized)


def test_an_encoder_of_timm_is_no_classifier(tmp_path):
    saved_by_timm(tmp_path)
    for spec in (TOKEN, str(tmp_path)):
        with pytest.raises(CheckpointError, match="holds no classification head; `nextblock probe`"):
            load_classifier(spec)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("test_convnext,pretrained=false", "_convnext is no transformer .* evaluation takes timm's vision"),
        ("swin_tiny_patch4_window7_224,pretrained=false", "_224 is no transformer .* evaluation takes timm"),
        ("vit_tiny_patch16_225,pretrained=false", "timm has no model .* did you mean 'vit_tiny_patch16_"),
        ("test_vit,pretrained=no", "cannot read 'pretrained=no'; options of timm:NAME are pretrained"),
        ("test_vit,image_size=32", "cannot read 'image_size=32'"),
        ("test_vit,img_size=0", "cannot read 'img_size=0'"),
        ("test_vit,", "cannot read ''"),
    ],
)
def test_unknown_names_and_options_and_networks_without_layers_of_tokens_are_refused(name, words):
    is_network = "is no transformer" in words
    for opens in (open_encoder,) if is_network else (open_encoder, load):
        with pytest.raises(CheckpointError if is_network else ValueError, match=words):
            opens(f"timm:{name}")
