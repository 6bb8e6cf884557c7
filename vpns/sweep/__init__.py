"""Many runs: every combination of a grid's choices, on this machine or on a Ray cluster."""

from vpns.sweep.estimate import Estimate, estimate_cost
from vpns.sweep.grid import Grid, PlannedRun, build_grid, read_grid
from vpns.sweep.sweep import Swept, run_sweep

__all__ = ["Estimate", "Grid", "PlannedRun", "Swept", "build_grid", "estimate_cost", "read_grid", "run_sweep"]
