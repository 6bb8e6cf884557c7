"""What does manifest.json say? What the artifact is, size and SHA-256 of each file, and a digest of all that.

It is accepted byte for byte as it is written, so that no second text means the same manifest. Digests
reveal damage, not malice: whoever can write a folder can write its digests too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vpns_kernels.engine.files import MANIFEST, read_file, refuse, write_file

FORMAT_VERSION = 1
PLAN, MASKS = "plan.bin", "masks.safetensors"
WEIGHTS, PROMPT = "weights.safetensors", "prompt.safetensors"
# Of an engine that torch runs in part: what torch runs, one file each (programs.py).
PROGRAM = "torch-{}.pt2"
_PROGRAM = re.compile(r"torch-(0|[1-9][0-9]{0,3})\.pt2")
_RESERVED = {"format_version", "files", "digest"}
_MANIFEST_LIMIT_BYTES = 64 << 20
_FILE_LIMIT_BYTES = 1 << 40


def check_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The free fields as they will be read (tuples become lists); ValueError where they cannot be stored."""
    if taken := _RESERVED & fields.keys():
        raise ValueError(
            f"write_artifact: expected a manifest without {sorted(_RESERVED)}, got {sorted(taken)}"
        )
    try:
        plain: dict[str, Any] = json.loads(_render(fields))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"write_artifact: expected JSON values in the manifest, got: {error}") from error
    return plain


def write_manifest(folder: Path, fields: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """The last file of a folder; it appears complete and synced."""
    content = {"format_version": FORMAT_VERSION, **fields, "files": dict(files)}
    partial = folder / f"{MANIFEST}.tmp"
    write_file(partial, [_render(content | {"digest": _digest(content)})])
    partial.rename(folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an artifact; ArtifactError where there is none that is intact and of this version."""
    path = folder / MANIFEST
    raw = read_file(path, _MANIFEST_LIMIT_BYTES).numpy().tobytes()
    try:
        content = json.loads(raw)
        is_ours = isinstance(content, dict) and _render(content) == raw
        is_ours = is_ours and content.get("digest") == _digest(content)
    except (ValueError, RecursionError) as error:
        raise refuse(path, "JSON", str(error)) from error
    if not is_ours:
        raise refuse(path, "a manifest with its own digest", "one that was changed")
    version, files = content.get("format_version"), content.get("files")
    if type(version) is not int or version != FORMAT_VERSION:
        raise refuse(path, f"format_version {FORMAT_VERSION}", f"{version!r} (from a newer version?)")
    ours = {PLAN, MASKS, WEIGHTS, PROMPT}
    if not isinstance(files, dict) or not {PLAN, MASKS} <= files.keys() <= ours | _programs(files):
        found = repr(sorted(files) if isinstance(files, dict) else files)[:200]
        raise refuse(path, f"files {PLAN}, {MASKS} and perhaps {WEIGHTS}", found)
    for name, entry in files.items():
        is_entry = isinstance(entry, dict) and entry.keys() == {"bytes", "sha256"}
        if not is_entry or type(entry["bytes"]) is not int or not isinstance(entry["sha256"], str):
            raise refuse(path, f"bytes and sha256 of {name}", repr(entry)[:200])
    manifest: dict[str, Any] = content
    return manifest


def read_listed(folder: Path, manifest: Mapping[str, Any], name: str) -> Tensor:
    """The bytes of a file of the manifest, uint8; the very bytes that were hashed."""
    path, entry = folder / name, manifest["files"][name]
    data = read_file(path, _FILE_LIMIT_BYTES, entry["bytes"])
    found = hashlib.sha256(data.numpy().data).hexdigest()
    if found != entry["sha256"]:
        hint = "damaged, or replaced since it was opened"
        raise refuse(path, f"SHA-256 {entry['sha256'][:64]}", f"{found} ({hint})")
    return data


def _programs(files: Mapping[str, Any]) -> set[str]:
    return {name for name in files if _PROGRAM.fullmatch(name)}


def _render(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical form: sorted keys, no spaces, ASCII, without the digest itself."""
    rest = {key: value for key, value in content.items() if key != "digest"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
