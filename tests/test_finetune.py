"""Fine-tuning as a whole: what it learns, measures, writes and refuses; resumed, divided, from scratch."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nextblock
from finetuning import ALL_RANDOM, LORA, QUICK, Quiet, metrics, run, run_as_rank, weights
from nextblock.checkpoint import save_model
from nextblock.cli import main
from nextblock.data import TooManyBadImages, eval_batches, normalize
from nextblock.evaluate.evaluation import Stopped
from nextblock.evaluate.finetune.settings import LoraSettings
from nextblock.evaluate.splits import Labelled
from nextblock.interop import load, open_encoder
from nextblock.models import TimmEncoder
from nextblock.models.heads import ImageClassifier
from nextblock.train import NonFiniteError
from ranks import run_ranks
from tiny_runs import same
from toy import DATA, ToySource, one_thread, tiny_model, toy_model  # noqa: F401 - a fixture

pytestmark = pytest.mark.usefixtures("coarse_pictures")
TIMM = "timm:test_vit,pretrained=false,img_size=32"


# ------------------------------------------------------------------------------------ what it learns


@pytest.mark.parametrize("config", [QUICK, LORA], ids=["whole", "lora"])
def test_it_learns_colours_and_so_does_the_same_network_from_scratch(tmp_path, config):
    result = run(tmp_path, replace(config, epochs=4, baselines=True))
    ours, scratch = result.rows
    assert [row["encoder"] for row in result.rows] == ["model", "from scratch"]
    assert (ours["split"], ours["images"], ours["epoch"]) == ("test", 48, 4)
    assert min(ours["top1"], scratch["top1"]) > 0.8
    assert scratch["lead"] == pytest.approx(ours["top1"] - scratch["top1"])
    assert any("from scratch: fresh weights" in note for note in result.notes)
    assert json.loads((tmp_path / "model/baselines.json").read_text()) == {"chance": pytest.approx(np.log(4))}


def test_shuffled_labels_leave_it_at_chance(tmp_path):
    sources = {"train": ToySource(96, shuffled=True), "test": ToySource(48, seed=1)}
    assert run(tmp_path, replace(QUICK, epochs=4), sources=sources).rows[0]["top1"] < 0.5


def test_from_scratch_is_an_untrained_model_fine_tuned_without_layer_decay(tmp_path):
    run(tmp_path / "a", replace(QUICK, baselines=True))
    from nextblock.data import keyed_seed
    from nextblock.evaluate.features import untrained

    fresh = untrained(toy_model(), keyed_seed(0, "untrained encoder"))
    run(tmp_path / "b", replace(QUICK, layer_decay=1.0), model=fresh)
    assert metrics(tmp_path / "a", "scratch") == metrics(tmp_path / "b")


def test_whole_fine_tuning_changes_every_part_and_lora_the_adapted_maps_alone(tmp_path):
    before = toy_model().state_dict()
    for name, config in (("whole", QUICK), ("lora", LORA)):
        run(tmp_path / name, replace(config, epochs=1))
        after = weights(tmp_path / name)
        changed = {one for one in before if not torch.equal(before[one], after[f"encoder_model.{one}"])}
        adapted = {f"encoder.blocks.{i}.attn.{part}.weight" for i in (0, 1) for part in ("qkv", "proj")}
        assert changed == (set(before) if name == "whole" else adapted)


@pytest.mark.parametrize(
    "changes",
    [
        {"head": "attentive", "attentive_heads": 4},
        {"head_norm": "batch"},
        {"augment": "none", "crop_scale": None},
        {"augment": "timm", "crop_scale": None, "epochs": 4},
    ],
    ids=["attentive", "batch norm", "no crops", "timm"],
)
def test_other_heads_and_crops_learn_and_leave_the_global_generator(tmp_path, changes):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert run(tmp_path, replace(QUICK, **changes)).rows[0]["top1"] > 0.8
    assert torch.equal(torch.get_rng_state(), before)


def test_the_classifier_kept_measures_as_reported(tmp_path):
    row = run(tmp_path, replace(LORA, ema_decay=0.9)).rows[0]
    classifier, source = load(tmp_path / "classifier"), ToySource(48, seed=1)
    assert isinstance(classifier, ImageClassifier)
    assert classifier.class_names == ("a", "b", "c", "d")
    (batch,) = eval_batches(source, DATA, 16, 48)
    with torch.no_grad():
        logits = classifier(normalize(batch.images, DATA.mean, DATA.std))
    labels = torch.from_numpy(source.labels)
    assert float((logits.argmax(1) == labels).float().mean()) == pytest.approx(row["top1"])
    assert float(torch.nn.functional.cross_entropy(logits, labels)) == pytest.approx(row["loss"], abs=1e-5)


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


# ------------------------------------------------------------------------------------ train, val, test


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


def test_with_neither_a_tenth_of_every_class_is_held_out(tmp_path):
    result = run(tmp_path, sources={"train": ToySource(96)})
    assert (result.rows[0]["split"], result.rows[0]["images"]) == ("held-out", 8)
    assert result.facts["train_images"] == 88


def test_a_test_set_without_one_class_is_measured_and_the_class_is_named(tmp_path):
    source = ToySource(48, seed=1, class_names=("b", "c", "d", "a"))  # other numbers for the same names
    note = "toy-1 has no image of 1 class of train: b"
    few = Labelled(source, (source.labels + 1) % 4, notes=(note,))
    result = run(tmp_path, replace(QUICK, epochs=1), sources={"test": few})
    assert note in result.notes


# ------------------------------------------------------------------------------------ parts of a batch


def numbers(values):
    return {name: value for name, value in values.items() if not isinstance(value, str)}


@pytest.mark.parametrize(("bad", "world"), [((), 2), ((3, 4, 50), 3)], ids=["all readable", "holes"])
def test_micro_batches_and_ranks_change_no_number(tmp_path, bad, world):
    """Also under drop path, mixing and averaging, and with unreadable images; but for rounding."""
    sources = {"train": ToySource(96, bad=bad), "val": ToySource(22, seed=2), "test": ToySource(48, seed=1)}
    config = replace(ALL_RANDOM, val="toy-2")
    whole = run(tmp_path / "whole", config, sources=sources)
    parts = run(tmp_path / "parts", replace(config, micro_batch_size=6), sources=sources)
    first, *others = run_ranks(world, run_as_rank, tmp_path / "ranks", config, sources)
    assert all(one == first for one in others), (first, others)
    for out, result in ((tmp_path / "parts", parts.as_dict()), (tmp_path / "ranks", first)):
        expected = [*metrics(tmp_path / "whole"), whole.rows[0]]
        for line, other in zip(expected, [*metrics(out), result["rows"][0]], strict=True):
            assert numbers(other) == pytest.approx(numbers(line), rel=1e-4, abs=1e-5)
        assert result["bad_images"] == {"train": len(bad), "test": 0}


def test_a_batch_norm_over_part_of_a_batch_is_refused(tmp_path):
    with pytest.raises(ValueError, match="micro-batches of 4, not the batch of 16"):
        replace(QUICK, head_norm="batch", micro_batch_size=4)
    failed = run_ranks(2, run_as_rank, tmp_path, replace(QUICK, head_norm="batch"), {})
    assert "head_norm layer, or one process" in str(failed[0])


# ------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize(
    ("config", "stop_after"),
    [
        (replace(ALL_RANDOM, head_norm="batch"), 3),
        (replace(ALL_RANDOM, val="toy-2"), 6),
        (replace(LORA, ema_decay=0.9, lora=LoraSettings(rank=2, dropout=0.3)), 5),
    ],
    ids=["within an epoch", "at its end", "lora"],
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

    def killed(*_, **__):
        raise OSError("killed")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr("nextblock.evaluate.finetune.run.save_classifier", killed)
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


# ------------------------------------------------------------------------------------ unreadable images


def test_unreadable_images_are_left_out_counted_and_listed(tmp_path, caplog):
    sources = {"train": ToySource(96, bad={3, 50}), "test": ToySource(48, seed=1, bad={7})}
    with caplog.at_level(logging.WARNING):
        result = run(tmp_path, replace(QUICK, epochs=1), sources=sources)
    assert result.facts["bad_images"] == {"train": 2, "test": 1}
    assert result.rows[0]["images"] == 47
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    found = {(line["source"], line["name"]) for line in lines}
    assert found == {("train", "toy-0[3]"), ("train", "toy-0[50]"), ("test", "toy-1[7]")}
    assert "2 images of toy-0 (train) skipped" in caplog.text


@pytest.mark.parametrize("purpose", ["train", "test"])
def test_of_too_many_unreadable_images_this_commands_setting_is_named(tmp_path, purpose):
    sources = {"train": ToySource(96), "test": ToySource(48, seed=1), purpose: ToySource(90, bad=range(60))}
    with pytest.raises(TooManyBadImages, match="max_bad_fraction") as found:
        run(tmp_path, replace(QUICK, epochs=1), sources=sources)
    assert "data.max_bad_fraction" not in str(found.value)


# ------------------------------------------------------------------------------------ refusals


def test_a_diverging_run_stops_with_advice_in_this_commands_words(tmp_path):
    with pytest.raises(NonFiniteError, match=r"for 5 steps in a row.*a lower lr, a longer warmup"):
        run(tmp_path, replace(QUICK, lr=1e30))


def test_a_size_that_the_blocks_do_not_divide_is_refused_with_what_would_do(tmp_path):
    with pytest.raises(ValueError, match=r"20x20 px .* image_size 16 or 24, or attention full$"):
        run(tmp_path, replace(QUICK, image_size=20))
    assert not list(tmp_path.iterdir())


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
        ({"lora": {"alpha": 16.0}}, "lora.alpha and lora.dropout need adapters, e.g. --lora.rank 8"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, changes, message):
    given = {"model": "RUN", "train": "digits", "out": tmp_path, "crop_scale": (0.5, 1.0), "lr": 1e-2}
    with pytest.raises(ValueError, match=message):
        nextblock.finetune(**{**given, **changes})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--attention", "causal"], "was not trained with a causal mask"),
        (["--image_size", "64"], "timm:NAME,img_size=N"),
        (["--head", "attentive", "--attentive_heads", "7"], "to a divisor, such as 4"),
        (["--precision", "fp16"], "fp16 needs a GPU"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, capsys, words, message):
    given = ["finetune", "--model", TIMM, "--train", "digits", "--out", str(tmp_path / "o")]
    assert main([*given, "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


# ------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A model of digits' size in a file."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, tiny_model(image_size=(16, 16)), data=replace(DATA, val_resize_px=16))
    return path


def test_the_command_holds_out_a_tenth_prints_a_table_and_ends_with_json(saved, tmp_path, capsys):
    words = ["finetune", "--model", saved, "--train", "digits:split=test", "--out", tmp_path / "o"]
    words += ["--epochs=1", "--batch_size=128", "--lora.rank", "2", "--device", "cpu", "--json"]
    assert main([str(word) for word in words]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert [(row["encoder"], row["split"]) for row in result["rows"]] == [
        ("model", "held-out"),
        ("from scratch", "held-out"),
    ]
    assert "from scratch" in printed
    assert {path.name for path in (tmp_path / "o").iterdir() if path.name[0] != "."} == {
        *("finetune.json", "finetune.md", "finetune.csv", "confusion.png"),
        *("classifier", "model", "scratch"),
    }


def test_a_signal_ends_the_command_with_its_number_and_says_how_to_resume(
    saved, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("nextblock.evaluate.finetune.run.Reporter", lambda **_: Quiet(stop_after=1))
    words = ["finetune", "--model", saved, "--train", "digits:split=test", "--out", tmp_path / "o"]
    assert main([str(word) for word in [*words, "--epochs", "2", "--device", "cpu"]]) == 128 + 15
    assert "stopped by SIGTERM after step 1 of 2" in capsys.readouterr().err


def test_the_python_function_takes_paths_and_nested_settings(saved, tmp_path):
    result = nextblock.finetune(
        model=saved,
        train="digits:split=test",
        test="digits:split=test",
        out=Path(tmp_path / "o"),
        baselines=False,
        epochs=1,
        batch_size=180,
        lora={"rank": 1},
        image_size=[16, 16],
        reporter=Quiet(),
    )
    assert np.array(result.facts["confusion"]).sum() == 360
