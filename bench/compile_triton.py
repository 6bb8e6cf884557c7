"""Do all Triton kernels compile for the GPUs, to tensor-core instructions and without spilling?

    python -m bench.compile_triton --json bench/results/triton-compiled.json

No GPU is needed. Every pass of every op on every layer of bench/layers is called with tensors of the CPU, and
what it would start is compiled for sm_80 and sm_90, each program once. A table of registers, stack, shared
memory and product instructions is printed; the command fails where a kernel does not compile, needs more
shared memory than there is, or, of a convolution in bfloat16 or float16, spills or multiplies without tensor
cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.triton_build import SHARED_BYTES, Row, Specialised, build, tile_key, why_no_wgmma
from bench.triton_calls import ARCHS, DTYPES, PATTERNS, Call, calls, distinct_layers, ops_with_triton

SCHEMA_VERSION = 1


def compile_calls(found: Sequence[Call], jobs: int = 1, every_size: bool = False) -> list[Row]:
    """One row for each distinct program that the calls start, with the calls that start it.

    Args:
        jobs: processes that compile; 1 is this one.
        every_size: also programs that differ in nothing but which sizes are one or multiples of 16.
    """
    programs: dict[Any, Specialised] = {}
    users: dict[Any, list[Call]] = defaultdict(list)
    for call in found:
        for launch in call.launches:
            key = Specialised(launch, call.arch).key if every_size else tile_key(launch, call.arch)
            if key not in programs:
                programs[key] = Specialised(launch, call.arch)
            users[key].append(call)
    _waiting[:] = programs.values()
    if jobs == 1:
        built = [_build(number) for number in range(len(_waiting))]
    else:
        # Forked, for kernels and their sources do not travel to another process.
        with multiprocessing.get_context("fork").Pool(jobs) as pool:
            built = pool.map(_build, range(len(_waiting)), chunksize=1)
    rows = [row | _uses(users[key]) for key, row in zip(programs, built, strict=True)]
    return [row | {"no_wgmma": why_no_wgmma(row), "complaints": complaints(row)} for row in rows]


_waiting: list[Specialised] = []


def _build(number: int) -> Row:
    program = _waiting[number]
    try:
        return build(program)
    except Exception as error:
        raise RuntimeError(
            f"compile_calls: expected {program.source.name} to compile for sm_{program.target.arch} with "
            f"{program.constants} and {program.signature}, got {type(error).__name__}: {error}"
        ) from error


def _uses(users: Sequence[Call]) -> Row:
    return {
        "is_main": any(call.is_main for call in users),
        "passes": sorted({f"{call.op} {call.pass_name}" for call in users}),
        "dtypes": sorted({call.dtype for call in users}),
        "patterns": sorted({call.pattern for call in users} - {""}),
        "layers": sorted({call.layer for call in users}),
    }


def complaints(row: Row) -> list[str]:
    """What must not be in a row; main kernels have more to keep than others."""
    found = []
    limit = SHARED_BYTES[int(row["arch"].removeprefix("sm_"))]
    if row["shared_bytes"] > limit:
        found.append(f"{row['shared_bytes']} bytes of shared memory, there are {limit}")
    if not row["is_main"]:
        return found
    if row["stack_bytes"] or row["local_bytes"]:
        found.append(f"it spills {row['stack_bytes'] + row['local_bytes']} bytes")
    if row["products"]:
        if row["wgmma"] == row["mma_sync"] == 0:
            found.append("its products are not on tensor cores")
        elif row["arch"] == "sm_90" and row["wgmma"] == 0 and why_no_wgmma(row) is None:
            found.append("its products are not wgmma")
    return found


def passes_without_product(found: Sequence[Call], rows: Sequence[Row]) -> list[str]:
    """Main passes that start something of which nothing multiplies: their products would be nowhere."""
    started = {f"{call.op} {call.pass_name}" for call in found if call.is_main and call.launches}
    multiply = {name for row in rows if row["is_main"] and row["products"] for name in row["passes"]}
    return sorted(started - multiply)


def table(rows: Sequence[Row]) -> str:
    """One line per kernel and architecture: of its programs the largest figures and the range of counts."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[f"{row['module'].removeprefix('vpns_kernels.ops.')}.{row['kernel']}", row["arch"]].append(row)
    heads = (
        "kernel",
        "arch",
        "programs",
        "regs",
        "stack",
        "shared",
        "wgmma",
        "mma.sync",
        "tma",
        "complaints",
    )
    lines = [heads]
    for (name, arch), group in sorted(groups.items()):
        most = [max(row[key] for row in group) for key in ("registers", "stack_bytes", "shared_bytes")]
        counts = [_range([row[key] for row in group]) for key in ("wgmma", "mma_sync", "tma_loads")]
        wrong = sum(bool(row["complaints"]) for row in group)
        lines.append(tuple(map(str, (name, arch, len(group), *most, *counts, wrong))))
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)) for line in lines
    )


def _range(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return str(least) if least == most else f"{least}-{most}"


def report(rows: Sequence[Row], found: Sequence[Call], settings: dict[str, Any]) -> dict[str, Any]:
    """What the file holds."""
    import triton

    from vpns_kernels.measure.fingerprint import fingerprint

    about = fingerprint()
    about["versions"]["triton"] = triton.__version__
    refusals = sorted(
        {(c.op, c.pass_name, c.dtype, c.pattern, c.refusal) for c in found if c.refusal is not None}
    )
    names = ("op", "pass", "dtype", "pattern", "reason")
    return {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": about,
        "settings": settings,
        "refusals": [dict(zip(names, refusal, strict=True)) for refusal in refusals],
        "rows": list(rows),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--ops", nargs="+", help="default: all that have a Triton backend")
    parser.add_argument("--layers", default="", help="only those whose name contains this")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS))
    parser.add_argument("--archs", nargs="+", type=int, default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument(
        "--every-size", action="store_true", help="also what differs in multiples of 16 alone"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    options = parser.parse_args()
    layers = [layer for layer in distinct_layers() if options.layers in layer.name]
    ops = options.ops or ops_with_triton()
    found = list(calls(ops, layers, options.dtypes, options.patterns, options.archs, options.batch))
    rows = compile_calls(found, options.jobs, options.every_size)
    print(table(rows))
    wrong = [
        f"{row['kernel']} {row['arch']} {row['constants']}: {text}"
        for row in rows
        for text in row["complaints"]
    ]
    wrong += [f"{name}: no kernel of it multiplies" for name in passes_without_product(found, rows)]
    print(f"{len(found)} calls, {len(rows)} programs, {len(wrong)} complaints")
    print("\n".join(wrong))
    if options.json is not None:
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "jobs")}
        text = json.dumps(report(rows, found, settings), indent=1)
        options.json.write_text(text + "\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
