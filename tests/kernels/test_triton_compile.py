"""Do Triton's kernels compile for sm_80 and sm_90, to tensor-core instructions and without spilling?

Compilation and Triton's interpreter exclude each other in one process: these tests are for one without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from bench.compile_triton import table
from bench.triton_build import Specialised, build, products, resources, tile_key, why_no_wgmma
from bench.triton_calls import DTYPES, MAIN, Call, calls, distinct_layers, ops_with_triton
from bench.triton_programs import Programs, complaints
from vpns_kernels.ops._triton.backend import is_interpreted
from vpns_kernels.ops._triton.launch import Launch, describe

pytestmark = pytest.mark.skipif(is_interpreted(), reason="Triton's interpreter is on: nothing is compiled")
# The layer that asks most of kernels: 3x3 with stride 2; of prompts, a network's first.
HARDEST, FIRST = "resnet18.layer2.0.conv1", "resnet18.conv1"


@triton.jit
def multiply(
    x, w_ptr, y_ptr, count, scale, bias_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS
    offs_n = tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, 32):
        offs_k = start + tl.arange(0, 32)
        w = tl.load(w_ptr + offs_k[:, None] * COLUMNS + offs_n[None, :])
        acc = tl.dot(x.load([row, start]), w, acc)
    offs_m = row + tl.arange(0, ROWS)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n)[None, :]
    tl.store(y_ptr + offs_m[:, None] * COLUMNS + offs_n[None, :], (acc * scale).to(y_ptr.dtype.element_ty))


def multiplication(rows: int = 64, columns: int = 64, dtype: torch.dtype = torch.bfloat16) -> Launch:
    x, w = torch.empty(256, 128, dtype=dtype), torch.empty(128, columns, dtype=dtype)
    args = {"x": describe(x, [rows, 32]), "w_ptr": w, "y_ptr": torch.empty(256, columns)}
    args |= {"count": 128, "scale": 0.5, "bias_ptr": None}
    return Launch(multiply, (256 // rows,), args, {"ROWS": rows, "COLUMNS": columns}, warps=4, stages=3)


def call_of(launch: Launch, op: str = "sparse_conv2d", arch: int = 90) -> Call:
    return Call(op, "forward", "resnet18.conv1", "bfloat16", "block:64x64", arch, (launch,))


def test_arguments_are_typed_as_the_jit_types_them() -> None:
    found = Specialised(multiplication(), 90)
    assert found.signature == {
        "x": "tensordesc<bf16[64, 32]>",
        "w_ptr": "*bf16",
        "y_ptr": "*fp32",
        "count": "i32",
        "scale": "fp32",
    }
    assert found.constants == {"bias_ptr": "None", "ROWS": "64", "COLUMNS": "64"}


def test_launches_that_differ_in_numbers_alone_are_one_program_and_others_are_not() -> None:
    launch = multiplication()
    key = Specialised(launch, 90).key

    def key_with(**changes: object) -> object:
        return Specialised(replace(launch, args={**launch.args, **changes}), 90).key

    assert key_with(count=256) == key
    # Ones are compiled in, multiples of 16 are known to be such, and 64 bits are another type.
    assert len({key, *(key_with(count=count) for count in (1, 8, 2**40))}) == 4
    assert key_with(w_ptr=torch.empty(128, 64)) != key
    assert Specialised(launch, 80).key != key
    assert Specialised(replace(launch, warps=8), 90).key != key
    assert Specialised(replace(launch, stages=2), 90).key != key
    assert Specialised(replace(launch, constants={"ROWS": 64, "COLUMNS": 32}), 90).key != key


@pytest.mark.parametrize(
    ("arch", "dtype", "instructions"),
    [
        (80, torch.bfloat16, ("mma_sync", "async_copies")),
        (90, torch.float16, ("wgmma", "tma_loads")),
    ],
)
def test_a_product_of_halves_is_found_on_tensor_cores(
    arch: int, dtype: torch.dtype, instructions: Sequence[str]
) -> None:
    row = build(Specialised(multiplication(dtype=dtype), arch))
    assert all(row[name] > 0 for name in instructions)
    assert row["products"] == [(64, 64)]
    assert row["stack_bytes"] == row["local_bytes"] == 0
    assert 32 <= row["registers"] <= 255
    assert row["shared_bytes"] > 0
    (row,) = Programs([call_of(multiplication(dtype=dtype), arch=arch)]).compile()
    assert row["complaints"] == []


def test_what_spills_is_complained_of_in_main_kernels_only() -> None:
    launch = multiplication(rows=128, columns=256)
    main, other = (Programs([call_of(launch, op)]).compile()[0] for op in ("sparse_conv2d", "channel_mask"))
    assert main["stack_bytes"] > 0
    assert "spills" in main["complaints"][0]
    assert other["complaints"] == []


def test_complaints_name_missing_instructions_and_too_much_memory() -> None:
    row = {
        "arch": "sm_90",
        "is_main": True,
        "shared_bytes": 0,
        "stack_bytes": 0,
        "local_bytes": 0,
        "warps": 4,
    }
    row |= {"products": [(64, 32)], "wgmma": 8, "mma_sync": 0}
    assert complaints(row) == []
    assert complaints(row | {"wgmma": 0}) == ["its products are not on tensor cores"]
    assert complaints(row | {"wgmma": 0, "mma_sync": 8}) == ["its products are not wgmma"]
    assert complaints(row | {"wgmma": 0, "mma_sync": 8, "products": [(32, 64)]}) == []
    assert complaints(row | {"arch": "sm_80", "wgmma": 0, "mma_sync": 8}) == []
    assert complaints(row | {"shared_bytes": 232449}) == ["232449 bytes of shared memory, there are 232448"]
    assert complaints(row | {"wgmma": 0, "is_main": False}) == []


def test_small_tiles_have_a_reason_for_the_older_instruction() -> None:
    row = {"arch": "sm_90", "warps": 4, "products": [(32, 64), (16, 64)]}
    assert why_no_wgmma(row) == "32 rows of a tile are less than its 64"
    assert why_no_wgmma(row | {"products": [(16, 64), (128, 64)]}) is None
    assert why_no_wgmma(row | {"products": [(64, 64)], "warps": 2}) == "2 warps are no group of four"


def test_a_pass_that_multiplies_nowhere_is_named() -> None:
    programs = Programs([call_of(multiplication())])
    row = {"is_main": True, "products": [(64, 64)], "passes": ["sparse_conv2d forward"]}
    assert programs.passes_without_product([row]) == []
    assert programs.passes_without_product([row | {"products": []}]) == ["sparse_conv2d forward"]
    for other in ({"dtype": "float32"}, {"op": "channel_mask"}, {"refusal": "it takes others"}):
        assert Programs([replace(call_of(multiplication()), **other)]).passes_without_product([]) == []


def test_resources_and_products_are_read_from_what_the_tools_write() -> None:
    usage = "Fatbin elf code:\n Function f:\n  REG:58 STACK:16 SHARED:0 LOCAL:8 CONSTANT[0]:600 TEXTURE:0\n"
    assert resources(usage) == {"registers": 58, "stack_bytes": 16, "local_bytes": 8}
    line = "%0 = tt.dot %a, %b, %c : tensor<64x32xbf16> * tensor<32x128xbf16> -> tensor<64x128xf32>\n"
    assert products(line + line) == [(64, 128)]


def test_a_program_is_compiled_once_for_all_calls_that_start_it() -> None:
    launch = multiplication()
    same = replace(launch, args={**launch.args, "count": 256})
    found = [call_of(launch, arch=80), replace(call_of(same, arch=80), layer="resnet50.fc", dtype="float16")]
    (row,) = Programs(found).compile()
    assert row["layers"] == ["resnet18.conv1", "resnet50.fc"]
    assert row["passes"] == ["sparse_conv2d forward"]
    assert "multiply" in table([row])


def test_one_size_stands_for_the_others_unless_all_are_wanted() -> None:
    launch = multiplication()
    sizes = [replace(launch, args={**launch.args, "count": count}) for count in (128, 100)]
    assert len({tile_key(size, 80) for size in sizes}) == 1
    found = [call_of(size, arch=80) for size in sizes]
    assert len(Programs(found, every_size=True).compile()) == 2
    others = [
        replace(launch, constants={"ROWS": 64, "COLUMNS": 32}),
        replace(launch, args={**launch.args, "w_ptr": torch.empty(128, 64)}),
        replace(launch, args={**launch.args, "x": describe(launch.args["x"].base, [64, 64])}),
        replace(launch, args={**launch.args, "bias_ptr": torch.empty(64)}),
        replace(launch, warps=8),
    ]
    assert len({tile_key(other, 80) for other in [launch, *others]}) == 6


def test_every_layer_of_the_lists_is_taken_once() -> None:
    layers = distinct_layers()
    assert len({(layer.geometry, layer.height, layer.width) for layer in layers}) == len(layers) == 43
    assert {FIRST, HARDEST, "vgg16.classifier.0"} <= {layer.name for layer in layers}


@pytest.mark.parametrize("op", ops_with_triton())
def test_the_kernels_of_an_op_compile_for_its_hardest_layer(op: str) -> None:
    wanted = FIRST if op == "prompt_conv2d" else HARDEST
    layers = [layer for layer in distinct_layers() if layer.name == wanted]
    dtype = "float32" if op == "select_threshold" else "bfloat16"
    programs = Programs(calls([op], layers, [dtype], ["block:64x64", "channel"], batch=32))
    rows = programs.compile()
    assert rows
    assert [row["complaints"] for row in rows if row["complaints"]] == []
    assert programs.passes_without_product(rows) == []


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("op", "layer", "pattern"),
    [
        # Four classes of pixels, an epilogue, and a tile of 64 images, of which ptxas spared no register.
        ("sparse_conv2d_fused", HARDEST, "block:32x32"),
        ("sparse_conv2d", "resnet18.fc", "block:32x32"),
        ("masked_conv2d", HARDEST, "block:64x64"),
        ("masked_conv2d", "vgg16.features.7", "block:64x64"),
        ("sparse_conv2d", "resnet18.layer3.0.conv2", "block:64x64"),
        ("prompt_conv2d", FIRST, ""),
    ],
)
def test_no_convolution_spills_in_float32(op: str, layer: str, pattern: str, arch: int) -> None:
    layers = [found for found in distinct_layers() if found.name == layer]
    rows = Programs(calls([op], layers, ["float32"], [pattern], [arch])).compile()
    assert rows
    spilt = [row for row in rows if row["stack_bytes"] or row["local_bytes"]]
    assert not [(row["kernel"], row["constants"], row["stack_bytes"]) for row in spilt]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_before_hopper_blocks_are_copied_asynchronously_sixteen_bytes_at_a_time(dtype: str) -> None:
    layers = [found for found in distinct_layers() if found.name == HARDEST]
    found = calls(["masked_conv2d"], layers, [dtype], ["block:64x64"], [80])
    rows = [row for row in Programs(found).compile() if row["products"]]
    # Forward, input gradient and score gradient.
    assert len({row["passes"][0] for row in rows}) == 3
    assert all(row["async_copies"] == row["wide_copies"] > 0 for row in rows)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("op", ops_with_triton())
def test_every_kernel_of_an_op_compiles_for_every_layer_and_dtype(op: str) -> None:
    programs = Programs(calls([op], distinct_layers()))
    rows = programs.compile()
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90"}
    assert not [(row["kernel"], row["constants"], row["complaints"]) for row in rows if row["complaints"]]
    if op in MAIN:
        assert {call.dtype for call in programs.calls if call.refusal is None} == set(DTYPES)
    assert programs.passes_without_product(rows) == []
