"""How does a program of torch lie in a file? As torch.export stores it, less whatever could run code.

torch.export.load opens pickles of sample inputs and of odd tensors, follows any name below torch, and
evaluates expressions of sizes. So only what an ordinary program needs is handed on: tensors by their bytes,
operations of aten, sizes that are sums and products. The archive is read and written anew here, so that there
are no two ways to read it.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from typing import Any

_SAMPLES = "archive/data/sample_inputs/model.pt"
_JSON = (
    "archive/data/weights/model_weights_config.json",
    "archive/data/constants/model_constants_config.json",
    "archive/models/model.json",
)
_MEMBER = re.compile(
    r"archive/(data/weights/weight_\d+|data/constants/tensor_\d+|archive_format|archive_version|byteorder"
    r"|\.data/version|\.data/serialization_id)"
)
_TARGET = re.compile(
    r"torch\.ops\.aten\.\w+\.\w+|_operator\.(getitem|add|sub|mul|floordiv|mod|neg|pow|eq|ne|lt|le|gt|ge)"
    r"|torch\.sym_(int|max|min|not|sum)"
)
_NAME = re.compile(r"[A-Za-z_]\w*")
_SIZE = re.compile(
    r"s\d+|u\d+|Symbol|Integer|Add|Mul|Pow|Mod|FloorDiv|PythonMod|CleanDiv|Max|Min|Eq|Ne|Lt|Le|Gt|Ge"
    r"|positive|nonnegative|integer|True|False|int_oo|oo"
)
_SIGNS = re.compile(r"[\w\s+\-*/(),<>='\"]*")


def strip_program(data: bytes) -> bytes:
    """What torch.export.save wrote, without its sample inputs."""
    return _rewrite(data, samples=b"")


def check_program(data: bytes) -> bytes:
    """The same bytes' content, written anew; ValueError where strip_program would not have written it."""
    try:
        return _rewrite(data, samples=None)
    except (
        zipfile.BadZipFile,
        KeyError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        RecursionError,
    ) as error:
        raise ValueError(f"expected an archive of torch.export, got: {error}") from error


def _rewrite(data: bytes, samples: bytes | None) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        infos = old.infolist()
        names = [info.filename for info in infos]
        if len(set(names)) != len(names) or any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise ValueError("expected files of different names, not compressed")
        for name in names:
            content = old.read(name)
            if name in _JSON:
                _check_json(name, json.loads(content))
            elif name == _SAMPLES:
                content = content if samples is None else samples
                if content:
                    raise ValueError(f"expected no sample inputs, got {len(content)} bytes")
            elif not _MEMBER.fullmatch(name):
                raise ValueError(f"expected files of an ordinary program, got {name[:100]!r}")
            new.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def _check_json(name: str, content: Any) -> None:
    for key, value in _entries(content):
        is_fit = True
        if key in ("target", "as_operator"):
            is_fit = isinstance(value, str) and _TARGET.fullmatch(value) is not None
        elif key == "expr_str":
            is_fit = isinstance(value, str) and _is_size(value)
        elif key == "use_pickle":
            is_fit = value is False
        elif key in ("as_custom_obj", "as_graph"):
            is_fit = value is None
        if not is_fit:
            raise ValueError(f"expected an ordinary program in {name}, got {key} {str(value)[:100]!r}")


def _is_size(expression: str) -> bool:
    names = _NAME.findall(expression)
    return _SIGNS.fullmatch(expression) is not None and all(_SIZE.fullmatch(name) for name in names)


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict):
        yield from content.items()
    children = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    for child in children:
        yield from _entries(child)
