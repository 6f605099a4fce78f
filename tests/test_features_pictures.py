"""`nextblock features`: colours, a head's attention and nearest patches, each against a slow definition."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import nextblock
from nextblock.checkpoint import save_classifier, save_model
from nextblock.config import DataConfig
from nextblock.data import eval_batches, normalize, open_source
from nextblock.evaluate.features import attention_maps
from nextblock.look import features as look
from nextblock.look.features import PatchColours
from nextblock.models.heads import HeadConfig, ImageClassifier
from tiny_runs import call_cli, refused, write_images
from toy import tiny_images, tiny_model

DATA = DataConfig(val_resize_px=24, workers=0, max_bad_fraction=0.5)
GRID, SIZE = (4, 6), (16, 24)


@pytest.fixture(name="places")
def saved_model_and_images(tmp_path):
    """Settings of a saved model of 4x6 patches and twelve pictures, one of which cannot be read."""
    save_model(tmp_path / "model.safetensors", tiny_model(), data=DATA)
    write_images(tmp_path / "images", 12, broken=1)
    return {
        "model": str(tmp_path / "model.safetensors"),
        "data": str(tmp_path / "images"),
        "out": str(tmp_path / "out"),
        "device": "cpu",
        "workers": 0,
        "num_images": 3,
    }


@pytest.fixture(name="cells")
def drawn_cells(monkeypatch):
    """The cells of every sheet that is drawn, by the name of its file."""
    found, draw = {}, look.draw_cells

    def keep(rows, path, **options):
        found[path.name] = [cell for row in rows for cell in row]
        draw(rows, path, **options)

    monkeypatch.setattr(look, "draw_cells", keep)
    return found


def patches_of(places, count=12):
    """The features of all patches of the readable pictures, (b n d)."""
    (batch,) = eval_batches(open_source(places["data"], DATA), DATA, SIZE, count, range(count))
    with torch.no_grad():
        return tiny_model().encode(normalize(batch.images, DATA.mean, DATA.std)).tokens


def head_on(model, kind, folder, data=DATA, **options) -> Any:
    config = HeadConfig(kind=kind, num_classes=3, num_heads=4, layers=(0, 1), **options)
    torch.manual_seed(0)
    classifier = ImageClassifier(model, config, ("a", "b", "c")).eval()
    save_classifier(folder, classifier, data=data)
    return classifier


def test_colours_are_the_first_three_principal_components_on_one_scale():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 7)) * [5, 4, 3, 1, 0.5, 0.2, 0.1] @ rng.normal(size=(7, 7))
    colours = PatchColours.fit(features)
    centred = features - features.mean(axis=0)
    variances, vectors = np.linalg.eigh(centred.T @ centred)
    widest = np.ptp(np.quantile(centred @ vectors[:, -3:], (0.01, 0.99), axis=0), axis=0).max()
    for channel in range(3):
        vector = vectors[:, -1 - channel]
        values = centred @ (vector * np.sign(vector[np.abs(vector).argmax()]))
        low, high = np.quantile(values, (0.01, 0.99))
        expected = (0.5 + (values - (low + high) / 2) / widest).clip(0, 1)
        np.testing.assert_allclose(colours.colours(features)[:, channel], expected, atol=1e-9)
        assert colours.explained[channel] == pytest.approx(variances[-1 - channel] / variances.sum())


def test_a_component_that_is_not_there_is_grey():
    colours = PatchColours.fit(np.array([[0.0, 1.0], [0.0, 3.0], [0.0, 7.0]]))
    np.testing.assert_allclose(colours.colours(np.array([[0.0, 100.0]])), [[1.0, 0.5, 0.5]], atol=1e-12)


@pytest.mark.parametrize(("channels", "shown"), [(2, 1), (4, 3)])
def test_images_of_two_channels_and_four_are_drawn_by_their_first(channels, shown, places, tmp_path, cells):
    data = DataConfig(val_resize_px=24, channels=channels, mean=(0.5,) * channels, std=(0.2,) * channels)
    model, places["head"] = tiny_model(in_chans=channels), str(tmp_path / "head")
    save_model(tmp_path / "model.safetensors", model, data=data)
    head_on(model, "ep", tmp_path / "head", data=data, num_queries=3)
    pixels = np.random.default_rng(0).integers(0, 256, (2, *SIZE, channels), dtype=np.uint8)
    places["data"] = str(tmp_path / "two")
    for path, one in zip((tmp_path / "two" / "a.png", tmp_path / "two" / "b.png"), pixels, strict=True):
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(one).save(path)
    nextblock.features(**places, query="0")
    (batch,) = eval_batches(open_source(places["data"], data), data, SIZE, 2, range(2))
    expected = batch.images[:, :shown].movedim(1, -1).numpy()
    np.testing.assert_array_equal(cells["features.png"][0].picture, expected[0])
    np.testing.assert_array_equal(cells["nearest.png"][1].picture, expected[1])
    assert (tmp_path / "out" / "attention.png").is_file()


def test_all_images_are_drawn_in_the_colours_of_the_whole_folder(places, cells):
    result = nextblock.features(**places)
    assert result.facts["fitted_on"] == 12
    assert [sample.name for sample in result.bad] == ["broken_00.png"]
    patches = patches_of(places)
    colours = PatchColours.fit(patches.reshape(-1, patches.shape[-1]).numpy())
    drawn = {cell.words: cell.picture for cell in cells["features.png"] if cell.words}
    assert list(drawn) == result.facts["images"] == ["0002.png", "0006.png", "0010.png"]
    for name, picture in drawn.items():
        expected = colours.colours(patches[int(name[:4])].numpy()).reshape(*GRID, 3)
        np.testing.assert_allclose(picture, expected, atol=1e-4)


def test_many_unreadable_images_are_left_out_and_named(places, tmp_path):
    write_images(tmp_path / "half", 4, broken=4)
    found = nextblock.features(**{**places, "data": str(tmp_path / "half"), "query": "0"})
    assert (found.facts["fitted_on"], len(found.bad), len(found.rows)) == (4, 4, 3)


def test_the_nearest_patches_are_those_of_the_slow_definition(places, cells):
    result = nextblock.features(**places, query="5", patch=(2, 3), top=15, per_image=2)
    patches = torch.nn.functional.normalize(patches_of(places), dim=-1)
    wanted = patches[5, 2 * GRID[1] + 3]
    expected = []
    for index in set(range(12)) - {5}:  # not in the query itself
        similar = (patches[index] @ wanted).tolist()
        best = sorted(range(len(similar)), key=similar.__getitem__, reverse=True)[:2]
        expected += [(similar[place], index, divmod(place, GRID[1])) for place in best]
    expected = sorted(expected, reverse=True)[:15]
    assert [(row["index"], row["patch"]) for row in result.rows] == [one[1:] for one in expected]
    assert [row["similarity"] for row in result.rows] == pytest.approx([one[0] for one in expected], abs=1e-6)
    first = cells["nearest.png"][0]
    assert first.words == "query\n0005.png"
    assert first.mark == (2 / 4, 3 / 6, 1 / 4, 1 / 6)
    # The same image as a file is its own nearest; without a patch, the one least like the mean of its image.
    result = nextblock.features(**places, query=str(Path(places["data"]) / "0005.png"))
    least = int((patches[5] @ patches[5].mean(0)).argmin())
    assert result.facts["patch"] == divmod(least, GRID[1])
    assert (result.rows[0]["index"], result.rows[0]["similarity"]) == (5, pytest.approx(1))


@pytest.mark.parametrize(
    ("kind", "queries", "unit", "count"), [("attentive", 1, "head", 4), ("ep", 3, "query", 3)]
)
def test_maps_of_a_head_are_drawn_over_the_grid(kind, queries, unit, count, places, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(look, "draw_attention", lambda *found, **words: drawn.update(found=found, **words))
    classifier = head_on(tiny_model(), kind, tmp_path / "head", num_queries=queries)
    result = nextblock.features(**places, head=str(tmp_path / "head"))
    pictures, maps, path = drawn["found"]
    assert (result.pictures[1], drawn["unit"], drawn["names"]) == (path, unit, result.facts["images"])
    assert (pictures.shape, maps.shape) == ((3, *SIZE, 3), (3, count, *GRID))
    images = normalize(torch.from_numpy(pictures).movedim(-1, 1), DATA.mean, DATA.std)
    weights = classifier.head.attention(classifier.features(images)).detach()
    np.testing.assert_allclose(maps.reshape(3, -1, 24), weights.numpy(), atol=1e-6)
    assert attention_maps(classifier, tiny_images()).sum((-2, -1)).allclose(torch.ones(2, count))


def test_the_command_prints_what_it_found_writes_the_same_and_removes_pictures_not_asked_for_again(
    places, tmp_path, capsys
):
    head_on(tiny_model(), "ep", tmp_path / "head", num_queries=3)
    flags = [f"--{name}={value}" for name, value in places.items()]
    for path in Path(places["data"]).glob("0*.png"):
        path.rename(path.with_name("long" * 40 + path.name))
    words = ["features", *flags, "--head", tmp_path / "head", "--query", "1", "--top", "2", "--json"]
    code, shown, _ = call_cli(capsys, *words)
    assert code == 0
    *lines, last = shown.splitlines()
    assert max(len(line) for line in lines if "long" in line) < 110
    values, out = json.loads(last), Path(places["out"])
    written = json.loads((out / "features.json").read_text())
    assert written.pop("settings")["num_images"] == 3
    assert values == written
    names = ["features.png", "attention.png", "nearest.png"]
    assert values["pictures"] == [str(out / name) for name in names]
    assert all((out / name).read_bytes()[:4] == b"\x89PNG" for name in names)
    assert "1 image could not be read: broken_00.png" in shown
    assert f"{100 * values['explained'][0]:.1f}" in shown
    nextblock.features(**places)
    assert [path.name for path in out.glob("*.png")] == ["features.png"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": "1,1"}, "patch is a patch of the query; give --query too"),
        ({"query": "13"}, "query is 13, but .* has 13 images, numbered from 0"),
        ({"query": "0", "patch": "4,0"}, "patch is 4,0, but an image has 4 rows of 6 patches"),
        ({"query": "DIR"}, "has 13 images; give an image file"),
        ({"query": "0", "data": "ONE"}, "has no readable image but the query; give data of more images"),
        ({"head": "linear"}, "is a linear head, which weights all patches equally"),
        ({"head": "other"}, "is a head on another encoder than .*; give --model"),
        ({"head": "none-such"}, "there is no head .*none-such; give a classifier's directory"),
        ({"head": "probe"}, "holds the heads of a probe; give --head .*/probe/ep"),
        ({"layers": "layer2"}, "the encoder has 2 layers"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_nothing_is_written(changes, message, places, tmp_path, capsys):
    head_on(tiny_model(), "linear", tmp_path / "linear")
    head_on(tiny_model(seed=1), "ep", tmp_path / "other", num_queries=3)
    head_on(tiny_model(), "ep", tmp_path / "probe" / "ep", num_queries=3)
    if "head" in changes:
        changes = {"head": str(tmp_path / changes["head"])}
    write_images(tmp_path / "one", 1)
    folders = {"DIR": places["data"], "ONE": str(tmp_path / "one")}
    changes = {name: folders.get(value, value) for name, value in changes.items()}
    flags = [f"--{name}={value}" for name, value in {**places, **changes}.items()]
    assert re.search(message, refused(call_cli(capsys, "features", *flags)))
    assert not Path(places["out"]).exists()
