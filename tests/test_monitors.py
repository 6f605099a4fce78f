"""kNN and RankMe while a model is trained, on one process and several; the best checkpoint; early stop."""

import json
import math
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import nextblock
from nextblock.evaluate.monitors import FeatureMonitor, rankme
from nextblock.evaluate.table import FeatureTable
from nextblock.plan import step_flops
from nextblock.train import MonitorEvent
from nextblock.train.runtime import device_use
from ranks import in_group, run_ranks, train_in_turn, train_together
from tiny_runs import TINY, Quiet, assert_same_end, checkpoints, crash_toy, metrics, run_toy, write_images
from toy import DATA, ToySource, tiny_config, toy_model

CPU = torch.device("cpu")
EVENT = MonitorEvent(step=0, run_dir=Path(), device=CPU)


def monitor_of(train, val, **changes):
    return FeatureMonitor(val, DATA, train=train, **{"image_size": 16, "every": "5ep", **changes})


def measured(train, val, *, model=None, event=EVENT, **changes):
    with torch.no_grad():
        return monitor_of(train, val, **changes)(model or toy_model(), event)


def test_rankme_is_exp_of_the_entropy_of_normalised_singular_values():
    features = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    squares = torch.linalg.eigvalsh(features.double().T @ features.double())
    values = [math.sqrt(square) for square in squares.tolist()]
    shares = [value / sum(values) + 1e-7 for value in values]
    assert rankme(features) == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), rel=1e-9)
    assert rankme(torch.outer(features[0], features[1])) == pytest.approx(1, abs=1e-4), "one direction"
    assert rankme(7 * torch.linalg.qr(features).Q) == pytest.approx(8, abs=1e-4), "all directions alike"


def test_colours_are_told_apart_shuffled_labels_are_not_and_without_labels_there_is_rankme_alone():
    found = measured(ToySource(96), ToySource(48, seed=1), batch_size=20)
    assert found["knn/top1"] > 0.95
    assert 1 < found["rankme"] < 32
    shown: list[tuple[int, int]] = []
    event = EVENT._replace(progress=lambda *done: shown.append(done))
    assert measured(ToySource(96), ToySource(48, seed=1), batch_size=20, event=event) == found
    assert shown == [(done, 144) for done in (20, 40, 48, 68, 88, 108, 128, 144)]
    assert measured(ToySource(200, shuffled=True), ToySource(100, seed=1))["knn/top1"] < 0.45
    assert measured(None, ToySource(48, seed=1), batch_size=20) == {"rankme": found["rankme"]}


@pytest.mark.parametrize(("names", "top1"), [(("b", "a", "c", "d"), 0.5), (("a", "b", "c", "other"), 0.75)])
def test_classes_are_matched_by_name_and_those_that_train_lacks_count_as_wrong(names, top1):
    found = measured(ToySource(96), ToySource(48, seed=1, class_names=names))
    assert found["knn/top1"] == pytest.approx(top1, abs=0.05)


def test_at_most_so_many_images_are_read_chosen_by_the_seed():
    found = []
    for seed in (0, 0, 1, 2):
        train, val = ToySource(96, shuffled=True), ToySource(96, seed=1)
        found.append(measured(train, val, k=1, max_samples=30, seed=seed))
        assert (train.reads, val.reads) == (30, 30)
    assert found[0] == found[1]
    assert len({one["rankme"] for one in found}) == 3
    assert len({one["knn/top1"] for one in found}) > 1


def test_the_monitor_looks_at_the_model_as_it_is_now_and_draws_no_random_number():
    model, before = toy_model(), torch.random.get_rng_state()
    sources = ToySource(96), ToySource(48, seed=1)
    first = measured(*sources, model=model)
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        model.encoder.patch_embed.proj.weight.zero_()
    assert measured(*sources, model=model)["knn/top1"] < 0.5
    model.load_state_dict(state)
    assert measured(*sources, model=model) == first
    assert torch.equal(torch.random.get_rng_state(), before)


def test_features_that_are_no_numbers_or_missing_are_told_and_the_run_goes_on(caplog):
    model = toy_model()
    with torch.no_grad():
        next(model.encoder.norm.parameters()).fill_(torch.nan)
    assert measured(ToySource(24), ToySource(24, seed=1), model=model) == {}
    assert "24 of 24 feature vectors contain NaN or inf (first: image 0)" in caplog.text
    assert measured(None, ToySource(4, bad=range(4))) == {}
    assert "no image of toy-0 could be read; the first: toy-0[0]: truncated" in caplog.text


def test_a_run_that_is_asked_to_stop_stops_after_a_batch():
    should_stop, train, val = Mock(side_effect=[False, False, False, True]), ToySource(96), ToySource(20)
    assert measured(train, val, batch_size=10, event=EVENT._replace(should_stop=should_stop)) == {}
    assert (should_stop.call_count, val.reads) == (4, 20)
    assert train.reads < 96


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="'often' is not a duration"):
        monitor_of(ToySource(8), ToySource(8, seed=1), every="often")
    with pytest.raises(ValueError, match="no class in common"):
        monitor_of(ToySource(8), ToySource(8, class_names=("e", "f", "g", "h")))


CASES = [(11, (0, 1, 2, 3, 9)), (11, ()), (2, ())]
"""Numbers of images, and which of them cannot be read."""


def filled_here(cases=CASES):
    """Tables of features of all cases, filled by the ranks together."""
    found, data = [], replace(DATA, max_bad_fraction=1.0)

    def both(images):
        return images.mean((2, 3)), images.flatten(2)

    def fill(group):
        for count, bad in cases:
            source = ToySource(count, bad=bad)
            table = FeatureTable(both, source, data, 16, batch_size=2, device=CPU, group=group)
            table.fill()
            rows = table.readable()
            features = [table.read(rows, kind).numpy() for kind in (0, 1)]
            found.append((features, rows.tolist(), table.bad, source.reads))

    in_group(fill)
    return found


def test_ranks_share_a_source_and_all_get_its_features_in_order():
    alone = filled_here()
    for rank, found in enumerate(run_ranks(3, filled_here)):
        for (count, _), expected, (features, *rest, reads) in zip(CASES, alone, found, strict=True):
            assert all((mine == theirs).all() for mine, theirs in zip(features, expected[0], strict=True))
            assert rest == [*expected[1:3]]
            assert reads == count * (rank + 1) // 3 - count * rank // 3


def test_ranks_that_find_no_readable_image_all_say_so():
    message = "NoFeaturesError: no image of toy-0 could be read; the first: toy-0[0]"
    assert all(str(one).startswith(message) for one in run_ranks(2, filled_here, [(4, range(4))]))


def monitored(out, strategy):
    train, val = ToySource(41, shuffled=True, bad={3}), ToySource(23, seed=1, bad={20, 21, 22})
    monitor = monitor_of(train, val, every="1st", batch_size=3, k=5)
    train_together(out, {"train.strategy": strategy, "train.duration": "2st"}, monitors=(monitor,))
    return train.reads + val.reads


def test_knn_and_rankme_are_the_same_on_any_number_of_ranks(tmp_path):
    reads = monitored(tmp_path / "alone", "auto")
    for world, strategy in ((3, "ddp"), (2, "fsdp")):
        shares = run_ranks(world, monitored, tmp_path / strategy, strategy)
        assert sum(shares) == reads
        assert max(shares) <= reads // world + 3 * 2
        alone, together = metrics(tmp_path / "alone", "monitor"), metrics(tmp_path / strategy, "monitor")
        assert [line["step"] for line in alone] == [line["step"] for line in together] == [0, 1, 2]
        for mine, theirs in zip(alone, together, strict=True):
            assert mine["rankme"] == pytest.approx(theirs["rankme"], abs=1e-6)
            assert mine["knn/top1"] == pytest.approx(theirs["knn/top1"], abs=1e-6)


def pretrain(tmp_path, monitor, **more):
    reporter, monitor = Quiet(), {"knn_every": "7st", **monitor}
    train = {"train": str(tmp_path / "train")}
    nextblock.pretrain(TINY, out=tmp_path / "run", reporter=reporter, data=train, monitor=monitor, **more)
    return reporter.notes


def test_knn_may_have_labelled_images_of_its_own(tmp_path):
    for name in ("train", "known/cat", "known/dog", "asked/cat", "asked/emu", "asked/fox"):
        write_images(tmp_path / name, 4)
    notes = pretrain(tmp_path, {"knn_train": str(tmp_path / "known"), "knn_val": str(tmp_path / "asked")})
    assert all({"knn/top1", "rankme"} <= line.keys() for line in metrics(tmp_path / "run", "monitor"))
    (note,) = [note for note in notes if "classes" in note]
    assert note == (
        "2 of 3 classes of monitor.knn_val are not in monitor.knn_train and count as wrong in kNN: emu, fox"
    )
    assert any(note.startswith("WARNING: monitor.knn_val: ") for note in notes)  # noise of the same seed


@pytest.mark.parametrize(
    ("monitor", "checkpoint", "message"),
    [
        ({"knn_train": "digits"}, {}, "monitor.knn_train and monitor.knn_val go together"),
        ({"early_stop": "knn"}, {}, "monitor.early_stop knn cannot be measured: it needs labelled"),
        ({}, {"keep_best": "val_loss"}, "checkpoint.keep_best val_loss cannot be measured: it needs val"),
        ({"knn_every": None}, {"keep_best": "rankme"}, "keep_best rankme needs monitor.knn_every"),
    ],
)
def test_what_cannot_be_measured_decides_nothing(tmp_path, monitor, checkpoint, message):
    write_images(tmp_path / "train", 8)
    with pytest.raises(ValueError, match=message):
        pretrain(tmp_path, monitor, checkpoint=checkpoint)
    assert not (tmp_path / "run").exists()


class Scripted:
    """Returns given values after steps 0, 1, ..., on rank 0 alone."""

    every = "1st"

    def __init__(self, values, name="knn/top1"):
        self.values, self.name = values, name

    def __call__(self, model, event):
        return {self.name: self.values[event.step]} if event.group.is_main else {}


VALUES = [0.9, 0.1, 0.5, 0.2, 0.3, 0.5, 0.1, 0.2]
"""After steps 0 to 7: the best of a trained model is that after step 2."""
MONITORED = {"monitor.knn_every": "1st", "checkpoint.keep": 1}
KEEP = {**MONITORED, "checkpoint.keep_best": "knn"}
EARLY = {**MONITORED, "monitor.early_stop": "knn", "monitor.patience": 2}


def best(run):
    return json.loads((run / "best.json").read_text())


@pytest.mark.parametrize(("metric", "name", "sign"), [("knn", "knn/top1", 1), ("val_loss", "val_loss", -1)])
def test_the_best_checkpoint_is_kept_besides_the_latest(tmp_path, metric, name, sign):
    scripted = Scripted([sign * value for value in VALUES], name)
    run_toy(tmp_path, {**KEEP, "checkpoint.keep_best": metric}, monitors=[scripted])
    assert checkpoints(tmp_path) == ["step_00000002", "step_00000007"]
    assert best(tmp_path) == {"metric": metric, "value": sign * VALUES[2], "step": 2}


@pytest.mark.parametrize("step", [1, 4])
def test_a_run_that_was_killed_or_stopped_keeps_the_same_best(tmp_path, step):
    every, monitors = {**KEEP, "checkpoint.every": "2st"}, [Scripted(VALUES)]
    run_toy(tmp_path / "whole", every, monitors=monitors)
    crash_toy(tmp_path / "killed", step, every, monitors=monitors)
    run_toy(tmp_path / "stopped", every, monitors=monitors, stop=step)
    for name in ("killed", "stopped"):
        run_toy(tmp_path / name, every, monitors=monitors)
        assert checkpoints(tmp_path / name) == checkpoints(tmp_path / "whole")
        assert best(tmp_path / name) == best(tmp_path / "whole")
        assert_same_end(tmp_path / name, tmp_path / "whole")


def test_of_a_run_that_kept_none_the_best_that_is_left_counts(tmp_path):
    run_toy(tmp_path, MONITORED, monitors=[Scripted(VALUES)], stop=4)
    run_toy(tmp_path, KEEP, monitors=[Scripted([*VALUES[:5], 0.25, 0.1, 0.2])])
    assert best(tmp_path) == {"metric": "knn", "value": 0.3, "step": 4}
    assert checkpoints(tmp_path) == ["step_00000004", "step_00000007"]


@pytest.mark.parametrize("stop", [None, 3])
def test_a_run_ends_early_once_its_metric_no_longer_improves_and_is_then_over(tmp_path, stop):
    if stop is not None:
        run_toy(tmp_path, EARLY, monitors=[Scripted(VALUES)], stop=stop)
    for _ in range(2):
        reporter = Quiet()
        result = run_toy(tmp_path, EARLY, monitors=[Scripted(VALUES)], reporter=reporter)
        assert (result.step, result.stopped_by, result.is_finished) == (4, "early stop", True)
        reason = "early stop: knn/top1 has not risen above 0.5, that of step 2, in 2 measurements"
        assert reporter.notes[-1].startswith(reason)
        starts = json.loads((tmp_path / "environment.json").read_text())
        assert [start["complete"] for start in starts] == [False] * (stop is not None) + [True]
        assert checkpoints(tmp_path) == ["step_00000004"]
    patient = {**EARLY, "monitor.patience": 5}
    result = run_toy(tmp_path, patient, monitors=[Scripted(VALUES)])
    assert (result.step, result.stopped_by) == (7, None)


def test_all_ranks_keep_the_best_and_end_early_together(tmp_path):
    turn = (tmp_path, (Scripted(VALUES),))
    found = run_ranks(2, train_in_turn, [turn, turn], {**EARLY, **KEEP})  # again it is over
    assert [[(one.step, one.stopped_by) for one in turns] for turns in found] == [[(4, "early stop")] * 2] * 2
    assert checkpoints(tmp_path) == ["step_00000002", "step_00000004"]
    assert best(tmp_path)["step"] == 2


def test_a_cpu_has_a_memory_and_a_speed_and_a_known_gpu_a_share_of_its_peak(monkeypatch):
    flops = step_flops(tiny_config())
    found = device_use(CPU, 500.0, tiny_config(), 2)
    assert found.keys() == {"memory_gb", "tflops"}
    assert 0.05 < found["memory_gb"] < 100
    assert found["tflops"] == pytest.approx(500 * flops / 1e12)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda _: 3e9)
    for name, share in (("NVIDIA H100 80GB HBM3", 500 * flops / 1e12 / 989.4 / 2), ("Other", None)):
        monkeypatch.setattr("torch.cuda.get_device_name", lambda _, name=name: name)
        found = device_use(torch.device("cuda", 0), 500.0, tiny_config(), 2)
        assert found["memory_gb"] == 3
        assert found.get("mfu") == (share and pytest.approx(share))
