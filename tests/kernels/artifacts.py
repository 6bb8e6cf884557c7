"""Small artifacts, and manifests that are signed again after a change."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpns_kernels import ConvGeometry, Packed, pack, parse_pattern, unpack
from vpns_kernels.engine import Artifact, PlanLayer, write_artifact

FILES = ("manifest.json", "plan.bin", "masks.safetensors", "weights.safetensors")
LINEAR = ConvGeometry(10, 6, (1, 1))
CONV = ConvGeometry(8, 12, (3, 3), (2, 1), (1, 1), (1, 2))
GROUPED = ConvGeometry(8, 12, (3, 3), padding=(1, 1), groups=4)
# Of plan.bin, see the docstring of plan_file.
HEADER, STEP = 96, 112


def make_layer(
    name: str, spec: str, geometry: ConvGeometry, dtype: torch.dtype = torch.float32
) -> tuple[PlanLayer, Tensor]:
    """A layer and its mask; about a third is kept."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    weight = torch.randn(geometry.weight_shape, generator=generator)
    pattern = parse_pattern(spec)
    mask = torch.rand(pattern.units_shape(geometry.weight_shape), generator=generator) < 0.3
    mask = pattern.expand(mask, geometry.weight_shape).contiguous()
    is_linear = geometry.kernel_size == (1, 1)
    bias = torch.randn(geometry.out_channels, generator=generator).to(dtype) if "bias" in name else None
    packed = pack(weight, mask, pattern, geometry, dtype)
    return PlanLayer(name, "linear" if is_linear else "conv2d", packed, bias, "torch" not in name), mask


@functools.cache
def make_layers() -> dict[str, tuple[PlanLayer, Tensor]]:
    rows: list[tuple[str, str, ConvGeometry, torch.dtype]] = [
        ("linear_bias", "unstructured", LINEAR, torch.float32),
        ("conv", "unstructured", CONV, torch.bfloat16),
        ("grouped_bias", "unstructured", GROUPED, torch.float32),
        ("block_bias", "block:8x4", CONV, torch.bfloat16),
        ("block_grouped", "block:3x2", GROUPED, torch.float64),
        ("block_linear", "block:4x4", LINEAR, torch.float32),
        ("channel_torch", "channel", CONV, torch.float32),
        ("half_bias", "unstructured", CONV, torch.float16),
        ("half_block", "block:3x2", GROUPED, torch.float16),
    ]
    return {row[0]: make_layer(*row) for row in rows}


def write_sample(folder: Path, label: str = "old", weights: bool = True, small: bool = False) -> None:
    made = make_layers()
    if small:
        made = {name: made[name] for name in ("grouped_bias", "block_linear", "half_bias")}
    dense = {
        name: unpack(m.packed.values, m.packed.layout, m.packed.geometry) for name, (m, _) in made.items()
    }
    write_artifact(
        folder,
        {"label": label, "density": 0.3, "label_map": (2, 0, 1), "model": {"name": "sample"}},
        [layer for layer, _ in made.values()],
        {name: mask for name, (_, mask) in made.items()},
        dense | {"step": torch.tensor(3)} if weights else None,
    )


def resign(folder: Path, change: Callable[[dict[str, Any]], None] = lambda content: None) -> None:
    """Make sizes and digests right again, as someone who wants to deceive would."""
    content = json.loads((folder / "manifest.json").read_text())
    for name, entry in content["files"].items():
        data = (folder / name).read_bytes()
        entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    change(content)
    content.pop("digest")
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["digest"] = hashlib.sha256(canonical.encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(content, indent=2) + "\n")


def use_all(artifact: Artifact) -> None:
    assert artifact.masks is not None
    _ = artifact.weights


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir() if path.name != folder.name)


def assert_same_packed(ours: Packed, theirs: Packed) -> None:
    assert (ours.pattern, ours.geometry) == (theirs.pattern, theirs.geometry)
    for one, other in zip((ours.values, *ours.layout), (theirs.values, *theirs.layout), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
