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
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton

from bench.triton_build import Row
from bench.triton_calls import ARCHS, DTYPES, PATTERNS, Call, calls, distinct_layers, ops_with_triton
from bench.triton_programs import Programs
from vpns_kernels.measure.fingerprint import fingerprint

SCHEMA_VERSION = 1


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


def report(rows: Sequence[Row], found: Sequence[Call], about: dict[str, Any]) -> dict[str, Any]:
    """What the file holds.

    Args:
        about: the machine and the command.
    """
    refusals = sorted(
        {(c.op, c.pass_name, c.dtype, c.pattern, c.refusal) for c in found if c.refusal is not None}
    )
    names = ("op", "pass", "dtype", "pattern", "reason")
    return {
        "schema_version": SCHEMA_VERSION,
        **about,
        "refusals": [dict(zip(names, refusal, strict=True)) for refusal in refusals],
        "rows": list(rows),
    }


def _about(options: argparse.Namespace) -> dict[str, Any]:
    """Taken before the work: the sources that were compiled are those of now."""
    found = fingerprint()
    found["versions"]["triton"] = triton.__version__
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "jobs")}
    return {"fingerprint": found, "settings": settings}


def _format(found: dict[str, Any]) -> str:
    """JSON with a line for each row."""
    head = json.dumps(found | {"rows": []}, indent=1)
    lines = ",\n".join(json.dumps(row) for row in found["rows"])
    return head.replace('"rows": []', '"rows": [\n' + lines + "\n ]") + "\n"


def _tell(done: int, count: int) -> None:
    if done % 50 == 0 or done == count:
        print(f"{done} of {count} programs", file=sys.stderr, flush=True)


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
    about = _about(options)
    layers = [layer for layer in distinct_layers() if options.layers in layer.name]
    ops = options.ops or ops_with_triton()
    found = calls(ops, layers, options.dtypes, options.patterns, options.archs, options.batch)
    programs = Programs(found, options.every_size)
    rows = programs.compile(options.jobs, _tell)
    print(table(rows))
    wrong = [
        f"{row['kernel']} {row['arch']} {row['constants']}: {text}"
        for row in rows
        for text in row["complaints"]
    ]
    wrong += [f"{name}: no kernel of it multiplies" for name in programs.passes_without_product(rows)]
    print(f"{len(programs.calls)} calls, {len(rows)} programs, {len(wrong)} complaints")
    print("\n".join(wrong))
    if options.json is not None:
        options.json.write_text(_format(report(rows, programs.calls, about)))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
