"""How much memory does a deployed network take, beside dense engines? Each in a process of its own.

    python -m bench.bench_memory --model resnet50 --batch 16 --json memory.json

Random masks of block:32x32 at density 0.1. What counts is the most that a process had resident in three
batches, above what it had after importing its engine; ours is read from a stored artifact, theirs from an
ONNX file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.train_memory import peak_mb, status_mb

ROOT = Path(__file__).resolve().parents[1]
ENGINES = ("vpns", "onnxruntime", "openvino float32", "openvino bfloat16")
Row = dict[str, Any]


def measure(engine: str, path: Path, shape: list[int]) -> Row:
    """Megabytes of this process: after imports, after loading, and the most after three batches."""
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    if engine == "vpns":
        import torch

        import vpns_kernels

        load = vpns_kernels.load
        given = torch.from_numpy(x)
        imported = _start()
        network = load(path)
        call = lambda: network(given)  # noqa: E731
    elif engine == "onnxruntime":
        import onnxruntime

        imported = _start()
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        call = lambda: session.run(None, {"x": x})  # noqa: E731
    else:
        from openvino import Core

        core = Core()
        hint = {"float32": "f32", "bfloat16": "bf16"}[engine.split()[-1]]
        settings = {"INFERENCE_PRECISION_HINT": hint, "NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY"}
        imported = _start()
        request = core.compile_model(core.read_model(str(path)), "CPU", settings).create_infer_request()
        call = lambda: request.infer([x])  # noqa: E731
    loaded = peak_mb()
    for _ in range(3):
        call()
    return {"imported_mb": imported, "loaded_mb": loaded - imported, "added_mb": peak_mb() - imported}


def _start() -> float:
    """Megabytes resident now, from where the peak is counted anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_mb("VmRSS")


def measure_apart(engine: str, path: Path, shape: list[int]) -> Row:
    """The same in a process of its own."""
    asked = json.dumps([engine, str(path), shape])
    command = [sys.executable, "-m", "bench.bench_memory", "--one", asked]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {"engine": engine} | json.loads(done.stdout)


def bench(model: str, batch: int, size: int) -> list[Row]:
    """A row for each engine."""
    import torch

    from vpns_kernels import compile, parse_pattern
    from vpns_kernels.measure.random_network import prune_randomly, scale_weights
    from vpns_kernels.onnx_file import to_onnx
    from vpns_kernels.torchvision_import import import_torchvision

    torch.manual_seed(0)
    x = torch.randn(batch, 3, size, size)
    dense = scale_weights(getattr(import_torchvision("models"), model)(weights=None))
    pruned = prune_randomly(dense, parse_pattern("block:32x32"), 0.1, 0, x[:8])
    with tempfile.TemporaryDirectory() as folder:
        artifact, onnx = Path(folder) / "artifact", Path(folder) / "network.onnx"
        compile(pruned, x).save(artifact)
        onnx.write_bytes(to_onnx(dense, x))
        return [
            measure_apart(engine, artifact if engine == "vpns" else onnx, list(x.shape)) for engine in ENGINES
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="of torchvision (default: resnet50)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--json", type=Path, help="where the rows go")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        engine, path, shape = json.loads(options.one)
        print(json.dumps(measure(engine, Path(path), shape)))
        return
    rows = bench(options.model, options.batch, options.size)
    for row in rows:
        print(f"{row['engine']:20s} {row['added_mb']:8.1f} MB, after {row['imported_mb']:.1f} of imports")
    if options.json is not None:
        from vpns_kernels.measure.fingerprint import fingerprint

        about = {"fingerprint": fingerprint(), "model": options.model, "batch": options.batch}
        report = about | {"size": options.size, "rows": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
