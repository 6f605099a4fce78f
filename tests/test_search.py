"""Search: what is nearest, the query itself among it, features from a file, what is written and refused."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from nextblock.evaluate.embed.config import EmbedConfig
from nextblock.evaluate.embed.files import EmbeddingsError, read_embeddings
from nextblock.evaluate.embed.run import embed_model
from nextblock.evaluate.search_config import SearchConfig
from PIL import Image
from sklearn.datasets import load_sample_images

import nextblock.cli.search as search_cli
from nextblock.checkpoint import save_model
from nextblock.cli import main
from nextblock.data import TooManyBadImages
from nextblock.evaluate.features import seeded
from nextblock.evaluate.search import MOST_COPIES, ImageFile, nearest, search_model
from nextblock.interop import open_encoder
from nextblock.models import NextBlockModel
from nextblock.visualize.contact_sheet import Cell, SheetRow, draw_contact_sheet, thumbnail
from toy import DATA, ToySource, one_thread, toy_model  # noqa: F401 - a fixture

CONFIG = SearchConfig(model="RUN", data="toy-0", query="toy-1", out="x.png", top=4, device="cpu")


def settings(**changes):
    return SearchConfig(**{**vars(CONFIG), **changes})


def run(*, source=None, queries=None, model=None, **changes):
    source, queries = source or ToySource(24), queries or ToySource(4, seed=1)
    features = read_embeddings(changes["features"]) if "features" in changes else None
    return search_model(model or toy_model(), settings(**changes), source, queries, DATA, features)


def embedded(path, *, source=None, model=None, **changes):
    """The path of a file of features."""
    config = EmbedConfig(model="RUN", data="toy-0", out=str(path), device="cpu", **changes)
    embed_model(model or toy_model(), config, source or ToySource(24), DATA)
    return str(path)


@pytest.fixture
def files(tmp_path):
    """A model and two folders of pictures of two colours, one picture of red aside."""
    save_model(tmp_path / "model.safetensors", toy_model(), data=DATA)
    rng = np.random.default_rng(0)
    for name, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(4):
            noisy = (np.array(colour) + rng.normal(0, 20, (16, 16, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(tmp_path / "data" / name / f"{number}.png")
    return tmp_path


def words(files, **changes):
    values = {
        "model": files / "model.safetensors",
        "data": files / "data",
        "query": files / "data" / "red" / "2.png",
        "out": files / "sheet.png",
        "top": 3,
        "device": "cpu",
        "workers": 0,
        **changes,
    }
    return [word for name, value in values.items() for word in (f"--{name}", str(value)) if value is not None]


# ----------------------------------------------------------------------------------------- what is nearest


def test_the_nearest_are_those_of_the_slow_definition_whatever_the_parts():
    rng = np.random.default_rng(0)
    data, queries = (rng.normal(size=shape).astype(np.float32) for shape in ((23, 8), (3, 8)))
    similarity = np.array(
        [[q @ x / np.linalg.norm(q) / np.linalg.norm(x) for x in data] for q in queries], dtype=np.float64
    )
    expected = np.argsort(-similarity, axis=1)[:, :5]
    for size in (1, 4, 23):
        parts = [
            (torch.from_numpy(data[i : i + size]), torch.arange(i, min(i + size, 23)))
            for i in range(0, 23, size)
        ]
        found, searched = nearest(torch.from_numpy(queries), parts, 5)
        assert searched == 23
        np.testing.assert_array_equal(found.indices, expected)
        np.testing.assert_allclose(found.similarity, np.take_along_axis(similarity, expected, 1), atol=1e-6)


def test_equally_near_images_come_in_the_order_of_the_source():
    same = torch.ones(6, 2)
    found, _ = nearest(torch.ones(1, 2), [(same[:3], torch.arange(3)), (same[3:], torch.arange(3, 6))], 4)
    assert found.indices.tolist() == [[0, 1, 2, 3]]


def test_fewer_images_than_asked_for_are_all_given():
    assert [len(query.neighbours) for query in run(source=ToySource(3), top=10).queries] == [3] * 4


def test_pictures_of_the_same_colour_are_found():
    for query in run().queries:
        assert {one.class_name for one in query.neighbours} == {"abcd"[query.index]}
        assert len(query.neighbours) == 4
        assert not any(one.is_query for one in query.neighbours)


def test_the_tokens_that_are_compared_are_those_asked_for():
    with seeded(0):
        model = open_encoder("timm:vit_tiny_patch16_224,pretrained=false,img_size=32")
    found = run(model=model, tokens="class").queries[0].neighbours
    assert [one.similarity for one in found] != [
        one.similarity for one in run(model=model).queries[0].neighbours
    ]
    with pytest.raises(ValueError, match="class"):
        run(tokens="class")


def test_the_query_itself_is_told_apart_and_comes_on_top():
    source = ToySource(24)
    result = run(source=source, queries=ToySource(24))
    for query in result.queries:
        first = query.neighbours[0]
        assert (first.is_query, first.index, first.similarity > 0.999) == (True, query.index, True)
        assert [one.is_query for one in query.neighbours[1:]] == [False] * 4


@pytest.mark.parametrize("copies", [6, MOST_COPIES])
def test_copies_of_the_query_do_not_take_the_place_of_neighbours(copies):
    source = ToySource(copies + 20)
    source.images[5 : 5 + copies] = source.images[5].clone()
    result = run(source=source, queries=ToySource(6))
    marked = [one.is_query for one in result.queries[5].neighbours]
    assert marked == [True] * copies + [False] * 4


def test_the_same_pixels_under_another_name_are_the_query_itself():
    queries = ToySource(24)
    queries.spec = "other"
    assert all(query.neighbours[0].is_query for query in run(queries=queries).queries)


def test_a_file_with_the_pixels_of_an_image_that_is_no_file_is_the_query_itself(tmp_path):
    Image.fromarray(ToySource(3).images[1].permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
    (query,) = run(queries=ImageFile(tmp_path / "x.png", DATA)).queries
    assert [(one.index, one.is_query) for one in query.neighbours[:1]] == [(1, True)]
    assert query.name == "x.png"


def test_unreadable_images_and_queries_are_left_out_and_listed():
    result = run(source=ToySource(24, bad={1, 5}), queries=ToySource(4, seed=1, bad={2}))
    assert [query.index for query in result.queries] == [0, 1, 3]
    assert (result.searched, sorted(bad.name for bad in result.bad)) == (
        22,
        ["toy-0[1]", "toy-0[5]", "toy-1[2]"],
    )
    with pytest.raises(TooManyBadImages):
        run(source=ToySource(4, bad={0, 1, 2}))


# --------------------------------------------------------------------------------------- features from a file


@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".safetensors"])
def test_features_of_a_file_find_the_same(tmp_path, suffix):
    model, source = toy_model(), ToySource(24, bad={3})
    path = embedded(tmp_path / f"f{suffix}", source=source)
    source.reads = 0
    fast, slow = (
        run(model=model, source=source, features=path),
        run(model=model, source=ToySource(24, bad={3})),
    )
    assert source.reads == 0
    for ours, theirs in zip(fast.queries, slow.queries, strict=True):
        assert [one.index for one in ours.neighbours] == [one.index for one in theirs.neighbours]
        np.testing.assert_allclose(
            [one.similarity for one in ours.neighbours],
            [one.similarity for one in theirs.neighbours],
            atol=1e-5,
        )


def test_the_query_is_encoded_as_the_features_of_the_file_were(tmp_path):
    as_made = {"layers": "layer0", "norm": False, "attention": "full", "precision": "bf16"}
    path = embedded(tmp_path / "f.npy", **as_made)
    result = run(queries=ToySource(24), features=path)
    for query in result.queries:
        assert query.neighbours[0].index == query.index
        assert query.neighbours[0].similarity > 1 - 1e-6
    assert result.identity["compared"].items() >= as_made.items()
    with pytest.raises(ValueError, match=r"precision is fp16, but .*f.npy was made in bf16"):
        run(features=path, precision="fp16")


def test_features_of_another_model_source_or_shape_are_refused(tmp_path):
    path = embedded(tmp_path / "f.npy")
    with pytest.raises(ValueError, match=r"features of another model \(weights: "):
        run(model=toy_model(1), features=path)
    other = NextBlockModel(replace(toy_model().config, feature_attention="full")).eval()
    other.load_state_dict(toy_model().state_dict())
    with pytest.raises(ValueError, match=r"features of another model \(encoder.feature_attention: "):
        run(model=other, features=path)
    with pytest.raises(ValueError, match="features of another source"):
        run(source=ToySource(20), features=path)
    patches = embedded(tmp_path / "patches.npy", pool="none")
    with pytest.raises(ValueError, match=r"16 x 32 numbers an image; search needs one vector"):
        run(features=patches)


def test_features_of_other_images_of_the_same_names_are_refused(files, capsys):
    assert main(["embed", *words(files, out=files / "f.npy", query=None, top=None)]) == 0
    (files / "data").rename(files / "other")
    for path in (files / "other").rglob("*.png"):
        name = files / "data" / path.relative_to(files / "other")
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(name)
    capsys.readouterr()
    assert main(["search", *words(files, features=files / "f.npy")]) == 2
    assert "features of other images of the same names (sources.data.sample: " in capsys.readouterr().err
    assert main(["search", *words(files, data=files / "other", features=files / "f.npy")]) == 0


def test_a_damaged_file_of_features_is_refused(tmp_path):
    path = embedded(tmp_path / "f.npy")
    (tmp_path / "f.npy.names.csv").unlink()
    with pytest.raises(EmbeddingsError, match=r"names.csv cannot be read \(No such file"):
        run(features=path)


# ------------------------------------------------------------------------------------------- the command


def test_the_command_writes_sheet_table_and_lists(files, capsys):
    assert main(["search", *words(files), "--json"]) == 0
    printed = capsys.readouterr().out
    told = json.loads(printed.splitlines()[-1])
    assert "the query itself" in printed
    (query,) = told["queries"]
    assert query["name"] == "2.png"
    assert [one["class_name"] for one in query["neighbours"]] == ["red"] * 4
    assert [one["is_query"] for one in query["neighbours"]] == [True, False, False, False]
    rows = list(csv.DictReader((files / "sheet.csv").read_text().splitlines()))
    assert [(row["rank"], row["is_query"]) for row in rows[:2]] == [("1", "true"), ("2", "false")]
    assert json.loads((files / "sheet.json").read_text())["queries"] == told["queries"]
    with Image.open(files / "sheet.png") as picture:
        assert picture.width > 500


def test_a_sheet_of_another_search_is_refused_and_the_same_drawn_again(files, capsys):
    assert main(["search", *words(files)]) == 0
    assert main(["search", *words(files)]) == 0
    other = words(files, query=files / "data" / "blue" / "0.png")
    assert main(["search", *other]) == 2
    told = capsys.readouterr().err
    assert "of another search (sources.query.fingerprint: " in told
    assert "give another --out, or --overwrite" in told
    before = (files / "sheet.png").read_bytes()
    for name, value in {
        "settings.top": "2",
        "compared.layers": "layer0",
        "compared.tokens": "all",
        "compared.attention": "full",
        "compared.precision": "bf16",
    }.items():
        assert main(["search", *words(files), f"--{name.partition('.')[2]}", value]) == 2
        assert f"({name}: " in capsys.readouterr().err
    assert main(["search", *words(files), "--layers", "last"]) == 0, "which is the default"
    assert (files / "sheet.png").read_bytes() == before
    assert main(["search", *other, "--overwrite"]) == 0
    (files / "mine.png").write_bytes(b"mine")
    assert main(["search", *words(files, out=files / "mine.png")]) == 2
    assert (files / "mine.png").read_bytes() == b"mine"


def test_features_alone_tell_which_images_to_search(files, capsys):
    made = words(files, out=files / "f.npy", query=None, top=None)
    assert main(["embed", *made]) == 0
    assert main(["search", *words(files, data=None, features=files / "f.npy"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["searched"], told["queries"][0]["neighbours"][0]["name"]) == (8, "red/2.png")


def test_features_know_their_images_from_every_directory_and_say_what_to_do_when_those_moved(
    files, monkeypatch, capsys
):
    monkeypatch.chdir(files)
    assert main(["embed", *words(files, data="data", out=files / "f.npy", query=None, top=None)]) == 0
    monkeypatch.chdir(files / "data")
    with_features = {"data": None, "features": files / "f.npy"}
    assert main(["search", *words(files, **with_features)]) == 0
    (files / "data").rename(files / "moved")
    query = files / "moved" / "red" / "2.png"
    capsys.readouterr()
    assert main(["search", *words(files, query=query, **with_features)]) == 2
    assert "if they lie elsewhere now, give --data" in capsys.readouterr().err
    moved = {"data": files / "moved", "features": files / "f.npy", "out": files / "moved.png"}
    assert main(["search", *words(files, query=query, **moved)]) == 0


def test_long_names_keep_their_end_in_a_narrow_table(files, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    folder = files / "data" / ("a_very_long_name_of_a_folder_" * 3)
    (files / "data" / "red").rename(folder)
    assert main(["search", *words(files, query=folder / "2.png")]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert "of_a_folder_/2.png" in rows[0]
    assert sum(".png" in row for row in rows) == 4
    assert max(map(len, rows)) <= 80


def test_a_directory_that_cannot_be_is_refused_before_any_work(files, capsys):
    (files / "file").touch()
    assert main(["search", *words(files, out=files / "file" / "x.png")]) == 2
    assert "cannot be made a directory (File exists); give another --out" in capsys.readouterr().err
    assert main(["search", *words(files, out="/proc/none/x.png")]) == 2
    assert "/proc/none cannot be made a directory (" in capsys.readouterr().err


def test_a_query_that_cannot_be_read_is_named(files, capsys):
    (files / "broken.png").write_bytes(b"no picture")
    assert main(["search", *words(files, query=files / "broken.png")]) == 2
    assert "broken.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "neither data nor features"),
        ({"out": "sheet.jpg"}, r"must end in .png"),
        ({"top": 0}, "use at least 1"),
        ({"layers": "each"}, "name the layers to compare"),
        ({"layers": "x"}, "use last, last6"),
        ({"features": "f.npy", "layers": "last"}, "features are given, and layers; a file of features has"),
        ({"features": "f.npy", "tokens": "all", "attention": "full"}, "given, and tokens and attention;"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_too_many_queries_are_refused():
    with pytest.raises(ValueError, match="has 65 images; give at most 64 queries"):
        run(queries=ToySource(65))


# --------------------------------------------------------------------------------------------- the sheet


def test_thumbnails_keep_shape_and_colours():
    photo = torch.from_numpy(np.array(load_sample_images().images[0])).permute(2, 0, 1).contiguous()
    small = thumbnail(photo)
    assert small.shape == (171, 256, 3)
    np.testing.assert_allclose(small.mean((0, 1)), photo.float().mean((1, 2)), atol=1.5)
    grey = thumbnail(torch.full((1, 8, 8), 7, dtype=torch.uint8))
    assert grey.shape == (8, 8, 3)
    assert (grey == 7).all()


def test_a_sheet_has_room_for_every_neighbour(tmp_path):
    def sheet(count):
        cell = Cell(np.full((8, 8, 3), 128, np.uint8), ("0.999", "$x_1 名"))
        draw_contact_sheet([SheetRow(cell, (cell,) * count)], tmp_path / "s.png", "words " * 40)
        with Image.open(tmp_path / "s.png") as picture:
            return picture.size

    (width, height), (_, height_of_two_lines) = sheet(6), sheet(12)
    assert height_of_two_lines > height + 200
    assert width > height


def test_the_python_function_returns_what_it_wrote(files):
    found = search_cli.search(
        model=files / "model.safetensors",
        data=files / "data",
        query=files / "data" / "blue" / "1.png",
        out=files / "b.png",
        device="cpu",
    )
    assert [one.class_name for one in found.queries[0].neighbours[:4]] == ["blue"] * 4
