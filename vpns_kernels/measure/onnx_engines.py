"""Engines that read ONNX: ONNX Runtime, OpenVINO, DeepSparse, each with as many threads as torch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vpns_kernels.measure.signal_stack import kept_signal_stack
from vpns_kernels.measure.subject import Call, Opponent, Subject
from vpns_kernels.onnx_file import quietly, run_onnx, why_no_onnx

_OPENVINO_TYPES = {"float32": "f32", "bfloat16": "bf16"}


def onnxruntime(name: str, subject: Subject) -> Opponent:
    """ONNX Runtime's CPU provider, all graph optimisations on."""
    if (reason := why_no_onnx("onnx", "onnxscript", "onnxruntime", extra="peers")) is not None:
        return Opponent(name, None, reason)
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    x = subject.x.float().contiguous()
    try:
        run = run_onnx(subject.onnx)
        run(x)
    except (NotImplementedError, state.Fail, state.NotImplemented, state.InvalidGraph) as error:
        return Opponent(name, None, _shorten(error))
    return Opponent(name, lambda: run(x))


def openvino(name: str, subject: Subject) -> Opponent:
    """OpenVINO's CPU plugin for one caller: one stream, latency first."""
    if (reason := why_no_onnx("onnx", "onnxscript", "openvino", extra="peers")) is not None:
        return Opponent(name, None, reason)
    dtype = name.split()[-1]
    try:
        if dtype == "int8":
            if (reason := why_no_onnx("onnxruntime", extra="peers")) is not None:
                return Opponent(name, None, reason)
            return Opponent(name, _compile_openvino(_quantize(subject), subject, {}))
        precision = {"INFERENCE_PRECISION_HINT": _OPENVINO_TYPES[dtype]}
        return Opponent(name, _compile_openvino(subject.onnx, subject, precision))
    except (NotImplementedError, RuntimeError) as error:
        return Opponent(name, None, _shorten(error))


def deepsparse(name: str, subject: Subject) -> Opponent:
    """DeepSparse with the dense network."""
    if (reason := why_no_onnx("deepsparse", extra="peers")) is not None:
        hint = "no longer maintained: deepsparse==1.8.0 in an environment of its own, with numpy<2"
        return Opponent(name, None, f"{reason.split(' (')[0]} ({hint})")
    from deepsparse import compile_model

    x = subject.x.float().contiguous().numpy()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        try:
            path.write_bytes(subject.onnx)
            engine = compile_model(str(path), batch_size=len(x), num_cores=torch.get_num_threads())
        except (NotImplementedError, RuntimeError) as error:
            return Opponent(name, None, _shorten(error))
    return Opponent(name, lambda: torch.from_numpy(engine.run([x])[0]))


def _compile_openvino(content: bytes, subject: Subject, settings: dict[str, Any]) -> Call:
    from openvino import Core

    core = Core()
    if settings.get("INFERENCE_PRECISION_HINT") == "bf16":
        able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if "BF16" not in able:
            raise NotImplementedError(f"OpenVINO multiplies no bfloat16 on this CPU, only {able}")
    settings = settings | {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": "1",
        "PERFORMANCE_HINT": "LATENCY",
    }
    x = subject.x.float().contiguous().numpy()
    with kept_signal_stack():
        request = core.compile_model(core.read_model(content), "CPU", settings).create_infer_request()
        request.infer([x])

    def call() -> torch.Tensor:
        found = request.infer([x], share_inputs=True, share_outputs=True)
        return torch.from_numpy(found[0])

    return call


def _quantize(subject: Subject) -> bytes:
    """The ONNX model with 8-bit weights and activations, scaled by what the input gives."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Once(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left: Iterator[dict[str, np.ndarray]] = iter(
                [{"x": subject.x.float().contiguous().numpy()}]
            )

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._left, None)

    with tempfile.TemporaryDirectory() as folder, quietly():
        path = Path(folder) / "network.onnx"
        model = onnx.load_model_from_string(subject.onnx)
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(model, path, Once(), quant_format=QuantFormat.QDQ, per_channel=True, **types)
        return path.read_bytes()


def _shorten(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
