"""How is a pruned network run where it is measured? Packed and fused; smaller where channels are gone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vpns_kernels import native
from vpns_kernels.convert import sparsify
from vpns_kernels.fusing import fuse
from vpns_kernels.measure.timing import interleave
from vpns_kernels.patterns import Channel, Pattern
from vpns_kernels.shrink import shrink
from vpns_kernels.sparse_modules import SparseConv2d, SparseLinear

_ROUNDS = 3


class Deployed:
    """A packed and fused network, and what its layers were before.

    Args:
        network: in evaluation mode, zeros where pruned.
        pattern: of its mask; None where it is not known.
        x: [N, C, H, W] float32.
        dtype: "float32", "bfloat16", or "auto" for bfloat16 where the CPU multiplies it natively.
    """

    def __init__(self, network: nn.Module, pattern: Pattern | None, x: Tensor, dtype: str = "auto") -> None:
        has_bf16 = any(native.has_isa(name) for name in ("avx512_bf16", "amx"))
        named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        self._dtype = named.get(dtype) or (torch.bfloat16 if has_bf16 else torch.float32)
        self.network = network
        if pattern is None or isinstance(pattern, Channel):
            self.network = shrink(network)
        self._sizes_before, self._x = _sizes(network), x
        kind = None if isinstance(pattern, Channel) else pattern
        self._fast = fuse(sparsify(self.network, pattern=kind)).to(self._dtype)

    @property
    def dtype(self) -> str:
        """Of activations and weights."""
        return str(self._dtype).removeprefix("torch.")

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """float32 outputs."""
        y: Tensor = self._fast(x.to(self._dtype).contiguous(memory_format=torch.channels_last))
        return y.float()

    def rows(self) -> dict[str, dict[str, Any]]:
        """By layer, for the whole batch: sparse_ms, ms of what was chosen, choice, kernel and reason."""
        after, given = _sizes(self.network), self._record()
        found: dict[str, dict[str, Any]] = {}
        for name, (layer, arguments) in given.items():
            kernel = (
                layer.kernel_for(arguments[0]) if isinstance(layer, SparseConv2d | SparseLinear) else "dense"
            )
            is_smaller = after[name] != self._sizes_before[name]
            is_sparse = kernel != "dense" or is_smaller
            (sample,) = interleave({name: lambda run=layer, a=arguments: run(*a)}, _ROUNDS).values()  # type: ignore[misc]
            before, now = (" ".join(map(str, s[:2])) for s in (self._sizes_before[name], after[name]))
            reason = (
                "chosen by the table of costs"
                if isinstance(layer, SparseConv2d | SparseLinear)
                else "nothing is pruned"
            )
            if is_smaller:
                reason = f"cut: {now} of {before} output and input channels are left"
            found[name] = {
                "sparse_ms": sample.median_ms if is_sparse else None,
                "ms": sample.median_ms,
                "choice": "sparse" if is_sparse else "dense",
                "kernel": "torch" if kernel == "dense" else kernel,
                "reason": reason,
            }
        return found

    def _record(self) -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
        """Every layer with what it is given."""
        found: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {}
        kinds = (nn.Conv2d, nn.Linear, SparseConv2d, SparseLinear)
        hooks = [
            module.register_forward_pre_hook(lambda m, args, name=name: found.update({name: (m, args)}))
            for name, module in self._fast.named_modules()
            if isinstance(module, kinds)
        ]
        self(self._x)
        for hook in hooks:
            hook.remove()
        return found


def _sizes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(module.weight.shape)
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
