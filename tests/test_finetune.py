"""Fine-tuning as a whole: what it learns, what it writes, how it goes on, what it refuses."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nextblock
import tiny_runs
from nextblock.cli import main
from nextblock.config import ModelConfig
from nextblock.evaluate.finetune.config import FinetuneConfig, LoraSettings
from nextblock.evaluate.finetune.run import Sources, finetune_model
from nextblock.evaluate.finetune.train import measure_classifier
from nextblock.interop import load
from nextblock.models import TimmEncoder
from nextblock.models.heads import ImageClassifier
from nextblock.train import NonFiniteError
from toy import DATA, ToySource, one_thread, tiny_model, toy_model  # noqa: F401 - a fixture

QUICK = FinetuneConfig(
    model="RUN",
    train="toy-0",
    out="OUT",
    epochs=4,
    batch_size=16,
    lr=1e-2,
    layer_decay=0.9,
    crop_scale=(0.5, 1.0),
    device="cpu",
)
LORA = replace(QUICK, lora=LoraSettings(rank=2))


class Quiet(tiny_runs.Quiet):
    """Keeps what it is told; may ask the run to stop after a step."""

    def __init__(self, stop_after=None):
        super().__init__()
        self.stop_after = stop_after

    def begin(self, step, total_steps):
        self.began = (step, total_steps)

    def update(self, tick):
        super().update(tick)
        if tick.step == self.stop_after:
            signal.raise_signal(signal.SIGTERM)


def tune(out, config=QUICK, *, reporter=None, train=None, measured=None, model=None, data=DATA):
    sources = Sources(train or ToySource(96), measured or {"test": ToySource(48, seed=1)})
    config = replace(config, out=str(out))
    return finetune_model(model or toy_model(), config, sources, data, reporter or Quiet())


def kept(out) -> Any:
    return load(out / "classifier")


def weights(out):
    return kept(out).state_dict()


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def metrics(out):
    """Lines of metrics without clock readings."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_s", "data_wait")} for line in lines]


# ------------------------------------------------------------------------------------ what it learns


@pytest.mark.parametrize("config", [QUICK, LORA], ids=["whole", "lora"])
def test_it_tells_colours_apart(tmp_path, config):
    result = tune(tmp_path, config)
    assert result.reported.measures.top1 > 0.9
    assert (result.reported.split, result.reported.weights, result.step) == ("test", "last", 24)


def test_shuffled_labels_leave_it_at_chance(tmp_path):
    result = tune(tmp_path, train=ToySource(96, shuffled=True))
    assert result.reported.measures.top1 < 0.5


def test_whole_fine_tuning_changes_every_part_of_the_network(tmp_path):
    tune(tmp_path, replace(QUICK, epochs=1))
    before, after = toy_model().state_dict(), weights(tmp_path)
    same = [name for name in before if torch.equal(before[name], after[f"encoder_model.{name}"])]
    assert not same


def test_lora_changes_the_adapted_maps_and_nothing_else_of_the_encoder(tmp_path):
    result = tune(tmp_path, replace(LORA, epochs=1))
    before, after = toy_model().state_dict(), weights(tmp_path)
    changed = {name for name in before if not torch.equal(before[name], after[f"encoder_model.{name}"])}
    assert changed == {f"encoder.blocks.{i}.attn.{part}.weight" for i in (0, 1) for part in ("qkv", "proj")}
    adapters = 2 * 2 * ((32 + 96) + (32 + 32))
    assert result.trained_parameters == adapters + 33 * 4


def test_the_result_is_a_plain_classifier_that_measures_as_reported(tmp_path):
    result = tune(tmp_path, LORA)
    classifier = load(tmp_path / "classifier")
    assert isinstance(classifier, ImageClassifier)
    assert classifier.class_names == ("a", "b", "c", "d")
    found = measure_classifier(
        classifier,
        ToySource(48, seed=1),
        DATA,
        image_size=16,
        batch_size=128,
        precision="fp32",
    )
    assert found.measures == result.reported.measures


def test_the_same_seed_gives_the_same_weights_and_another_one_others(tmp_path):
    quick = replace(QUICK, epochs=1)
    for name, config in (("a", quick), ("b", quick), ("c", replace(quick, seed=1))):
        tune(tmp_path / name, config)
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    head = "head.linear.weight"
    assert not torch.equal(weights(tmp_path / "a")[head], weights(tmp_path / "c")[head])


def test_no_global_generator_is_moved(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    tune(tmp_path, replace(QUICK, epochs=1, mixup=0.8, cutmix=1.0, drop_path=0.5))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "changes",
    [
        {"head": "attentive", "attentive_heads": 4},
        {"head_norm": "batch"},
        {"augment": "none", "crop_scale": None},
    ],
    ids=["attentive", "batch norm", "no crops"],
)
def test_other_heads_and_crops_learn_too(tmp_path, changes):
    assert tune(tmp_path, replace(QUICK, **changes)).reported.measures.top1 > 0.8


def test_timms_augmentation_is_repeatable_and_leaves_global_generators(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    config = replace(QUICK, epochs=1, augment="timm", crop_scale=None)
    results = [tune(tmp_path / name, config) for name in "ab"]
    assert torch.equal(torch.get_rng_state(), before)
    assert results[0] == results[1]
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_the_page_tells_the_batch_in_use_where_the_source_is_smaller(tmp_path):
    tune(tmp_path, replace(QUICK, epochs=1, batch_size=500))
    assert "1 epochs (1 steps of 96 images)" in (tmp_path / "finetune.md").read_text()


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "o").touch()
    with pytest.raises(ValueError, match=r"o cannot be made a directory \(File exists\); give another --out"):
        tune(tmp_path / "o")


def test_one_class_is_refused(tmp_path):
    class OneClass(ToySource):
        def _find_labels(self):
            return np.zeros(len(self), dtype=np.int64), ("a",)

    with pytest.raises(ValueError, match=r"one class only \(a\)"):
        tune(tmp_path, train=OneClass(24))


# ------------------------------------------------------------------------------------ what it writes


def test_out_holds_the_result_the_page_the_curve_and_the_classifier_and_no_state(tmp_path):
    measured = {"val": ToySource(24, seed=2), "test": ToySource(48, seed=1)}
    result = tune(tmp_path, replace(QUICK, epochs=3, val_every=2, ema_decay=0.5), measured=measured)
    assert {path.name for path in tmp_path.iterdir()} == {
        *("settings.json", "finetune.json", "finetune.md", "metrics.jsonl", "classifier"),
    }
    assert [(row.split, row.weights) for row in result.rows] == [
        *(("val", "last"), ("val", "averaged"), ("test", "last"), ("test", "averaged")),
    ]
    kinds = [(line["kind"], line["epoch"]) for line in metrics(tmp_path)]
    assert kinds == [("train", 1), ("train", 2), ("val", 2), ("train", 3), ("val", 3)]
    last = metrics(tmp_path)[-1]
    assert last["top1"] == result.rows[0].measures.top1
    assert last["averaged/top1"] == result.rows[1].measures.top1
    page = (tmp_path / "finetune.md").read_text()
    assert f"| averaged | test | 48 | {100 * result.reported.measures.top1:.2f} |" in page


def test_the_classifier_kept_is_the_averaged_one(tmp_path):
    config = replace(QUICK, epochs=1, ema_decay=0.9)
    result = tune(tmp_path / "a", config)
    tune(tmp_path / "b", replace(config, ema_decay=None))
    head = "head.linear.weight"
    assert not torch.equal(weights(tmp_path / "a")[head], weights(tmp_path / "b")[head])
    assert result.reported.weights == "averaged"


def test_another_image_size_makes_a_model_of_that_size(tmp_path):
    result = tune(tmp_path, replace(QUICK, epochs=1, image_size=24, attention="full"))
    classifier = kept(tmp_path)
    assert classifier.encoder_model.config.image_size == 24
    assert classifier.encoder_model.config.feature_attention == "full"
    assert classifier(torch.zeros(2, 3, 24, 24)).shape == (2, 4)
    assert result.reported.measures.images == 48


def test_a_timm_encoder_is_fine_tuned_with_its_class_token(tmp_path):
    from nextblock.interop import open_encoder

    spec = "timm:test_vit,pretrained=false,img_size=32"
    config = replace(
        QUICK, epochs=1, tokens="joined", lora=LoraSettings(rank=2), augment="none", crop_scale=None
    )
    tune(tmp_path, config, model=open_encoder(spec), data=replace(DATA, val_resize_px=32))
    assert isinstance(load(tmp_path / "classifier").encoder_model, TimmEncoder)


# ------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("stop_after", [3, 6])
@pytest.mark.parametrize(
    "config",
    [
        replace(QUICK, epochs=2, ema_decay=0.9, drop_path=0.3, mixup=0.8, cutmix=1.0, head_norm="batch"),
        replace(LORA, epochs=2, ema_decay=0.9, lora=LoraSettings(rank=2, dropout=0.3)),
    ],
    ids=["whole", "lora"],
)
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, config, stop_after):
    measured = {"val": ToySource(48, seed=1)}
    whole = tune(tmp_path / "whole", config, measured=measured)
    cut = tune(tmp_path / "cut", config, measured=measured, reporter=Quiet(stop_after))
    assert (cut.stopped_by, cut.step, cut.rows) == ("SIGTERM", stop_after, ())
    assert not (tmp_path / "cut" / "finetune.json").exists()
    again = Quiet()
    resumed = tune(tmp_path / "cut", config, measured=measured, reporter=again)
    assert again.began == (stop_after, 12)
    assert resumed.rows == whole.rows
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")


def test_a_run_killed_after_its_last_state_goes_on_from_it(tmp_path):
    config = replace(QUICK, epochs=2, save_every="5st")

    class Kill(Quiet):
        def update(self, tick):
            if tick.step == 9:
                raise OSError("killed")

    tune(tmp_path / "whole", config)
    with pytest.raises(OSError, match="killed"):
        tune(tmp_path / "cut", config, reporter=Kill())
    again = Quiet()
    tune(tmp_path / "cut", config, reporter=again)
    assert again.began == (5, 12)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")


def test_a_finished_one_is_recognised_and_gives_the_same_result(tmp_path):
    config = replace(QUICK, epochs=1)
    result = tune(tmp_path, config)
    again = Quiet()
    assert tune(tmp_path, replace(config, save_every="1min"), reporter=again) == result
    assert not again.ticks
    assert "is complete" in again.notes[0]


def test_another_result_in_out_is_refused_and_replaced_on_request(tmp_path):
    tune(tmp_path, replace(QUICK, epochs=1))
    with pytest.raises(ValueError, match=r"another result \(settings\.lr: 0\.01 there, 0\.02 here\)"):
        tune(tmp_path, replace(QUICK, epochs=1, lr=2e-2))
    reporter = Quiet()
    tune(tmp_path, replace(QUICK, epochs=1, lr=2e-2, overwrite=True), reporter=reporter)
    assert reporter.began == (0, 6)
    assert len(metrics(tmp_path)) == 1


# ------------------------------------------------------------------------------------ refusals


def test_a_size_that_the_blocks_do_not_divide_is_refused_with_what_would_do(tmp_path):
    with pytest.raises(ValueError, match=r"20x20 px .* image_size 16 or 24, or attention full$"):
        tune(tmp_path, replace(QUICK, image_size=20))
    assert not list(tmp_path.iterdir())


def test_sources_of_other_classes_are_refused(tmp_path):
    other = ToySource(48, seed=1, class_names=("a", "b", "c", "e"))
    with pytest.raises(ValueError, match="do not have the same classes"):
        tune(tmp_path, measured={"test": other})


def test_a_diverging_run_stops_with_advice(tmp_path):
    with pytest.raises(NonFiniteError, match=r"for 5 steps in a row.*lower lr"):
        tune(tmp_path, replace(QUICK, lr=1e30))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": LoraSettings(rank=0), "layer_decay": 1.5}, r"layer_decay is 1\.5"),
        ({"head_norm": "batch", "micro_batch_size": 4}, r"micro-batches of 4, not the batch of 16"),
        ({"warmup_epochs": 4.0}, r"warm up for fewer than all"),
        ({"save_every": "3h"}, r"'3h' is not a duration here"),
        ({"mixup": -1.0}, r"mixup is -1\.0"),
        ({"label_smoothing": 1.0}, r"label_smoothing is 1\.0"),
        ({"ema_decay": 1.0}, r"ema_decay is 1\.0"),
        ({"micro_batch_size": 0}, r"micro_batch_size is 0"),
        ({"attentive_heads": 16}, r"attentive_heads is 16, and the head is linear"),
        ({"augment": "none"}, r"crop_scale is of augment crop, and augment is none"),
        ({"augment": "timm"}, r"crop_scale is of augment crop, and augment is timm"),
        ({"augment": "none", "crop_scale": None, "flip": 0.5}, r"flip is of augment crop and timm"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(QUICK, **changes)


def test_adapter_settings_without_adapters_are_refused():
    with pytest.raises(ValueError, match=r"set lora\.rank, such as 8"):
        LoraSettings(alpha=16.0)


# ------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of digits' size in a file."""
    from nextblock.checkpoint import save_model

    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, tiny_model(image_size=(16, 16)), data=replace(DATA, val_resize_px=16))
    return path


def test_the_command_holds_out_a_tenth_prints_a_table_and_ends_with_json(saved, tmp_path, capsys):
    words = ["finetune", "--model", str(saved), "--train", "digits:split=test", "--out", str(tmp_path / "o")]
    words += ["--epochs=1", "--batch_size=128", "--lora.rank", "2", "--device", "cpu", "--json"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert [(row["split"], row["weights"]) for row in result["rows"]] == [("held-out", "last")]
    assert "held-out" in printed
    assert result["train_images"] + result["rows"][0]["measures"]["images"] == 360


def test_a_source_without_labels_is_refused(saved, tmp_path, capsys):
    from PIL import Image

    (tmp_path / "images").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "images" / "a.png")
    words = [
        "finetune",
        "--model",
        str(saved),
        "--train",
        str(tmp_path / "images"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(words) == 2
    assert "labels" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_fp16_on_a_cpu_is_refused_before_anything_is_written(saved, tmp_path, capsys):
    words = ["finetune", "--model", str(saved), "--train", "digits", "--out", str(tmp_path / "o")]
    assert main([*words, "--precision", "fp16", "--device", "cpu"]) == 2
    assert "fp16 needs a GPU" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--attention", "causal"], "was not trained with a causal mask"),
        (["--image_size", "64"], "timm:NAME,img_size=N"),
        (["--head", "attentive", "--attentive_heads", "7"], "to a divisor, such as 4"),
        (["--head", "mlp"], "head is 'mlp'; it must be linear or attentive"),
    ],
)
def test_what_a_timm_encoder_cannot_do_is_refused(tmp_path, capsys, words, message):
    spec = "timm:test_vit,pretrained=false,img_size=32"
    given = ["finetune", "--model", spec, "--train", "digits", "--out", str(tmp_path / "o"), *words]
    assert main(given) == 2
    assert message in capsys.readouterr().err


def test_the_python_function_takes_paths_and_nested_settings(saved, tmp_path):
    result = nextblock.finetune(
        model=saved,
        train="digits:split=test",
        test="digits:split=test",
        out=Path(tmp_path / "o"),
        epochs=1,
        batch_size=180,
        lora={"rank": 1},
        layers=2,
        image_size=[16, 16],
        reporter=Quiet(),
    )
    assert result.total_steps == 2
    assert isinstance(kept(tmp_path / "o").encoder_model.config, ModelConfig)
