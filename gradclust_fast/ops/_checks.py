"""Argument checks shared by the ops. Every message names the argument, what was expected, what came, the remedy."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))


def check_floats(name: str, tensor: torch.Tensor) -> None:
    """A dense tensor of a floating dtype."""
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}; cast it first")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}; use {name}.to_dense()")


def check_factors(act: torch.Tensor, grad: torch.Tensor) -> None:
    """act [B, *, I] and grad [B, *, O]: same B, same position dimensions, dtype and device."""
    for name, tensor in (("act", act), ("grad", grad)):
        check_floats(name, tensor)
        if tensor.dim() < 2:
            raise ValueError(
                f"{name} must be [B, *, features], got {shape(tensor)}; add the batch dimension with unsqueeze(0)"
            )
    if act.shape[:-1] != grad.shape[:-1]:
        raise ValueError(
            f"act must be [B, *, I] with [B, *] = {list(grad.shape[:-1])} (from grad), got {shape(act)}; "
            f"pass the same batch and positions to both"
        )
    check_like("grad", grad, act)


def check_like(name: str, tensor: torch.Tensor, act: torch.Tensor) -> None:
    """Same dtype and device as act."""
    if tensor.dtype != act.dtype:
        raise TypeError(f"{name} must be {act.dtype} like act, got {tensor.dtype}; cast one of them")
    if tensor.device != act.device:
        raise ValueError(f"{name} must be on {act.device} like act, got {tensor.device}; move one of them")


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 accumulates in float64, everything else in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """[B, *, F] → [B, T, F] with feature stride 1: a view where the strides allow it, else a copy."""
    B, F = tensor.shape[0], tensor.shape[-1]
    T = tensor.shape[1:-1].numel()
    rows = tensor.reshape(B, T, F)
    return rows if rows.stride(2) == 1 or F <= 1 else rows.contiguous()


def in_features(act: torch.Tensor, bias: bool) -> int:
    """Columns of G_b: with a bias, act has one more, constant-1 feature."""
    return act.shape[-1] + int(bias)


def check_auxiliary(name: str, tensor: torch.Tensor, act: torch.Tensor, like: str = "act") -> None:
    """A matrix that every example meets (a projection, a centre): act's dtype or the accumulator's, act's device."""
    allowed = {act.dtype, accumulator(act.dtype)}
    if tensor.dtype not in allowed:
        expected = " or ".join(sorted(map(str, allowed)))
        raise TypeError(f"{name} must be {expected} for {act.dtype} factors, got {tensor.dtype}; cast it")
    if tensor.device != act.device:
        raise ValueError(f"{name} must be on {act.device} like {like}, got {tensor.device}; move one of them")


def check_sides(
    act: torch.Tensor, grad: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None, bias: bool
) -> None:
    """left [O, P] and right [I (+ 1), Q]; None is the identity."""
    I, why = in_features(act, bias), "act's features plus one for the bias" if bias else "act's features"
    for name, side, size, source in (("left", left, grad.shape[-1], "grad's features"), ("right", right, I, why)):
        if side is None:
            continue
        if side.dim() != 2 or side.shape[0] != size:
            raise ValueError(
                f"{name} must be [{size}, {'P' if name == 'left' else 'Q'}] ({source}), got {shape(side)}; "
                f"one column per sketch dimension, or None for the identity"
            )
        check_auxiliary(name, side, act)


def check_centers(
    act: torch.Tensor, grad: torch.Tensor, center_grad: torch.Tensor, center_act: torch.Tensor, bias: bool
) -> None:
    """center_grad [K, O] and center_act [K, I (+ 1)], or both with a rank dimension in the middle."""
    O, I = grad.shape[-1], in_features(act, bias)
    if center_grad.dim() not in (2, 3) or center_grad.shape[-1] != O:
        raise ValueError(f"center_grad must be [K, {O}] or [K, r, {O}] (grad's features), got {shape(center_grad)}")
    expected = [*center_grad.shape[:-1], I]
    if list(center_act.shape) != expected:
        hint = "; with bias=True its last column meets the constant 1" if bias else ""
        raise ValueError(
            f"center_act must be {expected} (K and rank from center_grad, features from act), "
            f"got {shape(center_act)}{hint}"
        )
    check_auxiliary("center_grad", center_grad, act)
    check_auxiliary("center_act", center_act, act)
