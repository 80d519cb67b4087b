"""Tensors in, fresh tensors out: per-example gradient quantities from a layer's inputs and output gradients."""

from .conv_dot import conv_dot
from .conv_gram import conv_gram
from .conv_moments import conv_moments
from .conv_sketch import conv_sketch
from .conv_sqnorm import conv_sqnorm
from .grad_dot import grad_dot
from .grad_gram import grad_gram
from .grad_moments import grad_moments
from .grad_quantities import grad_quantities
from .grad_sketch import grad_sketch
from .grad_sqnorm import grad_sqnorm

__all__ = [
    "conv_dot",
    "conv_gram",
    "conv_moments",
    "conv_sketch",
    "conv_sqnorm",
    "grad_dot",
    "grad_gram",
    "grad_moments",
    "grad_quantities",
    "grad_sketch",
    "grad_sqnorm",
]
