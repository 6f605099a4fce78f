"""Tables of features: the same rows in memory, on disk, after a kill, and of any number of processes."""

import errno
import json
import os
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

import ranks
from evaluating import EVERY_TOKEN, MEAN_PATCH, toy_extract, toy_table
from nextblock.atomic import WriteError
from nextblock.data import TooManyBadImages, normalize
from nextblock.evaluate import table as table_module
from nextblock.evaluate.table import NoFeaturesError, NonFiniteFeaturesError
from toy import DATA, ToySource


def filled(*args, **options):
    table = toy_table(*args, **options)
    assert table.fill()
    return table


def whole(table):
    """The rows of all readable images."""
    return table.read(table.readable())


def rows_alone(source, extract, indices):
    """The slow definition: one image at a time."""
    images = [normalize(source.images[index][None], DATA.mean, DATA.std) for index in indices]
    with torch.no_grad():
        return [torch.cat(kind) for kind in zip(*map(extract, images), strict=True)]


def folders(directory):
    return [path for path in directory.iterdir() if path.is_dir()]


@pytest.mark.parametrize("on_disk", [False, True])
def test_rows_are_what_the_extract_gives_of_each_image(tmp_path, on_disk):
    source, extract = ToySource(10, bad={3}), toy_extract(MEAN_PATCH, EVERY_TOKEN)
    table = filled(source, extract, directory=tmp_path if on_disk else None, keys=({"a": 1}, {"a": 2}))
    readable = table.readable()
    assert readable.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    for kind, expected in enumerate(rows_alone(source, extract, readable)):
        torch.testing.assert_close(table.read(readable, kind), expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(table.read(readable[::-1].copy()), whole(table).flip(0))
    assert [(one.sample, one.name, one.reason) for one in table.bad] == [(3, "toy-0[3]", "truncated")]
    abouts = [json.loads((place / "about.json").read_text())["a"] for place in folders(tmp_path)]
    assert sorted(abouts) == ([1, 2] if on_disk else [])
    for place in folders(tmp_path):
        assert np.flatnonzero(np.load(place / "state.npy") == 0).tolist() == [3]


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_subset_is_encoded_first_and_the_rest_when_it_is_needed(tmp_path, on_disk):
    source, some = ToySource(12, bad={5}), np.array([7, 5, 2])
    table = toy_table(source, directory=tmp_path if on_disk else None)
    assert table.fill(some)
    assert source.reads == 3
    assert (table.readable(some).tolist(), table.readable().tolist()) == ([7, 2], [2, 7])
    before = whole(table)
    assert table.fill()
    assert source.reads == 12
    assert torch.equal(whole(table), whole(filled(ToySource(12, bad={5}))))
    assert torch.equal(table.read(np.array([2, 7])), before)


def test_features_of_another_origin_have_a_place_of_their_own(tmp_path):
    source = ToySource(4)
    for key in ({"weights": "a"}, {"weights": "b"}, {"weights": "a"}):
        filled(source, directory=tmp_path, keys=(key,))
    assert source.reads == 8
    assert len(folders(tmp_path)) == 2


def test_of_two_kinds_the_one_that_is_missing_is_encoded(tmp_path):
    source, extract = ToySource(4), toy_extract(MEAN_PATCH, EVERY_TOKEN)
    filled(source, directory=tmp_path, keys=({"a": 1},))
    both = filled(source, extract, directory=tmp_path, keys=({"a": 1}, {"a": 2}))
    expected = rows_alone(source, extract, range(4))[1]
    torch.testing.assert_close(both.read(np.arange(4), 1), expected, atol=1e-6, rtol=1e-5)


def test_too_many_unreadable_images_stop_it_and_are_read_again_next_time(tmp_path):
    data = replace(DATA, max_bad_fraction=0.25)
    filled(ToySource(8, bad={1, 6}), directory=tmp_path / "few", data=data)
    with pytest.raises(TooManyBadImages, match=r"3 of the 8 images of toy-0 .*\n  toy-0\[1\]: truncated"):
        filled(ToySource(8, bad={1, 2, 6}), directory=tmp_path, data=data)
    assert len(filled(ToySource(8), directory=tmp_path, data=data).readable()) == 8


def test_a_source_without_a_readable_image_is_refused():
    with pytest.raises(NoFeaturesError, match=r"no image of toy-0 could be read; the first: toy-0\[0\]: tr"):
        filled(ToySource(3, bad=range(3)), data=replace(DATA, max_bad_fraction=1))


@pytest.mark.parametrize("on_disk", [False, True])
def test_features_that_are_nan_are_refused_and_not_kept(tmp_path, on_disk, monkeypatch):
    monkeypatch.setattr(table_module, "FLUSH_EVERY_S", 0)
    source, directory = ToySource(8), tmp_path if on_disk else None
    fifth = normalize(source.images[5:6], DATA.mean, DATA.std).mean()

    def extract(images):
        features = images.flatten(1).clone()
        features[(images.mean((1, 2, 3)) - fifth).abs() < 1e-6, 0] = float("nan")
        return (features,)

    why = r"1 of 4 feature vectors contain NaN or inf \(first: image 5\)"
    with pytest.raises(NonFiniteFeaturesError, match=why):
        filled(source, extract, directory=directory)
    mended = filled(source, lambda images: (images.flatten(1),), directory=directory)
    assert whole(mended).isfinite().all()


def test_a_stop_keeps_what_was_encoded(tmp_path):
    asked = iter([False, False, True])
    table = toy_table(ToySource(20), directory=tmp_path)
    assert not table.fill(should_stop=lambda: next(asked))
    assert table.readable().tolist() == list(range(8))
    source = ToySource(20)
    filled(source, directory=tmp_path)
    assert source.reads == 12


class Kills(ToySource):
    def _read(self, index):
        if index == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._read(index)


def fill_until_killed(directory):
    table_module.FLUSH_EVERY_S = 0
    filled(Kills(16, bad={1}), directory=directory)


def test_after_a_kill_the_rest_is_encoded_and_the_rows_are_the_same(tmp_path):
    assert ranks.run_ranks(1, fill_until_killed, tmp_path) == [-signal.SIGKILL]
    source = ToySource(16, bad={1})
    table, expected = filled(source, directory=tmp_path), filled(ToySource(16, bad={1}))
    assert source.reads == 9  # two batches were whole, but for an image that is tried again
    assert table.readable().tolist() == expected.readable().tolist()
    assert torch.equal(whole(table), whole(expected))
    assert table.bad == expected.bad


def test_what_a_kill_left_of_a_table_half_made_is_made_again(tmp_path):
    filled(ToySource(4), directory=tmp_path)
    (place,) = folders(tmp_path)
    (place / "about.json").unlink()
    (place / "features.npy").write_bytes(b"half")
    source = ToySource(4)
    filled(source, directory=tmp_path)
    assert source.reads == 4


def test_a_second_command_waits_until_the_first_has_made_the_files(tmp_path, monkeypatch):
    first, second = toy_table(ToySource(8), directory=tmp_path), toy_table(ToySource(8), directory=tmp_path)
    other, make = threading.Thread(target=second.fill), np.lib.format.open_memmap

    def halfway(*args, **options):
        monkeypatch.undo()
        other.start()
        other.join(0.2)
        assert other.is_alive()
        return make(*args, **options)

    monkeypatch.setattr(np.lib.format, "open_memmap", halfway)
    first.fill()
    other.join()
    assert torch.equal(first.read(np.arange(8)), second.read(np.arange(8)))


@pytest.mark.parametrize("name", ["features.npy", "state.npy"])
@pytest.mark.parametrize("damage", ["cut", "gone", "garbage"])
def test_damaged_files_are_named(tmp_path, name, damage):
    filled(ToySource(64), directory=tmp_path)
    (place,) = folders(tmp_path)
    content = (place / name).read_bytes()
    (place / name).unlink()
    if damage != "gone":
        (place / name).write_bytes(content[:-9] if damage == "cut" else b"garbage")
    with pytest.raises(WriteError, match=r"contains damaged features .*; remove it"):
        filled(ToySource(64), directory=tmp_path)


def test_unreadable_images_are_tried_again_by_the_next_table_and_not_by_this_one(tmp_path):
    source, repaired = ToySource(8, bad={1, 6}), ToySource(8, bad={6})
    filled(source, directory=tmp_path).fill()
    assert source.reads == 8
    again = filled(repaired, directory=tmp_path)
    assert repaired.reads == 2
    assert [one.sample for one in again.bad] == [6]
    torch.testing.assert_close(again.read(np.array([1])), rows_alone(repaired, toy_extract(), [1])[0])


def test_a_full_disk_is_an_error_before_anything_is_encoded(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    source = ToySource(8)
    with monkeypatch.context() as patch, pytest.raises(WriteError, match="No space left on device"):
        patch.setattr(os, "posix_fallocate", full)
        filled(source, directory=tmp_path)
    assert source.reads == 0
    filled(source, directory=tmp_path)


def fill_together(source, directory, data=DATA):
    """The rows that one rank sees, the images without any, and how many this rank read."""

    def fill(group):
        table = toy_table(source, directory=directory, group=group, data=data)
        table.fill(np.arange(2, len(source)))
        table.fill()
        return table.readable(), whole(table).numpy(), table.bad, source.reads

    return ranks.in_group(fill)


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize(("world", "images", "bad"), [(2, 13, {0, 4, 12}), (3, 14, {7}), (3, 3, {1})])
def test_rows_are_the_same_of_several_processes(tmp_path, on_disk, world, images, bad):
    expected = filled(ToySource(images, bad=bad))
    found = ranks.run_ranks(world, fill_together, ToySource(images, bad=bad), tmp_path if on_disk else None)
    for readable, rows, reasons, _ in found:
        assert readable.tolist() == expected.readable().tolist()
        np.testing.assert_allclose(rows, whole(expected), atol=1e-6)
        assert reasons == expected.bad
    assert sum(reads for *_, reads in found) == images


def test_too_many_unreadable_images_stop_all_processes_and_rank_0_reports(tmp_path):
    data = replace(DATA, max_bad_fraction=0.2)
    found = ranks.run_ranks(2, fill_together, ToySource(10, bad={3, 8, 9}), tmp_path, data)
    assert all("TooManyBadImages: 3 of the 10 images" in str(error) and error.is_reported for error in found)
