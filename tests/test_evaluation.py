"""What every evaluation shares: one result in a directory, stops and resumes, unreadable images."""

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest

from evaluating import Signals, toy_verb, written  # noqa: F401 - a fixture
from nextblock.atomic import InUseError, exclusive
from nextblock.cli import main
from nextblock.errors import UsageError
from nextblock.evaluate import fewshot
from nextblock.evaluate.evaluation import Stopped
from nextblock.evaluate.results import Result, differences, identity_of
from nextblock.evaluate.settings import ClassifySettings, CompareSettings, EmbedSettings, KnnSettings
from nextblock.evaluate.suite.settings import SuiteSettings
from nextblock.models.next_block import NextBlockModel
from nextblock.settings import from_dict
from nextblock.tables import Column
from toy import DATA, ToySource, toy_model


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def knn(run, out):
    """kNN of toy sources into a directory, quickly."""
    return run.with_usual(verb="knn", train="toy-0", k=(1,), baselines=False, out=out)


def test_the_same_command_reads_its_result(knn, out):
    found = knn()
    before = knn.sources["toy-0"].reads
    again = knn(encode_batch_size=7, workers=1)
    assert knn.sources["toy-0"].reads == before
    assert (again.rows, again.notes, again.facts) == (found.rows, found.notes, found.facts)
    assert again.table.cells() == found.table.cells()
    values = written(out / "knn.json")
    assert values["rows"] == list(found.rows)
    assert values["settings"]["k"] == [1]
    assert (out / "knn.md").read_text().startswith("# knn of ")
    assert (out / "knn.csv").read_text().startswith("encoder,k,temperature,top1,top1_se,")
    assert not (out / "features").exists()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"k": (1, 3)}, r"settings.k: \[1\] there, \[1, 3\] here"),
        ({"test": "toy-1"}, "settings.test|sources.test"),
        ({"train": "toy-1"}, "sources.train.fingerprint"),
    ],
)
def test_another_one_is_refused_by_name_unless_it_is_to_overwrite(knn, changes, name, out):
    knn()
    with pytest.raises(UsageError, match=f"holds another result .*({name}).*; choose another --out"):
        knn(**changes)
    found = knn(**changes, overwrite=True)
    assert written(out / "knn.json")["rows"] == list(found.rows)


def test_a_model_and_images_that_have_moved_are_the_same(knn, tmp_path):
    knn()
    shutil.move(tmp_path / "model.safetensors", tmp_path / "moved.safetensors")
    knn.sources["elsewhere"] = knn.sources.pop("toy-0")
    before = knn.sources["elsewhere"].reads
    knn(model=tmp_path / "moved.safetensors", train="elsewhere")
    assert knn.sources["elsewhere"].reads == before


def test_a_directory_of_other_files_or_of_a_training_run_is_refused(knn, out, tmp_path):
    out.mkdir()
    (out / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"holds other files \(thesis.tex\); choose another --out"):
        knn(overwrite=True)
    (tmp_path / "run").mkdir()
    for name in (".nextblock", "config.yaml", "quarantine.jsonl"):
        (tmp_path / "run" / name).touch()
    with pytest.raises(UsageError, match=r"is a training run; choose another --out, such as .*run/knn"):
        knn(out=tmp_path / "run")


def test_a_damaged_result_is_named_and_can_be_overwritten(knn, out):
    found = knn()
    for content in ("", "{", "[]", "{}", '{"rows": []}'):
        (out / "knn.json").write_text(content)
        with pytest.raises(UsageError, match=r"knn.json is damaged|holds another result"):
            knn()
    assert knn(overwrite=True).rows == tuple(written(out / "knn.json")["rows"]) == found.rows


def test_a_second_process_into_one_directory_is_refused_at_once(knn, out):
    with exclusive(out), pytest.raises(InUseError, match=f"process {os.getpid()} on"):
        knn()
    knn()


def test_features_in_a_cache_serve_the_next_command(knn, tmp_path):
    cache = {"cache": tmp_path / "cache", "out": None}
    first = knn(**cache)
    before = knn.sources["toy-0"].reads
    assert knn(**cache, k=(1, 3)).rows[0] == first.rows[0]
    assert knn.sources["toy-0"].reads == before


def test_a_result_finds_its_rows_and_is_json_and_markdown():
    rows = ({"encoder": "model", "k": 1, "loss": float("nan")}, {"encoder": "model", "k": 3, "loss": 0.5})
    identity = {"settings": {"model": "a|b"}}
    result = Result(verb="knn", rows=rows, notes=("A note.",), identity=identity, columns=(Column("k", "k"),))
    assert result.row(k=3) is rows[1]
    with pytest.raises(LookupError, match=r"no row of knn has \{'k': 5\}"):
        result.row(k=5)
    assert result.markdown() == "# knn of a\\|b\n\n| k |\n| --- |\n| 1 |\n| 3 |\n\nA note.\n"
    assert json.loads(json.dumps(result.as_dict(), allow_nan=False))["rows"][0]["loss"] is None


def test_top_5_is_shown_of_more_than_five_classes():
    columns = [Column("top1", "top1"), Column("top5", "top5")]
    for num_classes, head in ((5, ["top1"]), (6, ["top1", "top5"])):
        facts = {"num_classes": num_classes}
        result = Result(verb="knn", rows=({"top1": 0.5, "top5": 1.0},), facts=facts, columns=columns)
        assert result.table.head == head


def identity(source=None, data=DATA, encoder=None, **changes):
    config = KnnSettings(model="run", train="toy", **changes)
    return identity_of(config, encoder or toy_model(), data, {"train": source or ToySource(12)})


def configured(**changes):
    """The toy model's weights in a network of other settings."""
    model = toy_model()
    other = NextBlockModel(replace(model.config, **changes))
    other.load_state_dict(model.state_dict(), strict=False)
    return other


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"source": ToySource(12, seed=1)}, "sources.train.fingerprint"),
        ({"source": ToySource(12, shuffled=True)}, "sources.train.labels"),
        ({"encoder": toy_model(1)}, "weights"),
        ({"encoder": configured(num_heads=4)}, "encoder.num_heads: 2 there, 4 here"),
        ({"encoder": configured(feature_attention="full")}, "encoder.feature_attention"),
        ({"data": replace(DATA, max_pixels=99)}, "images.max_pixels"),
        ({"precision": "bf16"}, "settings.precision"),
    ],
)
def test_other_images_labels_weights_or_settings_are_named(changes, name):
    (found,) = differences(json.loads(json.dumps(identity())), identity(**changes))
    assert found.startswith(name)


def test_settings_that_change_no_result_are_not_part_of_it():
    free = {"workers": 3, "max_bad_fraction": 0.5, "overwrite": True, "cache": "c", "encode_batch_size": 3}
    assert differences(identity(), identity(**free)) == []
    assert differences(identity(), identity(data=replace(DATA, flip=0.9))) == []


def test_of_another_version_only_that_is_said():
    old = {**identity(k=(3,)), "format_version": 1}
    assert differences(old, identity()) == ["written by another version of nextblock"]


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (EmbedSettings, {"out": "x.npy"}, "out is 'x.npy'; it must be a file that ends in .parquet or .npz"),
        (EmbedSettings, {"tokens": "class", "pool": "none"}, "pool none needs tokens patches or all"),
        (EmbedSettings, {"layers": "best"}, "layers is 'best'"),
        (ClassifySettings, {"out": "x.txt"}, "a file that ends in .csv, .json or .parquet"),
        (ClassifySettings, {"out": "x.csv", "top": 0}, "top"),
        (CompareSettings, {"methods": ("knn",), "shots": "3"}, "methods, shots needs train"),
        (CompareSettings, {"train": "toy-0", "classes": "FILE"}, "classes is for a classifier"),
        (SuiteSettings, {"only": ("cifar",)}, "there is no benchmark 'cifar'; did you mean 'cifar10'"),
        (SuiteSettings, {"root": "a,b"}, "a,b; use a path or a link without a comma"),
        (SuiteSettings, {"lr": (0.0,)}, "numbers above 0"),
        (SuiteSettings, {"layers": ("middle",)}, "layers"),
    ],
)
def test_settings_that_cannot_be_are_refused(kind, changes, message):
    required = {"model": "m", "data": "a", "test": "b", "root": "r", "out": "o.npz"}
    usual = {name: value for name, value in required.items() if name in kind.__dataclass_fields__}
    with pytest.raises(UsageError, match=message):
        from_dict(kind, {**usual, **changes})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_in_order_and_the_same_command_resumes(run, out, capsys, number):
    run.sources["toy-0"] = source = Signals(48, at=20, number=number)
    words = "--train toy-0 --k 1 --baselines false --device cpu --workers 0 --encode_batch_size 8 --debug"
    words = ["knn", "--model", run.usual["model"], "--out", str(out), *words.split()]
    assert main(words) == 128 + number
    assert f"stopped by {number.name}; the same command resumes" in capsys.readouterr().err
    assert not (out / "knn.json").exists()
    stopped_at = source.reads
    assert main(words) == 0
    assert 24 <= source.reads - stopped_at < 48
    whole = run("knn", train="toy-0", k=(1,), baselines=False)
    assert written(out / "knn.json")["rows"] == list(whole.rows)


def test_without_a_directory_it_is_said_that_nothing_is_kept(knn):
    knn.sources["toy-0"] = Signals(48, at=20, number=signal.SIGTERM)
    with pytest.raises(Stopped, match="nothing was saved; give --out to be able to resume") as caught:
        knn(out=None, encode_batch_size=8)
    assert caught.value.signal == signal.SIGTERM


def test_a_stop_between_two_regressions_is_seen(run, monkeypatch):
    def regress(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*_)

    plain = fewshot.regress
    monkeypatch.setattr(fewshot, "regress", regress)
    with pytest.raises(Stopped):
        run("fewshot", train="toy-0", test="toy-1", shots=("1",), draws=3, baselines=False)


def test_unreadable_images_are_named_counted_and_listed(knn, out, caplog):
    knn.sources["toy-0"] = ToySource(48, bad={0, 5, 9, 13})
    found = knn(test="toy-1")
    assert found.facts["bad_images"] == {"train": 4, "test": 0}
    (warning,) = [message for message in caplog.messages if "unreadable" in message]
    three = "; ".join(f"toy-0[{index}]: truncated" for index in (0, 5, 9))
    assert warning == f"4 images of toy-0 (train) skipped, unreadable: {three}; …"
    lines = list(map(json.loads, (out / "quarantine.jsonl").read_text().splitlines()))
    assert lines[1] == {"source": "train", "sample": 5, "name": "toy-0[5]", "reason": "truncated"}
    assert len(lines) == 4
    knn.sources["toy-0"] = ToySource(40)
    knn(test="toy-1", overwrite=True)
    assert not (out / "quarantine.jsonl").exists()
