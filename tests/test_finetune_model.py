"""The parts of fine-tuning by their definitions: layer decay, a step, drop path, mixing, adapters."""

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from timm.optim import param_groups_layer_decay

from nextblock.data import TrainLoader
from nextblock.errors import UsageError
from nextblock.evaluate.finetune.model import add_lora, build_classifier, merge_lora, tuning_groups
from nextblock.evaluate.finetune.run import FineTuner, mix
from nextblock.evaluate.finetune.settings import FinetuneSettings, LoraSettings, TuneConfig, TunedModel
from nextblock.interop import open_encoder
from nextblock.models import NextBlockModel
from nextblock.models.heads import HeadConfig
from nextblock.train.distributed import ALONE
from tiny_runs import CPU, same
from toy import CONFIG, DATA, ToySource, take, tiny_images, toy_model

QUICK = {"batch_size": 12, "lr": 1e-3, "device": "cpu", "augment": "none", "clip_grad": None}
PLAIN = FinetuneSettings(model="RUN", train="T", out="OUT", layer_decay=1.0, drop_path=0.0, **QUICK)
LORA = replace(PLAIN, lora=LoraSettings(rank=2, alpha=4.0))
NAMES = ("a", "b", "c", "d")
TIMM = "timm:test_vit,pretrained=false,img_size=32"
ROTARY = replace(CONFIG, positions="rope", class_token=True, qk_norm="scale", layer_scale=0.1)
SOURCE = ToySource(12)


def tuner(settings=PLAIN, model=None) -> Any:
    tuned = TunedModel(image_size=16, in_chans=3, weights="", labels="")
    make = partial(build_classifier, model or toy_model(), settings, NAMES)
    config, labels = TuneConfig.of(settings, tuned, DATA), {"train": SOURCE.labels}
    return FineTuner(config, CPU, None, ALONE, make=make, labels=labels)


def steps(one, count=1) -> list[Any]:
    sizes: dict[str, Any] = {"image_size": 16, "batch_size": 12, "micro_batch_size": 12, "seed": 0}
    return take(TrainLoader(SOURCE, DATA, **sizes, **one.loader_options), count)


def vector(network):
    return torch.cat([tensor.detach().flatten().float() for tensor in network.state_dict().values()])


def scale_by_definition(name, decay, depth):
    """BEiT's rule: embeddings 0, layer i (from 1) i, norm and head depth + 1; decay^(depth + 1 - index)."""
    if any(part in name for part in ("pos_embed", "patch_embed", "cls_token", "reg_token")):
        index = 0
    elif ".blocks." in name:
        index = int(name.split(".blocks.")[1].split(".")[0]) + 1
    else:
        index = depth + 1
    return decay ** (depth + 1 - index)


@pytest.mark.parametrize("spec", ["ours", "rotary", TIMM])
@pytest.mark.parametrize("settings", [PLAIN, LORA], ids=["whole", "lora"])
def test_rates_fall_by_the_layer_and_only_matrices_decay(spec, settings):
    settings = replace(settings, layer_decay=0.5)
    own = {"ours": toy_model, "rotary": lambda: NextBlockModel(ROTARY)}
    encoder = own[spec]() if spec in own else open_encoder(spec)
    classifier = build_classifier(encoder, settings, NAMES)
    groups = tuning_groups(classifier, settings)
    found = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, parameter in classifier.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim > 1 and not name.endswith(("pos_embed", "cls_token", "reg_token"))
            rate = scale_by_definition(name, 0.5, encoder.config.depth)
            assert found[id(parameter)] == (rate, 0.05 if is_matrix else 0), name


def test_all_but_the_final_norm_has_the_rate_that_timms_own_rule_gives():
    network: Any = timm.create_model("test_vit", num_classes=4, img_size=32)
    decayed = param_groups_layer_decay(network, layer_decay=0.5)
    theirs = {id(p): group["lr_scale"] for group in decayed for p in group["params"]}
    for name, parameter in network.named_parameters():
        if not name.startswith(("norm.", "fc_norm.")):
            assert theirs[id(parameter)] == scale_by_definition(f".{name}", 0.5, len(network.blocks)), name


def test_a_step_is_adamws_on_the_mean_smoothed_cross_entropy_and_leaves_the_model_as_it_was():
    model = toy_model().requires_grad_(requires_grad=False)
    one, plain = tuner(model=model), tuner()
    (step,) = steps(one)
    images = plain.to_model(step.micro_batches[0].images)
    labels = torch.from_numpy(SOURCE.labels)[step.micro_batches[0].samples]
    for group in one.optimizer.param_groups:
        group["eps"] = 1e-3  # lest AdamW make much of rounding where a gradient is zero, as of key biases
    outcome = one.train_step(step, 1e-3)
    groups = tuning_groups(plain.model, PLAIN)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=PLAIN.betas, eps=1e-3)
    loss = F.cross_entropy(plain.model(images), labels, label_smoothing=0.1)
    loss.backward()
    optimizer.step()
    assert outcome.loss == pytest.approx(loss.item(), abs=1e-6)
    assert torch.allclose(vector(one.model), vector(plain.model), atol=1e-6)
    assert same(model.state_dict(), toy_model().state_dict())
    assert not any(p.requires_grad for p in model.parameters())


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


def test_drop_path_grows_linearly_from_none_and_drops_branches_whose_number_is_below_the_rate():
    model = NextBlockModel(replace(CONFIG, depth=3, drop_path=0.5))
    without, some = (build_classifier(model, replace(PLAIN, drop_path=p), NAMES) for p in (0.0, 0.2))
    for classifier, rates in ((without, [0, 0, 0]), (some, [0, 0.1, 0.2])):
        blocks: Any = classifier.encoder_model.encoder.blocks
        for name in ("drop_path1", "drop_path2"):
            found = [getattr(getattr(block, name), "rate", 0) for block in blocks]
            assert found == pytest.approx(rates)
    path, branch = blocks[2].drop_path1, torch.ones(2, 3, 4)
    path.draws = torch.tensor([0.1, 0.3])
    assert torch.equal(path(branch)[0], torch.zeros(3, 4))
    assert torch.allclose(path(branch)[1], torch.full((3, 4), 1.25))
    assert path.eval()(branch) is branch


def mixed(seed=0, pairs=(0, 0, 1, 1, 2, 2), **changes: Any):
    images = torch.rand(len(pairs), 3, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = replace(PLAIN, **{"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.0, **changes})
    labels = torch.arange(len(pairs)) % 4
    return images, mix(images, labels, list(pairs), settings, num_classes=4, seed=seed)


def test_mixup_is_a_weighted_mean_with_the_partner_and_leaves_an_image_without_one_alone():
    images, found = mixed(cutmix=0.0, pairs=(0, 1, 1, 2, 2, 3))
    assert sorted(found.order) == list(range(6))
    one_hot = F.one_hot(torch.arange(6) % 4, 4).float()
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
    before = np.random.get_state(), torch.get_rng_state().tolist()  # noqa: NPY002 - the global one is meant
    first, again, other = (mixed(seed=seed)[1] for seed in (2, 2, 3))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.targets, other.targets)
    np.testing.assert_equal((np.random.get_state(), torch.get_rng_state().tolist()), before)  # noqa: NPY002


def adapted(seed=0) -> Any:
    """A toy model with new adapters."""
    model = toy_model()
    add_lora(model.encoder, replace(LORA, seed=seed))
    return model


def test_new_adapters_add_nothing_and_are_drawn_from_the_seed():
    images = tiny_images(size=(16, 16))
    assert torch.equal(adapted().encode(images).tokens, toy_model().encode(images).tokens)
    first, again, other = (adapted(seed).encoder.blocks[0].attn.qkv.lora_A.state_dict() for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


def test_merged_adapters_are_the_same_function_in_a_plain_network():
    images, model = tiny_images(size=(16, 16)), adapted()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before, untouched = model.encode(images).tokens, toy_model().encode(images).tokens
        merge_lora(model.encoder)
        after = model.encode(images).tokens
    assert model.state_dict().keys() == toy_model().state_dict().keys()
    assert torch.allclose(after, before, atol=1e-5)
    assert not torch.allclose(after, untouched, atol=1e-2)


def test_what_an_encoder_lacks_and_a_missing_peft_are_refused(monkeypatch):
    classifier = build_classifier(open_encoder(TIMM), PLAIN, NAMES)
    del classifier.encoder_model.encoder.blocks
    with pytest.raises(UsageError, match=r"layer_decay is 0\.5.*set layer_decay 1"):
        tuning_groups(classifier, replace(PLAIN, layer_decay=0.5))
    with pytest.raises(UsageError, match=r"set drop_path 0, not 0\.1"):
        build_classifier(classifier.encoder_model, replace(PLAIN, drop_path=0.1), NAMES)
    with pytest.raises(ValueError, match="no class token; use patches"):
        build_classifier(toy_model(), replace(PLAIN, tokens="class"), NAMES)
    beit: Any = timm.create_model("beit_base_patch16_224", num_classes=0, depth=1, embed_dim=24, num_heads=2)
    with pytest.raises(UsageError, match=r"this Beit has another kind.*lora\.rank 0"):
        add_lora(beit, LORA)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match="pip install peft"):
        add_lora(toy_model().encoder, LORA)


@pytest.mark.parametrize(("head", "layers", "num_heads"), [("linear", (1,), None), ("attentive", (0, 1), 4)])
def test_the_head_sees_normed_layers_the_last_one_or_six(head, layers, num_heads):
    found = build_classifier(toy_model(), replace(PLAIN, head=head, attentive_heads=num_heads), NAMES)
    seen = {"num_classes": 4, "layers": layers, "norm_layers": True, "batch_norm": False}
    assert found.head_config == HeadConfig(kind=head, num_heads=num_heads or 16, **seen)
