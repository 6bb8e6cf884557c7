"""How is an engine opened again? From its artifact, for the CPU or for a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vpns_kernels.engine.artifact import read_artifact
from vpns_kernels.engine.engine import Engine, check_threads
from vpns_kernels.engine.files import ArtifactError
from vpns_kernels.engine.gpu_compile import open_on_device
from vpns_kernels.engine.programs import open_program
from vpns_kernels.engine.report import StepReport


def load(
    folder: Path | str,
    threads: int | None = None,
    device: torch.device | str = "cpu",
    images: int = 32,
) -> Engine:
    """Open an engine that `save` wrote, wherever it was compiled.

    On a weaker CPU other kernels run it, and `explain()` says so. On a GPU the kernels run it that it was
    compiled for, where that was on a GPU and this one has them all; otherwise each layer is timed again, with
    and without what was pruned.

    Args:
        threads: of each call on a CPU; torch's number by default.
        device: where it will run.
        images: that a batch will have; layers that are timed again on a GPU are chosen for it.

    Raises:
        ArtifactError: names the file and what is wrong with it; also where it holds layers but no network.
        ValueError, TypeError: threads of a GPU, no threads, or no images.
        RuntimeError: torch has no such device.
    """
    check_threads("load", threads)
    artifact = read_artifact(Path(folder))
    if artifact.plan.input is None:
        raise ArtifactError(
            f"load: expected a compiled network in {folder}, got its layers alone "
            "(compile the network and save it)"
        )
    try:
        reports = [_read_report(fields) for fields in artifact.manifest["reports"]]
        programs = [
            open_program(artifact.read_program(number), described)
            for number, described in enumerate(artifact.manifest["programs"])
        ]
        if torch.device(device).type == "cpu":
            return Engine(artifact.plan, reports, artifact.plan_bytes, threads, programs)
    except ArtifactError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"load: expected an engine in {folder}, got: {error}") from error
    if threads is not None or images < 1:
        raise ValueError(
            f"load: expected no threads and at least 1 image on {device}, got {threads} and {images}"
        )
    return open_on_device(artifact.plan, reports, programs, torch.device(device), images)


def _read_report(fields: Mapping[str, Any]) -> StepReport:
    # Earlier artifacts do not tell what was chosen, but by what it took.
    was_sparse = fields["sparse_ms"] is not None and fields["ms"] == fields["sparse_ms"]
    return StepReport(**{"is_sparse": was_sparse, **fields})
