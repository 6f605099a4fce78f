"""A step of fine-tuning: layer decay, micro-batches, mixing, averaging, drop path; each by its definition."""

import copy
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath
from timm.optim import param_groups_layer_decay

from nextblock.evaluate.finetune.config import FinetuneConfig, LoraSettings
from nextblock.evaluate.finetune.model import build_classifier, images_for, set_drop_path, tuning_groups
from nextblock.evaluate.finetune.train import FineTuner, mixed
from nextblock.interop import open_encoder
from nextblock.models.heads import HeadConfig, ImageClassifier
from nextblock.optim import lr_at, set_lr
from toy import CONFIG, DATA, ToySource, one_thread, toy_model  # noqa: F401 - a fixture

PLAIN = FinetuneConfig(
    model="RUN",
    train="TRAIN",
    out="OUT",
    epochs=5,
    batch_size=12,
    lr=1e-3,
    layer_decay=1.0,
    drop_path=0.0,
    clip_grad=None,
    device="cpu",
)
NAMES = ("a", "b", "c", "d")


def tuner(config=PLAIN, model=None) -> Any:
    classifier = build_classifier(model or toy_model(), config, NAMES)
    return FineTuner(classifier, config, DATA, steps_per_epoch=2, device=torch.device("cpu"))


def batch(count=12, seed=0):
    source = ToySource(count, seed=seed)
    return source.images, torch.from_numpy(source.labels)


def vector(network):
    return torch.cat([tensor.detach().flatten().float() for tensor in network.state_dict().values()])


# ------------------------------------------------------------------------------------ layer decay


def scales(classifier, config):
    """Rate and decay of every parameter, by name."""
    of = {
        id(p): (g["lr_scale"], g["weight_decay"])
        for g in tuning_groups(classifier, config)
        for p in g["params"]
    }
    return {name: of[id(p)] for name, p in classifier.named_parameters() if p.requires_grad}


def scale_by_definition(name, decay, depth):
    """BEiT's rule: embeddings 0, layer i (from 1) i, norm and head depth + 1; decay^(depth + 1 - index)."""
    if any(part in name for part in ("pos_embed", "patch_embed", "cls_token", "reg_token")):
        index = 0
    elif ".blocks." in name:
        index = int(name.split(".blocks.")[1].split(".")[0]) + 1
    else:
        index = depth + 1
    return decay ** (depth + 1 - index)


@pytest.mark.parametrize("lora", [LoraSettings(), LoraSettings(rank=2)], ids=["whole", "lora"])
def test_rates_of_our_encoder_fall_by_the_layer(lora):
    config = replace(PLAIN, layer_decay=0.5, lora=lora)
    classifier = build_classifier(toy_model(), config, NAMES)
    found = scales(classifier, config)
    assert len(found) == sum(p.requires_grad for p in classifier.parameters())
    for name, (scale, _) in found.items():
        assert scale == scale_by_definition(name, 0.5, 2), name
    assert {scale for scale, _ in found.values()} == (
        {0.25, 0.5, 1.0} if lora.rank else {0.125, 0.25, 0.5, 1.0}
    )


def test_rates_of_a_timm_encoder_fall_by_the_layer():
    config = replace(PLAIN, layer_decay=0.5)
    encoder = open_encoder("timm:test_vit,pretrained=false,img_size=32")
    found = scales(build_classifier(encoder, config, NAMES), config)
    for name, (scale, _) in found.items():
        assert scale == scale_by_definition(name, 0.5, encoder.config.depth), name
    assert found["encoder_model.encoder.cls_token"] == (0.5 ** (encoder.config.depth + 1), 0.0)


def test_all_but_the_final_norm_has_the_rate_that_timms_own_rule_gives():
    network: Any = timm.create_model("test_vit", num_classes=4, img_size=32)
    decayed = param_groups_layer_decay(network, layer_decay=0.5)
    theirs = {id(p): group["lr_scale"] for group in decayed for p in group["params"]}
    depth = len(network.blocks)
    for name, parameter in network.named_parameters():
        if not name.startswith(("norm.", "fc_norm.")):
            assert theirs[id(parameter)] == scale_by_definition(f".{name}", 0.5, depth), name


def test_matrices_decay_and_positions_norms_and_biases_do_not():
    found = scales(build_classifier(toy_model(), PLAIN, NAMES), PLAIN)
    undecayed = {name for name, (_, decay) in found.items() if decay == 0}
    assert undecayed == {name for name in found if "norm" in name or name.endswith(("bias", "pos_embed"))}
    assert {decay for _, decay in found.values()} == {0.0, 0.05}


def test_the_optimizer_is_given_the_rate_of_the_schedule_times_the_scale():
    t = tuner(replace(PLAIN, layer_decay=0.5))
    t.step = 4
    peak = {"peak": 1e-3, "start": 1e-6, "end": 1e-6, "warmup_steps": 0, "total_steps": 10}
    assert t.lr == lr_at(4, **peak)
    set_lr(t.optimizer, t.lr)
    assert {group["lr"] / group["lr_scale"] for group in t.optimizer.param_groups} == {t.lr}


def test_an_encoder_without_named_layers_needs_layer_decay_one():
    classifier = build_classifier(toy_model(), PLAIN, NAMES)
    del classifier.encoder_model.encoder.blocks
    with pytest.raises(ValueError, match=r"layer_decay is 0\.5.*set layer_decay 1"):
        tuning_groups(classifier, replace(PLAIN, layer_decay=0.5))


# ------------------------------------------------------------------------------------ the step


@pytest.mark.parametrize("size", [5, 1])
def test_micro_batches_make_the_step_of_the_whole_batch(size):
    config = replace(PLAIN, mixup=0.8, cutmix=1.0)
    whole, parts = tuner(config), tuner(replace(config, micro_batch_size=size))
    for t in (whole, parts):
        t.classifier.double()  # so that what differs is more than rounding
    images = batch()[0].double() / 255
    for _ in range(3):
        first, second = (t.learn(images, batch()[1]) for t in (whole, parts))
        assert first.loss == pytest.approx(second.loss, abs=1e-6)
    assert torch.allclose(vector(whole.classifier), vector(parts.classifier), atol=1e-6)


def test_a_step_is_adamws_on_the_mean_smoothed_cross_entropy():
    t, plain = tuner(), tuner()
    for one in (t, plain):
        one.classifier.double()
    for group in t.optimizer.param_groups:
        group["eps"] = 1e-3  # lest AdamW make much of rounding where a gradient is zero, as of key biases
    images, labels = batch()
    normal = (images / 255 - torch.tensor(DATA.mean).view(3, 1, 1)) / torch.tensor(DATA.std).view(3, 1, 1)
    outcome = t.learn(normal.double(), labels)
    optimizer = torch.optim.AdamW(
        tuning_groups(plain.classifier, PLAIN), lr=1e-3, betas=PLAIN.betas, eps=1e-3
    )
    logits = plain.classifier(normal.double()).float()
    loss = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    loss.backward()
    optimizer.step()
    assert outcome.loss == pytest.approx(loss.item(), abs=1e-6)
    assert torch.allclose(vector(t.classifier), vector(plain.classifier), atol=1e-6)


def test_a_loss_that_is_no_number_changes_no_weight():
    t = tuner(replace(PLAIN, ema_decay=0.5))
    before, averaged = vector(t.classifier), vector(t.averaged.module)
    outcome = t.learn(torch.full((4, 3, 16, 16), float("nan")), torch.arange(4))
    assert not outcome.is_finite(scaled=False)
    assert torch.equal(vector(t.classifier), before)
    assert torch.equal(vector(t.averaged.module), averaged)


@pytest.mark.parametrize(("head_norm", "count"), [("layer", 0), ("batch", 1)])
def test_a_batch_without_enough_readable_images_is_left_out(head_norm, count):
    t = tuner(replace(PLAIN, head_norm=head_norm))
    before = vector(t.classifier)
    images, labels = batch()
    assert t.learn(images[:count], labels[:count]).images == 0
    assert (t.step, torch.equal(vector(t.classifier), before)) == (1, True)


def test_drop_path_is_drawn_by_seed_and_step():
    config = replace(PLAIN, drop_path=0.9)

    def weights_after(seed, stir):
        t = tuner(replace(config, seed=seed))
        t.classifier.load_state_dict(tuner().classifier.state_dict())
        for _ in range(2):
            torch.rand(stir)
            t.learn(*batch())
        return vector(t.classifier)

    assert torch.equal(weights_after(0, 1), weights_after(0, 7))
    assert not torch.equal(weights_after(0, 1), weights_after(1, 1))


def test_activation_checkpointing_changes_no_weight():
    config = replace(PLAIN, drop_path=0.3)
    first, second = tuner(config), tuner(replace(config, activation_checkpointing=True))
    for t in (first, second):
        t.learn(*batch())
    assert torch.equal(vector(first.classifier), vector(second.classifier))


# ------------------------------------------------------------------------------------ averaging


def test_the_average_is_that_of_its_definition():
    """Decay min(ema_decay, 1 - t^(-2/3)) at step t, counted from 1: the first step's weights, then a mean."""
    t = tuner(replace(PLAIN, ema_decay=0.5, head_norm="batch", warmup_epochs=0.0))
    expected = vector(t.classifier)
    decays = []
    for step in range(1, 5):
        t.learn(*batch(seed=step))
        decays.append(min(0.5, 1 - step ** (-2 / 3)))
        expected = decays[-1] * expected + (1 - decays[-1]) * vector(t.classifier)
        skip = [name for name in t.classifier.state_dict() if "num_batches" in name]
        assert skip == ["head.norm.num_batches_tracked"]
    assert decays[:2] == [0.0, pytest.approx(0.37, abs=1e-3)]
    assert decays[-1] == 0.5
    found = vector(t.averaged.module)
    of = torch.cat(
        [torch.full((x.numel(),), "num_batches" in n) for n, x in t.classifier.state_dict().items()]
    )
    assert torch.allclose(found[~of], expected[~of], atol=1e-6)


# ------------------------------------------------------------------------------------ mixing


def mix(seed=0, count=6, **changes: Any):
    images = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(count) % 4
    settings: dict[str, Any] = {
        "num_classes": 4,
        "mixup": 0.8,
        "cutmix": 1.0,
        "label_smoothing": 0.1,
        **changes,
    }
    return images, labels, mixed(images, labels, seed=seed, **settings)


def test_without_mixing_labels_are_smoothed_and_images_are_themselves():
    images, labels, found = mix(mixup=0.0, cutmix=0.0)
    assert found.images is images
    expected = torch.full((6, 4), 0.1 / 4)
    expected[range(6), labels] += 0.9
    assert torch.allclose(found.targets, expected)


def test_mixup_is_a_weighted_mean_with_the_image_from_the_other_end():
    images, labels, found = mix(cutmix=0.0, label_smoothing=0.0)
    one_hot = torch.nn.functional.one_hot(labels, 4).float()
    share = float(found.targets[0, 0])  # image 0 is of class 0, its partner of class 1
    assert 0 < share < 1
    for i in range(6):
        assert torch.allclose(found.images[i], share * images[i] + (1 - share) * images[5 - i], atol=1e-6)
        assert torch.allclose(found.targets[i], share * one_hot[i] + (1 - share) * one_hot[5 - i], atol=1e-6)


def test_cutmix_pastes_a_part_whose_area_is_the_labels_share():
    images, _, found = mix(seed=2, mixup=0.0, label_smoothing=0.0)
    pasted = (found.images[0] == images[5]).all(dim=0)
    kept = (found.images[0] == images[0]).all(dim=0)
    assert bool((pasted ^ kept).all())
    assert 0 < int(pasted.sum()) < 64
    assert float(found.targets[0, 0]) == pytest.approx(float(kept.float().mean()))


def test_of_an_odd_number_the_last_image_is_left_alone():
    images, labels, found = mix(count=5, label_smoothing=0.0)
    assert torch.equal(found.images[4], images[4])
    assert found.targets[4].tolist() == torch.nn.functional.one_hot(labels, 4)[4].tolist()
    assert not torch.equal(found.images[0], images[0])


def global_numpy():
    state: Any = np.random.get_state()  # noqa: NPY002 - it is the global one that is meant
    return state[1].copy()


def test_mixing_is_a_function_of_its_seed_and_moves_no_global_generator():
    np.random.seed(1)  # noqa: NPY002 - it is the global one that is meant
    before = (random.getstate(), global_numpy(), torch.get_rng_state())
    first, again, other = (mix(seed=seed)[2] for seed in (2, 2, 3))
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.targets, other.targets)
    after = (random.getstate(), global_numpy(), torch.get_rng_state())
    assert before[0] == after[0]
    assert np.array_equal(before[1], after[1])
    assert torch.equal(before[2], after[2])


# ------------------------------------------------------------------------------------ the network


def test_drop_path_grows_linearly_from_none_at_the_first_layer():
    encoder: Any = timm.create_model("test_vit", num_classes=0, depth=3, drop_path_rate=0.5)
    set_drop_path(encoder, 0.2)
    found = [getattr(block.drop_path2, "drop_prob", 0.0) for block in encoder.blocks]
    assert found == pytest.approx([0.0, 0.1, 0.2])
    set_drop_path(encoder, 0.0)
    assert not any(isinstance(part, DropPath) for part in encoder.modules())


def test_layers_without_a_place_for_drop_path_are_refused():
    with pytest.raises(ValueError, match=r"drop_path is 0\.1.*set drop_path 0"):
        set_drop_path(torch.nn.Sequential(), 0.1)


def test_a_larger_image_keeps_the_share_that_is_cut_and_the_positions_that_encode_would_use():
    model = toy_model()
    config = replace(PLAIN, image_size=32)
    classifier = build_classifier(model, config, NAMES)
    wide = replace(DATA, val_resize_px=20)
    after = classifier.encoder_model.config
    assert images_for(wide, model.config, after, config).val_resize_px == 40
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = classifier.encoder_model.encode(images), model.encode(images)
    assert torch.allclose(ours.tokens, theirs.tokens, atol=1e-5)


@pytest.mark.parametrize("head", ["linear", "attentive"])
def test_the_head_sees_normed_layers_the_last_one_or_six(head):
    model = toy_model()
    classifier = build_classifier(
        model, replace(PLAIN, head=head, attentive_heads=4 if head == "attentive" else None), NAMES
    )
    assert classifier.head_config == HeadConfig(
        kind=head,
        num_classes=4,
        layers=(1,) if head == "linear" else (0, 1),
        norm_layers=True,
        batch_norm=False,
        num_heads=4 if head == "attentive" else 16,
    )
    assert CONFIG.depth == 2


def test_a_class_token_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="no class token; use patches"):
        build_classifier(toy_model(), replace(PLAIN, tokens="class"), NAMES)


def test_a_state_taken_up_goes_on_as_the_first_would_have():
    config = replace(PLAIN, ema_decay=0.9, lora=LoraSettings(rank=2, dropout=0.2), head_norm="batch")
    first, second = tuner(config), tuner(config)
    first.learn(*batch())
    second.restore(copy.deepcopy(first.state()))
    for t in (first, second):
        t.learn(*batch(seed=1))
    assert torch.equal(vector(first.classifier), vector(second.classifier))
    assert torch.equal(vector(first.averaged.module), vector(second.averaged.module))


def test_with_lora_a_state_holds_no_frozen_weight():
    names = tuner(replace(PLAIN, lora=LoraSettings(rank=2))).state()["classifier"]
    assert all("lora_" in name or name.startswith("head.") for name in names)


def test_finished_with_lora_it_is_the_same_function_and_has_a_plain_classifiers_weights():
    t = tuner(replace(PLAIN, lora=LoraSettings(rank=2, alpha=8.0), ema_decay=0.5))
    for seed in range(3):
        t.learn(*batch(seed=seed))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = [network.eval()(images) for network in t.networks().values()]
        finished = t.finish()
        after = [network(images) for network in finished.values()]
    plain = ImageClassifier(toy_model(), t.classifier.head_config)
    for network, old, new in zip(finished.values(), before, after, strict=True):
        assert torch.allclose(old, new, atol=1e-5)
        assert network.state_dict().keys() == plain.state_dict().keys()
