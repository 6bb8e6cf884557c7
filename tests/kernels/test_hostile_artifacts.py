"""Is an artifact refused as soon as a single bit differs, or lies under a right digest?"""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.artifacts import (
    FILES,
    HEADER,
    STEP,
    make_layers,
    resign,
    use_all,
)
from vpns_kernels import unpack
from vpns_kernels.engine import ArtifactError, read_artifact
from vpns_kernels.engine.plan import plan_of_layers
from vpns_kernels.engine.plan_file import encode_plan


@pytest.mark.parametrize("name", FILES)
def test_a_missing_a_truncated_and_a_special_file_are_refused(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=name):
        read_artifact(folder, verify="all")
    path.unlink()
    with pytest.raises(ArtifactError, match=f"{name}, got: No such file"):
        read_artifact(folder, verify="all")
    os.mkfifo(path)
    with pytest.raises(ArtifactError, match=f"regular file at .*{name}"):
        read_artifact(folder, verify="all")
    path.unlink()
    path.mkdir()
    with pytest.raises(ArtifactError, match=name):
        read_artifact(folder, verify="all")


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="No such file"):
        read_artifact(tmp_path / "none")


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer": (lambda m: m.update(format_version=2), "format_version 1"),
    "truth for one": (lambda m: m.update(format_version=True), "format_version 1"),
    "no files": (lambda m: m.pop("files"), r"files plan\.bin"),
    "no plan": (lambda m: m["files"].pop("plan.bin"), r"files plan\.bin"),
    "path": (lambda m: m["files"].update({"../plan.bin": m["files"]["plan.bin"]}), r"\.\./plan\.bin"),
    "absolute": (lambda m: m["files"].update({"/etc/passwd": m["files"]["plan.bin"]}), "/etc/passwd"),
    "huge": (lambda m: m["files"]["plan.bin"].update(bytes=10**30), r"bytes in .*plan\.bin"),
    "negative": (lambda m: m["files"]["plan.bin"].update(bytes=-1), r"bytes in .*plan\.bin"),
    "size as text": (lambda m: m["files"]["plan.bin"].update(bytes="1"), r"sha256 of plan\.bin"),
    "digest as list": (lambda m: m["files"]["plan.bin"].update(sha256=[]), r"sha256 of plan\.bin"),
    "entry as list": (lambda m: m["files"].update({"plan.bin": []}), r"sha256 of plan\.bin"),
}


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES.keys())
def test_a_manifest_that_lies_under_a_right_digest_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    resign(folder, change)
    with pytest.raises(ArtifactError, match=reason):
        read_artifact(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "[" * 100_000, '{"digest": NaN}', "{}", "\x00", '{"a": 1e999}', "9" * 5000]
)
def test_a_manifest_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        read_artifact(folder)


def test_a_huge_manifest_is_refused_unread(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 1 << 42)
    with pytest.raises(ArtifactError, match="at most"):
        read_artifact(folder)


def plan_cases() -> dict[str, tuple[int, str, int, str]]:
    """Offset in plan.bin, format, what is put there, and the reason to refuse it."""
    step = HEADER + STEP * 1
    made = [layer for layer, _ in make_layers().values()]
    before = 1 + len(made[0].packed.layout) + (made[0].bias is not None)
    tensor = HEADER + STEP * len(made) + 64 * before
    return {
        "magic": (0, "<B", 0, "magic"),
        "newer": (8, "<I", 4, r"version 3, got 4 \(newer"),
        "older": (8, "<I", 2, r"version 3, got 2 \(older"),
        "steps": (12, "<I", 2**32 - 1, "tables"),
        "tensors": (16, "<I", 2**32 - 1, "tables"),
        "values": (20, "<I", 2**32 - 1, "tables"),
        "size": (24, "<Q", 2**63, "size"),
        "names place": (56, "<Q", 2**64 - 1, "tables"),
        "names size": (64, "<Q", 2**64 - 1, "tables within"),
        "input": (72, "<I", 0, "a value below 0 or none"),
        "images": (80, "<I", 0, "1 to 4096 images"),
        "flat": (84, "<I", 2, "0 or 1 for a flat output"),
        "reserved": (88, "<I", 1, "reserved"),
        "name place": (step, "<I", 0, "a name at"),
        "name size": (step + 4, "<I", 2**32 - 1, "names of"),
        "pattern place": (step + 8, "<I", 0, "a name at"),
        "kernel place": (step + 16, "<I", 0, "a name at"),
        "op": (step + 24, "<I", 11, "op, flags"),
        "other op": (step + 24, "<I", 2, "no weights"),
        "linear conv": (step + 24, "<I", 1, "linear layer"),
        "flags": (step + 28, "<I", 16, "op, flags"),
        "first tensor": (step + 32, "<I", 0, "first tensor"),
        "tensor count": (step + 36, "<I", 5, "tensors of conv"),
        "read value": (step + 40, "<I", 0, "a value below 0 or none"),
        "activation": (step + 56, "<I", 8, "op, flags"),
        "no channels": (step + 60, "<I", 0, "in_channels"),
        "huge channels": (step + 64, "<I", 2**32 - 1, r"2\^31"),
        "other channels": (step + 64, "<I", 13, "indptr"),
        "no kernel": (step + 68, "<I", 0, "kernel_size"),
        "stride": (step + 76, "<I", 0, "stride"),
        "huge padding": (step + 84, "<I", 2**31, r"2\^31"),
        "groups": (step + 100, "<I", 3, "groups"),
        "reserved of a step": (step + 104, "<I", 1, "reserved"),
        "dtype": (tensor + 8, "<I", 9, "dtype, rank"),
        "half indices": (tensor + 64 + 8, "<I", 5, "within the file"),
        "wrong dtype": (tensor + 8, "<I", 1, "within the file"),
        "rank": (tensor + 12, "<I", 5, "dtype, rank"),
        "huge shape": (tensor + 16, "<Q", 2**62, "dtype, rank"),
        "shape": (tensor + 16, "<Q", 1, "within the file"),
        "shape beyond rank": (tensor + 24, "<Q", 1, "dtype, rank"),
        "offset": (tensor + 48, "<Q", 2**64 - 64, "within the file"),
        "offset elsewhere": (tensor + 48, "<Q", 64, "within the file"),
        "bytes": (tensor + 56, "<Q", 2**63, "within the file"),
        "gap": (tensor_gap(), "<B", 1, "zeros before"),
    }


def tensor_gap() -> int:
    """Offset of the byte before the second tensor's data, which no tensor holds."""
    plan = b"".join(encode_plan(plan_of_layers([layer for layer, _ in make_layers().values()])))
    offset: int = struct.unpack_from("<Q", plan, HEADER + STEP * len(make_layers()) + 64 + 48)[0]
    return offset - 1


@pytest.mark.parametrize("case", plan_cases())
def test_a_plan_that_lies_under_right_digests_is_refused(folder: Path, case: str) -> None:
    place, form, value, reason = plan_cases()[case]
    data = bytearray((folder / "plan.bin").read_bytes())
    struct.pack_into(form, data, place, value)
    (folder / "plan.bin").write_bytes(data)
    resign(folder)
    with pytest.raises(ArtifactError, match=rf"plan\.bin: .*{reason}"):
        read_artifact(folder)


@pytest.mark.parametrize("value", [-1, 2**31 - 1])
@pytest.mark.parametrize("part", range(5))
def test_a_hostile_index_under_right_digests_is_refused(folder: Path, part: int, value: int) -> None:
    """The last entry of each index array of the first layer."""
    steps = len(make_layers())
    data = bytearray((folder / "plan.bin").read_bytes())
    offset, size = struct.unpack_from("<2Q", data, HEADER + STEP * steps + 64 * (1 + part) + 48)
    struct.pack_into("<i", data, offset + size - 4, value)
    (folder / "plan.bin").write_bytes(data)
    resign(folder)
    with pytest.raises(ArtifactError, match=r"plan\.bin: layer linear_bias: layout: expected"):
        read_artifact(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"[6, 10, 1, 1]", b"[6, 10, 1, 2]"),
        (b"[6, 10, 1, 1]", b"[6, 10, 1,-1]"),
        (b"[6, 10, 1, 1]", b"[9999999,999]"),
        (b"[6, 10, 1, 1]", b"[0,9999999,0]"),
        (b"[6, 10, 1, 1]", b"6            "),
        (b"linear_bias", b"linear_bia\xff"),
        (b"linear_bias", b"linear_bia5"),
        (b'"shapes"', b'"shaqes"'),
        (b'"U8"', b'"I8"'),
    ],
)
def test_masks_that_lie_under_right_digests_are_refused(folder: Path, old: bytes, new: bytes) -> None:
    path = folder / "masks.safetensors"
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    resign(folder)
    artifact = read_artifact(folder)
    with pytest.raises(ArtifactError, match=r"masks\.safetensors"):
        _ = artifact.masks


def mutate(data: bytes, chance: random.Random) -> bytes:
    kind, place = chance.randrange(3), chance.randrange(len(data))
    if kind == 0:
        return data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :]
    if kind == 1:
        return data[:place]
    return data[:place] + chance.choice([chance.randbytes(chance.randint(1, 70)), b" ", b"\n"]) + data[place:]


def test_none_of_300_mutations_is_accepted_and_each_is_an_artifact_error(small: Path) -> None:
    chance = random.Random(7)
    for number in range(300):
        path = small / FILES[number % len(FILES)]
        data = path.read_bytes()
        path.write_bytes(mutate(data, chance))
        with pytest.raises(ArtifactError, match=path.name):
            read_artifact(small, verify="all")
        path.write_bytes(data)
    use_all(read_artifact(small, verify="all"))


def test_300_mutations_under_right_digests_are_valid_or_an_artifact_error(small: Path) -> None:
    """Without help from the digests: what is accepted is a valid plan of other values."""
    chance, refused = random.Random(8), 0
    originals = {name: (small / name).read_bytes() for name in FILES}
    for number in range(300):
        name = FILES[1 + number % 3]
        data = bytearray(originals[name])
        # Most of a file is values, where every bit is legal: aim at the tables in two of three cases.
        place = chance.randrange(len(data) if number % 9 < 3 else len(data) // 3)
        data[place] ^= 1 << chance.randrange(8)
        (small / name).write_bytes(data if chance.random() < 0.8 else mutate(bytes(data), chance))
        resign(small)
        try:
            for layer in read_artifact(small, verify="all").layers:
                unpack(layer.packed.values, layer.packed.layout, layer.packed.geometry)
        except ArtifactError:
            refused += 1
        for changed in (name, "manifest.json"):
            (small / changed).write_bytes(originals[changed])
    assert 150 < refused < 300
