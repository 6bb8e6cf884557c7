"""The stages of a run, in order; each is a file here."""

from vpns.stages.context import Context, Stage
from vpns.stages.dense import DENSE
from vpns.stages.deploy import BENCH, EXPORT, REPORT
from vpns.stages.eval import EVAL
from vpns.stages.pretrain import PRETRAIN
from vpns.stages.pruned import Pruned, load_pruned
from vpns.stages.search import SEARCH
from vpns.stages.tune import TUNE

STAGES = (PRETRAIN, DENSE, SEARCH, TUNE, EVAL, EXPORT, BENCH, REPORT)

__all__ = ["STAGES", "Context", "Pruned", "Stage", "load_pruned"]
