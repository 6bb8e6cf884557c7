"""Finished runs with planted results, for reports to be written from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpns.config import RunConfig
from vpns.data import ImageSet, Split
from vpns.files import make_folder, read_json, write_json, write_tensors, write_text
from vpns.metrics import MetricsLog
from vpns.observe import EpochMetrics
from vpns.report.diagnosis import diagnose
from vpns.report.facts import read_facts
from vpns.state import StageRecord, finish_stage, list_outputs

CLASSES, TEST_IMAGES, VAL_IMAGES = 10, 2000, 1500
# Of a layer: its unit mask's shape, weights per unit, and how many units stay; a tenth of 1,000 in all.
LAYERS = {
    "conv1": ((100,), 4, 40),
    "layer1.0.conv1": ((20, 10), 4, 30),
    "layer1.0.conv2": ((20, 10), 4, 20),
    "fc": ((50, 10), 1, 10),
}


def make_images(count: int) -> ImageSet:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(count) % CLASSES)
    return ImageSet(split, split, split, tuple(map(str, range(CLASSES))))


def make_logits(labels: Tensor, wrong: slice) -> Tensor:
    """Right everywhere but on a stretch of the images."""
    predicted = labels.clone()
    predicted[wrong] = (predicted[wrong] + 1) % CLASSES
    return torch.nn.functional.one_hot(predicted, CLASSES).float()


def make_network(image_size: int, speedup: float = 2.0, low: float = 1.8) -> dict[str, Any]:
    """Timings as vpns_kernels.measure.bench_network gives them."""
    dense_ms = 8.0
    layers = [
        {
            "layer": name,
            "shape": f"64→64 3x3 @{image_size // 4}x{image_size // 4}",
            "pattern": "block:2x2",
            "density": kept / torch.Size(shape).numel(),
            "dense_ms": 1.0,
            "dense_dtype": "bfloat16",
            "sparse_ms": 1.0 / speedup,
            "speedup": speedup,
            "choice": "sparse" if speedup > 1 else "dense",
            "kernel": "block_avx2" if speedup > 1 else "torch",
            "reason": "block_avx2 wins | here" if speedup > 1 else "moving activations costs more",
            "flops": 1000,
            "share": 0.2,
        }
        for name, (shape, _, kept) in LAYERS.items()
    ]
    return {
        "device": "cpu",
        "image_size": image_size,
        "batch": 16,
        "dense": {
            "torch float32": {"median_ms": 12.0, "p20_ms": 11.0, "p80_ms": 13.0, "rounds": 15},
            "torch bfloat16": {"median_ms": dense_ms, "p20_ms": 7.5, "p80_ms": 8.5, "rounds": 15},
        },
        "best_dense": "torch bfloat16",
        "dense_ms": dense_ms,
        "dense_dtype": "bfloat16",
        "sparse_ms": dense_ms / speedup,
        "sparse_dtype": "float32",
        "speedup": speedup,
        "speedup_low": low,
        "speedup_high": speedup * 1.1,
        "max_rel_err": 0.001,
        "sparse_flops_frac": 0.75,
        "layers": layers,
    }


def make_bench(*networks: dict[str, Any]) -> dict[str, Any]:
    machine = {
        "cpu": "Test CPU",
        "cores": 2,
        "isa": ["scalar", "avx2"],
        "threads": 2,
        "python": "3.11.0",
        "versions": {"torch": "2.13.0", "numpy": "2.0.0", "vpns": "0.1.0"},
        "date": "2025-01-01",
        "commit": "abc123",
        "dirty": False,
    }
    return {"schema_version": 1, "machine": machine, "networks": list(networks)}


def finish(folder: Path, stage: str, **result: Any) -> None:
    make_folder(folder / stage)
    finish_stage(folder / stage, StageRecord(result, list_outputs(folder / stage), {}))


def make_run(
    folder: Path,
    config: RunConfig | None = None,
    *,
    dense_wrong: slice = slice(0, 40),
    sparse_wrong: slice = slice(20, 100),
    prompted_wrong: slice = slice(20, 50),
    bench: dict[str, Any] | None = None,
    emptied: str | None = None,
    mask_changed_frac: float | None = 0.05,
    kept_of_conv1: int = 40,
) -> Path:
    """A run folder in which every stage but the report has finished, with planted outcomes."""
    config = config or RunConfig(pattern="block:2x2")
    has_prompt = config.method == "vpns" and config.prompt.kind != "none"
    make_folder(folder)
    write_json(
        folder / "run.json",
        {"schema_version": 1, "config": config.to_dict(), "threads": 2, "versions": {"torch": "2.13.0"}},
    )
    log = MetricsLog(folder)
    for stage in ("pretrain", "dense", "search", "tune"):
        for epoch in range(1, 9):
            values = (2 / epoch, 90 + epoch, 88 + epoch, 0.1, 2 * epoch, 100 * epoch, 0.5 * epoch)
            log.append(EpochMetrics(stage, epoch, 2 * epoch, *values))
    trained = {"val_accuracy": 96.0, "best_epoch": 8, "updates": 16, "images_seen": 800, "seconds": 4.0}
    finish(folder, "pretrain", source="letters", **trained)
    make_folder(folder / "dense")
    write_tensors(folder / "dense" / "weights.safetensors", {"weight": torch.zeros(2500)})
    finish(folder, "dense", label_map=None, **trained)

    masks: dict[str, Tensor] = {}
    rows: list[dict[str, Any]] = []
    for name, (shape, weights, kept) in LAYERS.items():
        kept = 0 if name == emptied else kept_of_conv1 if name == "conv1" else kept
        mask = torch.zeros(shape, dtype=torch.bool)
        mask.flatten()[:kept] = True
        masks[name] = mask
        count = mask.numel() * weights
        share = {"kept": kept * weights, "weight_density": kept / mask.numel()}
        rows.append({"layer": name, "shape": [*shape, weights], "weights": count, **share})
    density = sum(row["kept"] for row in rows) / sum(row["weights"] for row in rows)
    found: dict[str, Any] = {"density": config.density, "weight_density": density, "layers": rows}
    found |= {"label_map": None, "threshold": 0.01, "ties_kept": 0, "kept": 100}
    if mask_changed_frac is not None:
        found["mask_changed_frac"] = mask_changed_frac
    finish(folder, "search", **found, **trained)

    make_folder(folder / "tune")
    canvas = config.prompt.canvas
    raw = torch.linspace(-2, 2, 3 * canvas * canvas).reshape(3, canvas, canvas)
    write_tensors(folder / "tune" / "masks.safetensors", masks)
    write_tensors(folder / "tune" / "prompt.safetensors", {"raw": raw} if has_prompt else {})
    finish(folder, "tune", **trained)

    labels = torch.arange(TEST_IMAGES) % CLASSES
    outputs = {"dense_logits": make_logits(labels, dense_wrong), "logits": make_logits(labels, sparse_wrong)}
    if has_prompt:
        outputs["logits_prompted"] = make_logits(labels, prompted_wrong)
    accuracy = {k: 100 * float((v.argmax(1) == labels).double().mean()) for k, v in outputs.items()}
    make_folder(folder / "eval")
    write_tensors(folder / "eval" / "outputs.safetensors", outputs | {"labels": labels})
    is_prompted = has_prompt and config.prompt.variant == "framed"
    finish(
        folder,
        "eval",
        dense_accuracy=accuracy["dense_logits"],
        sparse_accuracy=accuracy["logits"],
        sparse_accuracy_prompted=accuracy.get("logits_prompted"),
        accuracy=accuracy["logits_prompted" if is_prompted else "logits"],
        is_prompted=is_prompted,
        test_images=TEST_IMAGES,
        class_names=list(map(str, range(CLASSES))),
    )
    make_folder(folder / "export" / "artifact")
    for name in ("plan.bin", "manifest.json"):
        write_text(folder / "export" / "artifact" / name, "0" * 500)
    finish(folder, "export")
    make_folder(folder / "bench")
    timings = make_bench(make_network(32), make_network(224)) if bench is None else bench
    write_json(folder / "bench" / "bench.json", timings)
    finish(folder, "bench")
    return folder


def read_report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_json(folder / "report.json")
    return content


def find(report: dict[str, Any], name: str) -> dict[str, Any]:
    """The one finding whose name begins so."""
    (finding,) = [row for row in report["diagnosis"] if row["name"].startswith(name)]
    return dict(finding)


def diagnose_run(folder: Path, images: ImageSet, name: str, **planted: Any) -> dict[str, Any]:
    findings = diagnose(read_facts(make_run(folder, **planted), images))
    return find({"diagnosis": [asdict(finding) for finding in findings]}, name)
