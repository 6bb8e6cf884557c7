"""The networks a run can prune; add a family as a file here and its members are known by name."""

from vpns.models.base import MODELS, Architecture, build_model, register
from vpns.models.head import find_head, replace_head
from vpns.models.resnet import resnet18, resnet50
from vpns.models.vgg import vgg16, vgg16_bn
from vpns.models.weights import load_exactly, load_weights

__all__ = [
    "MODELS",
    "Architecture",
    "build_model",
    "find_head",
    "load_exactly",
    "load_weights",
    "register",
    "replace_head",
    "resnet18",
    "resnet50",
    "vgg16",
    "vgg16_bn",
]
