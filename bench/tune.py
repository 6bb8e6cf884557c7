"""Write this machine's part of vpns_kernels/cost_table.json: time a designed set of layers, fit.

    python -m bench.tune                      this machine's class, and those of its weaker instruction sets
    python -m bench.tune --classes avx2       one of them
    python -m bench.tune --seconds 50         stop after that long; called again it goes on
    python -m bench.tune --gradients          the rows of weight gradients instead of those of the forward
    python -m bench.tune --fit                no timing: from the rows that are there

The rows are kept (--rows), one JSON line each, so that an interrupted run goes on where it was; those of
another commit are measured anew.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.fit import fit_kernels, worst
from bench.tune_gradients import gradient_calls
from vpns_kernels import native, sparse_conv2d
from vpns_kernels.choose import this_machine
from vpns_kernels.cost import LayerQuery, class_name
from vpns_kernels.dtypes import dtype_name
from vpns_kernels.measure.fingerprint import fingerprint
from vpns_kernels.measure.layer_bench import Variant, make_input, make_mask, make_sparse, make_weight
from vpns_kernels.measure.layers import Layer, read_layers
from vpns_kernels.measure.timing import interleave, measurement_lock
from vpns_kernels.patterns import parse_pattern
from vpns_kernels.sparse_modules import SparseConv2d, SparseLinear

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "vpns_kernels" / "cost_table.json"
LISTS = [*sorted((ROOT / "bench" / "layers").glob("*.txt")), ROOT / "bench" / "tune_layers.txt"]
BLOCKS = ("block:16x16", "block:32x32")
BATCHES = (1, 16, 32)
# Taken in turn, so that every kernel meets all of them and no layer all.
DENSITIES = ((1.0, 0.2, 0.05), (0.5, 0.1, 0.02))
# A cell (layer and batch) of more work is left out: it takes long and says nothing new.
MOST_GFLOP = 8.0
# torch may have no fast float16.
MOST_FP16_GFLOP = 0.3
# What one cell may take, and what is too slow to be timed more than once.
CELL_SECONDS, SLOW_MS = 0.4, 60.0
# A cell during which other processes took more than this many cores is timed again, so often at most.
MOST_FOREIGN, MOST_TURNS = 0.1, 4
# In the name of a class's rows of weight gradients.
GRADIENTS = ".gradients"
# What torch must be told, so that its dense kernels are those of a weaker machine.
ONEDNN = {"avx2": "AVX2", "avx512": "AVX512_CORE", "avx512_bf16": "AVX512_CORE_BF16"}


@dataclass(frozen=True)
class Cell:
    """One layer at one batch, and which densities it is measured at."""

    layer: Layer
    batch: int
    densities: tuple[float, ...]

    @property
    def name(self) -> str:
        return f"{self.layer.name}|{self.layer.geometry}|{self.layer.height}x{self.layer.width}|{self.batch}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--classes", type=lambda text: text.split(","), help="all that run here by default")
    parser.add_argument("--rows", type=Path, default=ROOT / "runs" / "tune", help="folder of measured rows")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of measuring, at most")
    parser.add_argument("--passes", type=int, default=2, help="over the design; least times count")
    parser.add_argument("--every", type=int, default=1, help="only each n-th cell: a quick look")
    parser.add_argument("--gradients", action="store_true", help="time weight gradients instead")
    parser.add_argument("--fit", action="store_true", help="from the rows that are there")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.rows.mkdir(parents=True, exist_ok=True)
    classes = options.classes or [
        name for name in native.library().isa_list() if name in ONEDNN or name == "amx"
    ]
    if options.here:
        return measure_class(options)
    stop_at = time.monotonic() + options.seconds
    for isa in classes:
        # Instruction sets are chosen when a process starts, torch's too.
        left = stop_at - time.monotonic()
        if options.fit or left <= 0:
            break
        environment = os.environ | {"VPNS_ISA": isa}
        if isa in ONEDNN:
            environment["ONEDNN_MAX_CPU_ISA"] = ONEDNN[isa]
        command = [sys.executable, "-m", "bench.tune", "--here", "--rows", str(options.rows.resolve())]
        command += ["--every", str(options.every), "--passes", str(options.passes)]
        if options.gradients:
            command.append("--gradients")
        if left != float("inf"):
            command += ["--seconds", str(left)]
        subprocess.run(command, env=environment, cwd=ROOT, check=True)
    write_table(options.rows, options.table)
    return 0


def measure_class(options: argparse.Namespace) -> int:
    """Measure what is missing of the class that this process runs as."""
    machine = this_machine()
    isa, core = machine.isa, machine.core
    name = class_name(isa, core) + (GRADIENTS if options.gradients else "")
    path = options.rows / f"{name}.jsonl"
    about_path = options.rows / f"{name}.machine.json"
    here = fingerprint()
    if path.exists() and json.loads(about_path.read_text())["commit"] != here["commit"]:
        # Other code has other times.
        path.unlink()
    lines = path.read_text().splitlines() if path.exists() else []
    done = {(row["turn"], row["cell"]) for row in map(json.loads, lines)}
    if not done:
        about_path.write_text(json.dumps(here))
    wanted = [(turn, cell) for turn in range(options.passes) for cell in design()[:: options.every]]
    missing = [(turn, cell) for turn, cell in wanted if (turn, cell.name) not in done]
    stop_at = time.monotonic() + options.seconds
    with measurement_lock(), torch.no_grad():
        for number, (turn, cell) in enumerate(missing):
            if time.monotonic() > stop_at:
                print(f"{isa}: {len(missing) - number} cells to go", file=sys.stderr)
                break
            about = {"cell": cell.name, "turn": turn, "isa": isa, "core": core}
            with path.open("a") as file:
                measured = measure_gradients(cell) if options.gradients else measure_cell(cell)
                file.writelines(json.dumps(row | about) + "\n" for row in measured)
    return 0


def design() -> list[Cell]:
    """Every distinct layer of the lists at each batch that is not too much work, in an order of no meaning.

    So an interrupted run, or each n-th cell, has layers of all kinds.
    """
    layers: dict[Any, Layer] = {}
    for path in LISTS:
        for layer in read_layers(path):
            layers.setdefault(replace(layer, name="", count=1), layer)
    cells = [
        Cell(layer, batch, DENSITIES[number % len(DENSITIES)])
        for number, layer in enumerate(layers.values())
        for batch in BATCHES
        if layer.geometry.flops(batch, layer.height, layer.width) <= MOST_GFLOP * 1e9
    ]
    random.Random(0).shuffle(cells)
    return cells


def measure_cell(cell: Cell) -> list[dict[str, Any]]:
    """A row for every kernel, dtype and density of a cell, all timed in turn."""
    timed: list[tuple[dict[str, Any], Callable[[], Tensor]]] = []
    weight, x = make_weight(cell.layer), make_input(cell.layer, cell.batch)
    wanted = {torch.float32: cell.densities, torch.bfloat16: cell.densities[::2]}
    if cell.layer.geometry.flops(*_size(cell)) <= MOST_FP16_GFLOP * 1e9:
        wanted[torch.float16] = cell.densities[1:2]
    for dtype, densities in wanted.items():
        given = x.to(dtype)
        timed.append(_dense_call(cell, weight, given))
        for number, density in enumerate(densities):
            for spec in ("unstructured", BLOCKS[number % len(BLOCKS)], "channel"):
                timed += _sparse_calls(cell, given, spec, density)
    times_ms = _time([call for _, call in timed])
    threads = torch.get_num_threads()
    return [row | {"ms": ms, "threads": threads} for (row, _), ms in zip(timed, times_ms, strict=True)]


def measure_gradients(cell: Cell) -> list[dict[str, Any]]:
    """A row for every weight gradient, dtype and density of a cell, all timed in turn."""
    x, timed = make_input(cell.layer, cell.batch), []
    for dtype in (torch.float32, torch.bfloat16):
        for kernel, query, density, call in gradient_calls(cell.layer, x.to(dtype), cell.densities):
            timed.append((_row(cell, kernel, query, density), call))
    times_ms = _time([call for _, call in timed])
    threads = torch.get_num_threads()
    return [row | {"ms": ms, "threads": threads} for (row, _), ms in zip(timed, times_ms, strict=True)]


def _dense_call(
    cell: Cell, weight: nn.Conv2d | nn.Linear, x: Tensor
) -> tuple[dict[str, Any], Callable[[], Tensor]]:
    dense = cell.layer.build().to(x.dtype)
    dense.weight.copy_(weight.weight)
    if isinstance(dense, nn.Conv2d):
        dense.weight.data = dense.weight.data.contiguous(memory_format=torch.channels_last)
    query = LayerQuery(
        cell.layer.geometry, _size(cell), (0,), dtype=dtype_name(x.dtype), weight_dtype=dtype_name(x.dtype)
    )
    return _row(cell, f"dense {query.dtype}", query, 1.0), lambda: dense(x)


def _sparse_calls(
    cell: Cell, x: Tensor, spec: str, density: float
) -> Iterator[tuple[dict[str, Any], Callable[[], Tensor]]]:
    pattern, groups = parse_pattern(spec), cell.layer.geometry.groups
    if groups > 1 and spec != "unstructured":
        return
    sparse = _packed(cell.layer, Variant(pattern, density, x.dtype))
    query = LayerQuery(
        cell.layer.geometry, _size(cell), tuple(sparse.values.shape), dtype_name(x.dtype), dtype_name(x.dtype)
    )
    able = [kernel for kernel, refusal in this_machine().refusals(query) if not refusal]
    for kernel in _worth_timing(able, query):
        yield _row(cell, kernel, query, density), _kernel_call(sparse, kernel, x)
    if spec == "channel" and density == cell.densities[0]:
        yield _row(cell, "compact", query, density), _compact_call(sparse, x)


@lru_cache(maxsize=64)
def _packed(layer: Layer, variant: Variant) -> SparseConv2d | SparseLinear:
    """Kept over the batches of a layer."""
    weight = make_weight(layer)
    return make_sparse(weight, make_mask(layer, weight, variant), variant)


def _worth_timing(kernels: Sequence[str], query: LayerQuery) -> list[str]:
    """Not the same loop with shorter vectors, and the plain one on small layers only."""
    has_avx512 = any("avx512" in kernel for kernel in kernels)
    kept = [kernel for kernel in kernels if not (has_avx512 and kernel.endswith("avx2"))]
    g = query.geometry
    is_small = g.flops(*query.size) < 2e7
    return [kernel for kernel in kept if kernel != "scalar" or is_small]


def _kernel_call(sparse: SparseConv2d | SparseLinear, kernel: str, x: Tensor) -> Callable[[], Tensor]:
    # Over the same tensors, with a cache of its own for the prepared weights.
    mine = copy.copy(sparse)
    mine.kernel, mine._cache = kernel, copy.deepcopy(sparse._cache)
    return lambda: mine(x)


def _compact_call(sparse: SparseConv2d | SparseLinear, x: Tensor) -> Callable[[], Tensor]:
    image = x if x.dim() == 4 else x.reshape(*x.shape, 1, 1)
    arguments = (sparse.values.detach(), sparse.layout, sparse.geometry, None, "compact")
    return lambda: sparse_conv2d(image, *arguments)


def _time(calls: Sequence[Callable[[], Tensor]]) -> list[float]:
    """Least times in ms, of more turns while others compute; the first call only prepares."""
    first = []
    for call in calls:
        call()
        started = time.perf_counter()
        call()
        first.append(1000 * (time.perf_counter() - started))
    for _ in range(MOST_TURNS):
        before, started = _foreign_seconds(), time.monotonic()
        named = {str(i): call for i, call in enumerate(calls)}
        quick = {i: call for i, call in named.items() if first[int(i)] <= SLOW_MS}
        round_seconds = sum(first[int(i)] for i in quick) / 1000
        rounds = max(4, min(15, int(CELL_SECONDS / max(round_seconds, 1e-3))))
        samples = interleave(named, 1, warmup=0)
        if quick:
            samples |= interleave(quick, rounds, warmup=0)
        for i, sample in samples.items():
            first[int(i)] = min(first[int(i)], *sample.times_ms)
        if _foreign_seconds() - before < MOST_FOREIGN * (time.monotonic() - started):
            break
    return first


def _foreign_seconds() -> float:
    """Time that all cores together have spent on other processes, where the system tells."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0.0
    fields = [int(field) for field in path.read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _, _, irq, softirq, steal = fields[:8]
    own = os.times()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def _row(cell: Cell, kernel: str, query: LayerQuery, density: float) -> dict[str, Any]:
    return {"kernel": kernel, "layer": cell.layer.name, "density": density, **asdict(query)}


def _size(cell: Cell) -> tuple[int, int, int]:
    return cell.batch, cell.layer.height, cell.layer.width


def write_table(folder: Path, path: Path) -> None:
    """Fit every class that has rows; classes without keep what the table says of them."""
    table = json.loads(path.read_text()) if path.exists() else {"schema_version": 1, "classes": {}}
    for rows_path in sorted(folder.glob("*.jsonl")):
        name = rows_path.stem
        measured_class = name.removesuffix(GRADIENTS)
        are_gradients = name.endswith(GRADIENTS)
        rows = [json.loads(line) for line in rows_path.read_text().splitlines()]
        machine = json.loads((folder / f"{name}.machine.json").read_text())
        fits = fit_kernels(rows)
        known = table["classes"].setdefault(measured_class, {"machine": machine, "kernels": {}})
        # Those of weight gradients stand beside those of the forward.
        kept = {
            row: fit
            for row, fit in known["kernels"].items()
            if (row not in fits and are_gradients) or (not are_gradients and _is_gradient(row))
        }
        table["classes"][measured_class] = {
            "machine": known["machine"] if are_gradients else machine,
            "kernels": kept | fits,
        }
        print(f"\n{name}: {len(rows)} rows of {len({row['cell'] for row in rows})} cells")
        for kernel, row in fits.items():
            error = row["error"]
            print(f"  {kernel}: {row['rows']} rows, error {error['median']:.0%}, 90 % {error['p90']:.0%}")
        print("  worst", *worst(rows, table), sep="\n    ")
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(table, indent=1) + "\n")
    beside.replace(path)


def _is_gradient(row: str) -> bool:
    return "gradient" in row or "score" in row


if __name__ == "__main__":
    sys.exit(main())
