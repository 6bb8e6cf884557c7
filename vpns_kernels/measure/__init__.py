"""Measuring: interleaved timing, the machine, the dense opponents, a network dense against sparse."""

from vpns_kernels.measure.fingerprint import fingerprint
from vpns_kernels.measure.network import bench_network
from vpns_kernels.measure.opponents import OPPONENTS, find_opponents
from vpns_kernels.measure.subject import Opponent
from vpns_kernels.measure.timing import (
    Laps,
    Ratio,
    Sample,
    add_up,
    compare,
    interleave,
    interleave_phases,
    measurement_lock,
)

__all__ = [
    "OPPONENTS",
    "Laps",
    "Opponent",
    "Ratio",
    "Sample",
    "add_up",
    "bench_network",
    "compare",
    "find_opponents",
    "fingerprint",
    "interleave",
    "interleave_phases",
    "measurement_lock",
]
