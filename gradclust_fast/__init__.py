"""Per-example gradients, gradient variance and stratified mini-batches for PyTorch."""

__version__ = "0.1.0"

from . import ops
from ._dispatch import backend, explain
from ._native import build_info
from .clustering import GradientClustering, cluster_points
from .coverage import coverage
from .recording import record
from .sampling import StratifiedBatchSampler, with_indices
from .sketching import Sketch
from .strata import Strata

__all__ = [
    "GradientClustering",
    "Sketch",
    "Strata",
    "StratifiedBatchSampler",
    "__version__",
    "backend",
    "build_info",
    "cluster_points",
    "coverage",
    "explain",
    "ops",
    "record",
    "with_indices",
]
