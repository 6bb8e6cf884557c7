"""GPU kernels compile without warnings or spills for each architecture, and run where there is a GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from vpns_kernels import native, select_threshold

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_a_kernel_compiles_without_warnings_and_spills(
    source: Path, architecture: str, tmp_path: Path
) -> None:
    command = [str(NVCC), "-std=c++17", "-I", str(ROOT / "csrc"), "-Werror", "all-warnings"]
    command += [f"-arch={architecture}", "-Xptxas", "-v", "-cubin", "-o", str(tmp_path / "out.cubin")]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stores = [line for line in done.stderr.splitlines() if "spill stores" in line]
    assert stores
    assert all(" 0 bytes spill stores, 0 bytes spill loads" in line for line in stores), done.stderr


def test_without_a_gpu_tensor_the_backend_says_why_not() -> None:
    with pytest.raises(
        NotImplementedError, match="backend 'cuda' cannot run this: it takes float32 CUDA scores"
    ):
        select_threshold([torch.ones(3)], 0.5, backend="cuda")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_the_gpu_part_is_built_where_nvcc_is() -> None:
    assert native.why_no_cuda() is None
    assert native.cuda_library().select_threshold_workspace() > 0


@needs_gpu
@pytest.mark.parametrize("kept", [1, 1000, 300_000])
def test_the_gpu_selects_what_the_reference_selects(kept: int) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(n, generator=generator) for n in (300_001, 1, 64 * 9, 0)]
    scores[0][::3] = 0.5
    expected = select_threshold(scores, kept=kept, backend="reference")
    for _ in range(20):
        found = select_threshold([s.cuda() for s in scores], kept=kept, backend="cuda")
        assert float(found[0]) == float(expected[0])
        assert int(found[1]) == int(expected[1])
    scores[2][5] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        select_threshold([s.cuda() for s in scores], kept=kept, backend="cuda")
