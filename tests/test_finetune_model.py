"""The parts of fine-tuning by their definitions: layer decay, a step, drop path, mixing, adapters."""

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from finetuning import CPU, LORA, QUICK
from nextblock.data import TrainLoader
from nextblock.errors import UsageError
from nextblock.evaluate.finetune.model import (
    KeyedDropPath,
    add_lora,
    build_classifier,
    merge_lora,
    set_drop_path,
    tuning_groups,
)
from nextblock.evaluate.finetune.run import FineTuner, mix
from nextblock.evaluate.finetune.settings import LoraSettings, TuneConfig, TunedModel
from nextblock.interop import open_encoder
from nextblock.models import NextBlockModel
from nextblock.models.heads import HeadConfig
from nextblock.train.distributed import ALONE
from tiny_runs import same
from toy import CONFIG, DATA, ToySource, one_thread, take, tiny_images, toy_model  # noqa: F401 - a fixture

PLAIN = replace(QUICK, batch_size=12, lr=1e-3, layer_decay=1.0, drop_path=0.0, clip_grad=None, augment="none",
                crop_scale=None)  # fmt: skip
NAMES = ("a", "b", "c", "d")
ROTARY = replace(CONFIG, positions="rope", class_token=True, qk_norm="scale", layer_scale=0.1)
SOURCE = ToySource(12)


def tuner(settings=PLAIN) -> Any:
    tuned = TunedModel(image_size=16, in_chans=3, weights="", labels="")
    return FineTuner(
        TuneConfig.of(settings, tuned, DATA),
        CPU,
        None,
        ALONE,
        make=lambda: build_classifier(toy_model(), settings, NAMES),
        labels={"train": SOURCE.labels},
    )


def steps(one, count=1, source=SOURCE) -> list[Any]:
    sizes: dict[str, Any] = {"image_size": 16, "batch_size": 12, "micro_batch_size": 12, "seed": 0}
    return take(TrainLoader(source, DATA, **sizes, **one.loader_options), count)


def vector(network):
    return torch.cat([tensor.detach().flatten().float() for tensor in network.state_dict().values()])


# ------------------------------------------------------------------------------------ layer decay


def scales(classifier, settings):
    """Rate and decay of every parameter, by name."""
    groups = tuning_groups(classifier, settings)
    of = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
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


@pytest.mark.parametrize("spec", ["ours", "rotary", "timm:test_vit,pretrained=false,img_size=32"])
@pytest.mark.parametrize("lora", [LoraSettings(), LoraSettings(rank=2)], ids=["whole", "lora"])
def test_rates_fall_by_the_layer(spec, lora):
    settings = replace(PLAIN, layer_decay=0.5, lora=lora)
    own = {"ours": toy_model, "rotary": lambda: NextBlockModel(ROTARY)}
    encoder = own[spec]() if spec in own else open_encoder(spec)
    classifier = build_classifier(encoder, settings, NAMES)
    for name, (scale, _) in scales(classifier, settings).items():
        assert scale == scale_by_definition(name, 0.5, encoder.config.depth), name


def test_all_but_the_final_norm_has_the_rate_that_timms_own_rule_gives():
    network: Any = timm.create_model("test_vit", num_classes=4, img_size=32)
    decayed = param_groups_layer_decay(network, layer_decay=0.5)
    theirs = {id(p): group["lr_scale"] for group in decayed for p in group["params"]}
    for name, parameter in network.named_parameters():
        if not name.startswith(("norm.", "fc_norm.")):
            assert theirs[id(parameter)] == scale_by_definition(f".{name}", 0.5, len(network.blocks)), name


def test_matrices_decay_and_positions_norms_and_biases_do_not():
    found = scales(build_classifier(toy_model(), PLAIN, NAMES), PLAIN)
    undecayed = {name for name, (_, decay) in found.items() if decay == 0}
    assert undecayed == {name for name in found if "norm" in name or name.endswith(("bias", "pos_embed"))}
    assert {decay for _, decay in found.values()} == {0.0, 0.05}


def test_what_an_encoder_has_no_place_for_is_refused():
    classifier = build_classifier(toy_model(), PLAIN, NAMES)
    del classifier.encoder_model.encoder.blocks
    with pytest.raises(ValueError, match=r"layer_decay is 0\.5.*set layer_decay 1"):
        tuning_groups(classifier, replace(PLAIN, layer_decay=0.5))
    with pytest.raises(ValueError, match=r"set drop_path 0, not 0\.1"):
        set_drop_path(torch.nn.Sequential(), 0.1)
    with pytest.raises(ValueError, match="no class token; use patches"):
        build_classifier(toy_model(), replace(PLAIN, tokens="class"), NAMES)


# ------------------------------------------------------------------------------------ a step


def test_a_step_is_adamws_on_the_mean_smoothed_cross_entropy():
    one, plain = tuner(), tuner()
    (step,) = steps(one)
    images = plain.to_model(step.micro_batches[0].images)
    labels = torch.from_numpy(SOURCE.labels)[step.micro_batches[0].samples]
    for group in one.optimizer.param_groups:
        group["eps"] = 1e-3  # lest AdamW make much of rounding where a gradient is zero, as of key biases
    outcome = one.train_step(step, 1e-3)
    groups = tuning_groups(plain.model, PLAIN)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=PLAIN.betas, eps=1e-3)
    loss = torch.nn.functional.cross_entropy(plain.model(images), labels, label_smoothing=0.1)
    loss.backward()
    optimizer.step()
    assert outcome.loss == pytest.approx(loss.item(), abs=1e-6)
    assert torch.allclose(vector(one.model), vector(plain.model), atol=1e-6)


def test_activation_checkpointing_changes_no_weight():
    settings = replace(PLAIN, drop_path=0.5)
    first, second = tuner(settings), tuner(replace(settings, activation_checkpointing=True))
    for one in (first, second):
        one.train_step(*steps(one), 1e-3)
    assert torch.equal(vector(first.model), vector(second.model))


def test_the_average_is_that_of_its_definition():
    """Decay min(ema_decay, 1 - t^(-2/3)) at step t, counted from 1: the first step's weights, then a mean."""
    one = tuner(replace(PLAIN, ema_decay=0.5))
    expected = vector(one.model)
    for number, step in enumerate(steps(one, 4), start=1):
        one.train_step(step, 1e-3)
        decay = min(0.5, 1 - number ** (-2 / 3))
        expected = decay * expected + (1 - decay) * vector(one.model)
    assert torch.allclose(vector(one.tuned), expected, atol=1e-6)


# ------------------------------------------------------------------------------------ drop path


def test_drop_path_grows_linearly_from_none_and_drops_branches_whose_number_is_below_the_rate():
    encoder: Any = timm.create_model("test_vit", num_classes=0, depth=3, drop_path_rate=0.5)
    set_drop_path(encoder, 0.2)
    assert [getattr(block.drop_path2, "rate", 0.0) for block in encoder.blocks] == pytest.approx(
        [0, 0.1, 0.2]
    )
    path, branch = encoder.blocks[2].drop_path1, torch.ones(2, 3, 4)
    path.draws = torch.tensor([0.1, 0.3])
    assert torch.equal(path(branch)[0], torch.zeros(3, 4))
    assert torch.allclose(path(branch)[1], torch.full((3, 4), 1.25))
    assert path.eval()(branch) is branch
    set_drop_path(encoder, 0.0)
    assert not any(isinstance(part, KeyedDropPath) for part in encoder.modules())


# ------------------------------------------------------------------------------------ mixing


def mixed(seed=0, pairs=(0, 0, 1, 1, 2, 2), **changes: Any):
    images = torch.rand(len(pairs), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = replace(PLAIN, **{"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.0, **changes})
    labels = torch.arange(len(pairs)) % 4
    return images, mix(images, labels, list(pairs), settings, num_classes=4, seed=seed)


def test_mixup_is_a_weighted_mean_with_the_partner_and_leaves_an_image_without_one_alone():
    images, found = mixed(cutmix=0.0, pairs=(0, 1, 1, 2, 2, 3))
    assert sorted(found.order) == list(range(6))
    one_hot = torch.nn.functional.one_hot(torch.arange(6) % 4, 4).float()
    share = float(found.targets[0, 1])  # its first row is image 1
    assert 0 < share < 1
    for row, image in enumerate(found.order):
        partner = {1: 2, 2: 1, 3: 4, 4: 3}.get(image, image)
        for there, given in ((found.images, images), (found.targets, one_hot)):
            assert torch.allclose(there[row], share * given[image] + (1 - share) * given[partner], atol=1e-6)


def test_cutmix_pastes_a_part_whose_area_is_the_labels_share():
    images, found = mixed(seed=2, mixup=0.0)
    pasted = (found.images[0] == images[1]).all(dim=0)
    kept = (found.images[0] == images[0]).all(dim=0)
    assert bool((pasted ^ kept).all())
    assert 0 < int(pasted.sum()) < 64
    assert float(found.targets[0, 0]) == pytest.approx(float(kept.float().mean()))


def test_mixing_is_a_function_of_its_seed_and_moves_no_global_generator():
    def generators():
        numpy: Any = np.random.get_state()  # noqa: NPY002 - it is the global one that is meant
        return numpy[1].tolist(), torch.get_rng_state().tolist()

    before = generators()
    first, again, other = (mixed(seed=seed)[1] for seed in (2, 2, 3))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.targets, other.targets)
    assert generators() == before


# ------------------------------------------------------------------------------------ adapters


def adapted(*, seed=0, stirred=True) -> Any:
    """A toy model with adapters, which add something if `stirred`."""
    model = toy_model()
    add_lora(model.encoder, replace(LORA, seed=seed, lora=LoraSettings(rank=2, alpha=4.0)))
    for name, parameter in model.named_parameters() if stirred else ():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return model


def test_adapters_are_on_qkv_and_proj_of_every_layer_and_at_first_add_nothing():
    model, images = adapted(stirred=False), tiny_images(size=(16, 16))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"encoder.blocks.{layer}.attn.{part}.lora_{side}.default.weight"
        for layer in (0, 1)
        for part in ("qkv", "proj")
        for side in "AB"
    }
    assert torch.equal(model.encode(images).tokens, toy_model().encode(images).tokens)
    name = "encoder.blocks.0.attn.qkv.lora_A.default.weight"
    states = [adapted(seed=seed).state_dict()[name] for seed in (0, 0, 1)]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_merged_adapters_are_the_same_function_in_a_plain_network():
    images, model = tiny_images(size=(16, 16)), adapted()
    with torch.no_grad():
        before, untouched = model.encode(images).tokens, toy_model().encode(images).tokens
        merge_lora(model.encoder)
        after = model.encode(images).tokens
    assert model.state_dict().keys() == toy_model().state_dict().keys()
    assert torch.allclose(after, before, atol=1e-5)
    assert not torch.allclose(after, untouched, atol=1e-2)


def test_attention_whose_qkv_is_no_layer_of_its_own_is_refused():
    sizes: dict[str, Any] = {"num_classes": 0, "depth": 1, "embed_dim": 24, "num_heads": 2}
    encoder: Any = timm.create_model("beit_base_patch16_224", **sizes)
    with pytest.raises(ValueError, match=r"this Beit has another kind.*lora\.rank 0"):
        add_lora(encoder, LORA)


def test_without_peft_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match="pip install peft"):
        add_lora(toy_model().encoder, LORA)


# ------------------------------------------------------------------------------------ the network


@pytest.mark.parametrize("head", ["linear", "attentive"])
def test_the_head_sees_normed_layers_the_last_one_or_six(head):
    settings = replace(PLAIN, head=head, attentive_heads=4 if head == "attentive" else None)
    layers, num_heads = ((1,), 16) if head == "linear" else ((0, 1), 4)
    assert build_classifier(toy_model(), settings, NAMES).head_config == HeadConfig(
        kind=head, num_classes=4, layers=layers, norm_layers=True, batch_norm=False, num_heads=num_heads
    )


def test_the_classifier_is_a_copy_that_leaves_the_model_as_it_was():
    model = toy_model().requires_grad_(requires_grad=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one = tuner()
    one.train_step(*steps(one), 1e-3)
    assert same(model.state_dict(), before)
    assert not any(p.requires_grad for p in model.parameters())
