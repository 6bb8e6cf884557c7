"""What does a kernel start become on a GPU that is not here? Compiled as Triton's JIT would, and read.

Nothing runs: registers, stack and spills come from the cubin (the cuobjdump that Triton brings), instructions
from the PTX, the shapes of products from Triton's own form of the kernel. Triton's interpreter must be off.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from torch import Tensor
from triton import compile as triton_compile
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from vpns_kernels.ops._triton.launch import Launch

# Bytes that one program can have: of an A100, of an H100 or H200.
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
# What is looked for in the PTX.
INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async\.",
    "mma_sync": r"\bmma\.sync\.",
    "tma_loads": r"\bcp\.async\.bulk\.tensor\.\dd\.shared",
    "tma_stores": r"\bcp\.async\.bulk\.tensor\.\dd\.global",
    "async_copies": r"\bcp\.async\.c[ag]\.",
    # Those of 16 bytes, the only ones that leave the first cache out.
    "wide_copies": r"\bcp\.async\.cg\.",
}
_PRODUCT = re.compile(r"tt\.dot .*-> tensor<(\d+)x(\d+)xf(?:16|32|64)>")
Row = dict[str, Any]


class Specialised:
    """A launch as the JIT sees it: types for tensors, constants for ones, multiples of 16 marked."""

    def __init__(self, launch: Launch, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        backend, kernel = make_backend(self.target), launch.kernel
        # Triton 3.9 asks to say whether a * b + c may round once; so it did by itself before.
        asked = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, types, rest = bind(**launch.args, **launch.constants, **asked)
        options, signature, constants, attributes = kernel._pack_args(
            backend, dict(rest), bound, types, dict(rest)
        )
        self.options = options
        self.source = ASTSource(kernel, signature, constants, attributes)

    @property
    def key(self) -> Hashable:
        """Equal for launches that are one program."""
        return self.target.arch, self.source.name, self.source.hash(), self.options.hash()

    @property
    def signature(self) -> dict[str, str]:
        """The type of each argument that is given at a start; the others are constants."""
        return {name: kind for name, kind in self.source.signature.items() if kind != "constexpr"}

    @property
    def constants(self) -> dict[str, str]:
        names = list(self.source.signature)
        return {names[path[0]]: str(value) for path, value in self.source.constants.items()}


def tile_key(launch: Launch, arch: int) -> Hashable:
    """Equal for launches of a kernel whose tiles and types are the same, whatever the sizes: most programs of
    a kernel differ only in which sizes are one or multiples of 16.
    """
    types = tuple((name, _type(argument)) for name, argument in launch.args.items())
    constants = tuple(launch.constants.items())
    return arch, launch.kernel, types, constants, launch.warps, launch.stages


def _type(argument: Any) -> Hashable:
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, tuple(argument.block_shape)
    if isinstance(argument, tuple):
        return tuple(map(_type, argument))
    return argument.dtype if isinstance(argument, Tensor) else type(argument)


def build(found: Specialised) -> Row:
    """Compile one and say what came out; raises what Triton raises where it cannot."""
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        compiled = triton_compile(found.source, found.target, found.options.__dict__)
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        ptx, ttir = compiled.asm["ptx"], compiled.asm["ttir"]
    return {
        "kernel": found.source.name,
        "module": found.source.fn.__module__,
        "arch": f"sm_{found.target.arch}",
        "signature": found.signature,
        "constants": found.constants,
        "warps": found.options.num_warps,
        "stages": found.options.num_stages,
        **resources(usage),
        "shared_bytes": compiled.metadata.shared,
        **{name: len(re.findall(pattern, ptx)) for name, pattern in INSTRUCTIONS.items()},
        "products": products(ttir),
    }


def resources(usage: str) -> dict[str, int]:
    """Registers of a thread, bytes of its stack (where ptxas spills) and of other local memory.

    Args:
        usage: what cuobjdump says of a cubin with one function.
    """
    (line,) = re.findall(r"REG:.*", usage)
    counts = dict(re.findall(r"(\w+):(\d+)", line))
    names = {"registers": "REG", "stack_bytes": "STACK", "local_bytes": "LOCAL"}
    return {ours: int(counts[theirs]) for ours, theirs in names.items()}


def products(ttir: str) -> list[list[int]]:
    """Rows and columns of each distinct matrix product of a kernel."""
    return sorted({(int(rows), int(columns)) for rows, columns in _PRODUCT.findall(ttir)})


def why_no_wgmma(row: Row) -> str | None:
    """Why a kernel's products cannot be Hopper's own instruction; None where they can, or there are none."""
    if row["arch"] == "sm_80":
        return "sm_80 has none"
    if not row["products"]:
        return None
    if row["warps"] % 4:
        return f"{row['warps']} warps are no group of four"
    rows = max(size[0] for size in row["products"])
    return f"{rows} rows of a tile are less than its 64" if rows < 64 else None
