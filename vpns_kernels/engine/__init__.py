"""The stored form of a pruned network: written whole or not at all, checked before anything is used."""

from vpns_kernels.engine.artifact import Artifact, read_artifact, write_artifact
from vpns_kernels.engine.files import ArtifactError
from vpns_kernels.engine.layer import PlanLayer

__all__ = ["Artifact", "ArtifactError", "PlanLayer", "read_artifact", "write_artifact"]
