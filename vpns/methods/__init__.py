"""The pruning methods; add one as a file here and it is known by its name."""

from vpns.methods.base import METHODS, Method, Start, find_method
from vpns.methods.depgraph import DEPGRAPH
from vpns.methods.hydra import HYDRA
from vpns.methods.l1 import L1
from vpns.methods.omp import OMP
from vpns.methods.random import RANDOM
from vpns.methods.vpns import VPNS

__all__ = ["DEPGRAPH", "HYDRA", "L1", "METHODS", "OMP", "RANDOM", "VPNS", "Method", "Start", "find_method"]
