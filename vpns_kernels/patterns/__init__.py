"""The patterns a mask can obey; add one as a file here and it is known by its name."""

from vpns_kernels.patterns.base import PATTERNS, Pattern, parse_pattern
from vpns_kernels.patterns.block import Block
from vpns_kernels.patterns.channel import Channel
from vpns_kernels.patterns.nm import NM
from vpns_kernels.patterns.unstructured import Unstructured

__all__ = ["NM", "PATTERNS", "Block", "Channel", "Pattern", "Unstructured", "parse_pattern"]
