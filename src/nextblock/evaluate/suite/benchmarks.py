"""The fifteen benchmarks, and ImageNet-1k by a linear head: splits, sizes, settings of the probe, where from.

Splits, classes and settings of the probe are those of the official code of XTRA-H/14; numbers of images are
those of AIMv2's Table B1, a paper of the same laboratory, and None where none is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nextblock.errors import UsageError
from nextblock.evaluate.probe.recipes import HeadName
from nextblock.settings import nearest_name

__all__ = [
    "BENCHMARKS",
    "FIFTEEN",
    "Benchmark",
    "Folders",
    "Hub",
    "Layout",
    "Listed",
    "Recipe",
    "Torchvision",
    "chosen",
]


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Two directories of class folders."""

    origin: str
    folder: str
    """Below the root."""


@dataclass(frozen=True, kw_only=True)
class Listed:
    """Image files whose classes and splits the data set's own annotation files tell."""

    folder: str
    """Below the root."""
    origin: str
    annotations: Literal["dtd", "pets", "food101", "inat2018", "iwildcam", "rxrx1", "domainnet"]
    """How to read them."""
    torchvision: str | None = None
    """The class of torchvision that downloads it into the root."""


@dataclass(frozen=True, kw_only=True)
class Torchvision:
    """A data set of torchvision that is no directory of image files."""

    folder: str
    """What torchvision calls it, below the root."""
    dataset: str
    """The class of torchvision."""
    needs: str | None = None
    """A package that torchvision reads it with."""
    labels_are_slow: bool = False
    """Whether labels come with the images, one by one."""


@dataclass(frozen=True, kw_only=True)
class Hub:
    """A data set of the Hugging Face hub."""

    folder: str
    """Where a copy of it lies, below the root."""
    repository: str
    config: str | None = None
    """Which of its parts, where it is divided."""


Layout = Folders | Listed | Torchvision | Hub


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of the official probe."""

    lrs: tuple[float, ...]
    """Learning rates as its settings name them; without warm-up its training reaches a tenth of them."""
    batch_size: int
    warmup_epochs: int
    weight_decay: float = 0.1
    epochs: int = 100
    augment: Literal["crop", "timm"] = "timm"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One column of the table."""

    name: str
    title: str
    """As the papers print it."""
    layout: Layout
    train: tuple[str, ...]
    """Splits to train the head on, together; several of listed files only."""
    test: str
    """Split whose top-1 accuracy is reported."""
    classes: int
    images: tuple[int | None, int | None]
    """Images of the training splits and of the test split, as far as known."""
    recipe: Recipe
    fetch: str
    """How to get it by hand; {at} stands for its folder, {root} for the root."""
    terms: str = "see its page"
    """Of use; in a few words."""
    head: HeadName = "attentive"
    source_images: tuple[int, int] | None = None
    """The same as `images` in the source, where it is known to be divided in another way."""
    note: str = ""
    """What else to know before using it."""

    @property
    def source(self) -> str:
        """Where it comes from, in a few words."""
        layout = self.layout
        if isinstance(layout, Hub):
            return f"hf:{layout.repository}"
        if isinstance(layout, Torchvision):
            return f"torchvision:{layout.dataset}"
        return layout.origin


# -------------------------------------------------------------------------------------------- their settings

_SEVEN = (1e-4, 3e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 4e-3)
_NINE = (*_SEVEN, 8e-3, 1e-2)
_TEN = (*_NINE, 1e-1)

_TV = "--download true fetches it"
_HUB = (
    "--download true reads it from the hub, or copy it: hf download {repository} --repo-type dataset "
    "--local-dir {{at}}"
)
_WILDS = (
    "pip install wilds, then python -c \"from wilds import get_dataset; get_dataset('{name}', download=True, "
    "root_dir='{{root}}')\" (more: https://wilds.stanford.edu); its download host was reported unreachable "
    "(github.com/p-lambda/wilds, issues 174 and 175): a copy from elsewhere serves where WILDS' own "
    "metadata.csv, columns {columns}, lies at {{at}}/metadata.csv and the images at {{at}}/{images}"
)
_IWILDCAM = _WILDS.format(name="iwildcam", columns="split, filename, y", images="train/FILENAME")
_RXRX1 = _WILDS.format(
    name="rxrx1",
    columns="dataset, experiment, plate, well, site, sirna_id",
    images="images/EXPERIMENT/PlateN/WELL_sSITE.png",
)
_IMAGENET = (
    "register at https://image-net.org, put ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and "
    'ILSVRC2012_devkit_t12.tar.gz into {at}, then python -c "from torchvision.datasets import ImageNet; '
    "[ImageNet('{at}', split) for split in ('train', 'val')]\" sorts them into train/ and val/"
)
_PCAM = (
    "--download true fetches it (pip install h5py gdown), or unpack the .h5.gz files of train and valid, x "
    "and y, of https://github.com/basveeling/pcam into {at}"
)
_INAT = (
    "from https://github.com/visipedia/inat_comp (2018) get train_val2018.tar.gz, train2018.json.tar.gz and "
    "val2018.json.tar.gz and unpack them into {at}"
)
_DOMAINNET = (
    "from http://ai.bu.edu/M3SDA (DomainNet) get infograph.zip and its lists infograph_train.txt and "
    "infograph_test.txt, and unpack it in {at} beside them"
)


def _hub(repository: str, more: str = "") -> str:
    return _HUB.format(repository=repository) + more


_IMAGENET_FOLDERS = Folders(origin="ImageNet", folder="imagenet")

BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark(
        name="imagenet1k",
        title="IN-1k",
        layout=_IMAGENET_FOLDERS,
        train=("train",),
        test="val",
        classes=1000,
        images=(1_281_167, 50_000),
        recipe=Recipe(lrs=_SEVEN, batch_size=4096, warmup_epochs=10),
        terms="registration; non-commercial",
        fetch=_IMAGENET,
    ),
    Benchmark(
        name="inat18",
        title="iNAT-18",
        layout=Listed(origin="iNaturalist 2018", folder="inat2018", annotations="inat2018"),
        train=("train",),
        test="val",
        classes=8142,
        images=(437_513, 24_426),
        recipe=Recipe(lrs=_TEN, batch_size=4096, warmup_epochs=10),
        terms="non-commercial",
        fetch=_INAT,
    ),
    Benchmark(
        name="cifar10",
        title="CIFAR-10",
        layout=Torchvision(folder="cifar-10-batches-py", dataset="CIFAR10"),
        train=("train",),
        test="test",
        classes=10,
        images=(50_000, 10_000),
        recipe=Recipe(lrs=_NINE, batch_size=512, warmup_epochs=0),
        fetch=_TV,
    ),
    Benchmark(
        name="cifar100",
        title="CIFAR-100",
        layout=Torchvision(folder="cifar-100-python", dataset="CIFAR100"),
        train=("train",),
        test="test",
        classes=100,
        images=(50_000, 10_000),
        recipe=Recipe(lrs=_NINE, batch_size=512, warmup_epochs=0),
        fetch=_TV,
    ),
    Benchmark(
        name="food101",
        title="Food101",
        layout=Listed(
            origin="torchvision:Food101", folder="food-101", annotations="food101", torchvision="Food101"
        ),
        train=("train",),
        test="test",
        classes=101,
        images=(75_750, 25_250),
        recipe=Recipe(lrs=_NINE, batch_size=512, warmup_epochs=0),
        fetch=_TV,
    ),
    Benchmark(
        name="dtd",
        title="DTD",
        layout=Listed(origin="torchvision:DTD", folder="dtd/dtd", annotations="dtd", torchvision="DTD"),
        train=("train", "val"),
        test="test",
        classes=47,
        images=(3_760, 1_880),
        recipe=Recipe(lrs=_NINE, batch_size=128, warmup_epochs=0),
        fetch=_TV,
    ),
    Benchmark(
        name="pets",
        title="Pets",
        layout=Listed(
            origin="torchvision:OxfordIIITPet",
            folder="oxford-iiit-pet",
            annotations="pets",
            torchvision="OxfordIIITPet",
        ),
        train=("trainval",),
        test="test",
        classes=37,
        images=(3_680, 3_669),
        recipe=Recipe(lrs=_NINE, batch_size=128, warmup_epochs=0),
        fetch=_TV,
    ),
    Benchmark(
        name="cars",
        title="Cars",
        layout=Hub(folder="stanford_cars", repository="tanganke/stanford_cars"),
        train=("train",),
        test="test",
        classes=196,
        images=(8_144, 8_041),
        recipe=Recipe(lrs=_TEN, batch_size=128, warmup_epochs=0),
        fetch=_hub("tanganke/stanford_cars"),
    ),
    Benchmark(
        name="iwildcam",
        title="iWildCam",
        layout=Listed(origin="WILDS", folder="iwildcam_v2.0", annotations="iwildcam"),
        train=("train",),
        test="val",
        classes=182,
        images=(129_809, None),
        recipe=Recipe(lrs=_NINE, batch_size=512, warmup_epochs=0),
        terms="CDLA permissive 1.0",
        fetch=_IWILDCAM,
    ),
    Benchmark(
        name="camelyon17",
        title="CAM17",
        layout=Hub(folder="camelyon17", repository="jxie/camelyon17"),
        train=("id_train",),
        test="ood_val",
        classes=2,
        images=(302_436, 34_904),
        recipe=Recipe(lrs=_NINE, batch_size=512, warmup_epochs=0),
        fetch=_hub("jxie/camelyon17"),
    ),
    Benchmark(
        name="pcam",
        title="PCAM",
        layout=Torchvision(folder="pcam", dataset="PCAM", needs="h5py", labels_are_slow=True),
        train=("train",),
        test="val",
        classes=2,
        images=(262_144, 32_768),
        recipe=Recipe(lrs=_NINE, batch_size=4096, warmup_epochs=0),
        fetch=_PCAM,
    ),
    Benchmark(
        name="rxrx1",
        title="RxRx1",
        layout=Listed(origin="WILDS", folder="rxrx1_v1.0", annotations="rxrx1"),
        train=("train",),
        test="val",
        classes=1139,
        images=(40_612, 9_854),
        recipe=Recipe(lrs=_NINE, batch_size=512, warmup_epochs=0),
        terms="CC BY-NC-SA 4.0",
        fetch=_RXRX1,
    ),
    Benchmark(
        name="eurosat",
        title="EuroSAT",
        layout=Hub(folder="eurosat", repository="tanganke/eurosat"),
        train=("train",),
        test="test",
        classes=10,
        images=(16_200, 5_400),
        recipe=Recipe(lrs=_NINE, batch_size=512, warmup_epochs=0),
        fetch=_hub("tanganke/eurosat"),
        source_images=(21_600, 2_700),
        note="the hub's copy is reported to hold 21,600 images to train and 2,700 to test on, not the 16,200 "
        "and 5,400 of AIMv2's Table B1",
    ),
    Benchmark(
        name="fmow",
        title="fMoW",
        layout=Hub(folder="fMoW", repository="danielz01/fMoW", config="WILDS"),
        train=("train",),
        test="val",
        classes=62,
        images=(76_863, 19_915),
        recipe=Recipe(lrs=_NINE, batch_size=512, warmup_epochs=0),
        terms="to be accepted",
        fetch=_hub("danielz01/fMoW", "; accept its terms on its page and hf auth login first"),
    ),
    Benchmark(
        name="infograph",
        title="Infograph",
        layout=Listed(origin="DomainNet", folder="domainnet", annotations="domainnet"),
        train=("train",),
        test="test",
        classes=345,
        images=(36_023, 15_582),
        recipe=Recipe(lrs=_TEN, batch_size=256, warmup_epochs=0),
        terms="non-commercial",
        fetch=_DOMAINNET,
    ),
    Benchmark(
        name="imagenet1k-linear",
        title="IN-1k linear",
        layout=_IMAGENET_FOLDERS,
        train=("train",),
        test="val",
        classes=1000,
        images=(1_281_167, 50_000),
        # XTRA-B/16's: random crops alone, and no decay.
        recipe=Recipe(lrs=_SEVEN, batch_size=4096, warmup_epochs=10, weight_decay=0.0, augment="crop"),
        terms="registration; non-commercial",
        fetch=_IMAGENET,
        head="linear",
    ),
)
"""In the order of AIM's Table 6; then the linear one, which is none of the fifteen."""

FIFTEEN = tuple(benchmark.name for benchmark in BENCHMARKS if benchmark.head == "attentive")
"""Names of those that the papers' mean is over, in the table's order."""


def chosen(names: tuple[str, ...] | None) -> tuple[Benchmark, ...]:
    """The benchmarks of these names in the table's order, all for None; `ValueError` for an unknown name."""
    known = [benchmark.name for benchmark in BENCHMARKS]
    for name in names or ():
        if name not in known:
            raise UsageError(f"there is no benchmark {name!r}; {nearest_name(name, known)}")
    return tuple(benchmark for benchmark in BENCHMARKS if not names or benchmark.name in names)
