"""``VarianceTracker``: gradient noise along a training run, measured every so many steps."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ._arguments import integer
from .recording import record
from .selection import Parameters, select
from .watching import _watched, idle

Writer = Callable[[str, float, int], Any]


@dataclass(frozen=True)
class TrackedStep:
    """One measured step.

    Attributes:
        step: how many steps came before it. batch_size: examples of its backwards.
        mean_sq_norm: mean ‖g_b‖². variance: estimate of tr Σ, the variance of one example's gradient.
        gradient_sqnorm: estimate of ‖ḡ‖². noise_scale: their ratio, noisy for one step. The last three are NaN for a
            backward of a single example.
    """

    step: int
    batch_size: int
    mean_sq_norm: float
    variance: float
    gradient_sqnorm: float
    noise_scale: float


class VarianceTracker:
    """Records every so many training steps the gradients' norms, variance and noise scale, and leaves the others alone.

    The first step is measured. The model's forward may run before ``step()`` (in train mode, through ``model(...)``) or
    inside it; the backward must run inside, and the gradients must not be clipped or cleared before it ends.

    Args:
        model: any module that ``gf.record`` can record.
        every: measure one step in so many.
        writer: anything with ``add_scalar(tag, value, step)`` (a TensorBoard ``SummaryWriter``), or a function of
            ``(tag, value, step)``.
        decay: weight of the past in ``noise_scale``; None averages over all measured steps equally.
        loss_reduction, loss_scale, batch_dim, batch_size, parameters: as for ``gf.record``.

    Attributes:
        history: list of :class:`TrackedStep`. steps: completed steps, measured or not.

    Raises:
        NotImplementedError: parameters without a route, named.
        ValueError, TypeError: ``every``, ``writer`` or ``decay`` of the wrong kind.

    Source:
        McCandlish et al. 2018, arXiv:1812.06162, appendix A, for averaging numerator and denominator separately.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> tracker = gf.VarianceTracker(model, every=10)
        >>> for _ in range(20):
        ...     loss = torch.nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.zeros(8, dtype=torch.long))
        ...     with tracker.step():
        ...         loss.backward()
        >>> [entry.step for entry in tracker.history]
        [0, 10]
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 100,
        writer: Any = None,
        *,
        decay: float | None = None,
        loss_reduction: str = "mean",
        loss_scale: Any = 1.0,
        batch_dim: int = 0,
        batch_size: int | None = None,
        parameters: Parameters = None,
    ) -> None:
        every = integer("every", every, 1)
        if decay is not None and not (isinstance(decay, numbers.Real) and 0 <= decay < 1):
            raise ValueError(f"decay must be in [0, 1) or None, got {decay!r}")
        self.model, self.every, self._decay = model, every, decay
        self._write = _writer(writer)
        self._options: dict[str, Any] = {
            "loss_reduction": loss_reduction,
            "loss_scale": loss_scale,
            "batch_dim": batch_dim,
            "batch_size": batch_size,
            "parameters": parameters,
        }
        record(model, **self._options)  # raises now what would otherwise be raised by the first step
        self._ids = [id(entry.parameter) for entry in select(model, parameters)]
        self.steps = 0
        self.history: list[TrackedStep] = []
        self._variance = self._gradient_sqnorm = self._weight = 0.0  # running averages, times their weight
        self._record: record | None = None
        self._inside = False  # the body of a measured step
        self._forwards = 0  # nested calls of the model that are being watched
        self._hooks = [
            model.register_forward_pre_hook(_Hook(self._before)),
            model.register_forward_hook(_Hook(self._after), always_call=True),
        ]

    @contextmanager
    def step(self) -> Iterator[record | None]:
        """Context for one training step's backward; gives the open record on measured steps, else None.

        Raises:
            RuntimeError: on a measured step without a backward, or whose forward was not seen.
        """
        if self.steps % self.every:
            yield None
            self.steps += 1
            return
        if self._record is None:
            opened = record(self.model, **self._options)
            opened.__enter__()
        else:
            opened = self._record
            self._wake()
        self._record, self._inside = opened, True
        try:
            yield opened
        except BaseException as error:
            self._leave(type(error), error, error.__traceback__)
            raise
        self._leave(None, None, None)
        self._note(opened)
        self.steps += 1

    @property
    def noise_scale(self) -> float:
        """Running tr Σ / ‖ḡ‖², both averaged over measured steps first; NaN before there is one."""
        if not self._weight or not self._gradient_sqnorm:
            return math.nan
        return self._variance / self._gradient_sqnorm

    def close(self) -> None:
        """Removes the tracker from the model. ``history`` stays."""
        for hook in self._hooks:
            hook.remove()
        self._abandon()

    def _leave(self, kind: Any, error: Any, trace: Any) -> None:
        opened, self._record, self._inside = self._record, None, False
        if opened is not None:
            opened.__exit__(kind, error, trace)

    def _abandon(self) -> None:
        """Ends the record of a forward that no step followed."""
        if self._record is not None and not self._inside:
            if self._forwards == 0:
                self._wake()
            self._leave(RuntimeError, None, None)  # no backward came, and none is missed

    def _wake(self) -> None:
        assert self._record is not None
        for i in self._ids:
            idle.pop(i, None)
        self._record._forward.__enter__()

    def _before(self, module: nn.Module, args: Any) -> None:
        if self._inside or self.steps % self.every or not (module.training and torch.is_grad_enabled()):
            return
        if self._forwards == 0:
            if self._record is not None and self._record.backwards:
                self._abandon()  # that backward ran outside of step()
            if self._record is None:
                if any(i in _watched for i in self._ids):
                    return  # somebody else's record; step() will say so
                self._record = record(self.model, **self._options)
                self._record.__enter__()
            else:
                self._wake()
        self._forwards += 1

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._forwards:
            self._forwards -= 1
            if self._forwards == 0 and self._record is not None:
                self._record._forward.__exit__(None, None, None)  # sleeps until step(), or until another record opens
                idle.update(dict.fromkeys(self._ids, self._abandon))

    def _note(self, rec: record) -> None:
        norms = rec.sq_norms
        if min(rows.B for rows in rec._rows) < 2:
            variance = gradient_sqnorm = scale = math.nan
        else:
            noise = rec.noise_scale()
            variance, gradient_sqnorm, scale = noise.trace, noise.gradient_sqnorm, float(noise)
        mean = float(norms.double().mean())
        self.history.append(TrackedStep(self.steps, len(norms), mean, variance, gradient_sqnorm, scale))
        if math.isfinite(variance) and math.isfinite(
            gradient_sqnorm
        ):  # an overflowing step must not poison the average
            past = 1.0 if self._decay is None else self._decay
            new = 1.0 if self._decay is None else 1 - self._decay
            self._variance = past * self._variance + new * variance
            self._gradient_sqnorm = past * self._gradient_sqnorm + new * gradient_sqnorm
            self._weight = past * self._weight + new
        if self._write is not None:
            self._write("gradient/mean_sq_norm", mean, self.steps)
            self._write("gradient/variance", variance, self.steps)
            self._write("gradient/sq_norm", gradient_sqnorm, self.steps)
            self._write("gradient/noise_scale", self.noise_scale, self.steps)


class _Hook:
    """A hook that does not follow the model into its copies and files: a snapshot must not be tracked."""

    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call

    def __call__(self, *args: Any) -> None:
        self.call(*args)

    def __reduce__(self) -> Any:
        return _untracked, ()


def _untracked() -> Callable[..., None]:
    return _no_hook


def _no_hook(*args: Any) -> None:
    return None


def _writer(writer: Any) -> Writer | None:
    if writer is None:
        return None
    if hasattr(writer, "add_scalar"):
        return writer.add_scalar
    if callable(writer):
        return writer
    raise TypeError(
        f"writer must have add_scalar(tag, value, step) or be a function of these, got {type(writer).__name__}"
    )
