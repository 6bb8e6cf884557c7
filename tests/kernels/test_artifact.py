"""Is an artifact read as it was written, and refused as soon as a single bit differs?"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vpns_kernels import ConvGeometry, Packed, pack, parse_pattern, unpack
from vpns_kernels.engine import Artifact, ArtifactError, PlanLayer, read_artifact, write_artifact
from vpns_kernels.engine.plan import encode_plan

FILES = ("manifest.json", "plan.bin", "masks.safetensors", "weights.safetensors")
LINEAR = ConvGeometry(10, 6, (1, 1))
CONV = ConvGeometry(8, 12, (3, 3), (2, 1), (1, 1), (1, 2))
GROUPED = ConvGeometry(8, 12, (3, 3), padding=(1, 1), groups=4)
# Of plan.bin, see its docstring.
HEADER, STEP = 64, 80


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


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("templates")
    write_sample(folder / "whole")
    write_sample(folder / "small", small=True)
    return folder


@pytest.fixture
def folder(tmp_path: Path, templates: Path) -> Path:
    shutil.copytree(templates / "whole", tmp_path / "artifact")
    return tmp_path / "artifact"


@pytest.fixture
def small(tmp_path: Path, templates: Path) -> Path:
    shutil.copytree(templates / "small", tmp_path / "artifact")
    return tmp_path / "artifact"


def assert_same_packed(ours: Packed, theirs: Packed) -> None:
    assert (ours.pattern, ours.geometry) == (theirs.pattern, theirs.geometry)
    for one, other in zip((ours.values, *ours.layout), (theirs.values, *theirs.layout), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


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
        "version": (8, "<I", 2, "version 1"),
        "steps": (12, "<I", 2**32 - 1, "tables"),
        "tensors": (16, "<I", 2**32 - 1, "tables"),
        "size": (24, "<Q", 2**63, "size"),
        "names place": (48, "<Q", 2**64 - 1, "tables"),
        "names size": (56, "<Q", 2**64 - 1, "tables within"),
        "name place": (step, "<I", 0, "a name at"),
        "name size": (step + 4, "<I", 2**32 - 1, "names of"),
        "op": (step + 16, "<I", 2, "op, flags"),
        "linear conv": (step + 16, "<I", 1, "linear layer"),
        "flags": (step + 20, "<I", 4, "op, flags"),
        "first tensor": (step + 24, "<I", 0, "first tensor"),
        "tensor count": (step + 28, "<I", 5, "tensors of conv"),
        "no channels": (step + 32, "<I", 0, "in_channels"),
        "huge channels": (step + 36, "<I", 2**32 - 1, r"2\^31"),
        "other channels": (step + 36, "<I", 13, "indptr"),
        "no kernel": (step + 40, "<I", 0, "kernel_size"),
        "stride": (step + 48, "<I", 0, "stride"),
        "huge padding": (step + 56, "<I", 2**31, r"2\^31"),
        "groups": (step + 72, "<I", 3, "groups"),
        "reserved": (step + 76, "<I", 1, "reserved"),
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
    plan = b"".join(encode_plan([layer for layer, _ in make_layers().values()]))
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


def test_a_folder_that_is_no_artifact_is_left_alone(tmp_path: Path, folder: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(ArtifactError, match="expected no folder or an artifact"):
        write_sample(other)
    assert (other / "thesis.txt").read_text() == "precious"
    (folder / "thesis.txt").write_text("precious")
    with pytest.raises(ArtifactError, match=r"thesis\.txt"):
        write_sample(folder, "new")
    assert (folder / "thesis.txt").read_text() == "precious"
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ArtifactError, match="expected no folder or an artifact"):
        write_sample(tmp_path / "file")
    assert leftovers(folder) == ["file", "other"]


def test_an_artifact_is_replaced_also_through_a_link(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    write_sample(tmp_path / "link", "new", weights=False)
    assert (tmp_path / "link").is_symlink()
    assert read_artifact(folder).manifest["label"] == "new"
    assert not (folder / "weights.safetensors").exists()
    assert leftovers(folder) == ["link"]


@pytest.mark.parametrize("field", ["format_version", "files", "digest"])
def test_reserved_fields_are_refused(tmp_path: Path, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        write_artifact(tmp_path / "a", {field: 1}, [], {})


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    layer, mask = make_layer("twice", "unstructured", LINEAR)
    with pytest.raises(ValueError, match="JSON"):
        write_artifact(tmp_path / "a", {"loss": float("nan")}, [], {})
    with pytest.raises(ValueError, match="unique layer names"):
        write_artifact(tmp_path / "a", {}, [layer, layer], {})
    with pytest.raises(ValueError, match="bool mask"):
        write_artifact(tmp_path / "a", {}, [], {"m": mask.float()})
    with pytest.raises(ValueError, match="floating bias"):
        PlanLayer("b", "linear", layer.packed, torch.zeros(5))
    with pytest.raises(ValueError, match="values of channel"):
        PlanLayer(
            "b", "linear", Packed(layer.packed.values, layer.packed.layout, parse_pattern("channel"), LINEAR)
        )
    nothing = [torch.zeros(n, dtype=torch.int32) for n in (2, 0, 11, 0, 0)]
    with pytest.raises(ValueError, match=r"2\^31 entries in whole blocks"):
        PlanLayer(
            "huge blocks of which there are none",
            "linear",
            Packed(
                torch.zeros(0, 2**20, 2**20), tuple(nothing), parse_pattern("block:1048576x1048576"), LINEAR
            ),
        )
    assert list(tmp_path.iterdir()) == []


def test_a_path_below_a_regular_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    for folder in (tmp_path / "file" / "a", tmp_path / "file" / "a" / "b"):
        with pytest.raises(OSError, match=r"cannot write .*: Not a directory"):
            write_sample(folder)
        with pytest.raises(ArtifactError, match="Not a directory"):
            read_artifact(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from vpns_kernels.engine import read_artifact, write_artifact
folder, weights = Path(sys.argv[1]), {"w": torch.zeros(300_000)}
for limit in (100, 50_000, 1_000_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    masks = {"m": torch.zeros(800_000, dtype=torch.bool)}
    for target in (folder, folder.with_name("fresh")):
        try:
            write_artifact(target, {"label": "new"}, [], masks, weights)
            sys.exit("it was written")
        except OSError as error:
            assert "cannot write" in str(error) and "File too large" in str(error), error
assert read_artifact(folder, verify="all").manifest["label"] == "old"
"""


def test_a_full_disk_leaves_the_old_artifact_and_nothing_else(folder: Path) -> None:
    subprocess.run([sys.executable, "-c", FULL_DISK, str(folder)], check=True, timeout=60)
    assert leftovers(folder) == []
    read_artifact(folder, verify="all")


OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def die_before(operation: int) -> None:
    """From now on, end this process just before its n-th operation on files, as a power cut would."""
    count = 0

    def step() -> None:
        nonlocal count
        if count == operation:
            os._exit(9)
        count += 1

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event in OPERATIONS:
            step()

    sync = os.fsync

    def sync_or_die(fd: Any) -> None:
        step()
        sync(fd)

    os.fsync = sync_or_die
    sys.addaudithook(watch)


def write_and_die(folder: Path, label: str, operation: int) -> bool:
    """Whether the writer, a process of its own, lived to its end."""
    with warnings.catch_warnings():
        # Forking a process with threads; the child does nothing that needs them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            die_before(operation)
            write_artifact(
                folder, {"label": label}, [], {"m": torch.ones(9, dtype=torch.bool)}, {"w": torch.ones(5)}
            )
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 0


def test_a_writer_killed_before_any_file_operation_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    found, operation, is_done = [], 0, False
    while not is_done:
        folder = tmp_path / f"{operation}" / "artifact"
        write_sample(folder, small=True)
        is_done = write_and_die(folder, "new", operation)
        found.append(read_artifact(folder, verify="all").manifest["label"])
        # What was left must not stop the next writer, and goes with it.
        write_sample(folder, "next", small=True)
        assert read_artifact(folder, verify="all").manifest["label"] == "next"
        assert leftovers(folder) == []
        operation += 1
    assert found == sorted(found, reverse=True)
    assert set(found) == {"old", "new"}
    assert len(found) > 25


def test_a_first_writer_killed_before_any_file_operation_leaves_nothing_or_all(tmp_path: Path) -> None:
    is_there, operation, is_done = [], 0, False
    while not is_done:
        folder = tmp_path / f"{operation}" / "artifact"
        is_done = write_and_die(folder, "new", operation)
        try:
            is_there.append(read_artifact(folder, verify="all").manifest["label"] == "new")
        except ArtifactError:
            assert not folder.exists()
            is_there.append(False)
        write_sample(folder, "next", small=True)
        assert leftovers(folder) == []
        operation += 1
    assert is_there == sorted(is_there)
    assert set(is_there) == {False, True}


def test_a_failure_at_any_file_operation_leaves_the_old_artifact_and_nothing_else(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors instead of kills. Where only the last sync fails, the new one is there, the old one aside."""
    for name, new_after_error in (("mkdir", 0), ("rename", 0), ("fsync", 1)):
        found: list[tuple[bool, str, bool]] = []
        while not found or found[-1][0]:
            write_sample(small, small=True)
            with monkeypatch.context() as patch:
                patch.setattr(os, name, fail_at(getattr(os, name), len(found)))
                has_failed = is_failing(small)
            label = read_artifact(small, verify="all").manifest["label"]
            found.append((has_failed, label, leftovers(small) == []))
        assert found[-1] == (False, "new", True)
        last = len(found) - 1 - new_after_error
        assert found[:last] == [(True, "old", True)] * last
        assert found[last:-1] == [(True, "new", False)] * new_after_error
        assert last > 0


def fail_at(function: Callable[..., Any], failing: int) -> Callable[..., Any]:
    calls = iter(range(1000))

    def fail(*args: Any, **named: Any) -> Any:
        if next(calls) == failing:
            raise OSError(5, "Input/output error")
        return function(*args, **named)

    return fail


def is_failing(folder: Path) -> bool:
    try:
        write_sample(folder, "new", small=True)
    except OSError as error:
        return "cannot write" in str(error) and "Input/output error" in str(error)
    return False


def test_readers_see_the_old_or_the_new_while_it_is_replaced_again_and_again(folder: Path) -> None:
    write_artifact(folder, {"label": "0"}, [], {"m": torch.tensor([False])})
    stop, labels = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            artifact = read_artifact(folder, verify="all")
            assert int(artifact.masks["m"].numel()) == int(artifact.manifest["label"]) + 1
            labels.append(int(artifact.manifest["label"]))

    failures: list[BaseException] = []

    def read_and_tell() -> None:
        try:
            read()
        except BaseException as error:
            failures.append(error)
            raise

    reader = threading.Thread(target=read_and_tell)
    reader.start()
    for number in range(1, 25):
        write_artifact(folder, {"label": str(number)}, [], {"m": torch.zeros(number + 1, dtype=torch.bool)})
    stop.set()
    reader.join()
    assert failures == []
    assert labels == sorted(labels)
    assert len(set(labels)) > 3
