"""The commands as data: description, function, usual settings, three examples."""

from __future__ import annotations


class Verb:
    """A command: a row of `VERBS`."""

    def __init__(self, about: str, run: str, usual: str, *examples: str) -> None:
        self.about = about
        """One sentence, without its full stop."""
        self.run = run
        """MODULE:FUNCTION below `nextblock.cli`."""
        self.usual = usual
        """Settings that --help shows besides positional words; if empty, all."""
        self.examples = examples
        """Words after the command's name."""


VERBS = {
    "pretrain": Verb(
        "Pre-train a vision transformer on any images, or resume a run",
        "pretrain:run",
        "data.train out preset data.val train.duration train.batch_size devices",
        "--data.train DIR --out RUN",
        "--preset xtra-small-64 --data.train DIR --data.val DIR2 --out RUN",
        "--out RUN                     # resume",
    ),
    "eval": Verb(
        "Measure models in several ways, or a classifier, in one table",
        "evaluations:compare",
        "model train test methods out",
        "--model RUN --train TRAIN --test TEST --out RUN/eval",
        "--model RUN --model timm:vit_base_patch16_224.mae --train TRAIN --test TEST",
        "--model CLASSIFIER --test TEST",
    ),
    "probe": Verb(
        "Train heads on a frozen encoder's features; measure their accuracy",
        "evaluations:probe",
        "model train test out heads epochs",
        "--model RUN --train TRAIN --test TEST --out RUN/probe",
        "--model RUN --train TRAIN --out RUN/probe --heads linear --epochs 10",
        "--model timm:vit_base_patch16_224.mae --train TRAIN --test TEST --out mae",
    ),
    "knn": Verb(
        "Measure a frozen encoder's features by nearest neighbours",
        "evaluations:knn",
        "model train test k out",
        "--model RUN --train TRAIN",
        "--model RUN --train TRAIN --test TEST --k 1,20",
        "--model timm:vit_base_patch16_224.mae --train TRAIN --test TEST",
    ),
    "fewshot": Verb(
        "Measure a frozen encoder's features with few labels",
        "evaluations:fewshot",
        "model train test shots out",
        "--model RUN --train TRAIN --test TEST",
        "--model RUN --train TRAIN --test TEST --shots 1,5,10",
        "--model RUN --train TRAIN --test TEST --out RUN/fewshot",
    ),
    "finetune": Verb(
        "Train encoder and head together, fully or with LoRA",
        "evaluations:finetune",
        "model train test out epochs lr lora.rank",
        "--model RUN --train TRAIN --test TEST --out RUN/finetuned",
        "--model RUN --train TRAIN --test TEST --out RUN/lora --lora.rank 8",
        "--model CHECKPOINT --train TRAIN --out OUT --epochs 50 --lr 5e-4",
    ),
    "suite": Verb(
        "Probe the fifteen benchmarks of the AIM and XTRA papers",
        "evaluations:suite",
        "model root out only augment list",
        "--list --root DIR             # which are found, how to get the others",
        "--model RUN --root DIR --out RUN/suite",
        "--model RUN --root DIR --out quick --only cifar10 --augment none --epochs 10",
    ),
    "classify": Verb(
        "Classify images with a trained head",
        "evaluations:classify",
        "model data out head top",
        "--model RUN/probe/attentive --data IMAGE",
        "--model RUN/finetuned --data DIR --out classes.csv --top 1",
        "--model backbone.pth --head head.pth --data DIR --out classes.csv",
    ),
    "embed": Verb(
        "Write the features of images to a file",
        "evaluations:embed",
        "model data out layers pool",
        "--model RUN --data DIR --out features.npz",
        "--model RUN --data DIR --out features.parquet",
        "--model timm:vit_base_patch16_224.mae --data DIR --out features.npz",
    ),
    "search": Verb(
        "Find the images nearest to one, and draw them",
        "evaluations:search",
        "model data query out top",
        "--model RUN --data DIR --query IMAGE",
        "--model RUN --data DIR --query IMAGE --out nearest --top 20",
        "--model RUN --data DIR --query QUERIES --out nearest --layers last6",
    ),
    "predict": Verb(
        "Draw how a model predicts the next blocks of images",
        "look:predict",
        "model data out num_images distance",
        "--model RUN --data DIR --out RUN/predictions",
        "--model RUN --data digits:split=test --out RUN/predictions --num_images 16",
        "--model xtra.ckpt --num_heads 12 --data DIR --out predictions",
    ),
    "complete": Verb(
        "Give a model parts of images, and draw how it continues them",
        "look:complete",
        "model data out given_rows given given_blocks order num_images",
        "--model RUN --data DIR --out RUN/completions",
        "--model RUN --data IMAGE --out completed --given_rows 0.25",
        "--model RUN --data DIR --out completed --given_blocks 0,1,5 --order spiral",
    ),
    "surprise": Verb(
        "Rank images by how badly their blocks are predicted",
        "evaluations:surprise",
        "model data out score num_images",
        "--model RUN --data DIR --out RUN/surprise",
        "--model RUN --data DIR --out odd --score largest --num_images 16",
        "--model RUN --data DIR        # only print",
    ),
    "features": Verb(
        "Draw patch features as colours, nearest patches, a head's attention",
        "look:features",
        "model data out num_images head query patch",
        "--model RUN --data DIR --out RUN/features",
        "--model RUN --data DIR --out RUN/features --head RUN/probe/ep",
        "--model timm:vit_base_patch16_224.mae --data DIR --out mae --query IMAGE --patch 3,5",
    ),
    "serve": Verb(
        "Show on a local page what a model does with an image you drop",
        "look:serve",
        "model data port open",
        "RUN --data digits:split=test",
        "timm:vit_base_patch16_224.mae --data DIR --open true",
        "RUN --port 0                  # any free port",
    ),
    "runs": Verb(
        "List the runs below a directory and their status",
        "runs:runs",
        "",
        "DIR",
        "RUN",
        "DIR --json",
    ),
    "report": Verb(
        "Sum up a run as text and as a page, or compare several",
        "runs:report",
        "",
        "RUN                           # writes RUN/report.html too",
        "RUNS/* --out runs.html",
        "RUN --json",
    ),
    "convert": Verb(
        "Write a model in another format, or push it to the Hugging Face hub",
        "weights:convert",
        "to num_heads image_size head license",
        "RUN ENCODER --to timm",
        "RUN encoder.onnx",
        "xtra.ckpt hf:USER/NAME --num_heads 12",
    ),
    "info": Verb(
        "Show what a run or a weight file contains",
        "weights:info",
        "",
        "RUN",
        "xtra.ckpt --num_heads 12",
        "backbone.pth --head head.pth",
    ),
    "doctor": Verb(
        "Examine images before training",
        "data:doctor",
        "val model samples images_per_s out",
        "DIR",
        "DIR --val DIR2 --out found.json",
        "DIR --model xtra-small-64 --samples 1000",
    ),
    "data": Verb(
        "Pack images into shards, draw and split subsets",
        "data:data",
        "",
        "pack DIR SHARDS",
        "sample DIR few.txt --fraction 0.01",
        "split DIR --parts train=0.8,val=0.2 --out LISTS",
    ),
    "plan": Verb(
        "Estimate a training's memory and time without running it",
        "plan:run",
        "preset gpu gpus images data.train train.batch_size",
        "--gpu h100",
        "--preset aim-7b-dfn2b+ --gpus 64 --gpu h100",
        "--preset xtra-l16 --data.train DIR --gpu_memory_gb 80 --gpu_tflops 300",
    ),
    "presets": Verb(
        "List the named runs and model sizes",
        "presets:run",
        "all draw prefix model.image_size model.block_size",
        "",
        "xtra-b16-in1k",
        "aim-600m --draw order.png --prefix 20 --model.image_size 112",
    ),
    "data pack": Verb(
        "Write the images of a source as tar shards, with an index beside each",
        "data:pack",
        "resize_px tile_px format quality workers",
        "DIR SHARDS                    # again: resume",
        "DIR SHARDS --resize_px 512 --quality 90",
        "SCENES TILES --tile_px 1024",
    ),
    "data sample": Verb(
        "Draw some images of a source, and write them as a list",
        "data:sample",
        "fraction count per_class seed",
        "DIR few.txt --fraction 0.01",
        "DIR few.txt --count 1000 --seed 1",
        "DIR few.txt --per_class 5",
    ),
    "data split": Verb(
        "Split a source into parts, and write each as a list",
        "data:split",
        "parts out stratify seed",
        "DIR --parts train=0.8,val=0.2 --out LISTS",
        "DIR --parts train=0.8,val=0.2 --out LISTS --stratify",
        "DIR --parts train=0.5 --out LISTS --seed 1",
    ),
}
"""Commands by name; the list of commands omits names of two words."""
