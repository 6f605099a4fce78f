"""Features on disk: what is kept is what the encoder gives, and it is used where it fits, and only there."""

import json
from dataclasses import replace

import pytest
import torch

from nextblock.checkpoint import CheckpointError
from nextblock.data import Source
from nextblock.evaluate.features import collect_features, encoder_extract, iterate_features
from nextblock.evaluate.probe import feature_cache
from nextblock.evaluate.probe.config import Split
from nextblock.evaluate.probe.feature_cache import FeatureCache
from nextblock.evaluate.probe.run import probe_model
from nextblock.models.features import FeatureConfig
from probing import QUICK, weights
from toy import DATA, ToySource, one_thread, toy_model  # noqa: F401 - a fixture

CPU = torch.device("cpu")
CONFIG = replace(QUICK, epochs=2, baselines=False)
KINDS = [FeatureConfig(layers=(1,)), FeatureConfig(layers=(0, 1), pooled=False)]


def batches(source, kinds, size=7):
    extract = encoder_extract(toy_model(), kinds)
    return iterate_features(extract, source, DATA, 16, batch_size=size, device=CPU)


def fill(cache, source, kinds=KINDS):
    keys = [{"source": source.fingerprint, "kind": str(kind)} for kind in kinds]
    return cache.get(keys, len(source), lambda missing: batches(source, [kinds[n] for n in missing]))


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
    make = lambda missing: asked.append(missing) or batches(source, [KINDS[n] for n in missing])  # noqa: E731
    both = cache.get(keys, 12, make)
    assert cache.get(keys, 12, make) is not None
    assert asked == [(1,)]
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


def test_features_that_were_cut_off_while_they_were_written_are_made_again(tmp_path):
    cache, source = FeatureCache(tmp_path / "cache", 1.0), ToySource(12)

    def cut_off(_):
        yield next(batches(source, KINDS))
        raise KeyboardInterrupt

    keys = [{"source": source.fingerprint, "kind": str(kind)} for kind in KINDS]
    with pytest.raises(KeyboardInterrupt):
        cache.get(keys, 12, cut_off)
    assert not list((tmp_path / "cache").glob("[!.]*"))
    stored = fill(cache, source)
    assert stored is not None
    assert json.loads(next((tmp_path / "cache").glob("*/about.json")).read_text())["bad"] == []


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
