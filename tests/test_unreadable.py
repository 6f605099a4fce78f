"""Unreadable images are counted in the source that the user named, told by name, and listed."""

import json
from dataclasses import replace

import numpy as np
import pytest
from nextblock.evaluate.fewshot_config import FewshotConfig
from nextblock.evaluate.knn_config import KnnConfig

from nextblock.data import BadSample, TooManyBadImages, keyed_seed
from nextblock.evaluate import features as features_module
from nextblock.evaluate import sources as evaluation_sources
from nextblock.evaluate.features import check_bad
from nextblock.evaluate.fewshot import fewshot
from nextblock.evaluate.knn import knn
from nextblock.evaluate.probe.run import probe
from nextblock.evaluate.sources import hold_out, part_of
from nextblock.evaluate.unreadable import in_whole, report_unreadable, whole_of
from probing import QUICK, known_config, run
from toy import DATA, ToySource, one_thread, toy_model  # noqa: F401 - a fixture


def listed(out):
    return [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]


def test_the_limit_is_to_the_share_of_the_whole_and_counts_all_its_parts():
    source, data = ToySource(40), replace(DATA, max_bad_fraction=0.05)
    part = part_of(source, np.arange(4, 12))
    bad = [BadSample(number, f"{number}.png", "truncated") for number in range(2)]
    check_bad(bad, part, data)
    with pytest.raises(TooManyBadImages, match="3 of the 40 images of toy-0 cannot be read"):
        check_bad(bad, part, data, besides=1)
    assert whole_of(part) is source
    assert whole_of(source) is source
    assert in_whole(bad[1], part).sample == 5
    assert in_whole(bad[1], source) == bad[1]


def test_the_first_few_are_told_and_all_are_listed_by_their_number_in_the_whole(tmp_path, caplog):
    source = ToySource(40)
    bad = [BadSample(number, f"{number}.png", "cut\noff") for number in range(4)]
    found = {"train": (part_of(source, np.arange(10, 40)), bad), "val": (ToySource(8, seed=1), ())}
    report_unreadable(tmp_path / "out", found)
    (told,) = warnings_of(caplog)
    assert told == (
        "4 of the 30 images of toy-0 (train) cannot be read and are left out: "
        "0.png: cut off; 1.png: cut off; 2.png: cut off; ..."
    )
    lines = listed(tmp_path / "out")
    assert [line["sample"] for line in lines] == [10, 11, 12, 13]
    assert lines[0] == {"source": "train", "sample": 10, "name": "0.png", "reason": "cut\noff"}


def test_where_all_can_be_read_there_is_no_list_not_even_an_older_one(tmp_path):
    (tmp_path / "quarantine.jsonl").write_text("of another result\n")
    report_unreadable(tmp_path, {"train": (ToySource(8), ())})
    report_unreadable(tmp_path / "new", {"train": (ToySource(8), ())})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def known(monkeypatch, tmp_path):
    """A quick probe of sources of which some images cannot be read."""
    config = known_config(monkeypatch, tmp_path)
    sources = {"toy-0": ToySource(96, bad={0, 5}), "toy-1": ToySource(48, seed=1, bad={7})}
    monkeypatch.setattr(evaluation_sources, "open_source", lambda spec, data: sources[spec])
    return replace(config, max_bad_fraction=0.5)


def test_a_probe_names_what_it_left_out(known, tmp_path, caplog):
    probe(replace(known, lr=(1e-3, 1e-2), heads=("linear",), epochs=1))
    lines = listed(tmp_path / "out")
    assert [line["name"] for line in lines if line["source"] == "val"] == ["toy-1[7]"]
    assert {(line["name"], line["sample"]) for line in lines if line["source"] != "val"} == {
        ("toy-0[0]", 0),
        ("toy-0[5]", 5),
    }
    assert any("toy-0[5]: truncated" in told for told in warnings_of(caplog))
    assert "unreadable images left out: 3." in (tmp_path / "out" / "probe.md").read_text()


def test_they_are_named_by_a_probe_that_was_cut_off_when_all_was_measured(known, tmp_path, monkeypatch):
    def cut_off(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("nextblock.evaluate.probe.run.save_classifier", cut_off)
        probe(replace(known, epochs=1))
    before = listed(tmp_path / "out")
    (tmp_path / "out" / "quarantine.jsonl").unlink()
    assert probe(replace(known, epochs=1)).bad_images == {"train": 2, "val": 1}
    assert listed(tmp_path / "out") == before
    assert len(before) == 3


def test_of_images_held_out_the_unreadable_ones_count_in_the_whole_source():
    config = replace(QUICK, heads=("linear",), epochs=1, lr=(1e-3, 1e-2))
    kept, held = hold_out(ToySource(96).labels, keyed_seed(config.seed, "probe choice"))
    data = replace(DATA, max_bad_fraction=1.5 / 96)
    found = run(config, train=ToySource(96, bad={held[0]}), data=data)
    assert found.result.bad_images == {"train": 0, "choice": 1, "val": 0}
    with pytest.raises(TooManyBadImages, match="2 of the 96 images of toy-0 cannot be read"):
        run(config, train=ToySource(96, bad={held[0], kept[0]}), data=data)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "config"),
    [
        (knn, KnnConfig(model="RUN", train="toy-0", val="toy-1", baselines=False, device="cpu")),
        (
            fewshot,
            FewshotConfig(
                model="RUN",
                train="toy-0",
                test="toy-1",
                shots=("90%",),
                seeds=1,
                baselines=False,
                device="cpu",
            ),
        ),
    ],
)
def test_knn_and_fewshot_name_them_as_well(known, tmp_path, caplog, monkeypatch, verb, config):
    monkeypatch.setattr(features_module, "open_encoder", lambda spec, num_heads: toy_model())
    out = tmp_path / verb.__name__
    verb(replace(config, max_bad_fraction=0.5))
    assert not out.exists()
    assert any("toy-1[7]: truncated" in told for told in warnings_of(caplog))
    verb(replace(config, max_bad_fraction=0.5, out=str(out)))
    assert "toy-1[7]" in {line["name"] for line in listed(out)}
    assert "unreadable images left out: " in " ".join((out / f"{verb.__name__}.md").read_text().split())
    verb(replace(config, max_bad_fraction=0.5, out=str(out)))  # its own list is no foreign file
