"""Fine-tuning's directory: whose files it takes for its own, and what it tells of images it cannot read."""

import json
import logging
from dataclasses import replace

import pytest

from nextblock.data import TooManyBadImages
from nextblock.evaluate.sources import hold_out_test, part_of
from test_finetune import LORA, QUICK, assert_same, metrics, tune, weights
from toy import DATA, ToySource, one_thread  # noqa: F401 - a fixture

ONE = replace(QUICK, epochs=1)


# ------------------------------------------------------------------------------------ whose files


@pytest.mark.parametrize("place", ["classifier/mine.pt", "state/mine.pt", "metrics.jsonl", "confusion.png"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_no_fine_tuning_wrote_is_refused_and_left_alone(tmp_path, place, overwrite):
    mine = tmp_path / place
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(ValueError, match=rf"holds other files \({place.partition('/')[0]}\)"):
        tune(tmp_path, replace(ONE, overwrite=overwrite))
    assert mine.read_text() == "mine"


def test_a_strangers_file_beside_a_result_is_refused_also_to_overwrite(tmp_path):
    tune(tmp_path, ONE)
    (tmp_path / "notes.txt").touch()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"holds other files \(notes\.txt\)"):
            tune(tmp_path, replace(ONE, overwrite=overwrite))
    assert (tmp_path / "classifier" / "model.safetensors").is_file()


# ------------------------------------------------------------------------------------ unreadable images


def listed(out):
    return [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]


def held_out(source):
    kept, held = hold_out_test(source, QUICK.seed)
    return kept, held, {"train": part_of(source, kept), "measured": {"held-out": part_of(source, held)}}


def test_unreadable_images_are_left_out_counted_named_and_listed(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        result = tune(
            tmp_path,
            ONE,
            train=ToySource(96, bad={3, 50}),
            measured={"val": ToySource(24, seed=2, bad={4}), "test": ToySource(48, seed=1, bad={7})},
        )
    assert result.bad_images == {"train": 2, "val": 1, "test": 1}
    assert [row.measures.images for row in result.rows] == [23, 47]
    found = sorted(
        (line["source"], line["name"], line["sample"], line["reason"]) for line in listed(tmp_path)
    )
    assert found == [
        ("test", "toy-1[7]", 7, "truncated"),
        ("train", "toy-0[3]", 3, "truncated"),
        ("train", "toy-0[50]", 50, "truncated"),
        ("val", "toy-2[4]", 4, "truncated"),
    ]
    assert "2 of the 96 images of toy-0 (train) cannot be read" in caplog.text
    assert "1 of the 48 images of toy-1 (test) cannot be read and are left out: toy-1[7]: " in caplog.text
    assert "unreadable images left out: 4." in (tmp_path / "finetune.md").read_text()


def test_of_a_source_of_which_a_tenth_is_held_out_the_images_are_named_by_their_number_in_it(tmp_path):
    kept, held, _ = held_out(ToySource(96))
    bad = {int(kept[60]), int(held[2])}
    _, _, sources = held_out(ToySource(96, bad=bad))
    tune(tmp_path, ONE, **sources)
    assert {line["source"]: line["sample"] for line in listed(tmp_path)} == {
        "train": kept[60],
        "held-out": held[2],
    }
    assert kept[60] != 60
    assert {line["name"] for line in listed(tmp_path)} == {f"toy-0[{number}]" for number in bad}


@pytest.mark.parametrize("which", [0, 1], ids=["to train on", "held out"])
def test_the_limit_is_a_share_of_the_whole_source_not_of_the_part_that_it_meets(tmp_path, which):
    parts = held_out(ToySource(96))[:2]
    two = {int(number) for number in parts[which][:2]}
    _, _, sources = held_out(ToySource(96, bad=two))
    data = replace(DATA, max_bad_fraction=2 / 96)
    assert tune(tmp_path / "a", ONE, data=data, **sources).bad_images == {
        "train": 2 * (which == 0),
        "held-out": 2 * (which == 1),
    }
    with pytest.raises(TooManyBadImages, match=r"2 .*96.* cannot be read"):
        tune(tmp_path / "b", ONE, data=replace(data, max_bad_fraction=1.9 / 96), **sources)


def test_unreadable_images_of_both_parts_count_together(tmp_path):
    kept, held, _ = held_out(ToySource(96))
    _, _, sources = held_out(ToySource(96, bad={int(kept[0]), int(held[0])}))
    with pytest.raises(TooManyBadImages, match="2 of the 96 images of toy-0 cannot be read"):
        tune(tmp_path, ONE, data=replace(DATA, max_bad_fraction=1.5 / 96), **sources)


def test_of_too_many_bad_images_the_commands_own_setting_is_named(tmp_path):
    with pytest.raises(TooManyBadImages, match="or allow more by --max_bad_fraction") as found:
        tune(tmp_path, train=ToySource(96, bad=set(range(60))))
    assert "data.max_bad_fraction" not in str(found.value)


# ------------------------------------------------------------------------------------ measuring


@pytest.mark.parametrize(("config", "times"), [(QUICK, 2), (LORA, 3)], ids=["whole", "lora, then merged"])
def test_val_is_measured_once_an_epoch_and_the_last_measuring_is_the_result(tmp_path, config, times):
    val = ToySource(24, seed=2)
    result = tune(tmp_path, replace(config, epochs=2), measured={"val": val})
    assert val.reads == times * len(val)
    assert metrics(tmp_path)[-1]["loss"] == pytest.approx(result.reported.measures.loss, abs=1e-5)


def test_one_that_is_killed_before_its_result_is_written_measures_again_and_finds_the_same(
    tmp_path, monkeypatch
):
    config, val = replace(QUICK, epochs=2), {"val": ToySource(24, seed=2)}
    whole = tune(tmp_path / "whole", config, measured=val)

    def killed(*_, **__):
        raise OSError("killed")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr("nextblock.evaluate.finetune.run.save_classifier", killed)
        tune(tmp_path / "cut", config, measured=val)
    assert tune(tmp_path / "cut", config, measured=val) == whole
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
