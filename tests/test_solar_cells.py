"""The harder set of docs/results/accuracy.md: photographs of solar cells in a package of the test extra."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from nextblock.cli import main
from nextblock.config import DataConfig
from nextblock.data import open_source

RESULTS = (Path(__file__).parent.parent / "docs" / "results" / "accuracy.md").read_text()


@pytest.fixture
def cells(tmp_path, monkeypatch):
    """What the Python of the document writes, in the working directory."""
    (code,) = re.findall(r"```python\n(.*?)```", RESULTS, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    return tmp_path


def test_the_list_of_the_document_has_the_classes_that_it_tells(cells):
    source = open_source("files:solar.txt", DataConfig(channels=1))
    counts = dict(zip(source.class_names, np.bincount(source.labels).tolist(), strict=True))
    told = {f"{kind} {state}": n for n, kind, state in re.findall(r"([\d,]+) (poly|mono)\s+(\w+)", RESULTS)}
    assert {name.replace("-", " "): f"{count:,}" for name, count in counts.items()} == told
    assert source.read(0).shape == (1, 300, 300)


@pytest.mark.slow
def test_pre_training_helps_the_linear_probe_on_solar_cells(cells, capsys):
    main(["data", "split", "files:solar.txt", "--parts", "train=0.8,test=0.2", "--stratify", "--out", "."])
    model = "--model.image_size 64 --model.patch_size 8 --model.in_chans 1 --data.channels 1"
    data = "--data.normalize auto --data.flip 0.5 --data.val_resize_px 64 --data.train files:train.txt"
    short = "--train.duration 10ep --monitor.knn_every null --out run"
    assert main(f"pretrain --preset xtra-tiny {model} {data} {short}".split()) == 0
    heads = "--heads linear --lr 1e-2 --epochs 30 --batch_size 128"
    sources = "--train files:train.txt --test files:test.txt"
    assert main(f"probe --model run {sources} {heads} --out probe".split()) == 0
    rows = json.loads((cells / "probe" / "probe.json").read_text())["rows"]
    top1 = {row["encoder"]: row["top1"] for row in rows}
    assert top1["model"] > top1["untrained"] + 0.05
