"""How many complete runs an hour: search and tuning of the embedded task through the command line.

Every run gets a fresh folder and the same pretrained weights. Ours against the same run by torch's dense
layers (backend=reference), in turn; and two at once, the threads divided, against two in sequence.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vpns.state import read_stage
from vpns_kernels.measure.timing import compare, interleave

ROOT = Path(__file__).resolve().parents[1]
# Backend, pattern and dtype.
FORMS = (
    ("auto", "block:16x16", "float32"),
    ("auto", "block:16x16", "bfloat16"),
    ("auto", "unstructured", "float32"),
    ("reference", "unstructured", "float32"),
    ("reference", "unstructured", "bfloat16"),
)
TWO_AT_ONCE, REFERENCE = FORMS[0], FORMS[3]
Form = tuple[str, str, str]
Row = dict[str, Any]


def bench_runs(rounds: int, settings: Sequence[str], forms: Sequence[Form] = FORMS) -> list[Row]:
    """Seconds of each form's runs, all in turn, and two at once.

    Args:
        settings: options of the command line that all runs share, such as --search.epochs=2.
    """
    with tempfile.TemporaryDirectory() as name:
        runs = _Runs(Path(name), settings)
        runs.pretrain()
        threads = torch.get_num_threads()
        calls = {_name(form): lambda form=form: runs.finish([form], threads) for form in forms}  # type: ignore[misc]
        samples = interleave(calls, rounds, warmup=0)
        rows = []
        for form in forms:
            sample = samples[_name(form)]
            rivals = [other for other in forms if other[0] == "reference" and form[0] != "reference"]
            ratios = {_name(other): compare(samples[_name(other)], sample) for other in rivals}
            rows.append(
                {
                    "form": _name(form),
                    "backend": form[0],
                    "pattern": form[1],
                    "dtype": form[2],
                    "threads": threads,
                    "seconds": sample.median_ms / 1000,
                    "run": sample.to_dict(),
                    "stage_seconds": runs.stage_seconds(form),
                    "runs_per_hour": 3600e3 / sample.median_ms,
                    "ratios": {name: asdict(ratio) for name, ratio in ratios.items()},
                }
            )
        return [*rows, _two_at_once(runs, threads, rounds)]


def _two_at_once(runs: _Runs, threads: int, rounds: int) -> Row:
    """Two runs together with half the threads each, and one after the other with all of them."""

    def in_sequence() -> None:
        for _ in range(2):
            runs.finish([TWO_AT_ONCE], threads)

    def at_once() -> None:
        runs.finish([TWO_AT_ONCE] * 2, max(1, threads // 2))

    samples = interleave({"sequence": in_sequence, "at once": at_once}, rounds, warmup=0)
    ratio = compare(samples["sequence"], samples["at once"])
    return {
        "form": "two at once",
        "each": _name(TWO_AT_ONCE),
        "threads_each": max(1, threads // 2),
        "seconds": samples["at once"].median_ms / 1000,
        "sequence_seconds": samples["sequence"].median_ms / 1000,
        "throughput": asdict(ratio),
    }


def _name(form: Form) -> str:
    return " ".join(("ours" if form[0] == "auto" else form[0], *form[1:]))


class _Runs:
    """Folders of runs that share a pretrained network."""

    def __init__(self, folder: Path, settings: Sequence[str]) -> None:
        self.folder, self.settings = folder, list(settings)
        self.count = 0
        self.stages: dict[Form, list[dict[str, float]]] = {}

    def pretrain(self) -> None:
        _wait(self._start("pretrain", self.folder / "base", torch.get_num_threads(), []))

    def finish(self, forms: Sequence[Form], threads: int) -> None:
        """Start a run of each form at the same moment, and wait for all."""
        started = []
        for form in forms:
            self.count += 1
            backend, pattern, dtype = form
            options = [f"--backend={backend}", f"--pattern={pattern}", f"--dtype={dtype}"]
            options += ["--prompt.variant=released", f"--model.weights={self.folder / 'base'}"]
            folder = self.folder / f"run-{self.count}"
            started.append((form, folder, self._start("tune", folder, threads, options)))
        try:
            for _, _, process in started:
                _wait(process)
        finally:
            for _, _, process in started:
                process.kill()  # one that ended takes no harm
        for form, folder, _ in started:
            seconds = {}
            for stage in ("search", "tune"):
                record = read_stage(folder / stage)
                assert record is not None
                seconds[stage] = float(record.result["seconds"])
            self.stages.setdefault(form, []).append(seconds)

    def stage_seconds(self, form: Form) -> dict[str, float]:
        """Medians of training alone, without starting up and reading files."""
        found = self.stages[form]
        return {stage: median(seconds[stage] for seconds in found) for stage in found[0]}

    def _start(
        self, command: str, folder: Path, threads: int, options: Sequence[str]
    ) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "vpns", command, str(folder), f"--threads={threads}"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        return subprocess.Popen(
            [*words, *self.settings, *options],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )


def _wait(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(
            f"bench_runs: expected a run to finish, got exit code {process.returncode}: {errors}"
        )
