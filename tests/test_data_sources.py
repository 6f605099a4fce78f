"""A source lists what it is told to, in a fixed order, and says what it searched where there is nothing."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nextblock.config import DataConfig
from nextblock.data import BadImageError, Source, open_source, open_sources
from nextblock.data.sources.base import in_class_order
from nextblock.data.sources.listing import list_images
from nextblock.data.sources.torchvision_sets import TorchvisionSource

DATA = DataConfig()


def make_images(root: Path, names: Iterable[str]) -> Path:
    """One small picture per name, each of another colour, stored as PNG whatever it is called."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (number, 100, 200)).save(path, "PNG")
    return root


def names(source: Source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


# --------------------------------------------------------------------------------------------- directories

TREE = (
    "b/2.png",
    "b/10.JPG",
    "a/x/deep.Tiff",
    "a/y.jpeg",
    "a-b/1.webp",
    "c/1.gif",
    "c/2.ppm",
    "c/3.pgm",
    "c/4.bmp",
)


def test_a_directory_is_searched_recursively_and_sorted_by_the_parts_of_the_path(tmp_path) -> None:
    source = open_source(str(make_images(tmp_path, TREE)), DATA)
    assert names(source) == sorted(TREE, key=lambda name: name.split("/"))
    assert len(source) == len(TREE)
    assert source.in_memory is False


def test_an_image_is_read_by_its_number_as_rgb(tmp_path) -> None:
    source = open_source(str(make_images(tmp_path, TREE)), DATA)
    for index in range(len(source)):
        pixels = source.read(index)
        assert pixels.shape == (3, 4, 6)
        assert pixels.dtype == torch.uint8
        assert pixels[:, 0, 0].tolist() == [TREE.index(source.name(index)), 100, 200]


def test_a_png_named_jpg_is_read_by_its_content(tmp_path) -> None:
    source = open_source(str(make_images(tmp_path, ["liar.jpg"])), DATA)
    assert source.read(0).shape == (3, 4, 6)


@pytest.mark.parametrize("index", [-1, 2])
def test_a_number_beyond_the_list_is_refused(tmp_path, index) -> None:
    source = open_source(str(make_images(tmp_path, ["0.png", "1.png"])), DATA)
    with pytest.raises(IndexError, match=f"image {index} of 2; the numbers are 0 to 1"):
        source.read(index)
    with pytest.raises(IndexError, match="the numbers are 0 to 1"):
        source.name(index)


def test_a_file_that_is_gone_or_broken_is_a_bad_image(tmp_path) -> None:
    source = open_source(str(make_images(tmp_path, ["0.png", "1.png"])), DATA)
    (tmp_path / "0.png").unlink()
    (tmp_path / "1.png").write_bytes(b"")
    with pytest.raises(BadImageError, match="cannot be read: No such file"):
        source.read(0)
    with pytest.raises(BadImageError, match="empty"):
        source.read(1)


def test_max_pixels_of_the_settings_holds(tmp_path) -> None:
    source = open_source(str(make_images(tmp_path, ["0.png"])), DataConfig(max_pixels=23))
    with pytest.raises(BadImageError, match=r"24 pixels, more than data.max_pixels \(23\)"):
        source.read(0)


def test_other_files_and_hidden_ones_are_ignored_and_counted_in_one_line(tmp_path, caplog) -> None:
    make_images(tmp_path, ["a/1.png", "a/._1.png", ".cache/2.png"])
    for name in ("a/notes.txt", "labels.csv", "more.csv", "README"):
        (tmp_path / name).touch()
    with caplog.at_level(logging.INFO, logger="nextblock"):
        source = open_source(str(tmp_path), DATA)
    assert names(source) == ["a/1.png"]
    (record,) = caplog.records
    assert record.getMessage() == (
        f"{tmp_path}: 1 images; ignored 4 files, none with an image's extension (.csv, .txt, no extension) "
        "and 2 hidden (beginning with a dot)"
    )


def test_links_to_directories_are_followed_and_loops_are_not(tmp_path) -> None:
    make_images(tmp_path, ["in/a/1.png", "out/2.png"])
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "out", target_is_directory=True)
    (tmp_path / "in" / "a" / "up").symlink_to(tmp_path / "in", target_is_directory=True)
    (tmp_path / "out" / "itself").symlink_to(tmp_path / "out", target_is_directory=True)
    assert names(open_source(str(tmp_path / "in"), DATA)) == ["a/1.png", "linked/2.png"]


def test_a_link_that_leads_nowhere_is_listed_and_unreadable_and_a_pipe_is_not_listed(tmp_path) -> None:
    make_images(tmp_path, ["1.png"])
    (tmp_path / "2.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "3.png")
    source = open_source(str(tmp_path), DATA)
    assert names(source) == ["1.png", "2.png"]
    with pytest.raises(BadImageError, match="cannot be read"):
        source.read(1)


def test_names_that_are_no_text_are_read_and_shown_escaped(tmp_path) -> None:
    make_images(tmp_path, ["1.png"])
    os.rename(tmp_path / "1.png", os.path.join(os.fsencode(tmp_path), b"\xff.png"))  # noqa: PTH104, PTH118 - bytes
    source = open_source(str(tmp_path), DATA)
    assert names(source) == ["\\xff.png"]
    assert source.read(0).shape == (3, 4, 6)


def test_paths_take_few_bytes_and_survive_pickling(tmp_path) -> None:
    make_images(tmp_path, [f"folder/{number}.png" for number in range(50)])
    source = open_source(str(tmp_path), DATA)
    assert len(pickle.dumps(list_images(tmp_path))) < 50 * 30 + 1000
    copy = pickle.loads(pickle.dumps(source))
    assert names(copy) == names(source)
    assert copy.fingerprint == source.fingerprint


# -------------------------------------------------------------------------------------------------- labels


def test_labels_are_the_first_level_folders_in_sorted_order(tmp_path) -> None:
    source = open_source(str(make_images(tmp_path, TREE)), DATA)
    assert source.has_labels
    assert source.class_names == ("a", "a-b", "b", "c")
    assert source.labels.dtype == np.int64
    assert [source.class_names[label] for label in source.labels] == [
        name.split("/")[0] for name in names(source)
    ]


def test_images_in_the_root_have_no_labels_and_are_refused_only_when_labels_are_asked_for(tmp_path) -> None:
    source = open_source(str(make_images(tmp_path, ["a/1.png", "b/1.png", "stray.png"])), DATA)
    assert not source.has_labels
    assert source.read(2).shape == (3, 4, 6)
    for ask in (lambda: source.labels, lambda: source.class_names):
        with pytest.raises(
            ValueError, match=r"first-level folders, but 1 of its 3 images lie directly in it"
        ):
            ask()


# --------------------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_tells_lists_apart_and_not_places_or_contents(tmp_path) -> None:
    def fingerprint(folder: str, *images: str) -> str:
        return open_source(str(make_images(tmp_path / folder, images)), DATA).fingerprint

    base = fingerprint("0", "a/1.png", "a/2.png")
    assert fingerprint("1", "a/1.png", "a/2.png") == base
    assert fingerprint("2", "a/1.png") != base
    assert fingerprint("3", "a/1.png", "a/3.png") != base
    assert fingerprint("4", "a/1.png", "b/2.png") != base
    (tmp_path / "0" / "a" / "1.png").write_bytes(b"other")
    assert open_source(str(tmp_path / "0"), DATA).fingerprint == base


# ------------------------------------------------------------------------------------------------ refusals


def test_a_directory_without_images_is_refused_with_what_was_found(tmp_path) -> None:
    (tmp_path / "deep").mkdir()
    for number in range(12):
        (tmp_path / "deep" / f"{number}.{'txt' if number else 'csv'}").touch()
    with pytest.raises(ValueError, match=r"12 files, none with an image's extension \(.txt, .csv\)"):
        open_source(str(tmp_path), DATA)


def test_an_empty_directory_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="searched with all its folders: it is empty"):
        open_source(str(tmp_path), DATA)


def test_a_directory_that_does_not_exist_is_refused_with_where_it_was_sought(tmp_path) -> None:
    with pytest.raises(ValueError, match=f"no such directory .searched {tmp_path}/gone"):
        open_source(str(tmp_path / "gone"), DATA)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may list everything")
def test_a_folder_that_may_not_be_listed_is_named(tmp_path) -> None:
    make_images(tmp_path, ["a/1.png"])
    (tmp_path / "a").chmod(0)
    with pytest.raises(ValueError, match=r"cannot list the folder .*Permission denied"):
        open_source(str(tmp_path), DATA)
    (tmp_path / "a").chmod(0o700)


def test_a_file_is_no_directory(tmp_path) -> None:
    make_images(tmp_path, ["1.png"])
    with pytest.raises(ValueError, match="is a file; give the directory that holds it"):
        open_source(str(tmp_path / "1.png"), DATA)


def test_a_file_of_another_kind_is_refused_with_the_sources_there_are(tmp_path) -> None:
    (tmp_path / "x.rar").touch()
    with pytest.raises(ValueError, match=r"known sources: a directory, files:LIST\.txt, X\.tar, shards-"):
        open_source(str(tmp_path / "x.rar"), DATA)


@pytest.mark.parametrize("name", ["x.tar.gz", "shards-{000..009}.tar.zst", "x.TGZ", "x.tbz2"])
def test_a_tar_compressed_as_a_whole_is_refused_with_the_remedy(name) -> None:
    with pytest.raises(ValueError, match="cannot be read in any order; unpack it"):
        open_source(name, DATA)


def test_a_folder_of_shards_says_how_to_name_them(tmp_path) -> None:
    (tmp_path / "0.tar").touch()
    with pytest.raises(ValueError, match=r"\(.tar\).*name tar shards in full, as in shards-\{000000"):
        open_source(str(tmp_path), DATA)


def test_a_link_to_itself_is_listed_and_unreadable(tmp_path) -> None:
    make_images(tmp_path, ["1.png"])
    (tmp_path / "2.png").symlink_to("2.png")
    source = open_source(str(tmp_path), DATA)
    assert names(source) == ["1.png", "2.png"]
    with pytest.raises(BadImageError, match="cannot be read"):
        source.read(1)


def test_a_link_to_a_pipe_is_a_bad_image_and_is_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "1.png").symlink_to(tmp_path / "pipe")
    source = open_source(str(tmp_path), DATA)
    with pytest.raises(BadImageError, match="no regular file"):
        source.read(0)


# ------------------------------------------------------------------------------------------------- content


def test_content_is_the_file_as_it_lies_and_none_where_there_is_no_file(tmp_path) -> None:
    source = open_source(str(make_images(tmp_path, ["1.png"])), DATA)
    assert source.content(0) == (tmp_path / "1.png").read_bytes()
    assert open_source("digits", DATA).content(0) is None
    with pytest.raises(IndexError, match="image 1 of 1"):
        source.content(1)


def test_content_of_a_mixture_is_that_of_its_part(tmp_path) -> None:
    make_images(tmp_path, ["a/1.png", "b/1.png"])
    mixture = open_sources([str(tmp_path / "a"), "digits", str(tmp_path / "b")], DATA)
    assert mixture.content(0) == (tmp_path / "a" / "1.png").read_bytes()
    assert mixture.content(1) is None
    assert mixture.content(1798) == (tmp_path / "b" / "1.png").read_bytes()


@pytest.mark.parametrize(
    ("given", "ordered"),
    [
        (["10", "9", "-1", "2.5"], ("-1", "2.5", "9", "10")),
        (["10", "9", "x"], ("10", "9", "x")),
        (["1", "01", "0"], ("0", "01", "1")),
        ([], ()),
    ],
)
def test_classes_are_sorted_as_numbers_if_all_are(given, ordered) -> None:
    rank, classes = in_class_order(given)
    assert classes == ordered
    assert [classes[number] for number in rank] == given


def test_a_misspelt_kind_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="a colon; write digits:split=train"):
        open_source("digits,split=train", DATA)
    with pytest.raises(ValueError, match=r"one by one: --data.train A --data.train B"):
        open_source("[imgs,tars/x.tar]", DATA)
    with pytest.raises(ValueError, match="no kind of source 'torchvison'; did you mean 'torchvision'"):
        open_source("torchvison:CIFAR10", DATA)


# -------------------------------------------------------------------------------------------------- digits


def test_digits_are_the_1797_scaled_to_bytes_and_grey() -> None:
    from sklearn.datasets import load_digits

    values, classes = load_digits(return_X_y=True)
    source = open_source("digits", DATA)
    assert len(source) == 1797
    assert source.in_memory
    assert np.array_equal(source.labels, classes)
    assert source.class_names == tuple("0123456789")
    for index in (0, 900, 1796):
        pixels = source.read(index)
        assert pixels.shape == (3, 8, 8)
        assert np.array_equal(pixels[0].numpy(), np.rint(values[index].reshape(8, 8) / 16 * 255))
        assert torch.equal(pixels[0], pixels[1])
        assert torch.equal(pixels[0], pixels[2])


def test_digits_have_as_many_channels_as_asked_for() -> None:
    grey = open_source("digits", DataConfig(channels=1, mean=(0.5,), std=(0.5,)))
    assert grey.read(5).shape == (1, 8, 8)
    assert torch.equal(grey.read(5)[0], open_source("digits", DATA).read(5)[0])


def test_the_digits_splits_are_disjoint_whole_and_stratified() -> None:
    train, test, everything = (
        open_source(s, DATA) for s in ("digits:split=train", "digits:split=test", "digits")
    )
    assert (len(train), len(test)) == (1437, 360)
    assert set(names(train)).isdisjoint(names(test))
    assert set(names(train)) | set(names(test)) == set(names(everything))
    of_all, of_test = np.bincount(everything.labels), np.bincount(test.labels)
    assert np.abs(of_test - of_all / 5).max() < 1
    for source in (train, test):
        number = int(source.name(7).removeprefix("digits[").removesuffix("]"))
        assert torch.equal(source.read(7), everything.read(number))
        assert source.labels[7] == everything.labels[number]


def test_the_digits_split_never_changes() -> None:
    assert open_source("digits:split=train", DATA).fingerprint == "digits-train-1437-7a84af1c3e21a699"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digits:split=tset", "no split 'tset'; did you mean 'test'"),
        ("digits:spilt=test", "no option 'spilt'; did you mean 'split'"),
        ("digits:train", "'train' is no option; write key=value"),
    ],
)
def test_misspelt_digits_are_refused(spec, message) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(spec, DATA)


# --------------------------------------------------------------------------------------------- torchvision


def write_cifar10(root: Path) -> np.ndarray:
    """A CIFAR-10 of six images in its original layout; the hashes that torchvision checks are not right."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    for number in range(1, 6):
        entry = {"data": images[[number - 1]].reshape(1, -1), "labels": [number]}
        (folder / f"data_batch_{number}").write_bytes(pickle.dumps(entry))
    (folder / "test_batch").write_bytes(pickle.dumps({"data": images[[5]].reshape(1, -1), "labels": [9]}))
    classes = [f"class {number}" for number in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    return images


@pytest.fixture
def cifar10(tmp_path, monkeypatch) -> tuple[Path, np.ndarray]:
    from torchvision.datasets import CIFAR10, cifar

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(cifar, "check_integrity", lambda path, md5=None: True)
    return tmp_path, write_cifar10(tmp_path)


@pytest.mark.parametrize(
    ("split", "where"), [("train", slice(0, 5)), ("test", slice(5, 6)), ("val", slice(5, 6))]
)
def test_cifar10_is_read_with_its_split_labels_and_classes(cifar10, split, where) -> None:
    root, images = cifar10
    source = open_source(f"torchvision:CIFAR10,root={root},split={split}", DATA)
    assert np.array_equal(
        np.stack([source.read(index).numpy() for index in range(len(source))]), images[where]
    )
    assert source.labels.tolist() == [1, 2, 3, 4, 5, 9][where]
    assert source.has_labels
    assert source.class_names[3] == "class 3"
    assert source.in_memory
    assert source.fingerprint == f"torchvision-CIFAR10-{split}-{len(source)}"
    assert source.name(0) == "CIFAR10[0]"


def test_a_dataset_with_a_split_argument_gets_it_and_labels_under_any_name(tmp_path) -> None:
    from scipy.io import savemat

    values = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    savemat(tmp_path / "test_32x32.mat", {"X": values, "y": np.array([[1], [2], [10], [3]])})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.datasets.svhn.check_integrity", lambda path, md5: True)
        source = open_source(f"torchvision:SVHN,root={tmp_path},split=test", DATA)
    assert source.labels.tolist() == [1, 2, 0, 3]
    assert np.array_equal(source.read(1).numpy(), values[..., 1].transpose(2, 0, 1))


def test_a_dataset_of_folders_has_samples_and_broken_files_are_bad_images(tmp_path) -> None:
    make_images(tmp_path, ["cat/1.png", "dog/2.png"])
    (tmp_path / "dog" / "2.png").write_bytes(b"no image")
    source = open_source(f"torchvision:ImageFolder,root={tmp_path}", DATA)
    assert source.labels.tolist() == [0, 1]
    assert source.class_names == ("cat", "dog")
    assert source.name(1).endswith("dog/2.png")
    assert not source.in_memory
    assert source.read(0).shape == (3, 4, 6)
    with pytest.raises(BadImageError, match="cannot identify"):
        source.read(1)


def test_labels_that_are_not_stated_are_read_and_numbers_become_numbers() -> None:
    source = open_source("torchvision:FakeData,size=5,num_classes=3", DATA)
    assert len(source) == 5
    assert source.has_labels
    assert source.labels.shape == (5,)
    assert set(source.labels) <= {0, 1, 2}
    assert source.class_names == tuple("012")[: source.labels.max() + 1]


def test_a_dataset_without_class_numbers_has_no_labels(cifar10, monkeypatch) -> None:
    root, _ = cifar10
    source = open_source(f"torchvision:CIFAR10,root={root}", DATA)
    assert isinstance(source, TorchvisionSource)
    source._dataset.targets = [[1], [2, 3], [4], [5], [6]]
    assert not source.has_labels
    with pytest.raises(ValueError, match="searched the dataset's targets, _labels, labels and samples"):
        source.labels  # noqa: B018 - asking is what fails


def test_missing_data_says_how_to_fetch_it(tmp_path) -> None:
    with pytest.raises(ValueError, match=f"not found in {tmp_path}.*add download=true to fetch it"):
        open_source(f"torchvision:CIFAR10,root={tmp_path},split=train", DATA)


def test_data_that_torchvision_cannot_fetch_says_so(tmp_path) -> None:
    with pytest.raises(ValueError, match="torchvision cannot fetch it: put it there"):
        open_source(f"torchvision:FER2013,root={tmp_path},split=train", DATA)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:CIFAR1O,root=x", "no dataset 'CIFAR1O'; did you mean 'CIFAR10'"),
        ("torchvision:", "torchvision has no dataset ''"),
        ("torchvision:CIFAR10", "CIFAR10 needs root=..."),
        ("torchvision:CIFAR10,root=x,split=trian", "no split 'trian'; did you mean 'train'"),
        ("torchvision:CIFAR10,root=x,splt=train", "no option 'splt'; did you mean 'split'"),
        ("torchvision:CIFAR10,root=x,transform=y", "no option 'transform'"),
        ("torchvision:SVHN,root=x,split=trian", "trian"),
        ("torchvision:EMNIST,root=x", "EMNIST needs split=..."),
        ("torchvision:CIFAR10,root", "'root' is no option; write key=value"),
    ],
)
def test_a_misspelt_dataset_is_refused(spec, message) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(spec, DATA)


def test_opening_a_directory_imports_no_torchvision(tmp_path) -> None:
    make_images(tmp_path, ["1.png"])
    code = (
        "import sys; from nextblock.data import open_source; from nextblock.config import DataConfig\n"
        f"open_source({str(tmp_path)!r}, DataConfig()).read(0)\n"
        "assert 'torchvision' not in sys.modules and 'sklearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
