"""How does a network become an ONNX file? By torch's own exporter (dynamo), which needs the extra [onnx]."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from vpns_kernels.copying import copy_network


def why_no_onnx(*packages: str, extra: str = "onnx") -> str | None:
    """What is not installed of these packages, and the extra that installs it; None if nothing is missing."""
    missing = [package for package in packages if find_spec(package) is None]
    return (
        f"{', '.join(missing)} not installed (pip install -c constraints.txt -e '.[{extra}]')"
        if missing
        else None
    )


def to_onnx(network: nn.Module, x: Tensor, any_batch: bool = False) -> bytes:
    """The network in evaluation mode as an ONNX model: input "x", output "y".

    Args:
        x: an example input, which fixes all sizes.
        any_batch: whether the first axis is free.

    Raises:
        NotImplementedError: packages of the extra that are missing, or an operation that ONNX does not have.
    """
    if (reason := why_no_onnx("onnx", "onnxscript")) is not None:
        raise NotImplementedError(f"to_onnx: expected torch's exporter to be complete, got: {reason}")
    plain = copy_network(network).eval()
    shapes = ({0: torch.export.Dim.DYNAMIC},) if any_batch else None
    # With one image, the exporter would take the batch for a constant.
    given = x.repeat(2, *(1 for _ in x.shape[1:])) if any_batch and len(x) == 1 else x
    with quietly():
        try:
            program = torch.onnx.export(
                plain, (given,), input_names=["x"], output_names=["y"], dynamic_shapes=shapes,
                dynamo=True, verbose=False,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            raise NotImplementedError(
                f"to_onnx: expected operations that ONNX has, got: {' '.join(str(error).split())[:300]}"
            ) from error
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def run_onnx(content: bytes) -> Callable[[Tensor], Tensor]:
    """A function that computes an ONNX model in ONNX Runtime.

    Raises:
        NotImplementedError: ONNX Runtime is not installed.
    """
    if (reason := why_no_onnx("onnxruntime")) is not None:
        raise NotImplementedError(f"run_onnx: expected ONNX Runtime, got: {reason}")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would wait in a loop for the next call, at the cost of whoever runs in between.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (name,) = [given.name for given in session.get_inputs()]

    def call(x: Tensor) -> Tensor:
        (found,) = session.run(None, {name: x.detach().numpy()})
        return torch.from_numpy(found)

    return call


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """What the exporter and its tools print and warn of concerns their own code."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
