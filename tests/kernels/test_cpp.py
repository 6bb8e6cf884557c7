"""Do the native kernels pass their own program, without torch and Python, and stay where they belong?"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vpns_kernels import native

ROOT = Path(__file__).resolve().parents[2]
# The pointer to the handler of exceptions, and locks of critical sections: data, the same in every file.
HARMLESS = ("DW.ref.__gxx_personality_v0", ".gomp_critical_user_")


def run(*command: str | Path) -> str:
    """The output of a command of the virtual environment; fails with all of it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program = shutil.which(command[0], path=path)
    assert program is not None, f"{command[0]} is not installed"
    done = subprocess.run(
        [program, *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        # Threads that spin while they wait starve each other where there are fewer cores than threads.
        env=os.environ | {"PATH": path, "OMP_WAIT_POLICY": "passive"},
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return done.stdout


def build(folder: Path, *options: str, program: str = "kernels_test") -> Path:
    """Bring a program up to date in a build folder; gives its path."""
    import pybind11

    python = (f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
    run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *python, *options)
    run("cmake", "--build", folder, "--target", program)
    return folder / program


def assert_passes(program: Path, rounds: int, seed: int = 1) -> None:
    """Nothing failed, and no kernel that this CPU can run was left out."""
    output = run(program, str(rounds), str(seed))
    last = output.splitlines()[-1]
    assert re.fullmatch(r"[1-9]\d* passed, 0 failed", last), output
    prompts = [f"prompt_conv2d_{kernel}" for kernel in native.library().prompt_conv2d_kernels(True)]
    for kernel in ("select_threshold", *prompts, *native.library().sparse_conv2d_kernels(True)):
        assert re.search(rf"^{kernel}: [1-9]", output, re.MULTILINE), output


@pytest.fixture(scope="module")
def folder() -> Path:
    """The build folder of the native library, so that only the program itself is left to compile."""
    return ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"


@pytest.fixture(scope="module")
def program(folder: Path) -> Path:
    return build(folder)


@pytest.fixture(scope="module")
def sanitized() -> Path:
    """The program under the address and undefined-behaviour sanitizers."""
    return build(ROOT / "build" / "sanitize", "-DVPNS_SANITIZE=ON", "-DVPNS_PYTHON=OFF")


def test_every_native_kernel_passes_300_random_rounds(program: Path) -> None:
    assert_passes(program, 300)


def test_every_native_kernel_passes_100_rounds_under_the_sanitizers(sanitized: Path) -> None:
    assert_passes(sanitized, 100)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", [2, 3, 4])
def test_every_native_kernel_passes_2000_random_rounds(program: Path, seed: int) -> None:
    assert_passes(program, 2000, seed)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", [2, 3])
def test_every_native_kernel_passes_600_rounds_under_the_sanitizers(sanitized: Path, seed: int) -> None:
    assert_passes(sanitized, 600, seed)


@pytest.mark.usefixtures("program")
def test_no_code_of_a_stronger_instruction_set_can_leak_into_the_rest(folder: Path) -> None:
    # The linker keeps one copy of a weak symbol: were it the one compiled for AVX-512, everyone would run it.
    objects = sorted(folder.glob("CMakeFiles/vpns_cpu.dir/csrc/cpu/isa_*.cpp.o"))
    assert [path.name for path in objects] == [f"{p.name}.o" for p in sorted(ROOT.glob("csrc/cpu/isa_*.cpp"))]
    for path in objects:
        symbols = [
            line.split(maxsplit=2)[1:] for line in run("nm", "-C", "--defined-only", path).splitlines()
        ]
        ours = [(kind, name) for kind, name in symbols if not name.startswith(HARMLESS)]
        assert not [name for kind, name in ours if kind in "VvWwu"], path.name
        public = [name for kind, name in ours if kind.isupper()]
        assert public, path.name
        assert all(name.startswith("vpns::run_") for name in public), (path.name, public)
