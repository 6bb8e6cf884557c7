"""`vpns bench --model`: a network, pruned and deployed, against every dense engine installed."""

from vpns.bench.measure import bench_model
from vpns.bench.plot import draw_report
from vpns.bench.table import to_text

__all__ = ["bench_model", "draw_report", "to_text"]
