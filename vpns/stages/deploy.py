"""Stages export, bench and report: the pruned network is packed, measured against dense, and written up."""

from __future__ import annotations

from typing import Any

from vpns.files import write_json
from vpns.stages.context import Context, Stage
from vpns.state import SCHEMA_VERSION


def run_export(context: Context) -> dict[str, Any]:
    """Write the artifact."""
    from vpns.deploy import export_run

    export_run(context.folder, context.config)
    return {}


def run_bench(context: Context) -> dict[str, Any]:
    """Write timings, of this machine."""
    from vpns.deploy import bench_run

    timings = bench_run(context.folder, context.config)
    write_json(context.stage_folder("bench") / "bench.json", {"schema_version": SCHEMA_VERSION} | timings)
    return {}


def run_report(context: Context) -> dict[str, Any]:
    """Write report.md and report.json."""
    from vpns.report import write_report

    write_report(context.folder, context.images)
    return {}


EXPORT = Stage("export", run_export, needs=("tune",))
BENCH = Stage("bench", run_bench, needs=("export",))
REPORT = Stage("report", run_report, needs=("eval", "bench"))
