"""How is a pruned network stored and opened? As a folder that is whole or absent, and checked before use.

    manifest.json         what it is, and digests (manifest.py); written last
    plan.bin              the layers with their packed weights (plan_file.py)
    torch-0.pt2 ...       of an engine that torch runs in part: what torch runs (programs.py)
    masks.safetensors     bool masks, 8 to a byte (tensors.py)
    weights.safetensors   optional: a plain state_dict with zeros in place, for anyone
    prompt.safetensors    optional: that of the visual prompt

Every number is checked before it is followed, and nothing in an artifact is ever executed but operations of
torch's own (program_file.py refuses whatever else torch.export would open).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from vpns_kernels.engine.files import (
    MANIFEST,
    ArtifactError,
    find_folder,
    refuse,
    replace_folder,
    write_file,
)
from vpns_kernels.engine.layer import PlanLayer
from vpns_kernels.engine.manifest import (
    MASKS,
    PLAN,
    PROGRAM,
    PROMPT,
    WEIGHTS,
    check_fields,
    read_listed,
    read_manifest,
    write_manifest,
)
from vpns_kernels.engine.plan import Plan, plan_of_layers
from vpns_kernels.engine.plan_file import decode_plan, encode_plan
from vpns_kernels.engine.tensors import (
    check_masks,
    decode_masks,
    decode_weights,
    encode_masks,
    encode_weights,
)


@dataclass(frozen=True, eq=False)
class Artifact:
    """An opened artifact; masks and weights are read, and checked, when first asked for.

    Args:
        folder: where it was found.
        manifest: all fields of manifest.json.
        plan: the network, or its layers alone.
        plan_bytes: of plan.bin; the plan's tensors are views of it.
    """

    folder: Path
    manifest: dict[str, Any]
    plan: Plan
    plan_bytes: Tensor

    @property
    def layers(self) -> tuple[PlanLayer, ...]:
        """Those with weights, in the order in which they were written."""
        return self.plan.layers

    @cached_property
    def masks(self) -> dict[str, Tensor]:
        """Bool masks by name."""
        return decode_masks(read_listed(self.folder, self.manifest, MASKS), self.folder / MASKS)

    def read_program(self, number: int) -> Tensor:
        """The bytes of what torch runs, uint8."""
        name = PROGRAM.format(number)
        if name not in self.manifest["files"]:
            raise refuse(self.folder / MANIFEST, name, "none")
        return read_listed(self.folder, self.manifest, name)

    @cached_property
    def weights(self) -> dict[str, Tensor] | None:
        """The state_dict with zeros in place, or None where it was not stored."""
        return self._read_tensors(WEIGHTS)

    @cached_property
    def prompt(self) -> dict[str, Tensor] | None:
        """The state_dict of the visual prompt, or None where it was not stored."""
        return self._read_tensors(PROMPT)

    def _read_tensors(self, name: str) -> dict[str, Tensor] | None:
        if name not in self.manifest["files"]:
            return None
        return decode_weights(read_listed(self.folder, self.manifest, name), self.folder / name)


def write_artifact(
    folder: Path,
    manifest: Mapping[str, Any],
    plan: Plan | Sequence[PlanLayer],
    masks: Mapping[str, Tensor],
    weights: Mapping[str, Tensor] | None = None,
    programs: Sequence[bytes] = (),
    prompt: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a folder whole or not at all; an artifact that stands there is replaced by the complete new one.

    Args:
        manifest: JSON values; not format_version, files or digest, which are added.
        plan: a network that can be run, or its layers alone.
        masks: bool, by name.
        weights: a state_dict with zeros in place.
        programs: what torch runs, in order.
        prompt: the state_dict of a visual prompt.

    Raises:
        ArtifactError: what stands at `folder` is no artifact, or holds files that are not the artifact's.
        OSError: it cannot be written; what stood there stands there, or, where only the last sync failed,
            the complete new one.
    """
    fields = check_fields(manifest)
    plan = plan if isinstance(plan, Plan) else plan_of_layers(plan)
    check_masks(masks)

    def write(new: Path) -> None:
        files = {PLAN: write_file(new / PLAN, encode_plan(plan))}
        files[MASKS] = write_file(new / MASKS, [encode_masks(masks)])
        for name, tensors in ((WEIGHTS, weights), (PROMPT, prompt)):
            if tensors is not None:
                files[name] = write_file(new / name, [encode_weights(tensors)])
        for number, program in enumerate(programs):
            name = PROGRAM.format(number)
            files[name] = write_file(new / name, [program])
        write_manifest(new, fields, files)

    try:
        replace_folder(Path(os.path.realpath(folder)), _check_replaceable, write)
    except OSError as error:
        reason = error.strerror or str(error)
        message = f"write_artifact: cannot write {folder}: {reason} (nothing half-written stands there)"
        raise OSError(error.errno, message) from error


def read_artifact(folder: Path, verify: Literal["used", "all"] = "used") -> Artifact:
    """Open an artifact; files are hashed when they are used, or all at once.

    A replacement that happens meanwhile is noticed: the old or the new artifact is read, never a mixture.

    Raises:
        ArtifactError: names the file and what is wrong with it.
    """
    if verify not in ("used", "all"):
        raise ValueError(f"read_artifact: expected verify 'used' or 'all', got {verify!r}")
    named = Path(os.path.realpath(folder))
    while True:
        found = find_folder(named)
        identity = _identify(found)
        try:
            return _open(found, verify)
        except ArtifactError:
            # Where it was replaced while it was read, it is not damaged, and the next one is whole.
            if find_folder(named) == found and _identify(found) == identity:
                raise


def _open(folder: Path, verify: Literal["used", "all"]) -> Artifact:
    manifest = read_manifest(folder)
    data = read_listed(folder, manifest, PLAN)
    artifact = Artifact(folder, manifest, decode_plan(data, folder / PLAN), data)
    if verify == "all":
        _ = artifact.masks, artifact.weights, artifact.prompt
        for name in manifest["files"].keys() - {PLAN, MASKS, WEIGHTS, PROMPT}:
            read_listed(folder, manifest, name)
    return artifact


def _identify(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _check_replaceable(folder: Path) -> None:
    try:
        manifest = read_manifest(folder)
    except ArtifactError as error:
        raise ArtifactError(
            f"write_artifact: expected no folder or an artifact at {folder}, got: {error} "
            "(write elsewhere: nothing but an artifact is ever replaced)"
        ) from error
    if foreign := {path.name for path in folder.iterdir()} - {MANIFEST, *manifest["files"]}:
        raise ArtifactError(
            f"write_artifact: expected only an artifact's files in {folder}, got {sorted(foreign)} "
            "(write elsewhere, or move them away: a replaced folder loses all that is in it)"
        )
