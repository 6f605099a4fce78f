"""A probe that was stopped goes on where it was, and finds what it would have found."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nextblock.checkpoint import CheckpointError
from nextblock.cli import main
from nextblock.evaluate import sources as evaluation_sources
from nextblock.evaluate.features import encoder_extract, iterate_features
from nextblock.evaluate.probe.feature_cache import FeatureCache
from nextblock.evaluate.probe.run import probe
from nextblock.evaluate.probe.state import ProbeStopped
from nextblock.evaluate.probe.train_heads import Feed, Lesson
from nextblock.models.heads import FeatureConfig
from nextblock.settings import to_dict
from probing import known_config
from toy import DATA, ToySource, one_thread, toy_model  # noqa: F401 - a fixture

CPU = torch.device("cpu")


@pytest.fixture
def known(monkeypatch, tmp_path):
    return replace(known_config(monkeypatch, tmp_path), lr=(1e-3, 1e-2), baselines=True)


@pytest.fixture
def steps(monkeypatch):
    """Counts the steps of all lessons; `steps.at[7] = call` has it called in the seventh."""

    class Steps:
        count = 0
        at: dict = {}  # noqa: RUF012 - one for each test

    steps, learn = Steps(), Lesson.learn
    steps.at = {}

    def counted(self, *args):
        steps.count += 1
        steps.at.pop(steps.count, lambda: None)()
        learn(self, *args)

    monkeypatch.setattr(Lesson, "learn", counted)
    return steps


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def without_times(result):
    text = json.dumps(to_dict(result))
    values = json.loads(text)
    for row in values["rows"]:
        del row["elapsed_s"]
    return values


def heads_of(out):
    return {name: load_file(out / name / "model.safetensors") for name in ("attentive", "linear")}


PER_SUBJECT = 2 * 5  # epochs, steps an epoch: of 96 images, 8 are held out to choose on


@pytest.mark.parametrize(
    ("stop", "changes"),
    [
        (1, {"cache_gb": 0.0}),
        (3, {"augment": "crop", "baselines": False}),
        (PER_SUBJECT, {}),
        (PER_SUBJECT + 3, {}),
        (2 * PER_SUBJECT + 7, {}),
    ],
)
def test_a_probe_that_was_stopped_ends_as_if_it_had_not_been(known, steps, tmp_path, stop, changes):
    config = replace(known, **changes)
    whole = probe(replace(config, out=str(tmp_path / "whole")))
    total, steps.count, steps.at = steps.count, 0, {stop: terminate}
    with pytest.raises(ProbeStopped, match=r"stopped by SIGTERM after step .* of 10; run the same command"):
        probe(config)
    assert steps.count == stop
    assert not (tmp_path / "out" / "probe.json").exists()
    again = probe(config)
    assert steps.count == total
    assert without_times(again) == without_times(whole)
    ours, theirs = heads_of(tmp_path / "out"), heads_of(tmp_path / "whole")
    for head, tensors in ours.items():
        assert all(torch.equal(tensor, theirs[head][name]) for name, tensor in tensors.items())
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"attentive", "linear", "probe.csv", "probe.json", "probe.md"}


def test_a_probe_that_was_killed_goes_on_from_the_last_save(known, steps, tmp_path):
    config = replace(known, save_every="1ep", baselines=False)

    def die():
        raise KeyboardInterrupt

    steps.at = {8: die}
    with pytest.raises(KeyboardInterrupt):
        probe(config)
    steps.count = 0
    result = probe(config)
    assert steps.count == PER_SUBJECT - 5
    assert without_times(result) == without_times(probe(replace(config, out=str(tmp_path / "whole"))))


def test_the_state_loads_as_weights_only(known, steps, tmp_path):
    steps.at = {3: terminate}
    with pytest.raises(ProbeStopped):
        probe(known)
    state = torch.load(tmp_path / "out" / "state.pt", weights_only=True)
    assert state["lesson"]["step"] == 3
    assert len(state["lesson"]["heads"]["heads"]) == 4


def test_another_probe_does_not_go_on_with_this_one(known, steps, tmp_path):
    steps.at = {3: terminate}
    with pytest.raises(ProbeStopped):
        probe(known)
    other = replace(known, epochs=1, baselines=False)
    with pytest.raises(ValueError, match=r"holds another probe, unfinished \(.*epochs: 2 there, 1 here"):
        probe(other)
    steps.count = 0
    probe(replace(other, overwrite=True))
    assert steps.count == 5
    assert not (tmp_path / "out" / "state.pt").exists()


def test_to_overwrite_begins_an_unfinished_probe_anew(known, steps):
    config = replace(known, baselines=False)
    steps.at = {3: terminate}
    with pytest.raises(ProbeStopped, match="run the same command again to go on"):
        probe(config)
    steps.count = 0
    probe(replace(config, overwrite=True))
    assert steps.count == PER_SUBJECT


def test_one_that_was_to_overwrite_goes_on_without_it_and_the_old_result_stays_until_then(
    known, steps, tmp_path
):
    config = replace(known, baselines=False)
    old = probe(replace(config, epochs=1))
    steps.count, steps.at = 0, {3: terminate}
    with pytest.raises(ProbeStopped, match="run the same command again, without --overwrite, to go on"):
        probe(replace(config, overwrite=True))
    assert json.loads((tmp_path / "out" / "probe.json").read_text())["settings"]["epochs"] == 1
    steps.count = 0
    again = probe(config)
    assert steps.count == PER_SUBJECT - 3
    assert without_times(again) == without_times(probe(replace(config, out=str(tmp_path / "whole"))))
    assert without_times(again) != without_times(old)


def test_settings_that_change_no_result_may_change_in_between(known, steps):
    steps.at = {3: terminate}
    with pytest.raises(ProbeStopped):
        probe(known)
    steps.count = 0
    probe(replace(known, save_every="1min", encode_batch_size=7, workers=0))
    assert steps.count == 3 * PER_SUBJECT - 3


def test_a_damaged_state_is_refused(known, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "state.pt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(CheckpointError, match=r"state.pt cannot be read .*remove it to start over"):
        probe(known)


def test_a_finished_result_is_read_and_not_computed_again(known, steps, monkeypatch):
    config = replace(known, baselines=False)
    first = probe(config)
    steps.count = 0
    assert probe(replace(config, save_every="3ep")) == first
    assert steps.count == 0
    assert without_times(probe(replace(config, overwrite=True))) == without_times(first)
    assert steps.count == PER_SUBJECT


@pytest.mark.parametrize("changes", [{}, {"cache": "CACHE"}])
def test_a_signal_while_features_are_computed_stops_the_probe_and_no_image_is_encoded_twice(
    known, monkeypatch, tmp_path, changes
):
    source = evaluation_sources.open_source("toy-0", DATA)
    assert isinstance(source, ToySource)
    if changes:
        changes = {"cache": str(tmp_path / "cache")}
    config = replace(known, baselines=False, encode_batch_size=16, **changes)
    whole = probe(replace(config, out=str(tmp_path / "whole"), cache=None))
    source.reads, read = 0, source._read

    def stopping(index):
        if source.reads == 40:
            terminate()
        return read(index)

    monkeypatch.setattr(source, "_read", stopping)
    with pytest.raises(
        ProbeStopped, match="SIGTERM when 48 of 88 images of toy-0 were encoded; run the same command again"
    ):
        probe(config)
    assert source.reads == 48
    again = probe(config)
    assert source.reads == 88 + 8  # those that are chosen on besides
    assert without_times(again) == without_times(whole)
    assert not (tmp_path / "out" / "features").exists()


def test_the_command_ends_with_128_and_the_signal(known, steps, tmp_path, capsys):
    words = ["--model", "RUN", "--train", "toy-0", "--out", str(tmp_path / "out"), "--epochs", "2"]
    words += ["--batch_size", "16", "--attentive_heads", "4", "--device", "cpu", "--lr", "0.01"]
    steps.at = {2: terminate}
    assert main(["probe", *words]) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM after step 2 of 10; run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{}, {"augment": "crop"}, {"stored": None}])
def test_a_feed_may_start_at_any_step(tmp_path, changes):
    kinds = [FeatureConfig(layers=(1,))]
    source = ToySource(22, bad={4})
    extract = encoder_extract(toy_model(), kinds)

    def stored():
        def make(_, start):
            indices = np.arange(start, 22)
            return iterate_features(extract, source, DATA, 16, batch_size=5, indices=indices, device=CPU)

        return FeatureCache(tmp_path / "cache", 1.0).get([{}], 22, make)

    def feed():
        settings = {"stored": stored, **changes}
        return Feed(
            extract=extract,
            source=source,
            data=DATA,
            image_size=16,
            batch_size=5,
            epochs=3,
            seed=0,
            device=CPU,
            **settings,
        )

    whole = list(feed().batches())
    assert len(whole) == 3 * 4
    for start in (0, 3, 4, 6, 12):
        rest = list(feed().batches(start))
        assert len(rest) == 12 - start
        for (features, labels), (expected, expected_labels) in zip(rest, whole[start:], strict=True):
            assert torch.equal(labels, expected_labels)
            torch.testing.assert_close(features[0], expected[0], atol=1e-5, rtol=1e-5)
