"""How is a pruned network run where it is measured? Compiled; made smaller first where channels are gone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vpns_kernels.convert import sparsify
from vpns_kernels.dtypes import dtype_name
from vpns_kernels.engine import Engine, compile
from vpns_kernels.measure.timing import interleave
from vpns_kernels.patterns import Channel, Pattern
from vpns_kernels.shrink import shrink
from vpns_kernels.sparse_modules import SparseConv2d, SparseLinear

_LAYER_ROUNDS = 10
_SPARSE = (SparseConv2d, SparseLinear)


class Deployed:
    """A compiled network, and what its layers were before.

    Args:
        network: in evaluation mode, zeros where pruned.
        pattern: of its mask; None where it is not known.
        x: [N, C, H, W] float32.
        dtype: as compile takes it.
        engine: of this network, where it is compiled already.
    """

    def __init__(
        self,
        network: nn.Module,
        pattern: Pattern | None,
        x: Tensor,
        dtype: str = "auto",
        engine: Engine | None = None,
    ) -> None:
        self._sizes_before = _sizes(network)
        self._images = len(x)
        if engine is None:
            may_shrink = pattern is None or isinstance(pattern, Channel)
            engine = compile(shrink(network) if may_shrink else network, x, dtype=dtype)  # type: ignore[arg-type]
        self.engine = engine

    @property
    def dtype(self) -> str:
        """The type of activations and weights inside, such as "bfloat16"."""
        plan = self.engine.plan
        assert plan.input is not None
        return dtype_name(plan.values[plan.input].dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """The engine's outputs."""
        return self.engine(x)

    def rows(self) -> dict[str, dict[str, Any]]:
        """Figures by layer, for the whole batch: sparse_ms, ms (what was chosen), choice, kernel, reason."""
        after = {layer.name: layer.packed.geometry.weight_shape[:2] for layer in self.engine.plan.layers}
        found = {}
        for row in self.engine.explain(quiet=True).rows():
            name = row["name"]
            before_it = self._sizes_before.get(name)
            is_smaller = name in after and before_it not in (None, after[name])
            sparse_ms = row["ms"] if is_smaller else row["sparse_ms"]
            reason = row["reason"]
            if is_smaller and not row["is_sparse"]:
                before, now = (" ".join(map(str, sizes)) for sizes in (before_it or (), after[name]))
                reason = f"cut: {now} of {before} output and input channels are left"
            found[name] = {
                "sparse_ms": None if sparse_ms is None else sparse_ms * self._images,
                "ms": row["ms"] * self._images,
                "choice": "sparse" if row["is_sparse"] or is_smaller else "dense",
                "kernel": row["kernel"] or row["op"],
                "reason": reason,
            }
        return found

    def dense_ms(self) -> dict[str, float]:
        """Milliseconds by layer, for the whole batch, with everything, as timed when compiling."""
        rows = self.engine.explain(quiet=True).rows()
        return {row["name"]: row["dense_ms"] * self._images for row in rows if row["dense_ms"] is not None}


class Untraced:
    """A network that no engine can take over, as torch runs it in float32: its pruned layers are sparse."""

    dtype = "float32"

    def __init__(self, network: nn.Module, pattern: Pattern | None, x: Tensor, *_: object) -> None:
        self._network = sparsify(network, pattern=pattern).to(x.device).eval()
        self._x = x

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """The network's outputs."""
        y: Tensor = self._network(x)
        return y

    def rows(self) -> dict[str, dict[str, Any]]:
        """As those of `Deployed`: each layer alone."""
        calls = record_layers(self._network, self._x, (*_SPARSE, nn.Conv2d, nn.Linear))
        with torch.no_grad():
            timed = interleave({name: partial(layer, x) for name, layer, x in calls}, _LAYER_ROUNDS)
        found = {}
        for name, layer, x in calls:
            is_pruned, took_ms = isinstance(layer, _SPARSE), timed[name].median_ms
            kernel = layer.kernel_for(x) if is_pruned else "dense"
            found[name] = {
                "sparse_ms": took_ms if is_pruned else None,
                "ms": took_ms,
                "choice": "dense" if kernel == "dense" else "sparse",
                "kernel": "torch" if kernel == "dense" else kernel,
                "reason": "the network cannot be traced: torch calls each layer",
            }
        return found

    def dense_ms(self) -> dict[str, float]:
        """Nothing: no engine chose."""
        return {}


# A pruned network, ready to run.
Deployment = Deployed | Untraced


def record_layers(
    network: nn.Module, x: Tensor, kinds: tuple[type[nn.Module], ...]
) -> list[tuple[str, Any, Tensor]]:
    """The layers of these kinds as a forward pass calls them: name, module and input."""
    found: list[tuple[str, Any, Tensor]] = []
    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, kinds):

            def note(layer: Any, args: tuple[Tensor, ...], name: str = name) -> None:
                found.append((name, layer, args[0]))

            hooks.append(module.register_forward_pre_hook(note))
    try:
        with torch.no_grad():
            network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _sizes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(module.weight.shape[:2])
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
