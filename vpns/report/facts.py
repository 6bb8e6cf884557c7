"""What did a run find? The records and outputs of its finished stages, read once and checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpns.config import RunConfig
from vpns.data import ImageSet, load_data
from vpns.files import read_json, read_tensors
from vpns.metrics import MetricsLog
from vpns.report.pairs import Pair, compare
from vpns.state import SCHEMA_VERSION, StageRecord, read_stage

# Stages that a report rests on, in order; each is a command of the same name.
STAGES = ("pretrain", "dense", "search", "tune", "eval", "export", "bench")
TRAINED = ("pretrain", "dense", "search", "tune")


@dataclass(frozen=True, eq=False)
class Facts:
    """A finished run.

    Args:
        config: the run's settings, with the threads that it began with.
        records: of each stage, by name.
        metrics: one row per trained epoch.
        bench: timings, as stage bench wrote them.
        masks: bool masks of the pattern's units, by name.
        prompt: the tuned prompt's tensors; empty where the run has none.
        pairs: the networks of eval against each other, image by image.
        example: one validation image, uint8 [1, 3, H, W].
        val_images: how many images chose the checkpoints.
        choices: of search and tune, who computed each layer's passes; empty where torch did.
    """

    folder: Path
    config: RunConfig
    records: dict[str, StageRecord]
    metrics: list[dict[str, Any]]
    bench: dict[str, Any]
    masks: dict[str, Tensor]
    prompt: dict[str, Tensor]
    pairs: list[Pair]
    example: Tensor
    val_images: int
    choices: dict[str, dict[str, Any]]

    def result(self, stage: str) -> dict[str, Any]:
        """The plain values that a stage recorded."""
        return self.records[stage].result

    @property
    def has_prompt(self) -> bool:
        """Whether the run could be tested with a prompt."""
        return self.result("eval")["sparse_accuracy_prompted"] is not None

    @property
    def own(self) -> str:
        """What `pairs` calls the sparse network at the run's own inference setting."""
        return "sparse, prompted" if self.result("eval")["is_prompted"] else "sparse"

    @property
    def units(self) -> int:
        """Units of the pattern, over all layers."""
        return sum(mask.numel() for mask in self.masks.values())

    @property
    def unit_density(self) -> float:
        """Share of the units that the masks really keep."""
        return sum(int(mask.sum()) for mask in self.masks.values()) / self.units

    @property
    def dense_bytes(self) -> int:
        """Size of the dense reference's weights."""
        return int(self.records["dense"].outputs["weights.safetensors"]["bytes"])

    @property
    def packed_bytes(self) -> int:
        """Size of what a machine needs to run the sparse network: plan, packed weights and manifest."""
        outputs = self.records["export"].outputs
        return sum(int(outputs[f"artifact/{name}"]["bytes"]) for name in ("plan.bin", "manifest.json"))

    def pair(self, first: str, second: str) -> Pair:
        """The comparison of two networks of eval."""
        return next(pair for pair in self.pairs if (pair.first, pair.second) == (first, second))


def read_facts(folder: Path, images: ImageSet | None = None) -> Facts:
    """Read a run folder in which every stage before the report has finished.

    Args:
        images: the run's images where they are loaded already.

    Raises:
        FileNotFoundError: naming what has not been done yet, and the command that does it.
        ValueError: naming the file that is damaged.
    """
    if not (folder / "run.json").exists():
        raise FileNotFoundError(f"write_report: expected a run folder with run.json, got {folder}")
    begun = read_json(folder / "run.json")
    config = replace(RunConfig.from_dict(begun["config"]), threads=int(begun["threads"]))
    records = {stage: _read_record(folder, stage) for stage in STAGES}
    if images is None:
        images = load_data(config.data, config.seed, config.prompt.canvas)
    return Facts(
        folder=folder,
        config=config,
        records=records,
        metrics=MetricsLog(folder).rows(),
        bench=_read_bench(folder / "bench" / "bench.json"),
        masks=read_tensors(folder / "tune" / "masks.safetensors"),
        prompt=read_tensors(folder / "tune" / "prompt.safetensors"),
        pairs=_compare_all(read_tensors(folder / "eval" / "outputs.safetensors")),
        example=images.val.select(torch.arange(1)).images.cpu(),
        val_images=len(images.val),
        choices={stage: _read_choice(folder / stage / "choice.json") for stage in ("search", "tune")},
    )


def _read_record(folder: Path, stage: str) -> StageRecord:
    record = read_stage(folder / stage)
    if record is None:
        raise FileNotFoundError(
            f"write_report: expected stage {stage!r} to be finished in {folder}, got no record of it "
            f"(run: vpns {stage} {folder})"
        )
    return record


def _read_choice(path: Path) -> dict[str, Any]:
    layers: dict[str, Any] = read_json(path)["layers"] if path.is_file() else {}
    return layers


def _read_bench(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"write_report: expected the timings {path}, got none (run: vpns bench {path.parent.parent})"
        )
    bench = read_json(path)
    if bench.get("schema_version") != SCHEMA_VERSION or not bench.get("networks"):
        raise ValueError(
            f"write_report: expected schema_version {SCHEMA_VERSION} and networks in {path}, "
            f"got {bench.get('schema_version')} and {bench.get('networks')!r} (remove {path.parent} and "
            f"run: vpns bench {path.parent.parent})"
        )
    return bench


def _compare_all(outputs: dict[str, Tensor]) -> list[Pair]:
    """Dense against sparse, without and with the prompt, and these two against each other."""
    names = {"dense_logits": "dense", "logits": "sparse", "logits_prompted": "sparse, prompted"}
    right = {
        name: outputs[key].argmax(1) == outputs["labels"] for key, name in names.items() if key in outputs
    }
    wanted = (("dense", "sparse"), ("dense", "sparse, prompted"), ("sparse", "sparse, prompted"))
    return [compare(a, right[a], b, right[b]) for a, b in wanted if b in right]
