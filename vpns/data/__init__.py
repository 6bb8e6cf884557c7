"""The images a run sees; add a data set as a file here and it is known by its name."""

from vpns.data import (
    cars,
    cifar,
    digits,
    flowers_coop,
    folder,
    imagenet,
    letters,
    tiny_imagenet,
    torchvision_sets,
)
from vpns.data.augment import crop_from, make_batch
from vpns.data.base import DATASETS, ImageSet, Loader, Split, load_data, register
from vpns.data.digits import load_digits
from vpns.data.letters import load_letters
from vpns.data.listing import LAYOUTS

__all__ = [
    "DATASETS",
    "LAYOUTS",
    "ImageSet",
    "Loader",
    "Split",
    "cars",
    "cifar",
    "crop_from",
    "digits",
    "flowers_coop",
    "folder",
    "imagenet",
    "letters",
    "load_data",
    "load_digits",
    "load_letters",
    "make_batch",
    "register",
    "tiny_imagenet",
    "torchvision_sets",
]
