"""Gradient Clustering: strata whose mini-batches have a small gradient variance."""

from .exact import PointClustering, cluster_points
from .gradient_clustering import GradientClustering

__all__ = ["GradientClustering", "PointClustering", "cluster_points"]
