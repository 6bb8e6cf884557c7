"""From a pruned network to one that runs: compiled, explained, stored, and checked before use."""

from vpns_kernels.engine.artifact import Artifact, read_artifact, write_artifact
from vpns_kernels.engine.compile import compile
from vpns_kernels.engine.drafts import LoweringError
from vpns_kernels.engine.engine import Engine, save_engine
from vpns_kernels.engine.files import ArtifactError
from vpns_kernels.engine.gpu import GpuEngine
from vpns_kernels.engine.layer import PlanLayer
from vpns_kernels.engine.load import load
from vpns_kernels.engine.plan import Plan, PlanStep, PlanValue
from vpns_kernels.engine.report import EngineReport, StepReport
from vpns_kernels.engine.trace import TraceError

__all__ = [
    "Artifact",
    "ArtifactError",
    "Engine",
    "EngineReport",
    "GpuEngine",
    "LoweringError",
    "Plan",
    "PlanLayer",
    "PlanStep",
    "PlanValue",
    "StepReport",
    "TraceError",
    "compile",
    "load",
    "read_artifact",
    "save_engine",
    "write_artifact",
]
