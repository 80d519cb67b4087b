"""Tensors in, fresh tensors out: per-example gradient quantities from a layer's inputs and output gradients."""

from .assign import assign
from .assign_points import assign_points
from .cluster_sums import cluster_sums
from .conv_dot import conv_dot
from .conv_gram import conv_gram
from .conv_moments import conv_moments
from .conv_sketch import conv_sketch
from .conv_sqnorm import conv_sqnorm
from .conv_weight_sqnorm import conv_weight_sqnorm
from .embedding_dot import embedding_dot
from .embedding_gram import embedding_gram
from .embedding_moments import embedding_moments
from .embedding_sketch import embedding_sketch
from .embedding_sqnorm import embedding_sqnorm
from .exact_moves import exact_moves
from .grad_dot import grad_dot
from .grad_gram import grad_gram
from .grad_moments import grad_moments
from .grad_quantities import grad_quantities
from .grad_sketch import grad_sketch
from .grad_sqnorm import grad_sqnorm
from .grad_weight_sqnorm import grad_weight_sqnorm
from .norm_grads import norm_grads
from .sign_product import sign_product

__all__ = [
    "assign",
    "assign_points",
    "cluster_sums",
    "conv_dot",
    "conv_gram",
    "conv_moments",
    "conv_sketch",
    "conv_sqnorm",
    "conv_weight_sqnorm",
    "embedding_dot",
    "embedding_gram",
    "embedding_moments",
    "embedding_sketch",
    "embedding_sqnorm",
    "exact_moves",
    "grad_dot",
    "grad_gram",
    "grad_moments",
    "grad_quantities",
    "grad_sketch",
    "grad_sqnorm",
    "grad_weight_sqnorm",
    "norm_grads",
    "sign_product",
]
