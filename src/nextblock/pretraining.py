"""`nextblock.pretrain`: sources, monitors and advice around the training loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from nextblock.config import RunConfig
from nextblock.data import Source, open_source, open_sources
from nextblock.data.doctor import WHEN_IT_PAYS, shared_images
from nextblock.data.loader import measure_pixels
from nextblock.data.subsets import named
from nextblock.errors import UsageError
from nextblock.evaluate.monitors import FeatureMonitor, missing_classes
from nextblock.interop.teacher import with_teacher
from nextblock.launch import find_world, ignore_sigterm, requeue_job
from nextblock.logs import counted, quote
from nextblock.presets import DEFAULT_PRESET, PRESETS, get_preset, resolve
from nextblock.settings import flatten, require, to_dict
from nextblock.train import Monitor, Reporter, TrainResult, train
from nextblock.train.distributed import find_device, process_group
from nextblock.train.logging import losses_text
from nextblock.train.run_dir import recorded_config
from nextblock.train.runtime import choose_device
from nextblock.visualize.predictions import PredictionMonitor, some_images

SMALL_FOLDER = 50_000
"""Presets for small folders are made for fewer images than this."""


def pretrain(
    preset_or_config: str | RunConfig,
    *,
    out: str | Path,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    **overrides: Any,
) -> TrainResult:
    """Train, or resume the run in `out`, as `nextblock pretrain` does.

    Every process that torchrun, `srun` or `mpirun` starts makes the same call; together they train one model.
    `overrides` are settings by dotted name (`**{"optim.lr": 1e-4}`) or section (`data={"train": "DIR"}`).
    Raises `ValueError` for impossible settings, else a `RuntimeError` that says what happened and what to do.
    """
    require(str(out) != "", "--out is empty; name a directory")
    config = get_preset(preset_or_config).config if isinstance(preset_or_config, str) else preset_or_config
    config = resolve(config, overrides) if overrides else config
    if not config.data.train_specs:
        shares = [f"{weight:g}" for weight in config.data.weights or ()]
        what = f"{len(shares)} sources, for data.weights {', '.join(shares)} in this order"
        flags = " ".join(["--data.train DIR"] * (len(shares) or 1))
        raise UsageError(
            f"there is nothing to train on, and {out} is not a run to resume; name "
            f"{what if shares else 'a directory of images'}: {flags}"
        )
    world = find_world()
    device = find_device(choose_device(config.train.device), world)
    with process_group(world, device, needed=config.train.strategy == "fsdp") as group:
        # Joined before any file is read, so that an error on one rank ends all of them.
        # Without this comparison rank 0's settings would silently win.
        group.check_same({"--out": str(out), **flatten(to_dict(config))})
        reporter = reporter or Reporter(is_quiet=not group.is_main)
        with group.together():
            sources = {"train": open_sources(config.data.train_specs, config.data)}
            labelled: dict[str, Source] = {}
            if config.monitor.knn_every is not None and config.monitor.knn_train is not None:
                for name in ("knn_train", "knn_val"):
                    labelled[f"monitor.{name}"] = open_source(getattr(config.monitor, name), config.data)
            # A resumed run has already shown its hints.
            is_new = overwrite or not (Path(out) / "config.yaml").is_file()
            for hint in _hints(config, len(sources["train"])) if is_new else ():
                reporter.note(hint)
            if config.data.val is not None:
                sources["val"] = open_source(config.data.val, config.data)
            for name, pair in {"": sources, "monitor.knn_val: ": labelled if is_new else {}}.items():
                # Only rank 0 compares them, as this reads images.
                shared = shared_images(*pair.values()) if len(pair) == 2 and group.is_main else None
                if shared is not None:
                    reporter.note(f"WARNING: {name}{shared}")
            recorded = None if overwrite or not group.is_main else recorded_config(Path(out))
            if config.data.normalize == "auto" and group.is_main:
                config, origin = _with_statistics(config, sources["train"], recorded)
                reporter.note(f"data.normalize auto: {origin}")
            if config.model.teacher is not None and group.is_main:
                # A resumed run has recorded the hash of its teacher's weights.
                digest = config.model.teacher_digest or (recorded and recorded.model.teacher_digest)
                config = replace(config, model=with_teacher(replace(config.model, teacher_digest=digest)))
        config = group.broadcast(config)
        group.check_same({name: source.fingerprint for name, source in labelled.items()})
        with group.together():
            monitors = _monitors(config, sources, labelled, reporter if is_new else None)
        result = train(
            config,
            Path(out),
            sources,
            monitors=monitors,
            reporter=reporter,
            overwrite=overwrite,
            group=group,
        )
    for line in _conclusion(result, sources):
        reporter.note(line)
    if result.stopped_by is not None and config.checkpoint.requeue:
        ignore_sigterm()
        if group.is_main:
            reporter.note(requeue_job())
    return result


def _with_statistics(config: RunConfig, source: Source, recorded: RunConfig | None) -> tuple[RunConfig, str]:
    """Fill in data.mean and data.std: as a run recorded them, else measured on a sample; and say which."""
    # A resumed run keeps its numbers: measured again, they could differ in the last digit.
    if recorded and recorded.data.normalize == "auto" and len(recorded.data.mean) == config.data.channels:
        mean, std, origin = recorded.data.mean, recorded.data.std, "as recorded in the run"
    else:
        measured = measure_pixels(source, config.data, config.model.image_size, config.seed)
        mean, std, origin = measured.mean, measured.std, f"measured on {counted(measured.images, 'image')}"
    words = (" ".join(f"{number:g}" for number in numbers) for numbers in (mean, std))
    config = replace(config, data=replace(config.data, mean=mean, std=std))
    return config, "mean {}, deviation {}, {}".format(*words, origin)


def _hints(config: RunConfig, images: int) -> Iterator[str]:
    """Yield hints on settings that the user may not have meant; they are not changed."""
    if config.preset is None:
        yield f"no preset named: based on {DEFAULT_PRESET}; `nextblock presets` lists others"
        if config.model.embed_dim == RunConfig().model.embed_dim and images < SMALL_FOLDER:
            yield (
                f"a model this big needs more than {counted(images, 'image')}; try --preset xtra-small-64, "
                f"or xtra-small-128 for larger images. {WHEN_IT_PAYS} says what to expect"
            )
    preset = PRESETS.get(config.preset or DEFAULT_PRESET)
    if config.preset is not None and preset is not None and images < preset.least_images:
        yield (
            f"{preset.name} suits {preset.images} images or more, as a rule of thumb, not {images:,}. "
            f"{WHEN_IT_PAYS} says what to expect"
        )
    batch_size, lr = min(config.train.batch_size, images), config.optim.lr
    if preset is None or preset.config.optim.lr != lr or preset.config.train.batch_size == batch_size:
        return
    meant = preset.config.train.batch_size
    yield (
        f"batch {batch_size} instead of {meant}: optim.lr stays {lr:g}. It is never scaled for you; in "
        f"proportion to the batch it would be {lr * batch_size / meant:.2g}"
    )


def _monitors(
    config: RunConfig, sources: dict[str, Source], labelled: dict[str, Source], reporter: Reporter | None
) -> list[Monitor]:
    """Pictures of the same few images, RankMe, and kNN accuracy if there are labels.

    `labelled` holds the two sources of kNN by setting name; if empty, kNN uses those of `data`.
    """
    settings, data, size = config.monitor, config.data, config.model.image_size
    monitors: list[Monitor] = []
    if settings.pictures_every is not None:
        images, _, _ = some_images(sources.get("val", sources["train"]), data, size, settings.pictures)
        monitors.append(PredictionMonitor(images, data.mean, data.std, settings.pictures_every))
    unmeasured: dict[str | None, str] = {}
    if "val" not in sources:
        unmeasured["val_loss"] = "it needs validation images, --data.val"
    if settings.knn_every is not None:
        labelled = labelled or {f"data.{kind}": source for kind, source in sources.items()}
        obstacle = _knn_obstacle(labelled)
        if obstacle is None:
            (train_name, train), (val_name, val) = labelled.items()
            missing = missing_classes(train, val)
            share = f"{len(missing)} of {len(val.class_names)} classes of {val_name} are not in {train_name}"
            note = f"{share} and count as wrong in kNN: {named(missing)}" if missing else ""
        else:
            train, val = None, sources.get("val", sources["train"])
            unmeasured["knn"], note = obstacle, f"kNN is not measured: {obstacle}"
        if note and reporter is not None:
            reporter.note(note)
        features = FeatureMonitor(
            val,
            data,
            train=train,
            image_size=size,
            every=settings.knn_every,
            max_samples=settings.knn_samples,
            seed=config.seed,
        )
        monitors.append(features)
    for name, metric in (
        ("checkpoint.keep_best", config.checkpoint.keep_best),
        ("monitor.early_stop", settings.early_stop),
    ):
        if metric in unmeasured:
            raise UsageError(f"{name} {metric} cannot be measured: {unmeasured[metric]}")
    return monitors


def _knn_obstacle(sources: dict[str, Source]) -> str | None:
    """Why kNN accuracy cannot be measured on two sources, named by their settings; None if it can."""
    if len(sources) < 2:
        return (
            "it needs labelled validation images, --data.val, or two labelled sources, --monitor.knn_train "
            "and --monitor.knn_val"
        )
    unlabelled = [name for name, source in sources.items() if not source.has_labels]
    if unlabelled:
        return f"{' and '.join(unlabelled)} have no labels; the first folders of a directory are classes"
    (train_name, train), (val_name, val) = sources.items()
    classes = sorted({*train.class_names, *val.class_names})
    if len(classes) == len(train.class_names) + len(val.class_names):
        return f"{train_name} and {val_name} have no class in common ({named(classes, 3)})"
    return "there is only one class" if len(train.class_names) < 2 else None


def _conclusion(result: TrainResult, sources: dict[str, Source]) -> Iterator[str]:
    """How a run ended, where its weights are, and what to do next."""
    unreadable = f"; unreadable images: {result.num_bad}, see quarantine.jsonl" if result.num_bad else ""
    if not result.is_finished and result.step == 0:
        yield f"stopped by {result.stopped_by} before the first step: nothing to save yet"
        return
    if not result.is_finished:
        yield (
            f"stopped by {result.stopped_by} after step {result.step} of {result.total_steps}, saved; "
            f"the same command resumes{unreadable}"
        )
        return
    is_complete = result.stopped_by is None
    ending = "complete" if is_complete else "ended early"
    ending = ending if result.warning is None else "ended without learning"
    number = result.step if is_complete else f"{result.step} of {result.total_steps}"
    yield f"{ending}: {number} step{'s' * (result.total_steps != 1)}, in {result.run_dir}{unreadable}"
    if result.warning is not None:
        yield f"WARNING: {result.warning}"
    yield losses_text(result.losses, result.baselines)
    yield f"weights: {result.run_dir}/checkpoints/step_{result.step:08d}/model.safetensors; next:"
    run, spec = str(result.run_dir), sources["train"].parts[0].spec
    other = sources.get("val", sources["train"].parts[0])
    if sources["train"].has_labels:
        first = ["knn", "--model", run, "--train", spec]
        if "val" in sources and other.has_labels and not missing_classes(sources["train"], other):
            first += ["--test", other.spec]
    else:
        first = ["embed", "--model", run, "--data", spec, "--out", f"{run}/features.parquet"]
    predict = ["predict", "--model", run, "--data", other.spec, "--out", f"{run}/predict"]
    for words in (first, predict, ["convert", run, f"{run}/timm", "--to", "timm"]):
        yield f"  nextblock {' '.join(map(quote, words))}"
