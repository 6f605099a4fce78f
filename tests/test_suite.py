"""The suite reads each data set, probes what is there, resumes, and shows published numbers too."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when the library is imported

import datasets

import nextblock
import suite_copies as copies
from nextblock.checkpoint import save_model
from nextblock.cli import main
from nextblock.config import DataConfig
from nextblock.data import Source, open_source
from nextblock.errors import UsageError
from nextblock.evaluate.evaluation import Result, Stopped
from nextblock.evaluate.probe.heads import Grid, encoder_candidates
from nextblock.evaluate.probe.settings import ProbeSettings
from nextblock.evaluate.suite import run as suite_run
from nextblock.evaluate.suite.settings import BENCHMARKS, FIFTEEN, PUBLISHED, SuiteSettings, chosen
from nextblock.visualize.evaluation import draw_suite
from ranks import run_ranks
from toy import DATA, toy_model

pytestmark = pytest.mark.usefixtures("coarse_pictures")
SETTINGS: dict[str, Any] = {"model": "m", "root": "r", "out": "o"}
THREE = ("cifar10", "dtd", "camelyon17")


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    copies.trust_cifar(monkeypatch)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


def opened(name: str, root: Path) -> list[Source]:
    (one,) = chosen((name,))
    specs = suite_run.sources_of(one, str(root), root.parent / "lists")
    return [open_source(spec, DataConfig(workers=0)) for spec in specs]


@pytest.mark.parametrize(
    ("name", "classes", "sizes"),
    [
        *((name, 3, (6, 3)) for name in ("inat18", "dtd", "pets", "infograph")),
        *((name, 4, (8, 4)) for name in ("cars", "camelyon17", "fmow")),
        ("imagenet1k", 3, (9, 6)),
        ("cifar10", 10, (50, 20)),
        ("pcam", 2, (6, 4)),
        ("iwildcam", 5, (3, 3)),  # with the classes that only other splits have
        ("rxrx1", 3, (3, 6)),  # site 1 of the training experiments
    ],
)
def test_each_layout_is_read_with_its_splits_and_classes(tmp_path, name, classes, sizes):
    getattr(copies, name)(tmp_path / "data")
    found = opened(name, tmp_path / "data")
    assert tuple(map(len, found)) == sizes
    assert [len(source.class_names) for source in found] == [classes] * 2
    # The pictures of a class have one colour.
    labels = np.concatenate([source.labels for source in found])
    colours = np.stack([s.read(i).float().mean((1, 2)).numpy() for s in found for i in range(len(s))])
    centres = np.stack([colours[labels == label].mean(axis=0) for label in np.unique(labels)])
    nearest = np.abs(colours[:, None] - centres).sum(-1).argmin(1)
    assert (np.unique(labels)[nearest] == labels).all()


def test_other_annotations_are_refused_with_the_way_to_get_the_right_ones(tmp_path):
    copies.write(tmp_path / "data" / "rxrx1_v1.0" / "metadata.csv", "split,y\ntrain,1\n")
    why = r"cannot read the annotations in .*rxrx1_v1.0 \(KeyError: .*pip install"
    with pytest.raises(UsageError, match=why):
        opened("rxrx1", tmp_path / "data")


def test_the_list_shows_what_is_found_how_it_differs_and_how_to_get_the_others(tmp_path, capsys):
    copies.dtd(tmp_path)
    copies.write(tmp_path / "camelyon17" / "README.md", "")  # a copy of the hub is not opened
    copies.write(tmp_path / "rxrx1_v1.0" / "metadata.csv", "broken")
    assert main(["suite", "--list", "--root", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["benchmark"] for row in found["rows"] if row["found"]] == ["dtd", "camelyon17", "rxrx1"]
    notes = dict(note.split(": ", 1) for note in found["notes"])
    numbers = "3 classes, not 47; 6 to train on, not 3,760; 3 to test on, not 1,880."
    assert notes.pop("DTD differs from the papers'") == numbers
    assert notes.pop("rxrx1").startswith("cannot read the annotations")
    assert str(tmp_path) in notes["pets"]
    assert len(notes) == len(BENCHMARKS) - 3
    assert [row["found"] for row in suite_run.list_benchmarks(None, ("pets",)).rows] == [None]
    with pytest.raises(UsageError, match="there is no directory"):
        suite_run.list_benchmarks(str(tmp_path / "none"), None)


class Probe:
    """Probes, and keeps the names of the benchmarks in order; `stops_at` one of them."""

    def __init__(self):
        self.names, self.stops_at = [], None

    def __call__(self, **settings):
        name = Path(settings["out"]).name
        if name == self.stops_at:
            raise Stopped(signal.SIGTERM, "stopped")
        self.names.append(name)
        return nextblock.probe(**settings)


@pytest.fixture
def probe(monkeypatch):
    probe = Probe()
    monkeypatch.setattr(suite_run, "probe", probe)
    return probe


@pytest.fixture
def run(tmp_path):
    """`run(**changes)`: a quick suite of a toy model on copies of three data sets."""
    save_model(tmp_path / "toy.safetensors", toy_model(), data=DATA)
    copies.cifar10(tmp_path / "data")
    copies.dtd(tmp_path / "data", 47)
    copies.camelyon17(tmp_path / "data")

    def call(**changes: Any) -> Result:
        settings = {"model": tmp_path / "toy.safetensors", "root": tmp_path / "data", "out": tmp_path / "out"}
        quick = {"only": THREE, "epochs": 2, "lr": 1e-2, "augment": "none"}
        return nextblock.suite(**{**settings, **quick, "device": "cpu", "workers": 0, **changes})

    return call


def command(tmp_path: Path, words: str) -> list[str]:
    places = ["--model", str(tmp_path / "toy.safetensors"), "--root", str(tmp_path / "data")]
    return ["suite", *places, *f"--augment none --epochs 2 --lr 1e-2 --device cpu {words}".split()]


def statuses(result: Result) -> dict[str, str]:
    return {row["benchmark"]: row["status"] for row in result.rows if row["status"]}


def test_what_is_found_is_probed_once_and_what_is_missing_is_named(run, tmp_path, probe):
    official = {"only": ("cifar10", "dtd", "pets"), "augment": "official", "lr": None}
    found = run(**official)
    assert statuses(found) == {"cifar10": "measured", "dtd": "measured", "pets": "missing"}
    row = found.row(benchmark="dtd")
    assert (row["classes"], row["train_images"], row["test_images"]) == (47, 94, 47)
    assert row["MAE H/14"] == 0.781
    assert f"Pets is missing: there is no {tmp_path}/data/oxford-iiit-pet; python -c" in found.notes[2]
    assert "DTD differs from the papers': 94 to train on, not 3,760; 47 to test on, not 1,880." in found.notes
    values = json.loads((tmp_path / "out" / "dtd" / "probe.json").read_text())
    assert values["rows"][0]["top1"] == row["top1"]
    settings = {"augment": "timm", "batch_size": 128, "norm_batch_size": 1024, "heads": ["attentive"]}
    assert settings.items() <= values["settings"].items()
    assert (tmp_path / "out" / "suite.png").is_file()
    assert "\n| CIFAR-10 | " in (tmp_path / "out" / "suite.md").read_text()
    # What is there is read, and what was missing is measured once it is there.
    assert (run(**official).rows, probe.names) == (found.rows, ["cifar10", "dtd"])
    copies.pets(tmp_path / "data")
    more = run(**{**official, "only": ("pets",)})
    assert statuses(more) == dict.fromkeys(("cifar10", "dtd", "pets"), "measured")
    assert probe.names == ["cifar10", "dtd", "pets"]


def test_a_stopped_suite_resumes_and_one_of_other_settings_is_refused(run, probe):
    def stopped(**changes):
        probe.stops_at = "dtd"
        with pytest.raises(Stopped):
            run(**changes)
        probe.stops_at = None

    stopped()
    assert statuses(run()) == dict.fromkeys(THREE, "measured")
    assert probe.names == list(THREE)
    with pytest.raises(UsageError, match=r"holds another result \(settings.epochs: 2 there, 3 here\)"):
        run(epochs=3)
    stopped(epochs=3, overwrite=True)  # it resumes without overwriting
    assert statuses(run(epochs=3)) == dict.fromkeys(THREE, "measured")
    assert probe.names == [*THREE, *THREE]


def test_one_that_fails_stops_no_other_and_the_command_returns_1(run, tmp_path, capsys, probe):
    for path in list((tmp_path / "data" / "dtd").rglob("*.jpg"))[:30]:
        path.write_bytes(b"no image")
    found = run(only=("dtd", "camelyon17"))
    assert statuses(found) == {"dtd": "failed", "camelyon17": "measured"}
    assert "cannot be read, more than max_bad_fraction" in found.row(benchmark="dtd")["why"]
    words = command(tmp_path, f"--out {tmp_path}/out --only dtd")
    assert main([*words, "--json"]) == 1
    assert "DTD failed: " in capsys.readouterr().out
    copies.dtd(tmp_path / "data", 47)
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "DTD" in printed
    assert "CIFAR" not in printed
    assert "| CIFAR-10 |" in (tmp_path / "out" / "suite.md").read_text()
    assert probe.names == ["dtd", "camelyon17", "dtd", "dtd"]


def test_two_processes_find_the_same(run, tmp_path):
    words = command(tmp_path, f"--out {tmp_path}/two --only dtd --only pets")
    assert run_ranks(2, main, words) == [0, 0]
    rows = json.loads((tmp_path / "two" / "suite.json").read_text())["rows"]
    top1 = next(row["top1"] for row in rows if row["benchmark"] == "dtd")
    assert top1 == run(only=("dtd",)).row(benchmark="dtd")["top1"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_encoder_runs_in_bf16_if_the_device_computes_in_it(run, monkeypatch, tmp_path, precision):
    monkeypatch.setattr(suite_run, "native_precision", lambda device: precision)
    note = f"Precision: encoder {precision}, heads fp32; officially both bf16-mixed."
    assert note in run(only=("camelyon17",)).notes
    values = json.loads((tmp_path / "out" / "camelyon17" / "probe.json").read_text())
    assert values["settings"]["precision"] == precision


def test_the_probes_have_the_official_recipes():
    config = SuiteSettings(**SETTINGS)
    probes = {one.name: config.probe(one, "a", "b") for one in BENCHMARKS}
    sizes = {name: probe["batch_size"] for name, probe in probes.items() if probe["batch_size"] != 512}
    large = dict.fromkeys(("imagenet1k", "inat18", "pcam", "imagenet1k-linear"), 4096)
    assert sizes == {**large, "infograph": 256, **dict.fromkeys(("dtd", "pets", "cars"), 128)}
    warm = {"imagenet1k", "inat18", "imagenet1k-linear"}
    assert {name for name, probe in probes.items() if probe["warmup_epochs"] == 10} == warm
    # Without warm-up the official scheduler reaches a tenth of what its configs name, 1e-4 to 1e-2 or 1e-1.
    rates = {name: (min(probe["lr"]), max(probe["lr"])) for name, probe in probes.items()}
    usual = dict.fromkeys(probes, (1e-5, 1e-3)) | dict.fromkeys(("cars", "infograph"), (1e-5, 1e-2))
    assert rates == usual | dict.fromkeys(warm, (1e-4, 4e-3)) | {"inat18": (1e-4, 1e-1)}
    heads = {n: (*one["heads"], *one["weight_decay"], one["augment"]) for n, one in probes.items()}
    usual = dict.fromkeys(probes, ("attentive", 0.1, "timm"))
    assert heads == usual | {"imagenet1k-linear": ("linear", 0.0, "crop")}
    short = SuiteSettings(**SETTINGS, epochs=20).probe(chosen(("inat18",))[0], "a", "b")
    assert (short["epochs"], short["warmup_epochs"]) == (20, 2)


def test_a_large_batch_is_normalized_in_parts_as_when_gradients_are_accumulated():
    quick = {"heads": ("linear",), "lr": (1e-3,), "batch_size": 16, "norm_batch_size": 8, "epochs": 1}
    config = ProbeSettings(model="m", train="a", **quick)
    (one,) = encoder_candidates(config, toy_model(), 4)
    head, alone = one.create(32, 4, seed=0), one.create(32, 4, seed=0)
    grid = Grid([head], [one], [0], config, config.schedule(16))
    features, labels = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4
    grid.learn([features], labels, 0)
    grid.finish()
    for part in (features[:8], features[8:]):
        alone.norm(part)
    torch.testing.assert_close(head.norm.running_mean, alone.norm.running_mean)
    torch.testing.assert_close(head.norm.running_var, alone.norm.running_var)


def test_the_published_means_are_the_means_of_their_rows_and_xtra_has_one_cell():
    for label, cells in PUBLISHED.items():
        if label.startswith("XTRA"):
            assert cells in ((80.9,), (76.8,))
        else:
            assert cells[15] == pytest.approx(sum(cells[:15]) / 15, abs=0.06), label  # each is rounded to 0.1


def test_with_all_fifteen_there_is_a_mean_and_the_linear_one_is_not_in_it():
    row = {"status": "measured", "train_images": 1, "test_images": 1, "classes": 2, "bad_images": 0}
    rows = {name: {**row, "top1": 0.5 + 0.01 * i} for i, name in enumerate((*FIFTEEN, "imagenet1k-linear"))}
    full = suite_run._result(SuiteSettings(**SETTINGS), {}, rows, None)
    assert full.row(benchmark="mean")["top1"] == pytest.approx(0.57)
    assert full.row(benchmark="mean")["AIM-7B"] == 0.778
    assert full.row(benchmark="imagenet1k-linear")["top1"] == 0.65
    del rows["dtd"]
    assert suite_run._result(SuiteSettings(**SETTINGS), {}, rows, None).row(benchmark="mean")["top1"] is None


def test_the_picture_has_a_dot_for_each_number(tmp_path):
    top1 = {"mine": [0.9, None, 0.5], "XTRA": [None, None, None], "MAE": [0.1] * 3}
    figure = draw_suite(["A", "B", "C"], top1, tmp_path / "suite.png")
    dots = {str(line.get_label()): np.asarray(line.get_xdata()).tolist() for line in figure.axes[0].lines}
    assert dots == {"mine": [90, 50], "XTRA": [], "MAE": [10, 10, 10]}
