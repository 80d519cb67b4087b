"""Per-example gradients, gradient variance and stratified mini-batches for PyTorch."""

__version__ = "0.1.0"

from . import layers, ops
from ._dispatch import backend, explain
from ._native import build_info
from .clustering import GradientClustering, cluster_points
from .coverage import coverage
from .estimators import SVRG, Stratified, Uniform
from .layers import register_layer, unregister_layer
from .recording import record
from .sampling import StratifiedBatchSampler, with_indices
from .sketching import Sketch
from .strata import Strata
from .tracking import VarianceTracker
from .variance import compare_estimators, gradient_stats

__all__ = [
    "SVRG",
    "GradientClustering",
    "Sketch",
    "Strata",
    "Stratified",
    "StratifiedBatchSampler",
    "Uniform",
    "VarianceTracker",
    "__version__",
    "backend",
    "build_info",
    "cluster_points",
    "compare_estimators",
    "coverage",
    "explain",
    "gradient_stats",
    "layers",
    "ops",
    "record",
    "register_layer",
    "unregister_layer",
    "with_indices",
]
