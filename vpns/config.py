"""What can a run be told? Every setting of every stage, with its default and its limits.

The defaults are the embedded task: a ResNet-18 that knows letters is pruned to a tenth for written digits.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, Self

Optimizer = Literal["adam", "sgd"]
Schedule = Literal["cosine", "multistep", "constant"]


def _expect(holds: bool, owner: object, what: str, value: object, hint: str = "") -> None:
    if not holds:
        suffix = f" ({hint})" if hint else ""
        raise ValueError(f"{type(owner).__name__}: expected {what}, got {value}{suffix}")


@dataclass(frozen=True)
class DataConfig:
    """The target task.

    Args:
        name: digits (embedded), folder (images in root/<class>/, or in root/{train,val,test}/<class>/), or a
            published set as it lies below root: cifar10, cifar100, tiny-imagenet, dtd, flowers102,
            flowers102-coop, food101, oxford-pets, stanford-cars, imagenet.
        root: the folder of the images.
        train_count: digits only: how many labelled training images; null for all.
        val_fraction: share of the images, in (0, 1), that selects checkpoints and is not trained on.
        load_size: side in pixels at which images are kept; 0 for their own, or the canvas (and 9/8 of it, of
            which training images are cut).
        cache: folder of decoded images; null for $VPNS_CACHE, or vpns in the user's own cache.
        flip: mirror training images at random.
        crop: cut training images at random out of 9/8 of the size.
    """

    name: str = "digits"
    root: str | None = None
    train_count: int | None = 100
    val_fraction: float = 0.2
    load_size: int = 0
    cache: str | None = None
    flip: bool = False
    crop: bool = True

    def __post_init__(self) -> None:
        _expect(0 < self.val_fraction < 1, self, "val_fraction in (0, 1)", self.val_fraction)
        _expect(self.load_size >= 0, self, "load_size >= 0 pixels", self.load_size)
        enough = self.train_count is None or self.train_count >= 1
        _expect(enough, self, "train_count >= 1 images, or null", self.train_count)


@dataclass(frozen=True)
class ModelConfig:
    """The network.

    Args:
        name: resnet18, resnet50, vgg16, vgg16_bn, any name of torchvision or timm (timm:<name> where both
            have it), or module:factory for your own.
        weights: a .safetensors or .pth file, torchvision:<name>, timm:<tag>, or the folder of another run,
            for the weights it ended with; null to pretrain on letters.
        source_classes: classes that the pretrained head tells apart.
    """

    name: str = "resnet18"
    weights: str | None = None
    source_classes: int = 52

    def __post_init__(self) -> None:
        _expect(self.source_classes >= 1, self, "source_classes >= 1", self.source_classes)


@dataclass(frozen=True)
class PromptConfig:
    """The visual prompt.

    Args:
        kind: "pad"; "expand", the frame around a smaller image in both variants; "fix" and "random", a square
            over the full image with as many pixels as the frame, in its corner or at a place drawn for each
            batch; or "none" for plain images on the whole canvas.
        variant: "framed" shrinks the image to make room for the frame; "released" lays the prompt over the
            image's border and follows the published code in everything.
        canvas: side in pixels of what the network sees.
        frame: width in pixels of the prompt.
        frozen: keep the prompt at its start value.
        prompt_in: the stages that use the prompt.
        at_inference: whether the prompt is applied at inference; null for the variant's own way: framed with
            it where tuning used it, released without.
    """

    kind: str = "pad"
    variant: Literal["framed", "released"] = "framed"
    canvas: int = 32
    frame: int = 2
    frozen: bool = False
    prompt_in: Literal["both", "search", "tune", "none"] = "both"
    at_inference: bool | None = None

    def __post_init__(self) -> None:
        _expect(self.canvas >= 1, self, "canvas >= 1 pixel", self.canvas)
        fits = 0 <= 2 * self.frame < self.canvas
        hint = "the frame must leave room for the image"
        _expect(fits, self, f"0 <= 2 * frame < canvas={self.canvas}", f"frame={self.frame}", hint)


@dataclass(frozen=True)
class LabelMapConfig:
    """How outputs of the pretrained head become classes of the task.

    Args:
        kind: "frequency" (each class takes the output that fires most for it), "iterative" (the same, counted
            anew before every epoch of search), "identity" (the first outputs), or "head" (a new head).
    """

    kind: Literal["frequency", "iterative", "identity", "head"] = "frequency"


@dataclass(frozen=True)
class StageConfig:
    """How one stage trains.

    Args:
        epochs: passes over the training images; 0 leaves the stage at its start.
        batch_size: images per update, at most.
        passes: updates per iteration: 1, or 2 for a prompted batch and then a plain one of another order.
        accumulate: parts of a batch that are computed one after the other, their gradients added up, where a
            whole one does not fit in memory; batch norm sees each part by itself.
        optimizer: of scores in search, of weights elsewhere, and of the prompt.
        lr: learning rate.
        prompt_lr: learning rate of the prompt; null for the same.
        weight_decay: added to the gradient (coupled, as published).
        momentum: of sgd.
        schedule: cosine to 0, multistep (a tenth at 0.5 of the epochs and again at 0.72) or constant;
            moves once an epoch.
    """

    epochs: int = 30
    batch_size: int = 64
    passes: Literal[1, 2] = 1
    accumulate: int = 1
    optimizer: Optimizer = "sgd"
    lr: float = 1e-2
    prompt_lr: float | None = None
    weight_decay: float = 1e-4
    momentum: float = 0.9
    schedule: Schedule = "cosine"

    def __post_init__(self) -> None:
        _expect(self.epochs >= 0, self, "epochs >= 0", self.epochs)
        _expect(self.batch_size >= 1, self, "batch_size >= 1 image", self.batch_size)
        fits = 1 <= self.accumulate <= self.batch_size
        _expect(fits, self, f"accumulate from 1 to batch_size={self.batch_size}", self.accumulate)
        _expect(self.lr > 0, self, "lr > 0", self.lr)
        _expect(self.prompt_lr is None or self.prompt_lr > 0, self, "prompt_lr > 0, or null", self.prompt_lr)
        _expect(self.weight_decay >= 0, self, "weight_decay >= 0", self.weight_decay)
        _expect(0 <= self.momentum < 1, self, "momentum in [0, 1)", self.momentum)


@dataclass(frozen=True)
class PretrainConfig(StageConfig):
    """How letters are learned. Args as in StageConfig."""

    epochs: int = 6
    batch_size: int = 64
    lr: float = 5e-2
    weight_decay: float = 5e-4


@dataclass(frozen=True)
class SearchConfig(StageConfig):
    """How scores and prompt are learned. Args as in StageConfig."""

    epochs: int = 60
    batch_size: int = 25
    optimizer: Optimizer = "adam"
    lr: float = 3e-2
    prompt_lr: float | None = 1e-2


@dataclass(frozen=True)
class TuneConfig(StageConfig):
    """How the kept weights and the prompt are tuned. Args as in StageConfig."""

    batch_size: int = 25


@dataclass(frozen=True)
class RunConfig:
    """One run: what is pruned for what, how, and how hard.

    Args:
        method: what decides which weights stay: vpns, hydra, omp or random; of channels also l1 or depgraph.
        pattern: what stands or falls together: unstructured, block:BKxBC, channel or nm:N:M.
        density: kept fraction in (0, 1] of the pattern's units.
        schedule: search trains mask and prompt jointly, or one after the other, half the epochs each.
        pretrain: teaches the network letters; epochs 0 takes it as it is built.
        search: finds the mask, and the prompt, with frozen weights.
        tune: trains the kept weights, and the prompt; the dense reference gets the same.
        backend: auto trains search and tune by the kernels that are expected to be fastest; reference by
            torch's dense layers.
        dtype: of activations in search and tune; bfloat16 keeps weights, scores and prompt in float32.
        seed: of everything random.
        threads: 0 for torch's own choice; a resumed run keeps those it began with.
        device: where torch computes.
        save_every_s: seconds of training between two saved states, the most that a kill can cost.
    """

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    prompt: PromptConfig = PromptConfig()
    label_map: LabelMapConfig = LabelMapConfig()
    method: str = "vpns"
    pattern: str = "block:16x16"
    density: float = 0.1
    schedule: Literal["joint", "mask_then_prompt", "prompt_then_mask"] = "joint"
    pretrain: PretrainConfig = PretrainConfig()
    search: SearchConfig = SearchConfig()
    tune: TuneConfig = TuneConfig()
    backend: Literal["auto", "reference"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 7
    threads: int = 0
    device: str = "cpu"
    save_every_s: float = 15.0

    def __post_init__(self) -> None:
        _expect(0 < self.density <= 1, self, "density, the kept fraction, in (0, 1]", self.density)
        _expect(self.threads >= 0, self, "threads >= 0", self.threads)
        _expect(self.seed >= 0, self, "seed >= 0", self.seed)
        _expect(self.save_every_s >= 0, self, "save_every_s >= 0 seconds", self.save_every_s)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, as they are stored in JSON and YAML."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of to_dict; TypeError on unknown keys."""
        built = dict(values)
        for field in dataclasses.fields(cls):
            kind = field.type
            if isinstance(kind, type) and dataclasses.is_dataclass(kind) and field.name in built:
                built[field.name] = kind(**built[field.name])
        return cls(**built)


# What makes no other run, and may differ when one continues; a resumed run keeps the threads it began with.
FREE_KEYS = ("threads", "device", "save_every_s", "data.cache")


def differing_keys(ours: RunConfig, theirs: RunConfig) -> list[str]:
    """Dotted names of the settings in which two runs are not the same run."""
    left, right = flatten(ours.to_dict()), flatten(theirs.to_dict())
    return [key for key in left if left[key] != right[key] and key not in FREE_KEYS]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
