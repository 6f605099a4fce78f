"""Fine-tuning as a whole: what it learns, measures, writes and refuses; resumed, divided, from scratch."""

import json
import signal
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows

import nextblock
import tiny_runs
from nextblock.checkpoint import save_model
from nextblock.cli import main
from nextblock.data import TooManyBadImages, eval_batches, keyed_seed, normalize
from nextblock.errors import UsageError
from nextblock.evaluate import evaluation, splits
from nextblock.evaluate.evaluation import Stopped
from nextblock.evaluate.features import untrained
from nextblock.evaluate.finetune.settings import FinetuneSettings, LoraSettings
from nextblock.interop import load, open_encoder
from nextblock.models import TimmEncoder
from nextblock.train import NonFiniteError
from ranks import run_ranks
from tiny_runs import same
from toy import DATA, ToySource, tiny_model, toy_model

pytestmark = pytest.mark.usefixtures("coarse_pictures")
TIMM = "timm:test_vit,pretrained=false,img_size=32"
FAST = {"epochs": 2, "batch_size": 16, "lr": 1e-2, "crop_scale": (0.5, 1.0), "device": "cpu"}
QUICK = FinetuneSettings(model="RUN", train="toy-0", out="OUT", baselines=False, layer_decay=0.9, **FAST)
LORA = replace(QUICK, lora=LoraSettings(rank=2))
ALL_RANDOM = replace(QUICK, val="toy-2", ema_decay=0.9, drop_path=0.3, mixup=0.8, cutmix=1.0)


class Quiet(tiny_runs.Quiet):
    """Keeps what is reported; may ask the run to stop after a step."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.stop_after = stop_after

    def update(self, tick):
        super().update(tick)
        if tick.step == self.stop_after:
            signal.raise_signal(signal.SIGTERM)


def run(out, config=QUICK, *, reporter=None, sources=None, model=None, data=DATA):
    """Fine-tune on 96 toy pictures and measure on 48 others; `sources` are by purpose."""
    given = {"train": ToySource(96), **(sources or {"test": ToySource(48, seed=1)})}
    specs = {purpose: getattr(config, purpose) or purpose for purpose in given}
    known = {specs[purpose]: source for purpose, source in given.items()}
    encoder = (model or toy_model()).eval()
    settings = {**vars(config), "test": None, **specs, "out": str(out)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "open_source", lambda spec, _: known[spec])
        patch.setattr(evaluation, "open_model", lambda *_: (encoder, data))
        return nextblock.finetune(**settings, reporter=reporter or Quiet())


def run_as_rank(out, config, sources):
    """The same as one rank of however many the environment says."""
    return run(out, config, sources=sources).as_dict()


def weights(out):
    return load(out / "classifier").state_dict()


def metrics(out, run="model"):
    """Lines of metrics without the machine's part in them."""
    lines = [json.loads(line) for line in (out / run / "metrics.jsonl").read_text().splitlines()]
    machine = ("images_per_s", "data_wait", "memory_gb")
    return [{name: value for name, value in line.items() if name not in machine} for line in lines]


@pytest.fixture(scope="module", params=[QUICK, replace(LORA, ema_decay=0.9)], ids=["whole", "lora"])
def learned(request, tmp_path_factory):
    """The settings, result and directory of a fine-tuning and of the same network from scratch."""
    config, out = replace(request.param, epochs=4, baselines=True), tmp_path_factory.mktemp("learned")
    return config, run(out, config), out


def test_it_learns_colours_and_so_does_the_same_network_from_scratch(learned):
    """The whole network changes every weight, LoRA only the adapted maps."""
    config, result, out = learned
    ours, scratch = result.rows
    assert [row["encoder"] for row in result.rows] == ["model", "from scratch"]
    assert (ours["split"], ours["images"], ours["epoch"]) == ("test", 48, 4)
    assert min(ours["top1"], scratch["top1"]) > 0.8
    assert scratch["lead"] == pytest.approx(ours["top1"] - scratch["top1"])
    assert any("from scratch: fresh weights" in note for note in result.notes)
    assert json.loads((out / "model/baselines.json").read_text()) == {"chance": pytest.approx(np.log(4))}
    before, after = toy_model().state_dict(), weights(out)
    changed = {name for name in before if not torch.equal(before[name], after[f"encoder_model.{name}"])}
    adapted = {f"encoder.blocks.{i}.attn.{part}.weight" for i in (0, 1) for part in ("qkv", "proj")}
    assert changed == (adapted if config.lora.rank else set(before))


def test_from_scratch_is_an_untrained_model_fine_tuned_without_layer_decay(learned, tmp_path):
    config, _, out = learned
    fresh = untrained(toy_model(), keyed_seed(0, "untrained encoder"))
    run(tmp_path, replace(config, layer_decay=1.0, baselines=False), model=fresh)
    assert metrics(out, "scratch") == metrics(tmp_path)


def test_the_classifier_kept_measures_as_reported(learned):
    _, result, out = learned
    classifier, source = load(out / "classifier"), ToySource(48, seed=1)
    assert classifier.class_names == ("a", "b", "c", "d")
    (batch,) = eval_batches(source, DATA, 16, 48)
    with torch.no_grad():
        logits = classifier(normalize(batch.images, DATA.mean, DATA.std))
    labels, row = torch.from_numpy(source.labels), result.rows[0]
    assert float((logits.argmax(1) == labels).float().mean()) == pytest.approx(row["top1"])
    assert float(F.cross_entropy(logits, labels)) == pytest.approx(row["loss"], abs=1e-5)


def test_shuffled_labels_leave_it_at_chance(tmp_path):
    sources = {"train": ToySource(96, shuffled=True), "test": ToySource(48, seed=1)}
    assert run(tmp_path, replace(QUICK, epochs=4), sources=sources).rows[0]["top1"] < 0.5


@pytest.mark.parametrize(
    "changes",
    [
        {"head": "attentive", "attentive_heads": 4},
        {"augment": "none", "crop_scale": None},
        {"augment": "timm", "crop_scale": None, "epochs": 4},
    ],
    ids=["attentive", "no crops", "timm"],
)
def test_other_heads_and_crops_learn_and_leave_the_global_generator(tmp_path, changes):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert run(tmp_path, replace(QUICK, **changes)).rows[0]["top1"] > 0.8
    assert torch.equal(torch.get_rng_state(), before)


def test_another_image_size_makes_a_model_of_that_size(tmp_path):
    run(tmp_path, replace(QUICK, epochs=1, image_size=24, attention="full"))
    classifier: Any = load(tmp_path / "classifier")
    assert classifier.encoder_model.config.image_size == 24
    assert classifier.encoder_model.config.feature_attention == "full"
    assert classifier(torch.zeros(2, 3, 24, 24)).shape == (2, 4)


def test_a_timm_encoder_is_fine_tuned_with_its_class_token(tmp_path):
    config = replace(LORA, epochs=1, tokens="joined", augment="none", crop_scale=None)
    run(tmp_path, config, model=open_encoder(TIMM), data=replace(DATA, val_resize_px=32))
    assert isinstance(load(tmp_path / "classifier").encoder_model, TimmEncoder)


def test_val_chooses_the_epoch_whose_classifier_is_kept_and_measured(tmp_path):
    # A rate this high makes accuracy go up and down.
    config = replace(QUICK, val="toy-2", epochs=6, lr=0.2)
    result = run(tmp_path, config, sources={"val": ToySource(48, seed=2), "test": ToySource(48, seed=1)})
    curve = [line["top1"] for line in metrics(tmp_path) if line["kind"] == "val"]
    assert len(curve) == 6
    assert result.rows[0]["epoch"] == 1 + curve.index(max(curve)) != 6
    again = run(tmp_path / "b", config, sources={"val": ToySource(48, seed=2)})
    assert again.rows[0]["split"] == "val"
    assert again.rows[0]["top1"] == max(curve)
    assert any("for an unbiased number give --test" in note for note in again.notes)


def numbers(values):
    return {name: value for name, value in values.items() if not isinstance(value, str)}


@pytest.mark.parametrize(("bad", "world"), [((), 2), ((3, 4, 40), 3)], ids=["all readable", "holes"])
def test_micro_batches_and_ranks_change_no_number_and_list_unreadable_images(tmp_path, bad, world, caplog):
    """Also under drop path, mixing and averaging; but for rounding."""
    val, test = ToySource(22, seed=2), ToySource(48, seed=1, bad=bad[:1])
    sources = {"train": ToySource(96, bad=bad), "val": val, "test": test}
    whole = run(tmp_path / "whole", ALL_RANDOM, sources=sources)
    assert ("3 images of toy-0 (train) skipped" in caplog.text) == bool(bad)
    parts = run(tmp_path / "parts", replace(ALL_RANDOM, micro_batch_size=6), sources=sources)
    first, *others = run_ranks(world, run_as_rank, tmp_path / "ranks", ALL_RANDOM, sources)
    assert all(one == first for one in others), (first, others)
    for out, result in ((tmp_path / "parts", parts.as_dict()), (tmp_path / "ranks", first)):
        expected = [*metrics(tmp_path / "whole"), whole.rows[0]]
        for line, other in zip(expected, [*metrics(out), result["rows"][0]], strict=True):
            assert numbers(other) == pytest.approx(numbers(line), rel=1e-4, abs=1e-5)
        assert result["bad_images"] == {"train": len(bad), "test": len(bad[:1])}
        assert result["rows"][0]["images"] == 48 - len(bad[:1])
        if bad:
            lines = map(json.loads, (out / "quarantine.jsonl").read_text().splitlines())
            found = [(line["source"], line["name"]) for line in lines]
            assert found == [*(("train", f"toy-0[{i}]") for i in sorted(bad)), ("test", "toy-1[3]")]


@pytest.mark.parametrize(
    ("config", "stop_after"),
    [(ALL_RANDOM, 6), (replace(LORA, ema_decay=0.9), 5)],
    ids=["whole, at an epoch's end", "lora, within an epoch"],
)
def test_a_resumed_run_is_an_uninterrupted_one_bit_for_bit(tmp_path, config, stop_after):
    purpose = "test" if config.val is None else "val"
    config, sources = replace(config, baselines=True), {purpose: ToySource(48, seed=2)}
    whole = run(tmp_path / "whole", config, sources=sources)
    # The run from scratch is stopped after the same step as the model's.
    for stage in ("model", "scratch"):
        with pytest.raises(Stopped, match=rf"after step {stop_after} of 12 in .*{stage}, saved"):
            run(tmp_path / "cut", config, sources=sources, reporter=Quiet(stop_after))
        assert not (tmp_path / "cut" / "finetune.json").exists()
    assert run(tmp_path / "cut", config, sources=sources) == whole
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    for stage in ("model", "scratch"):
        assert metrics(tmp_path / "whole", stage) == metrics(tmp_path / "cut", stage)


def test_one_that_is_killed_before_its_result_is_written_measures_again(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr("nextblock.evaluate.finetune.run.save_classifier", Mock(side_effect=OSError("killed")))
        run(tmp_path / "cut")
    again = Quiet()
    assert run(tmp_path / "cut", reporter=again) == whole
    assert not again.ticks


def test_a_finished_result_is_read_another_is_refused_and_overwrite_replaces_it(tmp_path):
    config, again = replace(QUICK, epochs=1), Quiet()
    result = run(tmp_path, config)
    assert run(tmp_path, replace(config, save_every="1min"), reporter=again).rows == result.rows
    assert not again.ticks
    other = replace(config, lr=2e-2)
    with pytest.raises(ValueError, match=r"another result \(settings\.lr: 0\.01 there, 0\.02 here\)"):
        run(tmp_path, other)
    with pytest.raises(Stopped):
        run(tmp_path, replace(other, overwrite=True), reporter=Quiet(3))
    with pytest.raises(ValueError, match=r"holds another run \(lr: 0\.02 there, 0\.01 now\)"):
        run(tmp_path, config)
    run(tmp_path, replace(other, overwrite=True), reporter=again)
    assert again.began_at == (3, 6)
    assert not list(tmp_path.rglob("step_*"))


@pytest.mark.parametrize("purpose", ["train", "test"])
def test_of_too_many_unreadable_images_this_commands_setting_is_named(tmp_path, purpose):
    sources = {"train": ToySource(96), "test": ToySource(48, seed=1), purpose: ToySource(90, bad=range(60))}
    with pytest.raises(TooManyBadImages, match="max_bad_fraction") as found:
        run(tmp_path, replace(QUICK, epochs=1), sources=sources)
    assert "data.max_bad_fraction" not in str(found.value)


def test_a_diverging_run_stops_with_advice_in_this_commands_words(tmp_path):
    with pytest.raises(NonFiniteError, match=r"for 5 steps in a row.*a lower lr, a longer warmup"):
        run(tmp_path, replace(QUICK, lr=1e30))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_decay": 1.5}, "layer_decay is 1.5; it must be a number above 0 and up to 1"),
        ({"mixup": 0.8, "micro_batch_size": 5}, "use an even number"),
        ({"attentive_heads": 16}, "attentive_heads needs --head attentive"),
        ({"augment": "timm"}, "crop_scale needs --augment crop"),
        ({"augment": "none", "crop_scale": None, "flip": 0.5}, "flip needs --augment crop or timm"),
        ({"end_lr": 1.0}, "end_lr 1.0 is above lr 0.01"),
        ({"save_every": "3h"}, "save_every is '3h'"),
        ({"cache": "DIR"}, "leave out --cache"),
        ({"lora": {"alpha": 16.0}}, "lora.alpha needs adapters, e.g. --lora.rank 8"),
        ({"attention": "causal"}, "was not trained with a causal mask"),
        ({"image_size": 64}, "timm:NAME,img_size=N"),
        ({"head": "attentive", "attentive_heads": 7}, "to a divisor, such as 4"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, changes, message):
    given = {"model": TIMM, "train": "digits", "crop_scale": (0.5, 1.0), "lr": 1e-2, "device": "cpu"}
    with pytest.raises(UsageError, match=message):
        nextblock.finetune(**{**given, "out": str(tmp_path / "o"), **changes})
    assert not (tmp_path / "o").exists()


def test_the_command_holds_out_a_tenth_prints_a_table_and_ends_with_json(tmp_path, capsys):
    saved = tmp_path / "model.safetensors"
    save_model(saved, tiny_model(image_size=(16, 16)), data=replace(DATA, val_resize_px=16))
    words = ["finetune", "--model", saved, "--train", "digits:split=test", "--out", tmp_path / "o"]
    words += ["--epochs=1", "--batch_size=128", "--lora.rank", "2", "--device", "cpu", "--json"]
    assert main([str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    rows = [(row["encoder"], row["split"], row["images"]) for row in result["rows"]]
    assert rows == [("model", "held-out", 40), ("from scratch", "held-out", 40)]
    assert result["train_images"] == 360 - 40
    assert "from scratch" in printed
    assert {path.name for path in (tmp_path / "o").iterdir() if path.name[0] != "."} == {
        *("finetune.json", "finetune.md", "finetune.csv", "confusion.png"),
        *("classifier", "model", "scratch"),
    }
