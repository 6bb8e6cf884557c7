"""Measuring: interleaved timing, the machine, the dense opponents, a network dense against sparse."""

from vpns_kernels.measure.fingerprint import fingerprint
from vpns_kernels.measure.network import bench_network
from vpns_kernels.measure.opponents import OPPONENTS, Opponent, find_opponents
from vpns_kernels.measure.timing import Ratio, Sample, compare, interleave, measurement_lock

__all__ = [
    "OPPONENTS",
    "Opponent",
    "Ratio",
    "Sample",
    "bench_network",
    "compare",
    "find_opponents",
    "fingerprint",
    "interleave",
    "measurement_lock",
]
