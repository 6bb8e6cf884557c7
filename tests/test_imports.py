"""The house rule of imports: who may import whom, no cycles, nothing heavy at import."""

from __future__ import annotations

import ast
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Rooms from the top of the house to the bottom: a room imports its own and those below.
KERNEL_ROOMS = [
    ("vpns_kernels.engine", "vpns_kernels.measure", "vpns_kernels.testing"),
    ("vpns_kernels.shrink",),
    ("vpns_kernels.channel_flow",),
    (
        "vpns_kernels.batch_norms",
        "vpns_kernels.kept_channels",
        "vpns_kernels.convert",
        "vpns_kernels.explain",
        "vpns_kernels.fusing",
    ),
    ("vpns_kernels.channels", "vpns_kernels.modules", "vpns_kernels.sparse_modules"),
    ("vpns_kernels.runners",),
    ("vpns_kernels.choose_training",),
    ("vpns_kernels.choose",),
    ("vpns_kernels.choose_gpu",),
    ("vpns_kernels.cost",),
    ("vpns_kernels.graph_nodes", "vpns_kernels.folding", "vpns_kernels.tracing"),
    ("vpns_kernels.refresh", "vpns_kernels.graph_nodes"),
    ("vpns_kernels.ops",),
    ("vpns_kernels.schemas", "vpns_kernels.formats", "vpns_kernels.native"),
    ("vpns_kernels.patterns",),
    (
        "vpns_kernels.copying",
        "vpns_kernels.dtypes",
        "vpns_kernels.geometry",
        "vpns_kernels.memory",
        "vpns_kernels.torchvision_import",
        "vpns_kernels.onnx_file",
        "vpns_kernels.text_table",
    ),
]
TRAINER_ROOMS = [
    ("vpns.cli", "vpns.__main__"),
    ("vpns.stage_options", "vpns.data_command"),
    ("vpns.reproduce",),
    ("vpns.sweep",),
    ("vpns.dry_run",),
    ("vpns.run",),
    (
        "vpns.estimate",
        "vpns.stages",
        "vpns.report",
        "vpns.deploy",
        "vpns.doctor",
        "vpns.bench",
        "vpns.exchange",
    ),
    (
        "vpns.step",
        "vpns.group",
        "vpns.nonfinite",
        "vpns.accelerate",
        "vpns.predictor",
        "vpns.inference",
        "vpns.observe",
        "vpns.state",
        "vpns.metrics",
        "vpns.optimizers",
        "vpns.batches",
    ),
    ("vpns.methods", "vpns.prompt", "vpns.masking", "vpns.label_map", "vpns.data", "vpns.models"),
    ("vpns.files", "vpns.torchvision"),
    (
        "vpns.config",
        "vpns.option_help",
        "vpns.preset_files",
        "vpns.bench_options",
        "vpns.complaint",
        "vpns.sweep_options",
        "vpns.report_options",
        "vpns.statistics",
        "vpns.reproduce_options",
    ),
]
# Known exceptions, each with its reason.
ALLOWED = {
    # A report is written from a finished run folder, opened as a run opens it.
    ("vpns.report", "vpns.run"),
    ("vpns.deploy", "vpns.run"),
    ("vpns.bench", "vpns.run"),
    ("vpns.exchange", "vpns.run"),
}


def python_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if is_module(full) else node.module


def is_module(name: str) -> bool:
    path = ROOT / Path(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def room_of(name: str, rooms: list[tuple[str, ...]]) -> int | None:
    for number, prefixes in enumerate(rooms):
        if any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes):
            return number
    return None


@pytest.mark.parametrize(("package", "rooms"), [("vpns_kernels", KERNEL_ROOMS), ("vpns", TRAINER_ROOMS)])
def test_rooms_import_only_their_own_and_lower_rooms(package: str, rooms: list[tuple[str, ...]]) -> None:
    wrong = []
    for path in python_files(package):
        name = module_name(path)
        room = room_of(name, rooms)
        if name == package:
            continue
        assert room is not None, f"{name} has no room: add it to this test where it belongs"
        for imported in imports_of(path):
            target = room_of(imported, rooms)
            pair = (".".join(name.split(".")[:2]), ".".join(imported.split(".")[:2]))
            if target is not None and target < room and pair not in ALLOWED:
                wrong.append(f"{name} imports {imported}")
    assert not wrong


def test_kernels_never_import_the_trainer_and_nothing_imports_bench_or_tests() -> None:
    for package, forbidden in (("vpns_kernels", ("vpns", "bench", "tests")), ("vpns", ("bench", "tests"))):
        for path in python_files(package):
            tops = {name.split(".")[0] for name in imports_of(path)}
            assert not tops & set(forbidden), path


@pytest.mark.parametrize("name", ["vpns/config.py", "vpns_kernels/geometry.py"])
def test_settings_and_sizes_import_nothing_of_ours(name: str) -> None:
    assert not [imported for imported in imports_of(ROOT / name) if imported.startswith("vpns")]


def test_backends_import_only_what_computing_needs() -> None:
    allowed = (
        "vpns_kernels.dtypes",
        "vpns_kernels.geometry",
        "vpns_kernels.patterns",
        "vpns_kernels.formats",
        "vpns_kernels.native",
        "vpns_kernels.ops._cpu",
        "vpns_kernels.ops._torch",
        "vpns_kernels.ops._triton",
    )
    for path in (ROOT / "vpns_kernels" / "ops").glob("*/*.py"):
        if path.stem in ("__init__", "cases"):
            continue
        own = f"vpns_kernels.ops.{path.parent.name}"
        ours = [name for name in imports_of(path) if name.startswith("vpns")]
        assert all(name.startswith((*allowed, own)) for name in ours), (path, ours)


def test_there_is_no_import_cycle() -> None:
    files = {
        module_name(path): path for package in ("vpns", "vpns_kernels") for path in python_files(package)
    }
    top_level = {
        name: {
            imported
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for imported in imports_in(node)
            if imported in files and imported != name
        }
        for name, path in files.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for imported in sorted(top_level[name]):
                visit(imported, (*trail, name))
            done.add(name)

    for name in sorted(files):
        visit(name, ())


def imports_in(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    full = [f"{node.module}.{alias.name}" for alias in node.names]
    return [name if is_module(name) else str(node.module) for name in full]


def test_native_code_knows_neither_torch_nor_outside_of_the_bindings_python() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        includes = re.findall(r'#include\s*[<"]([^>"]+)[>"]', path.read_text())
        banned = (
            ("torch", "ATen", "c10")
            if "bindings" in path.parts
            else ("torch", "ATen", "c10", "pybind11", "Python")
        )
        assert not [name for name in includes if name.startswith(banned)], path


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command, env = [sys.executable, "-c", code], os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=env)


def test_importing_the_kernels_adds_at_most_60_ms_nothing_but_themselves_and_no_cuda(tmp_path: Path) -> None:
    # Time of the processor, not of the clock: other processes of a busy machine do not count.
    code = (
        "import sys, time, torch, numpy\n"
        "before, started = set(sys.modules), time.process_time()\n"
        "import vpns_kernels\n"
        "print(1000 * (time.process_time() - started), torch.cuda.is_initialized())\n"
        "tops = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(*tops - sys.stdlib_module_names - {'torch'})"
    )
    # As after an installation, which compiles the sources; the first run here does.
    compiled = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    run_python("import vpns_kernels", **compiled)
    added_ms = []
    for _ in range(5):
        figures, modules = run_python(code, **compiled).stdout.splitlines()
        milliseconds, is_initialised = figures.split()
        assert is_initialised == "False"
        assert modules == "vpns_kernels"
        added_ms.append(float(milliseconds))
    assert statistics.median(added_ms) <= 60


@pytest.mark.parametrize(
    ("package", "absent"),
    [("vpns_kernels", "vpns_kernels.convert vpns_kernels.engine"), ("vpns", "torch vpns.run")],
)
def test_every_public_name_is_there_and_listed_and_what_is_slow_waits_until_asked_for(
    package: str, absent: str
) -> None:
    code = (
        f"import sys, {package} as package\n"
        f"print(*[name for name in {absent!r}.split() if name in sys.modules])\n"
        "assert set(package.__all__) <= set(dir(package))\n"
        "lazy = {name for names in package._LAZY.values() for name in names}\n"
        "assert lazy <= set(package.__all__)\n"
        "assert all(getattr(package, name).__module__.startswith(package.__name__) "
        "for name in package.__all__ if name != 'OPS')\n"
        "assert all(callable(getattr(package, name)) for name in lazy)\n"
        "print(hasattr(package, 'no_such_name'))"
    )
    assert run_python(code).stdout.splitlines() == ["", "False"]


def test_the_command_line_answers_help_without_importing_torch() -> None:
    started = time.perf_counter()
    code = (
        "import sys, contextlib\n"
        "from vpns.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['--help'])\n"
    )
    out = run_python(code + "print('torch' in sys.modules)").stdout
    assert out.splitlines()[-1] == "False"
    assert time.perf_counter() - started < 10


def test_both_packages_import_without_the_compiled_library_torchvision_and_triton() -> None:
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'vpns_kernels._native' or name.split('.')[0] in ('torchvision', 'triton'):\n"
        "            raise ImportError(f'{name} is blocked')\n"
        "sys.meta_path.insert(0, Block())\n"
        "import torch, vpns, vpns_kernels, vpns.run\n"
        "from vpns_kernels import native, select_threshold\n"
        "assert 'blocked' in native.why_not()\n"
        "print(int(select_threshold([torch.tensor([3.0, 1.0])], 0.5)[2]))"
    )
    assert run_python(code).stdout.strip() == "1"
