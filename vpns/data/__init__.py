"""The images a run sees; add a data set as a file here and it is known by its name."""

from vpns.data.augment import make_batch
from vpns.data.base import DATASETS, ImageSet, Loader, Split, load_data, register
from vpns.data.digits import load_digits
from vpns.data.folder import load_folder
from vpns.data.letters import load_letters

__all__ = [
    "DATASETS",
    "ImageSet",
    "Loader",
    "Split",
    "load_data",
    "load_digits",
    "load_folder",
    "load_letters",
    "make_batch",
    "register",
]
