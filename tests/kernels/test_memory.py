"""Is freed memory kept for the next activation?"""

from __future__ import annotations

import subprocess
import sys

import pytest

# Page faults of ten activations of 64 MB, before and after.
CODE = """
import resource, torch
from vpns_kernels.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(16 * 1024 * 1024).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
faults()
mapped = faults()
is_kept = keep_freed_memory()
faults()
print(mapped, faults(), is_kept)
"""


def test_activations_are_mapped_once_and_not_at_every_allocation() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    mapped, kept, is_kept = done.stdout.split()
    if is_kept == "False":
        pytest.skip("this C library has no mallopt")
    assert int(mapped) > 100
    assert int(kept) < int(mapped) / 20


def test_the_peak_counts_what_was_freed_again() -> None:
    code = (
        "import torch\n"
        "from vpns_kernels.memory import peak_resident_bytes\n"
        "before = peak_resident_bytes()\n"
        "torch.ones(64 * 1024 * 1024)\n"
        "print(before, peak_resident_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    if before == 0:
        pytest.skip("this system does not say")
    assert after - before > 200e6
