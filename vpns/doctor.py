"""What can this machine run, and what not, and why? Everything that a report of trouble should begin with."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from vpns.data.cache import cache_folder
from vpns_kernels import native
from vpns_kernels.choose import break_even_density, choose, this_machine
from vpns_kernels.cost import CLASSES, LayerQuery, class_name, cost_table
from vpns_kernels.engine.semi_structured import why_no_device
from vpns_kernels.geometry import ConvGeometry
from vpns_kernels.measure import fingerprint
from vpns_kernels.ops import OPS
from vpns_kernels.torchvision_import import import_torchvision

_EXTRAS = {"timm": "networks by name (extra [timm])", "ray": "sweeps over a cluster (extra [ray])"}
_PEERS = ("openvino", "onnxruntime", "deepsparse", "sparseprop")
# A layer in the middle of ResNet-18 at 224 pixels, batch 16, a tenth kept.
_LAYER, _SIZE, _KEPT = ConvGeometry(256, 256, (3, 3), padding=(1, 1)), (16, 14, 14), 0.1


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        is_needed: whether vpns runs slowly, or not at all, without it.
    """

    name: str
    is_there: bool
    detail: str
    is_needed: bool = False


def examine() -> list[Finding]:
    """Look at the machine, the compiled library, the GPU, the peers that may be measured against."""
    machine = fingerprint()
    cpu = f"{machine['cpu']}, {machine['cores']} cores, {platform.system()} {platform.machine()}"
    threads = f"torch uses {torch.get_num_threads()}"
    if found := {k: os.environ[k] for k in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY") if k in os.environ}:
        threads += f", {found}"
    reason = native.why_not()
    return [
        Finding("cpu", True, cpu),
        Finding("threads", True, threads),
        Finding("python", True, f"{machine['python']}, torch {machine['versions']['torch']}"),
        Finding("compiled library", reason is None, reason or "loaded", is_needed=True),
        *_instruction_sets(),
        *_gpu(),
        *(Finding(name, find_spec(name) is not None, "a peer for measuring") for name in _PEERS),
        _torchvision(),
        *(Finding(name, find_spec(name) is not None, what) for name, what in _EXTRAS.items()),
        _cache(),
        *(Finding(f"op {name}", True, f"backends {', '.join(op.backends)}") for name, op in OPS.items()),
        *_expected_speed(),
    ]


def to_text(findings: list[Finding]) -> str:
    """One line each."""
    width = max(len(finding.name) for finding in findings)
    return "\n".join(f"{f.name:{width}}  {'yes' if f.is_there else 'no ':3}  {f.detail}" for f in findings)


def to_plain(findings: list[Finding]) -> dict[str, Any]:
    """The findings as plain values, as JSON holds them."""
    return {
        "schema_version": 1,
        "is_healthy": is_healthy(findings),
        "findings": [asdict(f) for f in findings],
    }


def is_healthy(findings: list[Finding]) -> bool:
    """Whether all is there that vpns needs."""
    return all(finding.is_there for finding in findings if finding.is_needed)


def _instruction_sets() -> list[Finding]:
    if native.why_not() is not None:
        return []
    library = native.library()
    usable, kernels = library.isa_list(), library.sparse_conv2d_kernels()
    cap = os.environ.get("VPNS_ISA")
    found = []
    for isa in CLASSES:
        own = [kernel for kernel in kernels if kernel.endswith(f"_{isa}") or kernel == isa]
        why_not = "not on this CPU, or not compiled" + (f", or above VPNS_ISA={cap}" if cap else "")
        detail = f"kernels {', '.join(own)}" if own else "no convolution of its own"
        found.append(Finding(f"cpu {isa}", isa in usable, detail if isa in usable else why_not))
    return found


def _gpu() -> list[Finding]:
    nvcc, part = shutil.which("nvcc"), native.why_no_cuda()
    triton, has_gpu = _triton_version(), torch.cuda.is_available()
    in_triton = ", ".join(name for name, op in OPS.items() if "triton" in op.backends)
    found = [
        Finding("gpu", has_gpu, _describe_gpu() if has_gpu else "torch finds none"),
        Finding("nvcc", nvcc is not None, nvcc or "not on PATH: the library's GPU part is not built"),
        Finding("gpu part of the library", part is None, part or "loaded"),
        Finding(
            "triton",
            triton is not None,
            f"{triton}, kernels of {in_triton}" if triton else "not installed (extra [triton])",
        ),
    ]
    if has_gpu:
        refusal = why_no_device(torch.device("cuda"))
        found.append(Finding("gpu 2:4", refusal is None, refusal or "linear layers and 1x1 convolutions"))
    return found


def _describe_gpu() -> str:
    properties = torch.cuda.get_device_properties(0)
    capability = f"{properties.major}.{properties.minor}"
    memory = f"{properties.total_memory / 2**30:.0f} GiB"
    return f"{properties.name}, {memory}, compute capability {capability}, CUDA {torch.version.cuda}"


def _triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def _torchvision() -> Finding:
    """Imported, since a build for another torch is found but stops."""
    try:
        import_torchvision("datasets")
    except Exception as error:
        return Finding("torchvision", False, f"for published data and networks: {error}")
    return Finding("torchvision", True, "published data sets and networks by name")


def _cache() -> Finding:
    """Of decoded images."""
    folder = cache_folder(None)
    above = next(parent for parent in (folder, *folder.parents) if parent.exists())
    detail = f"{folder}, {shutil.disk_usage(above).free / 2**30:.0f} GiB free"
    can_write = os.access(above, os.W_OK)
    return Finding("cache of images", can_write, detail if can_write else f"{above} cannot be written")


def _costs() -> Finding:
    """Kernels are chosen by them."""
    machine = this_machine()
    name, known = class_name(machine.isa, machine.core), cost_table()["classes"]
    if name in known:
        return Finding("costs of layers", True, f"of {name}, measured {known[name]['machine']['date']}")
    detail = f"none of {name}: others stand in, and choices are cautious; python -m bench.tune measures them"
    return Finding("costs of layers", False, detail)


def _expected_speed() -> list[Finding]:
    """Of one layer, from the table of costs, or by a GPU's rule: nothing is measured here."""
    found = [_costs()]
    machines = {"": this_machine()}
    if torch.cuda.is_available():
        machines[" on the gpu"] = this_machine(torch.device("cuda"))
    K, C, R, S = _LAYER.weight_shape
    kept = round(_KEPT * K * C * R * S)
    sizes: Mapping[str, tuple[int, ...]] = {
        "unstructured": (kept,),
        "block:32x32": (kept // 1024, 32, 32),
    }
    for pattern, values in sizes.items():
        for dtype in ("float32", "bfloat16"):
            query = LayerQuery(_LAYER, _SIZE, values, dtype)
            for where, machine in machines.items():
                choice, ends_at = choose(query, machine), break_even_density(query, machine)
                detail = f"{choice.reason}; sparse is chosen up to density {ends_at:.2f}"
                found.append(Finding(f"expect {pattern} {dtype}{where}", choice.kernel != "dense", detail))
    return found
