"""Every benchmark is read from its data set's own layout: which images, of which split, of which class."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when the library is imported

datasets = pytest.importorskip("datasets")

import suite_copies as copies  # noqa: E402
from nextblock.cli import main  # noqa: E402
from nextblock.config import DataConfig  # noqa: E402
from nextblock.data import Source, open_source  # noqa: E402
from nextblock.evaluate.features import check_same_classes  # noqa: E402
from nextblock.evaluate.suite import layouts  # noqa: E402
from nextblock.evaluate.suite.benchmarks import BENCHMARKS, FIFTEEN, Benchmark, Hub, chosen  # noqa: E402
from nextblock.evaluate.suite.check import Check, check  # noqa: E402
from nextblock.evaluate.suite.layouts import Files, MissingDataError, find  # noqa: E402
from nextblock.evaluate.suite.sources import write_sources  # noqa: E402

DATA = DataConfig(workers=0)
NAMES: dict[str, str] = {name: name for name in ("food101", "dtd", "pets")}
NAMES |= {"imagenet": "imagenet1k", "inat2018": "inat18"}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    """Arrow files are made anew by every test, and nothing is printed."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "data"


def named(name: str) -> Benchmark:
    return chosen((name,))[0]


def sources(name: str, root: Path, *, max_images: int | None = None, seed: int = 0) -> tuple[Source, Source]:
    lists = root.parent / "lists"
    specs = write_sources(find(named(name), root), lists, name, max_images=max_images, seed=seed, data=DATA)
    train, test = (open_source(spec, DATA) for spec in specs)
    check_same_classes(train, test)
    return train, test


def colours(source: Source) -> np.ndarray:
    """The mean colour of every image, which its class tells."""
    return np.stack([source.read(index).float().mean((1, 2)).numpy() for index in range(len(source))])


def assert_labels_fit_the_pictures(train: Source, test: Source) -> None:
    """Of one class all colours are near, of two classes they are not."""
    labels = np.concatenate([train.labels, test.labels])
    means = np.concatenate([colours(train), colours(test)])
    centres = np.stack(
        [means[labels == label].mean(0) for label in range(labels.max() + 1) if label in labels]
    )
    for label, mean in zip(np.unique(labels, return_inverse=True)[1], means, strict=True):
        assert np.abs(centres - mean).sum(1).argmin() == label


# ------------------------------------------------------------------------------------------ the three kinds


@pytest.mark.parametrize(
    ("name", "sizes", "classes"), [("cifar10", (50, 20), 10), ("cifar100", (200, 100), 100)]
)
def test_cifar_is_read_from_its_batches(root, monkeypatch, name, sizes, classes):
    copies.trust_cifar(monkeypatch)
    getattr(copies, name)(root)
    train, test = sources(name, root)
    assert (len(train), len(test)) == sizes
    assert len(train.class_names) == classes
    assert np.bincount(train.labels).tolist() == [sizes[0] // classes] * classes


@pytest.mark.parametrize(
    ("name", "classes", "sizes"),
    [
        ("food101", 5, (10, 5)),
        ("dtd", 5, (10, 5)),
        ("pets", 5, (10, 5)),
        ("imagenet", 3, (9, 6)),
        ("inat2018", 3, (6, 3)),
    ],
)
def test_image_files_have_the_classes_and_splits_of_their_annotations(root, name, classes, sizes):
    getattr(copies, name)(root, classes)
    train, test = sources(NAMES[name], root)
    assert (len(train), len(test)) == sizes
    assert len(train.class_names) == classes
    assert_labels_fit_the_pictures(train, test)


def test_dtd_trains_on_train_and_val_of_its_first_division(root):
    copies.dtd(root, 3)
    found = find(named("dtd"), root)
    assert isinstance(found, Files)
    assert [Path(found.paths[number]).stem[-1] for number in found.train] == ["0"] * 3 + ["1"] * 3
    assert [Path(found.paths[number]).stem[-1] for number in found.test] == ["2"] * 3
    assert found.classes[0] == "texture0"


def test_a_breed_is_its_name_without_the_number(root):
    copies.pets(root, 2)
    assert sources("pets", root)[0].class_names == ("big_breed_0", "big_breed_1")


def test_iwildcam_keeps_classes_that_only_its_other_splits_have(root):
    copies.iwildcam(root)
    train, test = sources("iwildcam", root)
    assert train.class_names == test.class_names == ("0", "1", "2", "3", "4")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 2, 3], [0, 1, 3])
    assert_labels_fit_the_pictures(train, test)


def test_rxrx1_trains_on_site_1_and_tests_on_both_sites_of_other_experiments(root):
    copies.rxrx1(root)
    train, test = sources("rxrx1", root)
    assert [train.name(index)[-7:] for index in range(len(train))] == ["_s1.png"] * 3
    assert {Path(train.name(index)).parts[-3] for index in range(3)} == {"HEPG2-00"}
    assert (len(test), {Path(test.name(index)).parts[-3] for index in range(6)}) == (6, {"HEPG2-01"})
    assert_labels_fit_the_pictures(train, test)


def test_infograph_is_read_from_domainnets_lists(root):
    copies.domainnet(root)
    train, test = sources("infograph", root)
    assert (len(train), len(test)) == (6, 3)
    assert set(train.class_names) == {"t-shirt", "The_Mona_Lisa", "ant"}
    assert_labels_fit_the_pictures(train, test)


@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("cars", {"train": 2, "test": 1, "contrast": 1}),
        ("eurosat", {"train": 2, "test": 1, "validation": 1}),
        ("camelyon17", {"id_train": 2, "id_val": 1, "ood_val": 1, "ood_test": 1}),
        ("fmow", {"train": 2, "val": 1, "test": 1}),
    ],
)
def test_copies_of_the_hubs_repositories_are_read_with_the_right_splits(root, name, splits):
    layout = named(name).layout
    assert isinstance(layout, Hub)
    copies.hub(root / layout.folder, splits, 4, config=layout.config)
    train, test = sources(name, root)
    assert (len(train), len(test)) == (8, 4)
    assert train.class_names == ("kind 0", "kind 1", "kind 2", "kind 3")
    assert_labels_fit_the_pictures(train, test)


def test_a_copy_that_save_to_disk_wrote_has_no_parts(root):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": copies.encoded(0), "path": None}], "label": [1]}
    part = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": part, "val": part}).save_to_disk(root / "fMoW")
    assert [source.labels.tolist() for source in sources("fmow", root)] == [[1], [1]]


@pytest.mark.skipif(importlib.util.find_spec("h5py") is None, reason="needs h5py")
def test_pcam_is_read_from_its_h5_files(root):
    copies.pcam(root)
    train, test = sources("pcam", root)
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1] * 3, [0, 1] * 2)
    assert_labels_fit_the_pictures(train, test)
    assert check(named("pcam"), root).classes is None


def test_of_a_package_that_is_not_there_the_remedy_is_said(root, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDataError, match="PCAM is read with h5py; pip install h5py"):
        find(named("pcam"), root)


# ----------------------------------------------------------------------------------------- a part of them


def test_a_part_is_drawn_by_the_seed_and_keeps_all_classes(root):
    copies.food101(root, 20)
    train, test = sources("food101", root, max_images=7)
    again, _ = sources("food101", root, max_images=7)
    other, _ = sources("food101", root, max_images=7, seed=1)
    assert (len(train), len(test), len(train.class_names)) == (7, 7, 20)
    assert train.fingerprint == again.fingerprint != other.fingerprint
    assert_labels_fit_the_pictures(train, test)


def test_a_part_of_class_folders_keeps_all_classes(root):
    copies.imagenet(root, 6)
    train, test = sources("imagenet1k", root, max_images=2)
    assert (len(train), len(test), len(train.class_names)) == (2, 2, 6)
    assert_labels_fit_the_pictures(train, test)


def test_a_part_larger_than_the_whole_is_the_whole(root):
    copies.imagenet(root, 2)
    assert [len(source) for source in sources("imagenet1k", root, max_images=100)] == [6, 4]


# ---------------------------------------------------------------------------------------------------- check


def expecting(benchmark: Benchmark, classes: int, images: tuple[int | None, int | None]) -> Benchmark:
    return replace(benchmark, classes=classes, images=images)


def test_a_copy_with_the_papers_numbers_is_as_it_should_be(root):
    copies.dtd(root, 5)
    assert check(expecting(named("dtd"), 5, (10, 5)), root) == Check(
        name="dtd", status="as it should be", classes=5, images=(10, 5)
    )


@pytest.mark.parametrize(
    ("classes", "images", "problem"),
    [
        (47, (10, 5), "5 classes, not 47: is it whole? fetch it anew"),
        (5, (3_760, 5), "10 images in train + val, not 3,760 as in AIMv2's Table B1"),
        (5, (10, 1_880), "5 images in test, not 1,880 as in AIMv2's Table B1"),
    ],
)
def test_wrong_numbers_of_classes_and_images_are_found(root, classes, images, problem):
    copies.dtd(root, 5)
    found = check(expecting(named("dtd"), classes, images), root)
    assert (found.status, found.problems) == ("differs", (problem,))


def test_a_copy_with_its_sources_known_numbers_is_no_defect_and_another_is(root):
    copies.dtd(root)
    benchmark = expecting(named("dtd"), 47, (60, 30))
    found = check(replace(benchmark, source_images=(94, 47)), root)
    assert (found.status, found.problems, found.is_well) == ("differs, as known", (), True)
    assert "94 and 47 images, not 60 and 30 as in AIMv2's Table B1" in found.known[0]
    other = check(replace(benchmark, source_images=(94, 48)), root)
    assert (other.status, len(other.problems), other.known, other.is_well) == ("differs", 2, (), False)
    assert named("eurosat").source_images == (21_600, 2_700)


def test_the_list_fits_a_narrow_terminal_and_tells_what_to_do_below_it(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["suite", "--list", "--root", "/nowhere"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[1] for line in lines if line.startswith("│") and line.split()[1] != "│"]
    assert names == [benchmark.name for benchmark in BENCHMARKS]
    (words,) = [line for line in lines if line.startswith("rxrx1 (WILDS): ")]
    assert "unreachable" in words
    assert "/nowhere/rxrx1_v1.0/metadata.csv" in words


def test_what_no_paper_tells_is_not_checked(root):
    copies.iwildcam(root)
    assert check(expecting(named("iwildcam"), 5, (None, None)), root).status == "as it should be"


def test_image_files_that_are_listed_but_not_there_are_counted(root):
    copies.iwildcam(root)
    (root / "iwildcam_v2.0" / "train" / "val-3.jpg").unlink()
    (root / "iwildcam_v2.0" / "train" / "train-2.jpg").unlink()
    (problem,) = check(expecting(named("iwildcam"), 5, (4, 3)), root).problems
    assert problem.startswith("2 of 7 image files are not there, the first: ")
    assert problem.endswith("iwildcam_v2.0/train/train-2.jpg")


def test_class_folders_that_differ_between_the_splits_are_found(root):
    copies.imagenet(root, 3)
    shutil.rmtree(root / "imagenet" / "val" / "n00000002")
    found = check(expecting(named("imagenet1k"), 3, (9, 4)), root)
    assert "do not have the same classes" in found.problems[0]


def test_a_data_set_of_torchvision_that_is_cut_off_differs(root):
    copies.cifar10(root)  # whose hashes are not the real ones
    found = check(named("cifar10"), root)
    assert found.status == "differs"
    assert "corrupted" in found.problems[0]


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_of_each_that_is_missing_it_is_said_where_it_was_looked_for_and_how_to_get_it(
    root, benchmark, monkeypatch
):
    monkeypatch.setattr(layouts.importlib.util, "find_spec", lambda name: True)
    found = check(benchmark, root)
    assert found.status == "missing"
    assert str(root / benchmark.layout.folder) in found.problems[0]
    assert len(found.problems[0].partition("; ")[2]) > 20
    assert "{" not in found.problems[0]


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("dtd", "dtd/dtd/labels/val1.txt"),
        ("food101", "food-101/meta/test.json"),
        ("iwildcam", "iwildcam_v2.0/metadata.csv"),
        ("imagenet1k", "imagenet/val"),
    ],
)
def test_a_lost_annotation_file_is_named(root, name, lost):
    getattr(copies, "imagenet" if name == "imagenet1k" else name)(root)
    path = root / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    found = check(named(name), root)
    assert (found.status, f"there is no {path}" in found.problems[0]) == ("missing", True)


def test_annotations_of_another_kind_are_refused(root):
    copies.write_csv(root / "rxrx1_v1.0" / "metadata.csv", [{"split": "train", "y": 1}])
    with pytest.raises(
        ValueError, match=r"annotations in .*rxrx1_v1.0 are not what they should be \(KeyError"
    ):
        find(named("rxrx1"), root)


def test_annotations_without_a_split_are_refused(root):
    copies.iwildcam(root)
    copies.write_csv(root / "iwildcam_v2.0" / "metadata.csv", [{"split": "train", "filename": "a", "y": 1}])
    with pytest.raises(ValueError, match="no image is of the split val"):
        find(named("iwildcam"), root)


# ------------------------------------------------------------------------------------------------- fetching


def test_only_when_told_to_is_anything_fetched(root, monkeypatch):
    from torchvision.datasets import DTD

    asked = []

    def fetch(self, root, *, split, download):
        asked.append((split, download))
        if split == "test":
            copies.dtd(root, 2)

    monkeypatch.setattr(DTD, "__init__", fetch)
    with pytest.raises(MissingDataError, match=r"there is no .*dtd; --download true fetches it"):
        find(named("dtd"), root)
    assert asked == []
    assert isinstance(find(named("dtd"), root, download=True), Files)
    assert asked == [("train", True), ("val", True), ("test", True)]


def test_what_torchvision_cannot_fetch_is_said(root, monkeypatch):
    from torchvision.datasets import CIFAR10

    def fail(self, root, *, train, download):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(CIFAR10, "__init__", fail)
    with pytest.raises(MissingDataError, match=r"torchvision could not fetch CIFAR10 \(no network\)"):
        find(named("cifar10"), root, download=True)


def test_of_the_hub_the_repository_itself_is_read_when_told_to(root):
    assert find(named("fmow"), root, download=True) == (
        "hf:danielz01/fMoW,config=WILDS,split=train",
        "hf:danielz01/fMoW,config=WILDS,split=val",
    )
    assert find(named("camelyon17"), root, download=True).test == "hf:jxie/camelyon17,split=ood_val"


# ------------------------------------------------------------------------------------------------ the table


def test_there_are_fifteen_and_the_linear_one_each_with_its_own_name():
    assert len(FIFTEEN) == 15
    assert len({benchmark.name for benchmark in BENCHMARKS}) == len(BENCHMARKS) == 16
    classes = [1000, 8142, 10, 100, 101, 47, 37, 196, 182, 2, 2, 1139, 10, 62, 345, 1000]
    assert [benchmark.classes for benchmark in BENCHMARKS] == classes


def test_an_unknown_benchmark_is_refused_with_the_nearest_and_the_order_is_the_tables():
    with pytest.raises(ValueError, match="there is no benchmark 'cifar1O'; did you mean 'cifar10'"):
        chosen(("cifar1O",))
    assert [benchmark.name for benchmark in chosen(("dtd", "cifar10"))] == ["cifar10", "dtd"]


def test_the_command_lists_and_checks_and_says_by_its_code_whether_all_is_well(root, capsys):
    assert main(["suite", "--list"]) == 0
    assert "eurosat" in capsys.readouterr().out
    copies.dtd(root)
    assert main(["suite", "--list", "--root", str(root), "--only", "dtd", "--json"]) == 0
    assert '"is_there": true' in capsys.readouterr().out.splitlines()[-1]
    assert main(["suite", "--check", "--root", str(root), "--only", "dtd", "--only", "pets", "--json"]) == 1
    told = capsys.readouterr().out
    assert "94 images in train + val, not 3,760" in told
    assert '"status": "missing"' in told.splitlines()[-1]
    assert main(["suite", "--check"]) == 2
    assert "--check needs --root" in capsys.readouterr().err
