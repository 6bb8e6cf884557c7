"""How do masks and weights lie in safetensors? Masks 8 to a byte; weights as a plain state_dict.

A mask is stored flat, its first entry in the lowest bit of the first byte, zeros behind the last; the
metadata "shapes" holds the masks' shapes as JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vpns_kernels.engine.files import refuse

_MAX_RANK, _LIMIT = 8, 2**40


def encode_weights(weights: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of a state_dict; tensors that share memory are each stored whole."""
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in weights.items()
    }
    encoded: bytes = save(plain)
    return encoded


def decode_weights(data: Tensor, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ArtifactError where it is none."""
    try:
        tensors: dict[str, Tensor] = load(data.numpy().tobytes())
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise refuse(path, "safetensors", str(error)) from error
    return tensors


def check_masks(masks: Mapping[str, Tensor]) -> None:
    """ValueError where a mask cannot be stored."""
    for name, mask in masks.items():
        if mask.dtype != torch.bool or mask.dim() > _MAX_RANK:
            raise ValueError(
                f"write_artifact: expected a bool mask of rank <= {_MAX_RANK} as {name}, "
                f"got {mask.dtype} {list(mask.shape)}"
            )


def encode_masks(masks: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of bool masks, 8 to a byte."""
    flat = {name: mask.detach().cpu().contiguous().numpy().reshape(-1) for name, mask in masks.items()}
    packed = {name: torch.from_numpy(np.packbits(bits, bitorder="little")) for name, bits in flat.items()}
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    encoded: bytes = save(packed, {"shapes": json.dumps(shapes)})
    return encoded


def decode_masks(data: Tensor, path: Path) -> dict[str, Tensor]:
    """The masks of a file that encode_masks wrote; ArtifactError where it is none."""
    packed, raw = decode_weights(data, path), data.numpy()
    try:
        # load() has checked the header, but does not give its metadata.
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8].tobytes(), "little")].tobytes())
        shapes = json.loads(header["__metadata__"]["shapes"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise refuse(path, "metadata with the masks' shapes", repr(error)) from error
    if not isinstance(shapes, dict) or shapes.keys() != packed.keys():
        raise refuse(path, f"a shape of each of {sorted(packed)[:5]} ...", repr(shapes)[:200])
    return {name: _unpack(path, name, packed[name], shape) for name, shape in shapes.items()}


def _unpack(path: Path, name: str, packed: Tensor, shape: Any) -> Tensor:
    is_shape = isinstance(shape, list) and len(shape) <= _MAX_RANK
    is_shape = is_shape and all(type(extent) is int and extent >= 0 for extent in shape)
    is_shape = is_shape and math.prod(max(1, extent) for extent in shape) < _LIMIT
    count = math.prod(shape) if is_shape else -1
    if count < 0 or packed.dtype != torch.uint8 or packed.shape != (-(-count // 8),):
        raise refuse(
            path, f"{name} with a shape that fits {packed.dtype} {list(packed.shape)}", repr(shape)[:200]
        )
    bits = np.unpackbits(packed.numpy(), bitorder="little")
    if bits[count:].any():
        raise refuse(path, f"zeros behind the last bit of {name}", "others")
    return torch.from_numpy(bits[:count].astype(bool)).reshape(shape)
