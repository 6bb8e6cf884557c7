"""How is work timed on a GPU, and what could that GPU do at all? From recordings; ceilings, clocks."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch

from vpns_kernels.engine.gpu_clock import measure_ms, replayable
from vpns_kernels.measure.fingerprint import fingerprint
from vpns_kernels.measure.timing import Sample, interleave

# One play should take longer than what starting and awaiting it costs.
_LEAST_PLAY_MS, _MOST_REPEATS = 2.0, 50
_GEMM_SIZE, _COPY_BYTES = 8192, 1 << 31
_CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "temperature.gpu", "driver_version")


def interleave_recorded(
    calls: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, Sample]:
    """Each call's times, taken in turn, A B A B; on a GPU from recordings that repeat it.

    Raises:
        RuntimeError: on a GPU, a call that waits for the host.
    """
    repeats = {name: _repeats(measure_ms(call, device)) for name, call in calls.items()}
    players = {name: replayable(call, device, repeats[name]) for name, call in calls.items()}
    samples = interleave(players, rounds)
    return {
        name: Sample(tuple(ms / repeats[name] for ms in sample.times_ms)) for name, sample in samples.items()
    }


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds, monotonic, once all that was asked of the device is done."""
    if device.type != "cuda":
        return time.perf_counter

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def _repeats(ms: float) -> int:
    return max(1, min(_MOST_REPEATS, round(_LEAST_PLAY_MS / max(ms, 1e-6))))


def measure_gpu_ceilings(
    device: torch.device, size: int = _GEMM_SIZE, copy_bytes: int = _COPY_BYTES
) -> dict[str, float]:
    """TFLOP/s of torch's bfloat16 product, and TB/s that a copy reads and writes."""
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    source = torch.ones(copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product_ms = measure_ms(lambda: a @ b, device)
    copy_ms = measure_ms(lambda: target.copy_(source), device)
    return {
        "bfloat16_tflops": 2e-9 * size**3 / product_ms,
        "copy_tb_per_s": 2e-9 * copy_bytes / copy_ms,
    }


def gpu_fingerprint(device: torch.device) -> dict[str, Any]:
    """The machine's fingerprint with the GPU, its clocks now, and what its kernels are compiled by."""
    found = fingerprint() | {"device": str(device), "cuda": torch.version.cuda}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory_gb": properties.total_memory / 1e9,
            "capability": list(torch.cuda.get_device_capability(device)),
            "cudnn": torch.backends.cudnn.version(),
            "clocks": read_clocks(),
        }
    if find_spec("triton") is not None:
        import triton

        found["versions"] = found["versions"] | {"triton": triton.__version__}
    return found


def read_clocks() -> dict[str, str] | None:
    """What nvidia-smi says of the first GPU's clocks; None without it."""
    if shutil.which("nvidia-smi") is None:
        return None
    words = ["nvidia-smi", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return None
    return dict(zip(_CLOCKS, done.stdout.splitlines()[0].split(", "), strict=True))
