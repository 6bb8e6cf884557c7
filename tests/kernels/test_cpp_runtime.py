"""Does a C++ program that links the runtime alone give a stored plan's answers, bit for bit?"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.kernels.test_cpp import ROOT, build, run
from tests.kernels.test_engine import build as build_network
from tests.kernels.test_engine import images, prune
from tests.kernels.test_engine_torch import Attentive
from vpns_kernels import compile


@pytest.fixture(scope="module")
def program() -> Path:
    return build(ROOT / "build" / f"cmake-{sys.implementation.cache_tag}", program="run_plan")


def answer(
    program: Path, plan: Path, x: Tensor, threads: int, folder: Path
) -> subprocess.CompletedProcess[str]:
    (folder / "images").write_bytes(x.contiguous().numpy().tobytes())
    command = [program, plan, folder / "images", str(len(x)), str(threads), folder / "results"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["residual", "depthwise"])
def test_the_program_gives_the_engines_bits(program: Path, kind: str, dtype: str, tmp_path: Path) -> None:
    network = prune(build_network(kind), "unstructured", 0.4).eval()
    engine = compile(network, images(4), dtype, threads=2)  # type: ignore[arg-type]
    engine.save(tmp_path / "engine")
    for count, threads in ((1, 1), (5, 2)):
        x = images(count)
        done = answer(program, tmp_path / "engine" / "plan.bin", x, threads, tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        found = torch.frombuffer(bytearray((tmp_path / "results").read_bytes()), dtype=torch.float32)
        engine.threads = threads
        assert torch.equal(found.view(count, -1), engine(x))


def test_the_program_refuses_what_needs_torch_by_name_and_what_is_no_plan(
    program: Path, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    mixed: nn.Module = Attentive().eval()
    compile(mixed, images(2), "float32").save(tmp_path / "engine")
    done = answer(program, tmp_path / "engine" / "plan.bin", images(1), 1, tmp_path)
    assert done.returncode == 2
    assert "expected steps that run without torch, got layer torch:" in done.stderr
    (tmp_path / "none").write_bytes(b"VPNSPLAN and nothing else")
    done = answer(program, tmp_path / "none", images(1), 1, tmp_path)
    assert (done.returncode, "expected at least a header" in done.stderr) == (2, True)


def test_the_example_of_the_docs_runs_against_an_installation(program: Path, tmp_path: Path) -> None:
    run("cmake", "--install", program.parent, "--prefix", tmp_path / "installed")
    blocks = dict(re.findall(r"```(cmake|cpp)\n(.*?)```", (ROOT / "docs" / "cpp.md").read_text(), re.DOTALL))
    (tmp_path / "CMakeLists.txt").write_text(blocks["cmake"])
    (tmp_path / "main.cpp").write_text(blocks["cpp"])
    found = f"-DCMAKE_PREFIX_PATH={tmp_path / 'installed'}"
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build", "-G", "Ninja", found)
    run("cmake", "--build", tmp_path / "build")
    engine = compile(prune(build_network("residual"), "unstructured", 0.4).eval(), images(4), threads=4)
    engine.save(tmp_path / "engine")
    predicted = engine(torch.full_like(images(8), 0.5)).flatten(1).argmax(1)
    lines = run(tmp_path / "build" / "example", tmp_path / "engine" / "plan.bin").splitlines()
    assert lines == [str(label) for label in predicted.tolist()]


def test_the_program_links_neither_python_nor_torch(program: Path) -> None:
    needed = [line for line in run("readelf", "-d", program).splitlines() if "NEEDED" in line]
    assert needed
    assert not [line for line in needed if "python" in line or "torch" in line or "c10" in line]
