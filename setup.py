"""Builds the native library: setup.py hands the whole of csrc to CMake, which hands it to ninja."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configure once, then build incrementally; the library lands inside the package."""

    def build_extension(self, ext: Extension) -> None:
        if ext.optional:  # the GPU part: built with the rest where nvcc is there
            return
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build_dir.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DVPNS_OUTPUT={target}",
        ]  # fmt: skip
        environment = dict(os.environ)
        # The cmake and ninja of the virtual environment, not whichever the system has.
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        build = ["cmake", "--build", str(build_dir)]
        for command in (configure, build):
            done = subprocess.run(command, env=environment, capture_output=self.verbose == 0, text=True)
            if done.returncode != 0:
                print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
                sys.exit(f"setup.py: expected to build csrc, got exit code {done.returncode}")


EXTENSIONS = [
    Extension("vpns_kernels._native", sources=[]),
    Extension("vpns_kernels._cuda", sources=[], optional=True),
]
setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": CMakeBuild})
