"""Unreadable images are counted in the source that the user named, told by name, and listed."""

import json
from dataclasses import replace

import numpy as np
import pytest

from nextblock.data import BadSample, TooManyBadImages
from nextblock.evaluate.features import check_bad
from nextblock.evaluate.sources import part_of
from nextblock.evaluate.unreadable import in_whole, report_unreadable, whole_of
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
