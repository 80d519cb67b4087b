"""Tensors in, fresh tensors out: per-example gradient quantities from a layer's inputs and output gradients."""

from .grad_sqnorm import grad_sqnorm

__all__ = ["grad_sqnorm"]
