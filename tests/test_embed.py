"""Features in files: what they are, where they go, that a run cut off goes on, and what is refused."""

import csv
import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from nextblock.evaluate.embed.config import FORMATS, EmbedConfig
from nextblock.evaluate.embed.files import EmbeddingsError, iterate_features_of, read_embeddings
from nextblock.evaluate.embed.run import embed_model
from safetensors.numpy import load_file

import nextblock
from nextblock.cli import main
from nextblock.data import TooManyBadImages, eval_batches, normalize
from nextblock.evaluate.embed import run as embed_module
from nextblock.evaluate.layers import layer_choices
from nextblock.interop import open_encoder
from toy import DATA, ToySource, one_thread, toy_model  # noqa: F401 - a fixture

TIMM = "timm:vit_tiny_patch16_224,pretrained=false,img_size=32"


def settings(tmp_path, suffix=".npy", **changes):
    values = {"model": "RUN", "data": "toy-0", "out": str(tmp_path / f"features{suffix}")}
    return EmbedConfig(**{"encode_batch_size": 4, "device": "cpu", **values, **changes})


def run(tmp_path, suffix=".npy", *, source=None, data=DATA, model=None, **changes):
    return embed_model(
        model or toy_model(), settings(tmp_path, suffix, **changes), source or ToySource(10), data
    )


def encoded(model, source, attention="native", size=16):
    """All layers of every readable image, one image at a time."""
    found = []
    for batch in eval_batches(source, DATA, size, 1):
        if len(batch.samples):
            with torch.no_grad():
                found.append(model.encode(normalize(batch.images, DATA.mean, DATA.std), attention))
    return found


class Breaks(ToySource):
    """Stops the run when an image is asked for, as a kill would."""

    at: int | None = None

    def _read(self, index):
        if index == self.at:
            raise KeyboardInterrupt
        return super()._read(index)


# ---------------------------------------------------------------------------------------- what they are


@pytest.mark.parametrize(
    ("changes", "slow"),
    [
        ({}, lambda model, e: model.final_norm(e.layers[1]).mean(1)),
        ({"norm": False}, lambda model, e: e.layers[1].mean(1)),
        ({"layers": "last2", "norm": False}, lambda model, e: ((e.layers[0] + e.layers[1]) / 2).mean(1)),
        (
            {"layers": "0+1", "layer_pool": "concat"},
            lambda model, e: torch.cat([model.final_norm(x) for x in e.layers], -1).mean(1),
        ),
        ({"layers": "layer0", "pool": "none"}, lambda model, e: model.final_norm(e.layers[0])),
        (
            {"layers": "each"},
            lambda model, e: torch.stack([model.final_norm(x).mean(1) for x in e.layers], 1),
        ),
    ],
)
def test_features_are_those_of_the_slow_definition(tmp_path, changes, slow):
    model, source = toy_model(), ToySource(6)
    found = run(tmp_path, source=source, model=model, **changes)
    expected = torch.cat([slow(model, one) for one in encoded(model, source)]).detach()
    assert found.features.shape == expected.shape
    torch.testing.assert_close(torch.from_numpy(np.array(found.features)), expected, atol=1e-5, rtol=1e-5)


def test_attention_is_the_one_asked_for(tmp_path):
    model, source = toy_model(), ToySource(4)
    found = run(tmp_path, source=source, model=model, attention="full").features
    full = torch.cat([one.tokens.mean(1) for one in encoded(model, source, "full")])
    native = torch.cat([one.tokens.mean(1) for one in encoded(model, source)])
    np.testing.assert_allclose(found, full, atol=1e-5)
    assert not np.allclose(found, native, atol=1e-3)


def test_class_and_register_tokens_of_a_timm_encoder_are_taken_as_asked(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_encoder(TIMM)
    source = ToySource(3)
    one = encoded(model, source, size=32)
    normed = torch.cat([model.final_norm(torch.cat([e.prefix[-1], e.layers[-1]], 1)) for e in one]).detach()
    wanted = {
        "class": normed[:, 0],
        "patches": normed[:, 1:].mean(1),
        "joined": torch.cat([normed[:, 0], normed[:, 1:].mean(1)], -1),
        "all": normed.mean(1),
    }
    for tokens, expected in wanted.items():
        found = run(tmp_path, f"-{tokens}.npy", source=source, model=model, tokens=tokens).features
        np.testing.assert_allclose(found, expected, atol=1e-5)
    every = run(tmp_path, "-every.npy", source=source, model=model, tokens="all", pool="none").features
    np.testing.assert_allclose(every, normed, atol=1e-5)


def test_half_precision_is_a_rounding(tmp_path):
    whole, half = run(tmp_path), run(tmp_path, "-16.npy", dtype="fp16")
    assert half.features.dtype == np.float16
    np.testing.assert_array_equal(half.features, np.asarray(whole.features).astype(np.float16))


def test_numbers_beyond_half_precision_are_refused(tmp_path):
    model = toy_model()
    with torch.no_grad():
        for parameter in model.final_norm.parameters():
            parameter.fill_(1e6)
    with pytest.raises(EmbeddingsError, match="--dtype fp32"):
        run(tmp_path, model=model, dtype="fp16")


# ----------------------------------------------------------------------------------------- where they go


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_every_format_gives_back_features_names_and_labels_in_order(tmp_path, suffix, dtype):
    source = ToySource(10, bad={2, 7})
    found = run(tmp_path, suffix, source=source, pool="none", dtype=dtype)
    readable = [0, 1, 3, 4, 5, 6, 8, 9]
    np.testing.assert_array_equal(found.indices, readable)
    assert found.names == tuple(f"toy-0[{i}]" for i in readable)
    np.testing.assert_array_equal(found.labels, source.labels[readable])
    assert found.class_names == ("a", "b", "c", "d")
    assert found.features.shape == (8, 16, 32)
    expected = run(tmp_path, "-other.npy", pool="none", dtype=dtype)  # none bad
    np.testing.assert_allclose(found.features, expected.features[readable], atol=2e-3)
    parts = list(iterate_features_of(found.path, found.origin))
    np.testing.assert_array_equal(np.concatenate(parts), found.features)


def test_parquet_is_read_by_its_own_library(tmp_path):
    found = run(tmp_path, ".parquet")
    table = pyarrow.parquet.read_table(found.path)
    assert table.column_names == ["index", "name", "label", "class", "feature"]
    assert table.schema.field("feature").type.list_size == 32
    rows = table.to_pylist()
    assert [(row["index"], row["name"], row["label"], row["class"]) for row in rows[:2]] == [
        (0, "toy-0[0]", 0, "a"),
        (1, "toy-0[1]", 1, "b"),
    ]
    np.testing.assert_array_equal(np.array([row["feature"] for row in rows], np.float32), found.features)
    assert json.loads(table.schema.metadata[b"nextblock"])["identity"]["settings"]["data"] == "toy-0"


def test_npy_and_safetensors_are_read_by_their_own_libraries(tmp_path):
    npy, tensors = run(tmp_path), run(tmp_path, ".safetensors")
    loaded = load_file(tensors.path)
    assert loaded.keys() == {"features", "index", "label"}
    np.testing.assert_array_equal(np.load(npy.path), loaded["features"])
    for path in (npy.path, tensors.path):
        with path.with_name(f"{path.name}.names.csv").open(newline="") as file:
            rows = list(csv.reader(file))
        assert rows[0] == ["row", "index", "name", "label", "class"]
        assert rows[4] == ["3", "3", "toy-0[3]", "3", "d"]


def test_images_without_labels_have_none(tmp_path):
    class Unlabelled(ToySource):
        @property
        def has_labels(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
            return False

    for suffix in FORMATS:
        found = run(tmp_path, suffix, source=Unlabelled(4))
        assert (found.labels, found.class_names, len(found.names)) == (None, None, 4)


def test_many_rows_come_back_whole_from_all_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("nextblock.evaluate.embed.files.ROWS", 3)
    for suffix in FORMATS:
        found = run(tmp_path, suffix)
        parts = list(iterate_features_of(found.path, found.origin))
        assert [len(part) for part in parts] == [3, 3, 3, 1]
        np.testing.assert_array_equal(np.concatenate(parts), found.features)
        assert found.names == tuple(f"toy-0[{i}]" for i in range(10))


# --------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_run_cut_off_goes_on_to_the_same_bytes_and_reads_nothing_twice(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(embed_module, "COMMIT_EVERY_S", 0.0)
    whole = run(tmp_path, f"-whole{suffix}", source=ToySource(21, bad={5}))
    cut = Breaks(21, bad={5})
    cut.at = 14
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, suffix, source=cut)
    out = tmp_path / f"features{suffix}"
    assert not out.exists()
    again = ToySource(21, bad={5})
    found = run(tmp_path, suffix, source=again)
    assert again.reads == 21 - 12  # three batches of four were done
    assert np.asarray(found.features).tobytes() == np.asarray(whole.features).tobytes()
    np.testing.assert_array_equal(found.indices, whole.indices)
    assert found.origin.bad == 1
    (bad,) = (tmp_path / f"{out.name}.quarantine.jsonl").read_text().splitlines()
    assert json.loads(bad) == {"name": "toy-0[5]", "sample": 5, "reason": "truncated"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_was_written_after_the_last_count_is_written_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(embed_module, "COMMIT_EVERY_S", 0.0)
    whole, cut = run(tmp_path, "-whole.npy"), Breaks(10)
    cut.at = 8
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, source=cut)
    with (tmp_path / ".features.npy.partial" / "features.npy").open("ab") as file:
        file.write(b"half a row")
    assert run(tmp_path).features.tobytes() == whole.features.tobytes()


def test_killed_before_the_first_count_it_begins_anew(tmp_path):
    cut = Breaks(10)
    cut.at = 8
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, source=cut)
    assert run(tmp_path).features.tobytes() == run(tmp_path, "-whole.npy").features.tobytes()


@pytest.mark.parametrize("suffix", FORMATS)
def test_killed_while_the_file_is_made_it_is_made_from_what_is_done(tmp_path, monkeypatch, suffix):
    whole = run(tmp_path, f"-whole{suffix}", source=ToySource(10, bad={1}))
    finish = embed_module.write

    def killed(*args):
        finish(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embed_module, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, suffix, source=ToySource(10, bad={1}))
    again = ToySource(10, bad={1})
    found = run(tmp_path, suffix, source=again)
    assert again.reads == 0
    np.testing.assert_array_equal(found.features, whole.features)


def test_a_finished_file_is_recognised_and_not_made_again(tmp_path):
    first = run(tmp_path)
    before = first.path.stat().st_mtime_ns
    again = ToySource(10)
    assert run(tmp_path, source=again, encode_batch_size=7).features.tobytes() == first.features.tobytes()
    assert (again.reads, first.path.stat().st_mtime_ns) == (0, before)


@pytest.mark.parametrize("damage", ["names lost", "names cut off", "features cut off", "features empty"])
def test_a_damaged_file_is_not_taken_for_finished_and_is_made_anew_if_asked(tmp_path, damage):
    first = run(tmp_path)
    names, content = tmp_path / "features.npy.names.csv", first.path.read_bytes()
    if damage == "names lost":
        names.unlink()
    elif damage == "names cut off":
        names.write_text("".join(names.read_text().splitlines(keepends=True)[:-1]))
    else:
        first.path.write_bytes(content[:-4] if damage == "features cut off" else b"")
    with pytest.raises(EmbeddingsError, match=r"anew with --overwrite"):
        run(tmp_path)
    if damage.startswith("features"):
        with pytest.raises(EmbeddingsError, match="is not the whole file of 10 rows"):
            read_embeddings(first.path)
    again = run(tmp_path, overwrite=True)
    assert (again.path.read_bytes(), len(again.names)) == (content, 10)


# --------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_of_other_features_is_refused_and_left_and_replaced_if_asked(tmp_path, suffix):
    first = run(tmp_path, suffix)
    content = first.path.read_bytes()
    with pytest.raises(ValueError, match=r"holds other features \(settings.norm: True there, False here"):
        run(tmp_path, suffix, norm=False)
    with pytest.raises(ValueError, match="weights"):
        run(tmp_path, suffix, model=toy_model(1))
    assert first.path.read_bytes() == content
    other = run(tmp_path, suffix, norm=False, overwrite=True)
    assert not np.allclose(other.features, run(tmp_path, "-again.npy").features, atol=1e-2)
    assert read_embeddings(other.path).origin.identity["settings"]["norm"] is False


def test_a_file_of_something_else_is_refused(tmp_path):
    np.save(tmp_path / "features.npy", np.zeros(3))
    (tmp_path / "features.parquet").write_text("no parquet")
    for suffix in (".npy", ".parquet"):
        with pytest.raises(ValueError, match="was not written by `nextblock embed`"):
            run(tmp_path, suffix)
    with pytest.raises(EmbeddingsError, match="holds no features"):
        read_embeddings(tmp_path / "features.npy")


def test_unfinished_features_of_others_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(embed_module, "COMMIT_EVERY_S", 0.0)
    cut = Breaks(10)
    cut.at = 8
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, source=cut)
    with pytest.raises(ValueError, match="unfinished features of others"):
        run(tmp_path, norm=False)
    assert run(tmp_path, norm=False, overwrite=True).origin.rows == 10


def test_more_unreadable_images_than_allowed_stop_it_with_their_names(tmp_path):
    with pytest.raises(TooManyBadImages, match=r"toy-0\[1\]: truncated"):
        run(tmp_path, source=ToySource(10, bad={1, 2}), data=replace(DATA, max_bad_fraction=0.1))
    assert not (tmp_path / "features.npy").exists()


def test_images_that_have_been_repaired_count_as_readable(tmp_path, monkeypatch):
    monkeypatch.setattr(embed_module, "COMMIT_EVERY_S", 0.0)
    strict = replace(DATA, max_bad_fraction=0.1)
    with pytest.raises(TooManyBadImages):
        run(tmp_path, source=ToySource(10, bad={1, 9}), data=strict)
    assert run(tmp_path, data=strict).origin.rows == 10


def test_what_is_refused_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="class"):
        run(tmp_path, tokens="class")
    with pytest.raises(ValueError, match="none of the 3 images"):
        run(tmp_path, source=ToySource(3, bad={0, 1, 2}), data=replace(DATA, max_bad_fraction=1.0))
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file cannot be made a directory \(\w.*\); give another --out"):
        run(tmp_path / "file")


def test_a_list_of_names_of_another_length_is_refused(tmp_path):
    found = run(tmp_path)
    names = tmp_path / "features.npy.names.csv"
    names.write_text("".join(names.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(EmbeddingsError, match="has 9 rows, but was made with 10"):
        _ = read_embeddings(found.path).names


def test_a_disk_too_small_is_refused_at_the_first_batch(tmp_path, monkeypatch):
    class Usage:
        free = 100

    monkeypatch.setattr(embed_module.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(EmbeddingsError, match="make room"):
        run(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": "x.csv"}, r"out is 'x.csv'; its name must end in .parquet"),
        ({"layers": "first"}, "layers is 'first'; use last, last6"),
        ({"layers": "last0"}, "layers is 'last0'"),
        ({"tokens": "class", "pool": "none"}, "pool none needs tokens patches or all"),
        ({"encode_batch_size": 0}, "use at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, **changes)


def test_layers_by_their_words():
    assert layer_choices("last", 4) == ((3,),)
    assert layer_choices("last3", 4) == ((1, 2, 3),)
    assert layer_choices("2+0", 4) == ((0, 2),)
    assert layer_choices("layer1", 4) == ((1,),)
    assert layer_choices("each", 3) == ((0,), (1,), (2,))
    assert layer_choices("last5", 4) == ((0, 1, 2, 3),)
    for words in ("layer4", "1+4", "1+1"):
        with pytest.raises(ValueError, match="the encoder has 4"):
            layer_choices(words, 4)


# --------------------------------------------------------------------------------------------- the command


def test_the_command_and_python_make_the_same_file(tmp_path, capsys):
    from nextblock.checkpoint import save_model

    model = tmp_path / "model.safetensors"
    save_model(model, toy_model(), data=DATA)
    words = ["--model", str(model), "--data", "digits:split=test", "--encode_batch_size", "128"]
    words += ["--device", "cpu", "--workers", "0"]
    assert main(["embed", *words, "--out", str(tmp_path / "a.npy"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["shape"], told["images"], told["bad"]) == ([360, 32], 360, 0)
    found = nextblock.embed(
        model=model, data="digits:split=test", out=tmp_path / "a.parquet", encode_batch_size=128, device="cpu"
    )
    np.testing.assert_array_equal(found.features, np.load(tmp_path / "a.npy"))
    assert found.class_names == tuple("0123456789")
