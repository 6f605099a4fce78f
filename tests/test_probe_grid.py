"""The grid of a probe: which heads compete, that they are independent, and that the choice is honest."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import nextblock
from nextblock.cli import main
from nextblock.cli.arguments import Parser, built
from nextblock.config import ModelConfig, OptimConfig
from nextblock.data import Source, keyed_rng
from nextblock.evaluate.features import encoder_extract, seeded
from nextblock.evaluate.layers import layer_choices
from nextblock.evaluate.metrics import Measures
from nextblock.evaluate.probe.competition import choose
from nextblock.evaluate.probe.config import ProbeConfig, Split, probe_config
from nextblock.evaluate.probe.grid import Candidate, encoder_candidates
from nextblock.evaluate.probe.recipes import RECIPES
from nextblock.evaluate.probe.run import probe, probe_model
from nextblock.evaluate.probe.train_heads import Feed, Lesson, Student, train_heads
from nextblock.interop import open_encoder
from nextblock.interop.aim import BEST_LAYERS_OF_SIZE
from nextblock.models import TimmEncoder
from nextblock.models.heads import AttentiveHead, FeatureConfig, LinearHead
from probing import QUICK, known_config, run, weights
from toy import DATA, ToySource, one_thread, toy_model  # noqa: F401 - a fixture

GRID = replace(QUICK, lr=(1e-3, 1e-2), weight_decay=(0.0, 0.1), layers=("last", "last2"), epochs=3)
TIMM = "timm:test_vit,pretrained=false,img_size=32"


@pytest.fixture
def known(monkeypatch, tmp_path):
    return known_config(monkeypatch, tmp_path)


def head_configs(found, head=None):
    """What the heads of candidates, of one kind if it is named, are made of."""
    return [one.config for one in found if one.config is not None and head in (None, one.head)]


def both(config):
    given: dict[Split, Source] = {"val": ToySource(48, seed=1), "test": ToySource(40, seed=2)}
    return probe_model(toy_model(), config, ToySource(96), given, DATA)


# -------------------------------------------------------------------------------------- which heads compete


def test_the_grid_of_xtra_is_its_official_sweep():
    config = replace(QUICK, lr=None, attentive_heads=None)
    found = encoder_candidates(config, toy_model(), 4)
    rates = [1e-4, 3e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 4e-3]
    assert [one.lr for one in found if one.head == "attentive"] == rates
    assert [one.lr for one in found if one.head == "linear"] == rates
    assert {(one.head, one.weight_decay) for one in found} == {("attentive", 0.1), ("linear", 0.0)}
    assert {one.num_heads for one in head_configs(found, "attentive")} == {16}
    assert all(one.bias for one in head_configs(found))
    assert {one.layers for one in head_configs(found, "linear")} == {(1,)}


def test_the_grid_of_aim_is_the_sweep_of_aimv2_with_aims_heads():
    found = encoder_candidates(replace(QUICK, recipe="aim", lr=None, attentive_heads=None), toy_model(), 4)
    assert sorted({one.lr for one in found}) == [5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3]
    assert {one.weight_decay for one in found} == {0.05, 0.1}
    assert not any(one.bias for one in head_configs(found))
    assert {one.num_heads for one in head_configs(found, "attentive")} == {2}  # the encoder's
    assert len(found) == 2 * 7 * 2
    assert RECIPES["aim"].betas == (0.9, 0.999)


def test_every_setting_is_crossed_with_every_other():
    config = replace(GRID, attention=("native", "full"), heads=("attentive", "linear", "mlp"))
    found = encoder_candidates(config, toy_model(), 4)
    assert len(found) == len(set(found)) == 3 * 2 * 2 * 2 * 2
    assert len({one.features for one in found if one.head != "attentive"}) == 2 * 2


@pytest.mark.parametrize(
    ("word", "layers"),
    [
        ("last", [(11,)]),
        ("last6", [(6, 7, 8, 9, 10, 11)]),
        ("6", [(6, 7, 8, 9, 10, 11)]),
        ("layer7", [(7,)]),
        ("3+5+4", [(3, 4, 5)]),
        ("each", [(layer,) for layer in range(12)]),
    ],
)
def test_layers_go_by_words(word, layers):
    assert list(layer_choices(word, 12)) == layers


@pytest.mark.parametrize(
    ("width", "depth", "first"), [(1536, 24, 14), (2048, 24, 12), (3072, 24, 12), (4096, 32, 14)]
)
def test_the_best_layers_are_aims_by_size(width, depth, first):
    best = tuple(range(first, first + 6))
    assert layer_choices("best", depth, BEST_LAYERS_OF_SIZE[width, depth]) == (best,)


def test_the_same_layers_by_two_words_are_one_candidate():
    config = replace(QUICK, layers=("last", "each", "layer0"), heads=("linear",))
    assert [one.layers for one in head_configs(encoder_candidates(config, toy_model(), 4))] == [(1,), (0,)]


def test_attention_heads_that_do_not_divide_the_width_give_way_unless_asked_for(caplog):
    caplog.set_level("INFO")
    with seeded(0):
        model = nextblock.NextBlockModel(ModelConfig(**_small(embed_dim=36, num_heads=3)))
    found = encoder_candidates(replace(QUICK, attentive_heads=None), model, 4)
    assert head_configs(found)[0].num_heads == 12
    assert "36 channels cannot be divided among 16 attention heads: the attentive head has 12" in caplog.text


def _small(**changes):
    return {
        "image_size": 16,
        "patch_size": 4,
        "block_size": 2,
        "embed_dim": 32,
        "depth": 1,
        "num_heads": 2,
        "predictor": None,
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ("best",)}, r"best is known of AIM's sizes .*1536 x 24.* 32 wide with 2 layers"),
        ({"layers": ("1+2",)}, r"layers is 1\+2, but the encoder has 2 layers; name each once, among 0 to 1"),
        ({"layers": ("layer2",)}, "layers is layer2, but the encoder has 2 layers"),
        ({"tokens": ("class",)}, "tokens class: this encoder has no class token"),
    ],
)
def test_what_an_encoder_has_not_got_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        run(replace(QUICK, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ("frist",)}, "layers is 'frist'; use last, last6"),
        ({"lr": (1e-3, 1e-3)}, "lr are .*each once"),
        ({"lr": ()}, "name at least one"),
        ({"weight_decay": (-1.0,)}, "weight_decay is -1.0"),
        ({"attentive_heads": 0}, "attentive_heads is 0"),
        ({"save_every": "3st"}, "not a duration here"),
        (
            {"official_warmup_trap": True},
            "no effect with a warm-up, of 1.2 epochs here; give warmup_epochs 0",
        ),
        ({"official_warmup_trap": True, "warmup_epochs": 1.0}, "no effect with a warm-up, of 1 epochs here"),
    ],
)
def test_impossible_grids_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(QUICK, **changes)


def test_one_value_stands_for_a_list_of_it():
    given = {"model": "RUN", "train": "t", "out": "o"}
    config = probe_config({**given, "lr": 3e-3, "layers": 6, "tokens": "all", "weight_decay": [0.1, 0.2]})
    assert (config.lr, config.layers, config.tokens) == ((3e-3,), ("6",), ("all",))
    assert config.weight_decay == (0.1, 0.2)
    parser = Parser("probe", "")
    parser.add_settings(ProbeConfig)
    words = ["--model", "RUN", "--train", "t", "--out", "o", "--lr", "3e-3", "--layers", "6"]
    words += ["--heads", "linear", "--heads", "mlp", "--weight_decay", "[0.1, 0.2]"]
    parsed = built(ProbeConfig, parser.parse(words))
    assert (parsed.lr, parsed.layers, parsed.heads) == ((3e-3,), ("6",), ("linear", "mlp"))
    assert parsed.weight_decay == (0.1, 0.2)


# --------------------------------------------------------------------------------------------- independence


def _students(rates, steps):
    students = []
    for lr in rates:
        for column, make in enumerate((lambda: AttentiveHead(32, 4, num_heads=4), lambda: LinearHead(32, 4))):
            with seeded(7):
                head = make()
            optim = OptimConfig(lr=lr, start_lr=lr / 10, end_lr=1e-5, weight_decay=0.1, clip_grad=0.5)
            students.append(Student(head, column, optim, warmup_steps=2, total_steps=steps))
    return students


def test_every_head_of_a_grid_is_bit_for_bit_the_head_trained_alone():
    model = toy_model()
    kinds = [FeatureConfig(layers=(1,), pooled=False), FeatureConfig(layers=(1,))]
    feed = Feed(
        extract=encoder_extract(model, kinds),
        source=ToySource(40),
        data=DATA,
        image_size=16,
        batch_size=8,
        epochs=2,
        seed=0,
        device=torch.device("cpu"),
    )
    rates = (1e-3, 1e38, 1e-1)
    together = _students(rates, feed.steps)
    lesson = Lesson(together)
    lesson.begin()
    train_heads(lesson, feed)
    alone = _students(rates, feed.steps)
    for student in alone:
        lesson = Lesson([student])
        lesson.begin()
        train_heads(lesson, feed)
    for one, other in zip(together, alone, strict=True):
        assert one.is_finite == other.is_finite == (one.optim.lr < 1)
        expected = other.head.state_dict()
        assert (
            one.head.state_dict().keys()
            == expected.keys()
            == type(one.head)(32, 4, **_of(one)).state_dict().keys()
        )
        for name, tensor in one.head.state_dict().items():
            assert torch.equal(tensor.nan_to_num(), expected[name].nan_to_num())


def _of(student):
    return {"num_heads": 4} if isinstance(student.head, AttentiveHead) else {}


def test_the_winner_of_a_grid_is_the_head_that_a_probe_of_it_alone_gives():
    found = both(GRID)
    for head in ("attentive", "linear"):
        row = found.result.row("trained", head)
        layers = "+".join(map(str, row.layers))
        alone = replace(GRID, heads=(head,), lr=(row.lr,), weight_decay=(row.weight_decay,))
        alone = both(replace(alone, layers=(layers if "+" in layers else f"layer{layers}",)))
        assert torch.equal(weights(found, head), weights(alone, head))
        assert next(one for one in alone.result.rows if one.split == "test").top1 == row.top1


def test_each_batch_goes_through_the_encoder_once_for_each_attention(monkeypatch):
    model, asked = toy_model(), []
    encode = model.encode
    monkeypatch.setattr(
        model,
        "encode",
        lambda images, attention: asked.append((len(images), attention)) or encode(images, attention),
    )
    config = replace(GRID, attention=("native", "full"), encode_batch_size=16)
    probe_model(model, config, ToySource(96), {"val": ToySource(8, seed=1), "test": ToySource(8)}, DATA)
    in_training = [one for one in asked if one[0] == 16]
    assert sorted(in_training) == [(16, "full")] * 6 + [(16, "native")] * 6


# ----------------------------------------------------------------------------------------------- the choice


def test_candidates_are_compared_as_probes_of_each_alone_on_val_would_be():
    config = replace(GRID, heads=("linear",), epochs=1, layers=("each",), weight_decay=(0.1,))
    grid = both(config).result.grid
    assert len(grid) == 2 * 2
    for one in grid:
        changes = {"lr": (one.lr,), "weight_decay": (one.weight_decay,), "layers": (f"layer{one.layers[0]}",)}
        alone = run(replace(config, **changes)).result.row("trained", "linear")
        assert (one.top1, one.top5, one.loss) == (alone.top1, alone.top5, alone.loss)
        assert one.chosen_on == "val"
    (winner,) = (one for one in grid if one.winner)
    assert winner.top1 == max(one.top1 or 0.0 for one in grid)


def _measured(top1, loss):
    return Measures(
        images=10,
        top1=top1,
        top5=1.0,
        balanced=top1,
        calibration_error=0.0,
        loss=loss,
        per_class=(),
        confusion=None,
    )


def test_of_equal_accuracies_the_lower_loss_wins_then_the_first():
    candidates = [
        Candidate(head="linear", config=None, lr=lr, weight_decay=0.0) for lr in (1.0, 2.0, 3.0, 4.0)
    ]
    scores = dict(enumerate(map(_measured, (0.5, 0.7, 0.7, 0.7), (0.1, 0.4, 0.3, 0.3))))
    assert choose(candidates, list(scores), scores) == {"linear": 2}
    assert choose(candidates, [0, 3], {0: scores[0], 3: scores[3]}) == {"linear": 3}


def test_with_val_and_test_winners_are_chosen_on_val_and_measured_on_test_alone():
    result = both(GRID).result
    assert [(row.head, row.split, row.images) for row in result.rows] == [
        ("attentive", "test", 40),
        ("linear", "test", 40),
    ]
    assert result.chosen_on == "val"
    assert result.split_images == {"train": 96, "val": 48, "test": 40}


def test_with_val_alone_a_tenth_of_train_is_held_out_to_choose_on():
    result = run(replace(GRID, epochs=1)).result
    assert {row.split for row in result.rows} == {"val"}
    assert {one.chosen_on for one in result.grid} == {"choice"}
    assert (result.train_images, result.split_images) == (88, {"train": 88, "choice": 8, "val": 48})


def test_with_train_alone_two_disjoint_tenths_are_held_out(monkeypatch):
    from nextblock.evaluate.probe import run as probe_module

    divisions = []
    compete = probe_module.compete
    monkeypatch.setattr(
        probe_module, "compete", lambda s, arena: divisions.append(arena.division) or compete(s, arena)
    )
    probe_model(toy_model(), replace(GRID, epochs=1), ToySource(96), {}, DATA)
    (division,) = divisions
    parts = [division.train, division.choice[1], division.measured["held-out"]]
    names = [{part.name(i) for i in range(len(part))} for part in parts]
    assert [len(one) for one in names] == [80, 8, 8]
    assert len(set.union(*names)) == 96
    assert all(np.bincount(part.labels).tolist() == [2, 2, 2, 2] for part in parts[1:])


def test_where_there_is_nothing_to_choose_nothing_is_held_out():
    result = run().result
    assert (result.train_images, result.chosen_on) == (96, None)
    assert all(one.winner and one.top1 is None for one in result.grid)


def test_a_source_of_single_images_cannot_be_divided():
    with pytest.raises(ValueError, match=r"no class of toy-0 has an image to spare.*--val and --test"):
        run(GRID, train=ToySource(4))


def test_shuffled_labels_leave_a_chosen_head_at_chance():
    train = ToySource(200, shuffled=True)
    config = replace(GRID, weight_decay=(0.0,), epochs=6, batch_size=32)
    given: dict[Split, Source] = {
        "val": ToySource(80, seed=1, shuffled=True),
        "test": ToySource(200, seed=2, shuffled=True),
    }
    result = probe_model(toy_model(), config, train, given, DATA).result
    assert max(row.top1 for row in result.rows) < 0.35


def test_a_head_that_diverges_loses_and_stops_no_other():
    result = both(replace(QUICK, lr=(1e-2, 1e38), warmup_epochs=0.0)).result
    told = [(one.head, one.lr, one.diverged, one.winner, one.top1 is None) for one in result.grid]
    assert told == [
        ("attentive", 1e-2, False, True, False),
        ("attentive", 1e38, True, False, True),
        ("linear", 1e-2, False, True, False),
        ("linear", 1e38, True, False, True),
    ]
    assert min(row.top1 for row in result.rows) > 0.9


def test_if_all_heads_of_a_kind_diverge_this_is_said():
    with pytest.raises(ValueError, match=r"LinearHead diverged at learning rate 1e\+38, 3e\+38"):
        both(replace(QUICK, heads=("linear",), lr=(1e38, 3e38), warmup_epochs=0.0))


# --------------------------------------------------------------------------------------------- the schedule


def _rates(monkeypatch, config):
    rates = []
    learn = Student.learn
    monkeypatch.setattr(
        Student,
        "learn",
        lambda self, *args: (learn(self, *args), rates.append(self.optimizer.param_groups[0]["lr"])),
    )
    run(replace(config, heads=("linear",), warmup_epochs=0.0, official_warmup_trap=True))
    return rates


def test_the_officials_warm_up_trap_divides_the_rate_by_ten(monkeypatch):
    rates = _rates(monkeypatch, replace(QUICK, lr=(1e-2,), epochs=20))
    steps = 20 * 6
    expected = [1e-5 + (1e-3 - 1e-5) * (1 + np.cos(np.pi * step / steps)) / 2 for step in range(steps)]
    assert rates == pytest.approx(expected)


def test_the_officials_smallest_rate_is_constant_in_the_trap(monkeypatch):
    assert set(_rates(monkeypatch, replace(QUICK, lr=(1e-4,), epochs=3))) == {1e-5}


# ------------------------------------------------------------------------------------------ timm's encoders


class Larger(ToySource):
    """Toy pictures of 32 px."""

    def _read(self, index):
        return super()._read(index).repeat_interleave(2, 1).repeat_interleave(2, 2)


def test_timms_encoders_are_probed_on_their_class_token_and_on_all_tokens():
    model = open_encoder(TIMM)
    data = replace(DATA, val_resize_px=32)
    config = replace(QUICK, tokens=("patches", "class", "joined", "all"), epochs=6, batch_size=8)
    given: dict[Split, Source] = {"val": Larger(24, seed=1), "test": Larger(24, seed=2)}
    found = probe_model(model, config, Larger(48), given, data)
    tokens = {head: [one.tokens for one in found.result.grid if one.head == head] for head in config.heads}
    assert tokens == {"attentive": ["patches", "all"], "linear": ["patches", "class", "joined", "all"]}
    assert min(row.top1 for row in found.result.rows) > 0.5
    assert all(isinstance(one.encoder_model, TimmEncoder) for one in found.classifiers.values())
    images = torch.from_numpy(keyed_rng(0, "x").normal(size=(2, 3, 32, 32))).float()
    assert found.classifiers["linear"](images).shape == (2, 4)


@pytest.mark.parametrize("attention", [("native", "full"), ("full", "native"), ("full",)])
def test_native_and_full_attention_of_timms_encoders_are_one_candidate(attention):
    found = encoder_candidates(replace(QUICK, attention=attention), open_encoder(TIMM), 4)
    assert [one.attention for one in head_configs(found)] == [attention[0]] * 2


def test_an_attentive_head_on_the_class_token_alone_is_refused():
    with pytest.raises(ValueError, match=r"an attentive head sees many tokens.*--heads linear"):
        encoder_candidates(replace(QUICK, tokens=("class",)), open_encoder(TIMM), 4)


# ------------------------------------------------------------------------------------------------ the files


def test_the_whole_grid_is_written_with_the_winner_in_bold(known, tmp_path):
    config = replace(known, lr=(1e-3, 1e-2), test="toy-2")
    result = probe(config)
    with (tmp_path / "out" / "probe.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["head"], float(line["lr"]), line["winner"]) for line in lines] == [
        (one.head, one.lr, str(one.winner)) for one in result.grid
    ]
    text = (tmp_path / "out" / "probe.md").read_text()
    assert text.count("| **trained** |") == 2
    assert "2 winners chosen among 4 heads on 48 images (val) that they are not measured on." in text
    written = json.loads((tmp_path / "out" / "probe.json").read_text())
    assert len(written["grid"]) == 4
    assert written["resolved"]["weight_decay"]["attentive"] == [0.1]
    row = written["rows"][0]
    assert sum(map(sum, row["confusion"])) == row["images"] == 40
    assert row["balanced"] == pytest.approx(np.mean(row["per_class"]))
    assert written["class_names"] == ["a", "b", "c", "d"]


def test_the_command_tells_what_was_chosen_on_and_draws_it(known, tmp_path, capsys):
    words = ["--model", "RUN", "--train", "toy-0", "--val", "toy-1", "--test", "toy-2", "--epochs", "1"]
    words += ["--batch_size", "16", "--attentive_heads", "4", "--baselines", "false", "--device", "cpu"]
    words += ["--lr", "1e-3", "--lr", "1e-2", "--out", str(tmp_path / "out"), "--json"]
    assert main(["probe", *words]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    table = next(line for line in lines if "attentive" in line and " test " in line).split()
    assert table[:4] == ["trained", "attentive", "test", "40"]
    assert "2 winners chosen among 4 heads on 48 images (val) that they are not measured on." in lines
    assert json.loads(last)["rows"][0]["split"] == "test"
    assert (tmp_path / "out" / "figures" / "probe.png").is_file()
    drawn_at = (tmp_path / "out" / "figures" / "probe.png").stat().st_mtime_ns
    assert main(["probe", *words]) == 0  # which reads the result
    assert (tmp_path / "out" / "figures" / "probe.png").stat().st_mtime_ns > drawn_at
