"""Search: what is nearest, the query itself among it, the sheet and the lists."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from evaluating import toy_table, toy_verb, written  # noqa: F401 - a fixture
from nextblock.cli import main
from nextblock.errors import UsageError
from nextblock.visualize.evaluation import draw_contact_sheet
from toy import ToySource


@pytest.fixture
def search(run):
    return run.with_usual(verb="search", data="toy-0", query="toy-1")


def test_the_nearest_are_those_of_the_slow_definition(search):
    search.sources |= {"toy-0": ToySource(24, bad={4}), "toy-1": ToySource(3, seed=1)}
    found = search(top=4)
    known, asked = toy_table(search.sources["toy-0"]), toy_table(search.sources["toy-1"])
    known.fill()
    asked.fill()
    features, numbers = known.read(known.readable()), known.readable()
    rows = iter(found.rows)
    for query, vector in enumerate(asked.read(np.arange(3))):
        similarity = torch.cosine_similarity(features, vector[None])
        for rank, row in enumerate(similarity.argsort(descending=True)[:4].tolist(), start=1):
            line, index = next(rows), int(numbers[row])
            assert (line["query_index"], line["rank"], line["index"]) == (query, rank, index)
            assert line["similarity"] == pytest.approx(float(similarity[row]), abs=1e-6)
            assert (line["name"], line["class"]) == (f"toy-0[{index}]", "abcd"[index % 4])
            assert not line["is_query"]
    assert list(rows) == []
    assert found.facts["bad_images"] == {"data": 1, "query": 0}
    assert found.notes == ("23 images of toy-0 searched.",)


def test_a_query_of_the_searched_images_is_marked_and_does_not_count(search):
    search.sources["toy-1"] = ToySource(2)  # the first two of toy-0
    found = search(top=3)
    for query in range(2):
        lines = [row for row in found.rows if row["query_index"] == query]
        assert [line["is_query"] for line in lines] == [True, False, False, False]
        assert (lines[0]["index"], lines[0]["rank"]) == (query, 1)
        assert lines[0]["similarity"] == pytest.approx(1)
    assert found.table.cells()[0][3] == "toy-0[0] (the query itself)"
    # As near, but of other pixels.
    search.sources["toy-0"].images[0, 0, 0, 0] ^= 1
    first, *others = search(top=3).rows[:3]
    assert (first["index"], first["is_query"]) == (0, False)
    assert first["similarity"] > 1 - 1e-5
    assert [row["query_index"] for row in others] == [0, 0]


def test_fewer_images_than_asked_for_are_all_given_and_too_many_queries_refused(search):
    search.sources |= {"toy-0": ToySource(3), "toy-2": ToySource(65, seed=2)}
    assert len(search().rows) == 3 * 32
    with pytest.raises(UsageError, match="toy-2 has 65 images; give at most 64"):
        search(query="toy-2")


def test_the_command_writes_a_sheet_and_lists_for_one_image_file(run, tmp_path, capsys):
    out = tmp_path / "out"
    for name, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(3):
            pixels = np.full((18, 24, 3), np.array(colour) + 9 * number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")
    words = ["search", "--model", run.usual["model"], "--data", str(tmp_path / "data"), "--out", str(out)]
    words += ["--query", str(tmp_path / "data" / "red" / "1.png"), "--top", "2", "--device", "cpu"]
    assert main([*words, "--workers", "0"]) == 0
    assert f"Sheet: {out / 'sheet.png'}" in capsys.readouterr().out
    files = {path.name for path in out.iterdir() if path.name[0] != "."}
    assert files == {"search.csv", "search.json", "search.md", "sheet.png"}
    with (out / "search.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["is_query"] for line in lines] == ["True", "False", "False"]
    assert {line["class"] for line in lines} == {"red"}
    assert [row["name"] for row in written(out / "search.json")["rows"]] == [line["name"] for line in lines]
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        shown = set(map(tuple, np.asarray(sheet.convert("RGB")).reshape(-1, 3).tolist()))
    assert {(200 + 9 * n, 40 + 9 * n, 40 + 9 * n) for n in range(3)} <= shown
    assert (40, 40, 200) not in shown
    (out / "search.json").unlink()  # as if killed before it was written
    assert main(words) == 0


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_images_of_any_channels_are_drawn_and_long_rows_wrap(tmp_path, channels):
    class Channels(ToySource):
        def _read(self, index):
            return self.images[index][[0] * channels]

    row = {"query_index": 0, "similarity": 0.5, "class": None, "name": "$x_", "is_query": False}
    rows = [{**row, "index": index} for index in range(9)]
    draw_contact_sheet(rows, Channels(1, seed=1), Channels(9), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > sheet.height
