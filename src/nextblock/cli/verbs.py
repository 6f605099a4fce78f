"""The commands as data: description, three examples, usual settings, function."""

from __future__ import annotations

from typing import NamedTuple


class Verb(NamedTuple):
    """A command."""

    about: str
    """One sentence, without its full stop."""
    examples: tuple[str, ...]
    """Words after the command's name."""
    usual: str = ""
    """Settings that --help shows besides positional words; if empty, all."""
    run: str = ""
    """MODULE:FUNCTION below `nextblock.cli`; if empty, `run` in the module of the command's name."""


VERBS = {
    "pretrain": Verb(
        "Pre-train a vision transformer on any images, or resume a run",
        (
            "--data.train DIR --out RUN",
            "--preset xtra-small-64 --data.train DIR --data.val DIR2 --out RUN",
            "--out RUN                     # resume",
        ),
        "data.train out preset data.val train.duration train.batch_size devices",
    ),
    "eval": Verb(
        "Measure models in several ways, or a classifier, in one table",
        (
            "--model RUN --train TRAIN --test TEST --out RUN/eval",
            "--model RUN --model timm:vit_base_patch16_224.mae --train TRAIN --test TEST",
            "--model CLASSIFIER --test TEST",
        ),
        "model train test methods out",
        run="evaluations:compare",
    ),
    "probe": Verb(
        "Train heads on a frozen encoder's features; measure their accuracy",
        (
            "--model RUN --train TRAIN --test TEST --out RUN/probe",
            "--model RUN --train TRAIN --out RUN/probe --heads linear --epochs 10",
            "--model timm:vit_base_patch16_224.mae --train TRAIN --test TEST --out mae",
        ),
        "model train test out heads epochs",
        run="evaluations:probe",
    ),
    "knn": Verb(
        "Measure a frozen encoder's features by nearest neighbours",
        (
            "--model RUN --train TRAIN",
            "--model RUN --train TRAIN --test TEST --k 1,20",
            "--model timm:vit_base_patch16_224.mae --train TRAIN --test TEST",
        ),
        "model train test k out",
        run="evaluations:knn",
    ),
    "fewshot": Verb(
        "Measure a frozen encoder's features with few labels",
        (
            "--model RUN --train TRAIN --test TEST",
            "--model RUN --train TRAIN --test TEST --shots 1,5,10",
            "--model RUN --train TRAIN --test TEST --out RUN/fewshot",
        ),
        "model train test shots out",
        run="evaluations:fewshot",
    ),
    "finetune": Verb(
        "Train encoder and head together, fully or with LoRA",
        (
            "--model RUN --train TRAIN --test TEST --out RUN/finetuned",
            "--model RUN --train TRAIN --test TEST --out RUN/lora --lora.rank 8",
            "--model CHECKPOINT --train TRAIN --out OUT --epochs 50 --lr 5e-4",
        ),
        "model train test out epochs lr lora.rank",
        run="evaluations:finetune",
    ),
    "suite": Verb(
        "Probe the fifteen benchmarks of the AIM and XTRA papers",
        (
            "--list --root DIR             # which are found, how to get the others",
            "--model RUN --root DIR --out RUN/suite",
            "--model RUN --root DIR --out quick --only cifar10 --augment none --epochs 10",
        ),
        "model root out only augment list",
        run="evaluations:suite",
    ),
    "classify": Verb(
        "Name the classes of images with a trained head",
        (
            "--model RUN/probe/attentive --data IMAGE",
            "--model RUN/finetuned --data DIR --out classes.csv --top 1",
            "--model backbone.pth --head head.pth --data DIR --out classes.csv",
        ),
        "model data out head top",
        run="evaluations:classify",
    ),
    "embed": Verb(
        "Write the features of images to a file",
        (
            "--model RUN --data DIR --out features.npz",
            "--model RUN --data DIR --out features.parquet",
            "--model timm:vit_base_patch16_224.mae --data DIR --out features.npz",
        ),
        "model data out layers pool",
        run="evaluations:embed",
    ),
    "search": Verb(
        "Find the images nearest to one, and draw them",
        (
            "--model RUN --data DIR --query IMAGE",
            "--model RUN --data DIR --query IMAGE --out nearest --top 20",
            "--model RUN --data DIR --query QUERIES --out nearest --layers last6",
        ),
        "model data query out top",
        run="evaluations:search",
    ),
    "predict": Verb(
        "Draw how a model predicts the next blocks of images",
        (
            "--model RUN --data DIR --out RUN/predictions",
            "--model RUN --data digits:split=test --out RUN/predictions --num_images 16",
            "--model xtra.ckpt --num_heads 12 --data DIR --out predictions",
        ),
        run="look:predict",
    ),
    "complete": Verb(
        "Give a model parts of images, and draw how it continues them",
        (
            "--model RUN --data DIR --out RUN/completions",
            "--model RUN --data IMAGE --out completed --given_rows 0.25",
            "--model RUN --data DIR --out completed --given_blocks 0,1,5 --order spiral",
        ),
        "model data out given_rows given given_blocks order num_images",
        run="look:complete",
    ),
    "surprise": Verb(
        "Rank images by how badly their blocks are predicted",
        (
            "--model RUN --data DIR --out RUN/surprise",
            "--model RUN --data DIR --out odd --score largest --num_images 16",
            "--model RUN --data DIR        # only print",
        ),
        "model data out score num_images",
        run="evaluations:surprise",
    ),
    "features": Verb(
        "Draw patch features as colours, nearest patches, where a head looks",
        (
            "--model RUN --data DIR --out RUN/features",
            "--model RUN --data DIR --out RUN/features --head RUN/probe/ep",
            "--model timm:vit_base_patch16_224.mae --data DIR --out mae --query IMAGE --patch 3,5",
        ),
        "model data out num_images head query patch",
        run="look:features",
    ),
    "serve": Verb(
        "Show on a local page what a model does with an image you drop",
        (
            "RUN --data digits:split=test",
            "timm:vit_base_patch16_224.mae --data DIR --open true",
            "RUN --port 0                  # any free port",
        ),
        "model data port open",
        run="look:serve",
    ),
    "runs": Verb(
        "List the runs below a directory and their status",
        ("DIR", "RUN", "DIR --json"),
        run="runs:runs",
    ),
    "report": Verb(
        "Sum up a run as text and as a page, or compare several",
        (
            "RUN                           # writes RUN/report.html too",
            "RUNS/* --out runs.html",
            "RUN --json",
        ),
        run="runs:report",
    ),
    "convert": Verb(
        "Write a model in another format, or push it to the Hugging Face hub",
        ("RUN ENCODER --to timm", "RUN encoder.onnx", "xtra.ckpt hf:USER/NAME --num_heads 12"),
        "to num_heads image_size head license",
        run="weights:convert",
    ),
    "info": Verb(
        "Show what a run or a weight file contains",
        ("RUN", "xtra.ckpt --num_heads 12", "backbone.pth --head head.pth"),
        run="weights:info",
    ),
    "doctor": Verb(
        "Examine images before training",
        ("DIR", "DIR --val DIR2 --out found.json", "DIR --model xtra-small-64 --samples 1000"),
        "val model samples images_per_s out",
        run="data:doctor",
    ),
    "data": Verb(
        "Pack images into shards, draw and split subsets",
        (
            "pack DIR SHARDS",
            "sample DIR few.txt --fraction 0.01",
            "split DIR --parts train=0.8,val=0.2 --out LISTS",
        ),
        run="data:data",
    ),
    "plan": Verb(
        "Estimate a training's memory and time without running it",
        (
            "--gpu h100",
            "--preset aim-7b-dfn2b+ --gpus 64 --gpu h100",
            "--preset xtra-l16 --data.train DIR --gpu_memory_gb 80 --gpu_tflops 300",
        ),
        "preset gpu gpus images data.train train.batch_size",
    ),
    "presets": Verb(
        "List the named runs and model sizes",
        ("", "xtra-b16-in1k", "aim-600m --draw order.png --prefix 20 --model.image_size 112"),
        "all draw prefix model.image_size model.block_size",
    ),
    "data pack": Verb(
        "Write the images of a source as tar shards, with an index beside each",
        (
            "DIR SHARDS                    # again: resume",
            "DIR SHARDS --resize_px 512 --quality 90",
            "SCENES TILES --tile_px 1024",
        ),
        "resize_px tile_px format quality workers",
        run="data:pack",
    ),
    "data sample": Verb(
        "Draw some images of a source, and write them as a list",
        ("DIR few.txt --fraction 0.01", "DIR few.txt --count 1000 --seed 1", "DIR few.txt --per_class 5"),
        "fraction count per_class seed",
        run="data:sample",
    ),
    "data split": Verb(
        "Split a source into parts, and write each as a list",
        (
            "DIR --parts train=0.8,val=0.2 --out LISTS",
            "DIR --parts train=0.8,val=0.2 --out LISTS --stratify",
            "DIR --parts train=0.5 --out LISTS --seed 1",
        ),
        "parts out stratify seed",
        run="data:split",
    ),
}
"""Commands by name; the list of commands omits names of two words."""
