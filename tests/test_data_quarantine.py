"""The list of files that could not be read: each once, over restarts, and a limit to their number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nextblock.data import BadSample, QuarantineLog, TooManyBadImages


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_bad_file_is_listed_once_over_epochs_and_restarts(tmp_path) -> None:
    path = tmp_path / "quarantine.jsonl"
    first, second = BadSample(3, "a/3.png", "empty"), BadSample(5, "ü/5.png", "truncated\nhere")
    quarantine = QuarantineLog(path, num_files=100, max_bad_fraction=0.02)
    assert quarantine.count == 0
    assert not path.exists()
    for bad in (first, second, first):
        quarantine.add(bad)
    assert quarantine.count == 2
    again = QuarantineLog(path, num_files=100, max_bad_fraction=0.02)
    assert again.count == 2
    again.add(second)
    assert lines(path) == [
        {"name": "a/3.png", "sample": 3, "reason": "empty"},
        {"name": "ü/5.png", "sample": 5, "reason": "truncated\nhere"},
    ]


def test_too_many_bad_files_stop_with_the_first_ten_and_the_remedy(tmp_path) -> None:
    quarantine = QuarantineLog(tmp_path / "q.jsonl", num_files=1000, max_bad_fraction=0.011)
    for sample in range(11):
        quarantine.add(BadSample(sample, f"{sample}.png", f"reason {sample}"))
    with pytest.raises(TooManyBadImages) as caught:
        quarantine.add(BadSample(11, "11.png", "reason 11"))
    message = str(caught.value)
    assert "12 of 1000 files cannot be read, more than data.max_bad_fraction 0.011 allows" in message
    assert "\n  0.png: reason 0\n" in message
    assert "9.png: reason 9" in message
    assert "10.png" not in message
    assert "raise data.max_bad_fraction" in message
    assert len(lines(tmp_path / "q.jsonl")) == 12


def test_no_bad_file_is_allowed_by_a_fraction_of_0_and_any_by_1(tmp_path) -> None:
    for sample in range(3):
        QuarantineLog(tmp_path / "any.jsonl", 3, 1.0).add(BadSample(sample, "x", "y"))
    with pytest.raises(TooManyBadImages):
        QuarantineLog(tmp_path / "none.jsonl", 3, 0.0).add(BadSample(0, "x", "y"))


def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path) -> None:
    path = tmp_path / "q.jsonl"
    QuarantineLog(path, 100, 0.5).add(BadSample(1, "1.png", "empty"))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"name": "2.p')
    assert QuarantineLog(path, 100, 0.5).count == 1
    assert path.read_bytes() == whole


def test_a_damaged_list_is_refused_with_the_line(tmp_path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"line 1, is damaged .* delete that file"):
        QuarantineLog(path, 100, 0.5)
