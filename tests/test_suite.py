"""The suite probes what is there, goes on where it stopped, and sets its numbers among the published ones."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when the library is imported

datasets = pytest.importorskip("datasets")

import suite_copies as copies  # noqa: E402
from nextblock.checkpoint import save_model  # noqa: E402
from nextblock.cli import main  # noqa: E402
from nextblock.cli import suite as cli_suite  # noqa: E402
from nextblock.evaluate.evaluation import Stopped  # noqa: E402
from nextblock.evaluate.suite import run as suite_run  # noqa: E402
from nextblock.evaluate.suite.benchmarks import BENCHMARKS, FIFTEEN, chosen  # noqa: E402
from nextblock.evaluate.suite.config import Score, SuiteConfig, SuiteResult  # noqa: E402
from nextblock.evaluate.suite.published import PUBLISHED, mean_of  # noqa: E402
from nextblock.evaluate.suite.run import suite  # noqa: E402
from nextblock.evaluate.suite.tables import csv_table, markdown  # noqa: E402
from nextblock.visualize.suite import draw_suite  # noqa: E402
from toy import DATA, one_thread, toy_model  # noqa: E402, F401 - a fixture

THREE = ("cifar10", "dtd", "camelyon17")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Path]:
    """A toy model, and copies of three data sets."""
    place = tmp_path_factory.mktemp("suite")
    save_model(place / "toy.safetensors", toy_model(), data=DATA)
    copies.cifar10(place / "data")
    copies.dtd(place / "data")
    copies.hub(place / "data" / "camelyon17", {"id_train": 12, "ood_val": 4}, 2)
    return {"model": place / "toy.safetensors", "root": place / "data"}


@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    copies.trust_cifar(monkeypatch)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


def quick(world: dict[str, Path], out: Path, **changes: Any) -> SuiteConfig:
    settings: dict[str, Any] = {
        "model": str(world["model"]),
        "root": str(world["root"]),
        "out": str(out),
        "only": THREE,
        "epochs": 3,
        "batch_size": 16,
        "lr": (1e-2, 1e-3),
        "device": "cpu",
        "workers": 0,
    }
    return SuiteConfig(**settings | changes)


@pytest.fixture
def count_probes(monkeypatch) -> list[str]:
    """The benchmarks that are probed, in order."""
    from nextblock.evaluate.probe import run as probe_module

    probed: list[str] = []
    original = probe_module._Probe.measure

    def counted(self):
        probed.append(Path(self.config.out).name)
        return original(self)

    monkeypatch.setattr(probe_module._Probe, "measure", counted)
    return probed


# ----------------------------------------------------------------------------------------------- end to end


def test_three_are_probed_the_others_are_named_and_the_second_call_probes_nothing(
    world, tmp_path, count_probes
):
    config = quick(world, tmp_path / "out", only=(*THREE, "pets"))
    result = suite(config)
    assert [score.name for score in result.scores] == ["cifar10", "dtd", "camelyon17"]
    assert [(score.images, score.classes) for score in result.scores] == [
        ((50, 20), 10),
        ((94, 47), 47),
        ((24, 8), 2),
    ]
    assert [score.trained_on for score in result.scores] == [40, 47, 22], "a tenth, or one of a class"
    assert "| DTD | 94 | 47 | 47 | 3,760 |" in (tmp_path / "out" / "suite.md").read_text()
    assert result.scores[2].top1 >= 0.5
    assert list(result.missing) == ["pets"]
    assert "--download true fetches it" in result.missing["pets"]
    assert not result.failed
    assert result.mean_percent is None
    assert count_probes == ["cifar10", "dtd", "camelyon17"]
    assert suite(config) == result
    assert len(count_probes) == 3
    probed = json.loads((tmp_path / "out" / "dtd" / "probe.json").read_text())
    assert probed["rows"][0]["top1"] == result.scores[1].top1
    assert probed["settings"]["heads"] == ["attentive"]


def test_one_after_the_other_they_fill_one_table(world, tmp_path, count_probes):
    first = suite(quick(world, tmp_path / "out", only=("dtd",)))
    both = suite(quick(world, tmp_path / "out", only=("cifar10",)))
    assert [score.name for score in both.scores] == ["cifar10", "dtd"]
    assert both.scores[1] == first.scores[0]
    assert count_probes == ["dtd", "cifar10"]


def test_one_that_was_stopped_goes_on_and_those_before_it_are_not_probed_again(
    world, tmp_path, monkeypatch, count_probes
):
    original = suite_run.probe

    def stopped(**settings):
        if settings["out"].endswith("dtd"):
            raise Stopped(signal.SIGTERM, "stopped after step 2 of 9; the same command goes on")
        return original(**settings)

    config = quick(world, tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(suite_run, "probe", stopped)
        suite(config)
    assert "| CIFAR-10 | 50 | 40 | 20 |" in (tmp_path / "out" / "suite.md").read_text()
    assert not (tmp_path / "out" / "dtd").exists()
    assert len(suite(config).scores) == 3
    assert count_probes == ["cifar10", "dtd", "camelyon17"]


@pytest.mark.parametrize("changes", [{}, {"epochs": 4}])
def test_one_that_overwrites_and_was_stopped_goes_on_without_and_keeps_nothing_of_the_earlier(
    world, tmp_path, monkeypatch, count_probes, changes
):
    config = quick(world, tmp_path / "out", only=("camelyon17", "dtd"))
    suite(config)
    count_probes.clear()
    anew = replace(config, **changes)

    def stopped(**_):
        raise Stopped(signal.SIGTERM, "stopped after step 2 of 9")

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(suite_run, "probe", stopped)
        suite(replace(anew, overwrite=True))
    assert len(suite(anew).scores) == 2
    assert count_probes == ["dtd", "camelyon17"]


def test_one_benchmark_is_done_again_beside_the_others_or_all_goes_where_settings_differ(
    world, tmp_path, count_probes
):
    config = quick(world, tmp_path / "out", only=("camelyon17", "dtd"))
    before = suite(config)
    again = suite(replace(config, only=("dtd",), overwrite=True))
    assert [replace(one, elapsed_s=0) for one in again.scores] == [
        replace(one, elapsed_s=0) for one in before.scores
    ]
    assert count_probes == ["dtd", "camelyon17", "dtd"]
    assert (tmp_path / "out" / "camelyon17" / "probe.json").is_file()
    other = suite(replace(config, only=("dtd",), epochs=4, overwrite=True))
    assert [one.name for one in other.scores] == ["dtd"]
    assert not (tmp_path / "out" / "camelyon17").exists()


def test_to_overwrite_removes_the_suites_own_files_only(world, tmp_path, count_probes):
    config = quick(world, tmp_path / "out", only=("camelyon17",))
    suite(config)
    mine = tmp_path / "out" / "camelyon17" / "mine.txt"
    mine.touch()
    with pytest.raises(ValueError, match=r"camelyon17 holds other files \(mine.txt\)"):
        suite(replace(config, overwrite=True))
    assert (tmp_path / "out" / "suite.json").is_file()
    # A root is no directory for results, though its folders have the benchmarks' names.
    shutil.copytree(world["root"], tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "cifar-10-batches-py")
    there = sorted((tmp_path / "data").rglob("*"))
    with pytest.raises(ValueError, match="holds other files"):
        suite(replace(config, out=str(tmp_path / "data"), overwrite=True))
    assert sorted((tmp_path / "data").rglob("*")) == there
    assert count_probes == ["camelyon17"]


def test_a_probe_that_fails_is_told_and_the_others_go_on(world, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(world["root"], root)
    for path in (root / "dtd" / "dtd" / "images").glob("texture[1-4]/*_0001.jpg"):
        path.write_bytes(b"no image")
    found = suite(quick(world, tmp_path / "out", root=str(root), only=("dtd", "camelyon17")))
    assert [score.name for score in found.scores] == ["camelyon17"]
    assert list(found.failed) == ["dtd"]
    assert "cannot be read, more than max_bad_fraction" in found.failed["dtd"]


def test_a_data_set_with_too_few_classes_fails_before_it_is_probed(world, tmp_path, count_probes):
    root = tmp_path / "data"
    copies.dtd(root, 46)
    result = suite(quick(world, tmp_path / "out", root=str(root), only=("dtd", "pets")))
    assert result.failed == {"dtd": "46 classes, not 47: is it whole? fetch it anew"}
    assert list(result.missing) == ["pets"]
    assert count_probes == []
    assert "- DTD, failed: 46 classes, not 47" in (tmp_path / "out" / "suite.md").read_text()


def test_the_command_writes_everything_and_its_code_tells_of_failures(world, tmp_path, capsys):
    copies.dtd(tmp_path / "data", 46)
    (tmp_path / "data" / "camelyon17").symlink_to(world["root"] / "camelyon17")
    words = ["suite", "--model", world["model"], "--root", tmp_path / "data", "--out", tmp_path / "out"]
    words += ["--only", "dtd", "--only", "camelyon17", "--epochs", 2, "--batch_size", 16, "--workers", 0]
    words += ["--lr", 1e-3, "--device", "cpu", "--json"]
    assert main(list(map(str, words))) == 1
    told = capsys.readouterr().out
    assert "dtd: 46 classes, not 47" in told
    assert json.loads(told.splitlines()[-1])["failed"] == {
        "dtd": "46 classes, not 47: is it whole? fetch it anew"
    }
    assert {path.name for path in (tmp_path / "out").glob("[!.]*")} == {
        *("suite.md", "suite.csv", "suite.json", "suite.png", "lists", "camelyon17")
    }
    assert (tmp_path / "out" / "suite.png").stat().st_size > 10_000


def test_flags_reach_the_settings(monkeypatch):
    asked: list[dict[str, Any]] = []

    def remember(**settings: Any) -> SuiteResult:
        asked.append(settings)
        return result((score("dtd", 0.5),))

    monkeypatch.setattr(cli_suite, "suite", remember)
    words = ["suite", "--model", "m", "--root", "r", "--out", "o", "--only", "dtd", "--download", "true"]
    assert main([*words, "--lr", "0.1", "--lr", "0.01", "--augment", "official", "--overwrite"]) == 0
    assert main(words[:-2]) == 0
    assert asked[0]["download"]
    assert not asked[1]["download"]
    given = {name: asked[0][name] for name in ("only", "lr", "augment", "overwrite")}
    assert given == {"only": ("dtd",), "lr": (0.1, 0.01), "augment": "official", "overwrite": True}


def test_the_root_may_be_named_in_two_ways(world, tmp_path, monkeypatch, count_probes):
    suite(quick(world, tmp_path / "out", only=("camelyon17",)))
    monkeypatch.chdir(world["root"].parent)
    suite(quick(world, tmp_path / "out", only=("camelyon17",), root="data"))
    assert count_probes == ["camelyon17"]


def test_what_was_measured_stays_when_its_images_moved_or_broke(world, tmp_path, count_probes):
    root = tmp_path / "data"
    shutil.copytree(world["root"], root)
    config = quick(world, tmp_path / "out", root=str(root), only=("camelyon17", "dtd"))
    first = suite(config)
    shutil.rmtree(root / "camelyon17")
    copies.dtd(root, 48)  # refused, if it were opened
    assert suite(config).scores == first.scores
    moved = suite(replace(config, root=str(tmp_path / "elsewhere"), only=(*THREE,)))
    assert (moved.scores, list(moved.missing), moved.failed) == (first.scores, ["cifar10"], {})
    assert count_probes == ["dtd", "camelyon17"]
    anew = suite(replace(config, root=str(world["root"]), only=("dtd",), overwrite=True))
    assert anew.scores[0].top1 == next(one.top1 for one in first.scores if one.name == "dtd")
    assert len(count_probes) == 3


def test_settings_of_the_features_that_are_not_the_official_ones_are_told():
    def told(**changes):
        config = SuiteConfig(model="m", root="r", out="o", **changes)
        return " ".join(suite_run._notes(config, (), {}))

    assert "Not the official settings" not in told(attentive_heads=16, attention=("native",))
    words = told(attention=("full",), tokens=("all",), attentive_heads=8)
    assert "Not the official settings: attentive_heads 8, attention full, tokens all." in words


def test_a_part_of_the_images_is_enough_for_a_quick_look_and_the_table_says_so(world, tmp_path):
    result = suite(quick(world, tmp_path / "out", only=("cifar10", "dtd"), max_images=30, lr=(1e-3,)))
    assert [score.images for score in result.scores] == [(30, 20), (30, 30)]
    assert [score.classes for score in result.scores] == [10, 47]
    assert any("up to 30 images" in note for note in result.notes)
    assert not any("Table B1" in note for note in result.notes)


# ------------------------------------------------------------------------------------------------- refusals


def test_another_models_or_foreign_directory_is_refused(world, tmp_path, count_probes):
    config = quick(world, tmp_path / "out", only=("camelyon17",))
    suite(config)
    with pytest.raises(ValueError, match=r"holds another result \(settings.epochs: 3 there, 4 here\)"):
        suite(replace(config, epochs=4))
    assert suite(replace(config, epochs=4, overwrite=True)).scores[0].name == "camelyon17"
    assert len(count_probes) == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"holds other files \(thesis.tex\)"):
        suite(replace(config, out=str(tmp_path / "other")))


def test_a_root_that_no_source_can_name_is_refused_before_any_work(world, tmp_path, capsys):
    root = tmp_path / "a,b"
    root.symlink_to(world["root"])
    with pytest.raises(ValueError, match=r"a,b'; a comma would end it in the name of a source: give a path"):
        suite(quick(world, tmp_path / "out", root=str(root)))
    assert not (tmp_path / "out").exists()
    assert main(["suite", "--check", "--root", str(root), "--only", "camelyon17"]) == 2
    assert "a comma would end it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only": ("cifar",)}, "there is no benchmark 'cifar'; did you mean 'cifar10'"),
        ({"only": ()}, "only names no benchmark"),
        ({"max_images": 1}, "max_images is 1; use at least 2"),
        ({"epochs": 0}, "epochs is 0"),
        ({"lr": (0.0,)}, "a number above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        SuiteConfig(model="m", root="r", out="o", **changes)


# -------------------------------------------------------------------------------------------- the settings


def test_the_probes_have_the_official_settings():
    config = SuiteConfig(model="m", root="r", out="o", augment="official")
    probes = {one.name: config.probe(one, train="a", test="b") for one in BENCHMARKS}
    assert {name: probe.batch_size for name, probe in probes.items()} == {
        **dict.fromkeys(("imagenet1k", "inat18", "pcam", "imagenet1k-linear"), 4096),
        **dict.fromkeys(("cifar10", "cifar100", "food101", "iwildcam", "camelyon17", "rxrx1"), 512),
        **dict.fromkeys(("eurosat", "fmow"), 512),
        **dict.fromkeys(("dtd", "pets", "cars"), 128),
        "infograph": 256,
    }
    assert {name for name, probe in probes.items() if probe.warmup_epochs == 10} == {
        *("imagenet1k", "inat18", "imagenet1k-linear")
    }
    largest = {name: max(probe.lr or ()) for name, probe in probes.items()}
    assert {name for name, lr in largest.items() if lr == 1e-1} == {"inat18"}
    # Without warm-up: what the official scheduler reaches is a tenth of what the settings name.
    assert {name for name, lr in largest.items() if lr == 1e-2} >= {"cars", "infograph"}
    assert {name for name, lr in largest.items() if lr == 4e-3} == {"imagenet1k", "imagenet1k-linear"}
    assert {probe.augment for name, probe in probes.items() if name != "imagenet1k-linear"} == {"timm"}
    assert (probes["imagenet1k-linear"].heads, probes["imagenet1k-linear"].weight_decay) == (
        ("linear",),
        (0,),
    )
    assert all(probe.epochs == 100 for probe in probes.values())


def test_what_is_given_replaces_the_official_settings_in_all():
    config = SuiteConfig(model="m", root="r", out="o", lr=(1e-2,), epochs=20, weight_decay=(0.0, 0.2))
    probe = config.probe(chosen(("inat18",))[0], train="a", test="b")
    assert probe.lr == (1e-2,)
    assert (probe.epochs, probe.warmup_epochs, probe.weight_decay) == (20, 2, (0.0, 0.2))
    assert probe.augment == "none"


# ------------------------------------------------------------------------------------------------ the tables


def test_the_published_means_are_the_means_of_their_rows():
    complete = [(mean_of(row.by_name), row) for row in PUBLISHED if row.mean is not None]
    assert len(complete) == 11
    for mean, row in complete:
        assert mean == pytest.approx(row.mean, abs=0.06), row.model  # each is rounded to 0.1


def test_of_xtra_only_the_confirmed_cells_are_shown_and_no_mean():
    rows = [row for row in PUBLISHED if row.model.startswith("XTRA")]
    assert [(row.top1[0], set(row.top1[1:]), row.mean) for row in rows] == [
        (80.9, {None}, None),
        (76.8, {None}, None),
    ]
    assert all(76.2 not in (*row.top1, row.mean) for row in PUBLISHED)


def score(name: str, top1: float) -> Score:
    benchmark = chosen((name,))[0]
    images = (benchmark.images[0] or 1, benchmark.images[1] or 1)
    return Score(
        name=name,
        top1=top1,
        top5=1.0,
        images=images,
        trained_on=images[0] - 1,
        classes=benchmark.classes,
        bad_images=0,
        lr=1e-3,
        weight_decay=0.1,
        layers=(1, 2),
        attention="native",
        elapsed_s=1.0,
    )


def result(scores: tuple[Score, ...]) -> SuiteResult:
    return SuiteResult(
        model="runs/mine", architecture="ViT", scores=scores, missing={}, failed={}, notes=("As it is.",)
    )


def rows_of(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_markdown_has_the_papers_columns_in_order_and_leaves_what_is_unknown_empty():
    table = rows_of(markdown(result((score("cifar10", 0.9123), score("infograph", 0.4)))))
    assert table[0] == [
        *(
            "model",
            "architecture",
            "data",
            "IN-1k",
            "iNAT-18",
            "CIFAR-10",
            "CIFAR-100",
            "Food101",
            "DTD",
            "Pets",
        ),
        *("Cars", "iWildCam", "CAM17", "PCAM", "RxRx1", "EuroSAT", "fMoW", "Infograph", "mean"),
    ]
    ours = table[2]
    assert (ours[0], ours[5], ours[17], ours[18]) == ("**runs/mine**", "91.2", "40.0", "")
    assert [cell for cell in ours[3:] if cell] == ["91.2", "40.0"]
    assert ["MAE", "ViT-H/14", "IN-1k", "80.9", "64.6"] in [row[:5] for row in table]
    xtra = next(row for row in table if row[0].startswith("XTRA") and row[1] == "ViT-H/14")
    assert [cell for cell in xtra[3:] if cell] == ["80.9"]


def test_csv_and_markdown_agree_with_the_published_rows():
    table = rows_of(markdown(result(())))[3 : 3 + len(PUBLISHED)]
    read = list(csv.DictReader(io.StringIO(csv_table(result(())))))[1:]
    for row, printed, in_csv in zip(PUBLISHED, table, read, strict=True):
        assert printed[3:18] == ["" if top1 is None else f"{top1:.1f}" for top1 in row.top1]
        assert [in_csv[name] for name in FIFTEEN] == ["" if top1 is None else str(top1) for top1 in row.top1]
        assert in_csv["mean"] == ("" if row.mean is None else str(row.mean))


def test_with_all_fifteen_there_is_a_mean_and_the_linear_one_is_not_in_it():
    all_of_them = tuple(score(name, 0.5 + 0.01 * number) for number, name in enumerate(FIFTEEN))
    full = result((*all_of_them, score("imagenet1k-linear", 0.1)))
    assert full.mean_percent == pytest.approx(57.0)
    assert "IN-1k linear: **10.0**" in markdown(full)
    assert rows_of(markdown(full))[2][18] == "57.0"
    assert next(csv.DictReader(io.StringIO(csv_table(full))))["imagenet1k-linear"] == "10.0"


def test_the_picture_has_a_dot_for_each_number_and_none_for_what_is_not_known():
    figure = draw_suite({"cifar10": 91.2, "dtd": 60.0, "imagenet1k-linear": 10.0}, "runs/mine")
    dots = {str(line.get_label()): np.asarray(line.get_xdata()).tolist() for line in figure.axes[0].lines}
    assert dots["mine"] == [91.2, 60.0]
    assert [dots.pop(label) for label in ("XTRA, 100 epochs, ViT-H/14", "XTRA, 800 epochs, ViT-B/16")] == [
        [80.9],
        [76.8],
    ]
    assert len(dots) == 4
    assert {len(of) for label, of in dots.items() if label != "mine"} == {15}
