"""Is an artifact read as it was written?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kernels.artifacts import (
    CONV,
    FILES,
    assert_same_packed,
    make_layers,
    write_sample,
)
from vpns_kernels import pack, parse_pattern, unpack
from vpns_kernels.engine import ArtifactError, PlanLayer, read_artifact, write_artifact


def test_what_is_read_is_what_was_written(folder: Path) -> None:
    artifact = read_artifact(folder, verify="all")
    made = make_layers()
    assert [layer.name for layer in artifact.layers] == list(made)
    for layer in artifact.layers:
        written, mask = made[layer.name]
        assert (layer.op, layer.native) == (written.op, written.native)
        assert_same_packed(layer.packed, written.packed)
        if written.bias is None:
            assert layer.bias is None
        else:
            assert layer.bias is not None
            assert torch.equal(layer.bias, written.bias)
        assert layer.packed.values.data_ptr() % 64 == 0 or not layer.packed.values.numel()
        assert torch.equal(artifact.masks[layer.name], mask)
    assert artifact.weights is not None
    assert artifact.weights.keys() == {*made, "step"}
    assert artifact.weights["step"] == 3
    conv = made["conv"][0].packed
    assert torch.equal(artifact.weights["conv"], unpack(conv.values, conv.layout, conv.geometry))
    assert artifact.manifest["label_map"] == [2, 0, 1]
    assert artifact.manifest["format_version"] == 1


def test_an_artifact_without_layers_masks_and_weights_is_one(tmp_path: Path) -> None:
    write_artifact(tmp_path / "deep" / "er" / "a", {}, [], {})
    artifact = read_artifact(tmp_path / "deep" / "er" / "a", verify="all")
    assert (artifact.layers, artifact.masks, artifact.weights) == ((), {}, None)


def test_masks_of_any_shape_come_back(tmp_path: Path) -> None:
    masks = {str(shape): torch.rand(shape) < 0.5 for shape in ((), (0, 3), (1,), (8,), (9,), (3, 5, 7))}
    write_artifact(tmp_path / "a", {}, [], masks)
    found = read_artifact(tmp_path / "a").masks
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())


def test_a_layer_with_nothing_kept_comes_back(tmp_path: Path) -> None:
    for number, spec in enumerate(("unstructured", "block:4x4", "channel")):
        mask = torch.zeros(CONV.weight_shape, dtype=torch.bool)
        packed = pack(torch.ones(CONV.weight_shape), mask, parse_pattern(spec), CONV)
        write_artifact(tmp_path / str(number), {}, [PlanLayer("none", "conv2d", packed)], {})
        assert_same_packed(read_artifact(tmp_path / str(number)).layers[0].packed, packed)


def test_writing_twice_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_sample(tmp_path / "again")
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in FILES)


def test_files_that_are_not_used_are_not_hashed(folder: Path) -> None:
    for name in ("masks.safetensors", "weights.safetensors"):
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)
    artifact = read_artifact(folder)
    with pytest.raises(ArtifactError, match=r"SHA-256 .*masks\.safetensors"):
        _ = artifact.masks
    with pytest.raises(ArtifactError, match=r"SHA-256 .*weights\.safetensors"):
        _ = artifact.weights
    with pytest.raises(ArtifactError, match="SHA-256"):
        read_artifact(folder, verify="all")
