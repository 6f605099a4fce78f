"""Official classifier files scored by `nextblock eval`: the layouts of XTRA and AIM, on random weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import nextblock
from nextblock.cli import main
from nextblock.interop import aim

CLASSES = [f"n{number:02d}" for number in range(10)]
XTRA = ["--num_heads", "3"]
AIM = ["--num_heads", "3", "--head", "head.pth", "--probe_layers"]
# What is scored, how it is loaded in Python, and its official cut: shorter side and centre, in pixels.
LAYOUTS = {
    "attentive Lightning": ("attentive.ckpt", XTRA, {}, (73, 64)),
    "linear Lightning": ("linear.ckpt", XTRA, {}, (73, 64)),
    "DeepSpeed": ("deepspeed/checkpoint", XTRA, {}, (73, 64)),
    "Lightning with DeepSpeed": ("deepspeed", XTRA, {}, (73, 64)),
    "AIM, last": ("backbone.pth", [*AIM, "last"], {"head": "head.pth", "probe_layers": "last"}, (256, 224)),
    "AIM, best": ("backbone.pth", [*AIM, "best"], {"head": "head.pth", "probe_layers": "best"}, (256, 224)),
}


@pytest.fixture
def images(tmp_path):
    """Labelled images of no square size, in colours and shapes of their own, as Pillow opens them."""
    rng, found = np.random.default_rng(0), []
    for label, name in enumerate(CLASSES):
        (tmp_path / "val" / name).mkdir(parents=True)
        for number in range(2):
            pixels = rng.integers(0, 256, (3, 2, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((90 + 5 * label, 80 + 20 * number))
            image.save(tmp_path / "val" / name / f"{number}.png")
            found.append((image, label))
    return found


@pytest.fixture
def files(golden_dir, tmp_path, monkeypatch):
    """Classifiers in each official layout; 10 classes, whose likeliest one differs from image to image."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(aim.BEST_LAYERS_OF_SIZE, (48, 4), (0, 1))
    monkeypatch.setattr(aim, "PROBED_LAYERS", 3)
    generator = torch.Generator().manual_seed(0)

    def spread(weights, name):
        # Larger weights without a batch norm's statistics of other images.
        for statistic, value in (("running_mean", 0.0), ("running_var", 1e-3)):
            next(w for n, w in weights.items() if n.endswith(statistic)).fill_(value)
        weights[name].normal_(generator=generator)

    for kind, linear in (("attentive", "classifier.linear.weight"), ("linear", "classifier.1.weight")):
        content = torch.load(golden_dir / f"{kind}_probe.ckpt", weights_only=True)
        spread(content["state_dict"], linear)
        torch.save(content, f"{kind}.ckpt")
    (tmp_path / "deepspeed" / "checkpoint").mkdir(parents=True)
    deepspeed = {"module": content["state_dict"], "hyper_parameters": content["hyper_parameters"]}
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save(deepspeed, f"deepspeed/checkpoint/{name}")
    shutil.copy(golden_dir / "aim_nano_backbone.pth", "backbone.pth")
    head = torch.load(golden_dir / "aim_nano_head.pth", weights_only=True)
    spread(head, "head.linear.weight")
    torch.save(head, "head.pth")


def score(capsys, *words):
    assert main(["eval", "--test", "val", "--device", "cpu", "--workers", "0", "--json", *words]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found["rows"][0], found["notes"][0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_top_1_and_top_5_are_those_of_the_slow_definition(layout, files, images, capsys):
    name, words, settings, (resized_px, cut_px) = LAYOUTS[layout]
    row, note = score(capsys, "--model", name, *words)
    resize = v2.Resize(resized_px, v2.InterpolationMode.BICUBIC, antialias=True)
    scaled = v2.Compose(
        [v2.PILToTensor(), resize, v2.CenterCrop(cut_px), v2.ToDtype(torch.float32, scale=True)]
    )
    cut = v2.Compose([scaled, v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    classifier = nextblock.load(name, num_heads=3, **settings)
    with torch.no_grad():
        logits = classifier(torch.stack([cut(image) for image, _ in images]))
    ranked = [sorted(range(10), key=lambda label: -one[label])[:5] for one in logits.tolist()]
    assert len({first for first, *_ in ranked}) >= 3, "the classes differ from image to image"
    labels = [label for _, label in images]
    pairs = list(zip(ranked, labels, strict=True))
    assert row["images"] == 20
    assert row["top1"] == sum(five[0] == label for five, label in pairs) / 20
    assert row["top5"] == sum(label in five for five, label in pairs) / 20
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).item()
    assert row["loss"] == pytest.approx(loss, rel=1e-4)
    assert f"resize to {resized_px} px (bicubic), center crop {cut_px}x{cut_px} px" in note

    if layout not in ("linear Lightning", "AIM, best"):
        return
    # The same classes by name, in the file's order: the first class is the last logit.
    Path("names.txt").write_text("\n".join(reversed(CLASSES)))
    by_name, _ = score(capsys, "--model", name, *words, "--classes", "names.txt")
    assert by_name["top1"] == sum(five[0] == 9 - label for five, label in pairs) / 20


@pytest.mark.parametrize("layout", ["attentive Lightning", "AIM, best"])
def test_another_number_of_classes_needs_their_names(layout, files, images, tmp_path, capsys):
    shutil.rmtree(tmp_path / "val" / CLASSES[3])
    words = ["--model", *LAYOUTS[layout][:1], *LAYOUTS[layout][1]]
    assert main(["eval", *words, "--test", "val", "--workers", "0"]) == 2
    error = capsys.readouterr().err
    assert "val has 9 classes, the classifier 10 without names" in error
    assert "--classes FILE" in error
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    row, _ = score(capsys, *words, "--classes", "names.txt")
    assert row["images"] == 18


def test_a_missing_head_is_asked_for_and_one_of_another_width_refused_with_both(files, images, capsys):
    assert main(["eval", "--model", "backbone.pth", "--num_heads", "3", "--test", "val"]) == 1
    assert "backbone.pth holds no classification head; give AIM's head" in capsys.readouterr().err
    head = torch.load("head.pth", weights_only=True)
    narrow = {name: w[..., :24] if w.ndim and "linear" not in name else w for name, w in head.items()}
    torch.save({**narrow, "head.linear.weight": head["head.linear.weight"][:, :24]}, "head.pth")
    assert main(["eval", "--model", "backbone.pth", *AIM, "last", "--test", "val"]) == 1
    assert "of width 24, but backbone.pth has width 48" in capsys.readouterr().err
