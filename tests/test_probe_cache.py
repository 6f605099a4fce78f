"""Features on disk: what is kept is what the encoder gives, and it is used where it fits, and only there."""

import shutil
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from nextblock.checkpoint import CheckpointError
from nextblock.data import Source, TooManyBadImages
from nextblock.evaluate.features import collect_features, encoder_extract, iterate_features
from nextblock.evaluate.probe import feature_cache
from nextblock.evaluate.probe.config import Split
from nextblock.evaluate.probe.feature_cache import FeatureCache
from nextblock.evaluate.probe.run import probe_model
from nextblock.models.heads import FeatureConfig
from probing import QUICK, weights
from toy import DATA, ToySource, one_thread, toy_model  # noqa: F401 - a fixture

CPU = torch.device("cpu")
CONFIG = replace(QUICK, epochs=2, baselines=False)
KINDS = [FeatureConfig(layers=(1,)), FeatureConfig(layers=(0, 1), pooled=False)]


def batches(source, kinds, start=0, size=7):
    extract = encoder_extract(toy_model(), kinds)
    indices = np.arange(start, len(source))
    return iterate_features(extract, source, DATA, 16, batch_size=size, indices=indices, device=CPU)


def fill(cache, source, kinds=KINDS):
    keys = [{"source": source.fingerprint, "kind": str(kind)} for kind in kinds]
    return cache.get(
        keys, len(source), lambda missing, start: batches(source, [kinds[n] for n in missing], start)
    )


class Counted:
    """A model that counts the images it encodes."""

    def __init__(self, monkeypatch, seed=0):
        self.model, self.images = toy_model(seed), 0
        encode = self.model.encode
        monkeypatch.setattr(self.model, "encode", lambda x, attention: self._count(x) or encode(x, attention))

    def _count(self, images):
        self.images += len(images)

    def probe(self, config, data=DATA, train=None):
        given: dict[Split, Source] = {"val": ToySource(24, seed=1)}
        return probe_model(self.model, config, train or ToySource(48), given, data)


@pytest.mark.parametrize("bad", [set(), {0, 5, 23}, set(range(7))])
def test_what_is_read_from_the_disk_is_what_the_encoder_gives(tmp_path, bad):
    source = ToySource(24, bad=bad)
    stored = fill(FeatureCache(tmp_path / "cache", 1.0), source)
    expected = collect_features(batches(source, KINDS))
    assert stored is not None
    assert stored.bad == expected.bad
    for size in (5, 24):
        found = collect_features(stored.batches(size, CPU))
        assert torch.equal(found.samples, expected.samples)
        assert all(map(torch.equal, found.features, expected.features))


def test_only_the_kinds_that_are_missing_are_computed(tmp_path):
    cache, source = FeatureCache(tmp_path / "cache", 1.0), ToySource(12)
    fill(cache, source, KINDS[:1])
    asked = []
    keys = [{"source": source.fingerprint, "kind": str(kind)} for kind in KINDS]

    def make(missing, start):
        asked.append((missing, start))
        return batches(source, [KINDS[n] for n in missing], start)

    both = cache.get(keys, 12, make)
    assert cache.get(keys, 12, make) is not None
    assert asked == [((1,), 0)]
    assert both is not None
    assert [array.shape for array in both.arrays] == [(12, 32), (12, 16, 32)]


def test_a_later_probe_does_not_run_the_encoder(tmp_path, monkeypatch):
    config = replace(CONFIG, cache=str(tmp_path / "cache"))
    first = Counted(monkeypatch)
    found = first.probe(config)
    assert first.images == 48 + 24
    again = Counted(monkeypatch)
    other = again.probe(replace(config, encode_batch_size=5))
    assert again.images == 0
    for head in ("attentive", "linear"):
        assert torch.equal(weights(found, head), weights(other, head))
    assert [row.top1 for row in other.result.rows] == [row.top1 for row in found.result.rows]
    more = Counted(monkeypatch)
    more.probe(replace(config, lr=(1e-3,), epochs=1))
    assert more.images == 0


def test_what_is_kept_is_known_by_weights_images_and_the_way_they_are_cut(tmp_path, monkeypatch):
    config = replace(CONFIG, cache=str(tmp_path / "cache"), epochs=1)
    Counted(monkeypatch).probe(config)
    for seed, changes in (
        (1, {}),
        (0, {"data": replace(DATA, val_resize_px=18)}),
        (0, {"data": replace(DATA, val_crop="squash")}),
        (0, {"train": ToySource(48, seed=5)}),
        (0, {"config": replace(config, precision="bf16")}),
        (0, {"config": replace(config, attention=("full",))}),
    ):
        other = Counted(monkeypatch, seed)
        other.probe(**{"config": config, **changes})
        assert other.images > 0, changes


def test_without_a_cache_of_its_own_a_probe_leaves_no_features(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    one = Counted(monkeypatch)
    one.probe(CONFIG)
    assert one.images == 48 + 24
    assert list(tmp_path.iterdir()) == []


def test_features_beyond_the_bound_are_not_kept(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    cache = FeatureCache(tmp_path / "cache", 12 * 32 * 4 / 1e9)
    source = ToySource(12)
    assert fill(cache, source, KINDS[:1]) is not None  # fills it to the last byte
    assert fill(cache, ToySource(12, seed=1), KINDS[:1]) is None
    assert fill(cache, source, KINDS[:1]) is not None
    assert "more than cache_gb" in caplog.text
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    assert fill(FeatureCache(tmp_path / "other", 1.0), source) is None


@pytest.mark.parametrize("bad", [set(), {3, 9}, set(range(7))])
def test_features_that_were_cut_off_are_gone_on_with(tmp_path, bad):
    source = ToySource(24, bad=bad)
    keys = [{"source": source.fingerprint, "kind": str(kind)} for kind in KINDS]

    def cut_off(_, start):
        made = batches(source, KINDS, start)
        yield next(made)
        yield next(made)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path / "cache", 1.0).get(keys, 24, cut_off)
    assert not list((tmp_path / "cache").glob("[!.]*"))
    assert source.reads == 14
    stored = fill(FeatureCache(tmp_path / "cache", 1.0), source)
    assert source.reads == 24
    whole = fill(FeatureCache(tmp_path / "whole", 1.0), source)
    assert stored is not None
    assert whole is not None
    assert {one.sample for one in stored.bad} == bad
    assert stored.bad == whole.bad
    assert all(map(np.array_equal, stored.arrays, whole.arrays))
    assert not list((tmp_path / "cache").glob(".*"))


def test_what_a_kill_leaves_is_gone_on_with(tmp_path, monkeypatch):
    """What lies on the disk in the midst of a batch is what a kill there leaves."""
    monkeypatch.setattr(feature_cache, "SAVE_EVERY_S", 0.0)
    source = ToySource(24, bad={2})
    keys = [{"source": source.fingerprint, "kind": str(kind)} for kind in KINDS]

    def copied(_, start):
        for number, batch in enumerate(batches(source, KINDS, start)):
            if number == 2:
                shutil.copytree(tmp_path / "cache", tmp_path / "killed")
            yield batch

    whole = FeatureCache(tmp_path / "cache", 1.0).get(keys, 24, copied)
    for path in (tmp_path / "killed").glob(".filling-*/features.npy"):
        with path.open("ab") as file:
            file.write(b"half a row")  # that was not counted yet
    source.reads = 0
    stored = fill(FeatureCache(tmp_path / "killed", 1.0), source)
    assert source.reads == 24 - 2 * 7
    assert stored is not None
    assert whole is not None
    assert stored.bad == whole.bad
    assert all(map(np.array_equal, stored.arrays, whole.arrays))


def test_nothing_is_kept_where_too_many_images_cannot_be_read(tmp_path):
    cache, broken, source = FeatureCache(tmp_path / "cache", 1.0), ToySource(24, bad={20}), ToySource(24)
    keys = [{"source": source.fingerprint, "kind": str(kind)} for kind in KINDS]

    def give_up(missing, start):
        yield from islice(batches(broken, [KINDS[n] for n in missing], start), 3)
        raise TooManyBadImages

    with pytest.raises(TooManyBadImages):
        cache.get(keys, 24, give_up)
    assert list((tmp_path / "cache").iterdir()) == []
    stored = fill(cache, source)
    assert stored is not None
    assert stored.bad == ()


def test_kinds_that_were_cut_off_apart_go_on_from_where_all_are(tmp_path):
    cache, source = FeatureCache(tmp_path / "cache", 1.0), ToySource(24)
    for number, count in ((0, 2), (1, 1)):
        key = {"source": source.fingerprint, "kind": str(KINDS[number])}

        def cut_off(_, start, number=number, count=count):
            yield from islice(batches(source, [KINDS[number]], start), count)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cache.get([key], 24, cut_off)
    source.reads = 0
    stored = fill(cache, source)
    assert source.reads == 24 - 7
    expected = collect_features(batches(source, KINDS))
    assert stored is not None
    for array, features in zip(stored.arrays, expected.features, strict=True):
        assert np.array_equal(array, features.numpy())


def test_unfinished_features_count_towards_the_bound_and_go_where_there_is_no_room(tmp_path):
    source = ToySource(24)
    needed_gb = 24 * 32 * 4 / 1e9

    def cut_off(_, start):
        yield next(batches(source, KINDS[:1], start))
        raise KeyboardInterrupt

    keys = [{"source": source.fingerprint, "kind": str(KINDS[0])}]
    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path / "cache", 1.0).get(keys, 24, cut_off)
    tight = FeatureCache(tmp_path / "cache", 1.2 * needed_gb)
    assert fill(tight, ToySource(24, seed=1), KINDS[:1]) is None
    assert fill(tight, source, KINDS[:1]) is not None  # its own are no burden
    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path / "other", 1.0).get(keys, 24, cut_off)
    assert fill(FeatureCache(tmp_path / "other", needed_gb / 2), source, KINDS[:1]) is None
    assert list((tmp_path / "other").iterdir()) == []


class Named(ToySource):
    """Pictures in files whose names are those of any other such source, at the same place as told."""

    in_memory = False

    def __init__(self, count, *, seed, shuffled=False):
        super().__init__(count, seed=seed, shuffled=shuffled)
        self.spec = "data"

    def _make_fingerprint(self):
        return "numbered"


def test_other_files_of_the_same_names_at_the_same_place_are_another_source(tmp_path):
    config = replace(CONFIG, cache=str(tmp_path / "cache"), epochs=1)
    given: dict[Split, Source] = {"val": Named(24, seed=1), "test": Named(24, seed=2, shuffled=True)}
    found = probe_model(toy_model(), config, Named(24, seed=0), given, DATA).result
    alone = probe_model(toy_model(), replace(config, cache=None), Named(24, seed=0), given, DATA).result
    assert [row.loss for row in found.rows] == [row.loss for row in alone.rows]


def test_the_same_files_at_another_place_are_the_same_source(tmp_path, monkeypatch):
    config, model = replace(CONFIG, cache=str(tmp_path / "cache"), epochs=1), Counted(monkeypatch)
    model.probe(config, train=Named(24, seed=0))
    before, moved = model.images, Named(24, seed=0)
    moved.spec = "elsewhere"
    model.probe(config, train=moved)
    assert model.images == before


def test_damaged_features_are_refused(tmp_path):
    cache, source = FeatureCache(tmp_path / "cache", 1.0), ToySource(12)
    fill(cache, source)
    for path in (tmp_path / "cache").glob("*/features.npy"):
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"holds damaged features .*remove it"):
        fill(cache, source)


def test_a_source_without_a_readable_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"none of the images could be read \(12 bad, the first: toy-0\[0\]"):
        fill(FeatureCache(tmp_path / "cache", 1.0), ToySource(12, bad=range(12)))
