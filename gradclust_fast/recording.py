"""``record``: what every example of a training step contributed, from the one backward that the step runs anyway."""

from __future__ import annotations

import math
import numbers
import weakref
from typing import Any

import torch

from ._backward import Backward
from ._fused import FusedFactors, Link
from .layers import Factors
from .selection import Parameters
from .sketching import Sketch
from .watching import Watch


class NoiseScale(float):
    """A gradient noise scale that remembers its two parts, so that steps can be averaged part by part.

    Attributes:
        trace: estimate of tr Σ, the trace of the covariance of one example's gradient.
        gradient_sqnorm: estimate of ‖ḡ‖², the squared norm of the true gradient.
    """

    trace: float
    gradient_sqnorm: float

    def __new__(cls, trace: float, gradient_sqnorm: float) -> NoiseScale:
        ratio = trace / gradient_sqnorm if gradient_sqnorm else math.copysign(math.inf, trace) if trace else math.nan
        made = super().__new__(cls, ratio)
        made.trace, made.gradient_sqnorm = trace, gradient_sqnorm
        return made


class _Rows:
    """What one backward gave, before and after it is scaled."""

    def __init__(self) -> None:
        self.B = 0
        self.factor = 1.0
        self.sq_norms: dict[str, torch.Tensor] = {}  # [B] each
        self.sketches: dict[str, torch.Tensor] = {}  # [B, dim] each, or one of them under "" where they add up
        self.gram: torch.Tensor | None = None  # [B, B]
        self.moments: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.grad_sqnorm: float | torch.Tensor | None = None  # ‖Σ_b share_b‖², where it was asked for eagerly
        self.grads: list[tuple[str, Any, weakref.ref[torch.Tensor], int]] = []  # where `.grad` still tells it


class record(Watch):
    """Context manager: per-example quantities of every backward inside, at the price of a few reads.

    The forward, the backward, ``.grad`` and the random state are bit for bit those of an unrecorded step (``.grad`` up
    to rounding with ``fused=True``). Row b is
    B (mean) or 1 (sum) times example b's share of the unscaled loss's gradient, so rows average (mean) or add up
    (sum) to ``.grad``, also with token means, class weights and sample weights. Every use of a recorded parameter is
    seen, functional ones too; tied and reused parameters get their cross terms. Several backwards append their rows.

    Args:
        model: any ``torch.nn.Module``; ``gf.coverage(model)`` says which parameters have a route.
        sq_norms: collect ‖∇ℓ_b‖².
        sketch: a ``gf.Sketch``: collect a random projection of every example's gradient.
        gram: collect all pairwise inner products of one backward.
        moments: collect ``Σ_b g_b`` and ``Σ_b g_b∘g_b`` of every parameter.
        loss_reduction: how the loss was reduced over examples, ``"mean"`` or ``"sum"``.
        loss_scale: number that the loss was multiplied by, or the ``GradScaler`` that did; 1/steps where the loss
            is divided by the number of accumulation steps.
        batch_dim: dimension of the batch in linear layers on sequences, 0 or 1.
        batch_size: number of examples, where some layer sees several rows an example.
        parameters: name globs, or a predicate(name, parameter); None records every trainable parameter.
        fused: compute the weight gradients of linear layers and, on a CPU, of convolutions together with their norms
            (``gf.ops.grad_weight_sqnorm``, ``gf.ops.conv_weight_sqnorm``). The weight's ``.grad`` is then accumulated
            in another order, and no longer bit for bit that of a plain step. Weights used more than once or transposed,
            and layers inside of a checkpoint, go the plain way. ``gf.coverage(model, fused=True)`` tells what it gains
            where the model is; ``rec.fused_parameters`` what went this way.

    Raises:
        NotImplementedError: a recorded parameter without a route (on entry, all of them at once), or a use of one
            without a route (when it happens).
        RuntimeError: recording twice at once; on exit, a record that saw no backward, or a gradient that arrived
            through a use that was not seen.

    Source:
        Goodfellow 2015, arXiv:1510.01799; McCandlish et al. 2018, arXiv:1812.06162 (noise scale).

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> with gf.record(model) as rec:
        ...     torch.nn.functional.cross_entropy(model(torch.randn(8, 4)), torch.zeros(8, dtype=torch.long)).backward()
        >>> rec.sq_norms.shape
        torch.Size([8])
    """

    _keeps_edges = False

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        sq_norms: bool = True,
        sketch: Sketch | None = None,
        gram: bool = False,
        moments: bool = False,
        loss_reduction: str = "mean",
        loss_scale: Any = 1.0,
        batch_dim: int = 0,
        batch_size: int | None = None,
        parameters: Parameters = None,
        fused: bool = False,
    ) -> None:
        super().__init__(model, _unused, parameters=parameters, batch_dim=batch_dim, batch_size=batch_size)
        if loss_reduction not in ("mean", "sum"):
            raise ValueError(
                f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}; for reduction='none' pass what you "
                f"did with the losses before backward()"
            )
        if not hasattr(loss_scale, "get_scale") and not (
            isinstance(loss_scale, numbers.Real) and math.isfinite(loss_scale) and loss_scale != 0
        ):
            raise ValueError(f"loss_scale must be a finite number other than 0 or a GradScaler, got {loss_scale!r}")
        if sketch is not None and not isinstance(sketch, Sketch):
            raise TypeError(f"sketch must be a gf.Sketch or None, got {sketch!r}; e.g. sketch=gf.Sketch(dim=256)")
        if not (sq_norms or gram or moments or sketch is not None):
            raise ValueError(
                "nothing was asked for; pass sq_norms=True, sketch=gf.Sketch(...), gram=True or moments=True"
            )
        if fused and not sq_norms:
            raise ValueError("fused=True makes norms and weight gradients together, and sq_norms=False asks for none")
        self._fused = bool(fused)
        self._links: dict[str, list[Link | None]] = {}  # of each backward, where norms brought the gradient along
        self._asked = {"sq_norms": sq_norms, "sketch": sketch is not None, "gram": gram, "moments": moments}
        self._sketch, self._mean, self._loss_scale = sketch, loss_reduction == "mean", loss_scale
        self._rows: list[_Rows] = []
        self._no_grad_sqnorm = ""  # why noise_scale() cannot know ‖ĝ‖²

    def __enter__(self) -> record:
        super().__enter__()
        with torch._C.DisableTorchFunction():  # the open watch would look at each of these parameters
            self._shapes = {entry.name: entry.parameter.shape for entry in self._every}
            self._device = self._every[0].parameter.device
            self._parameters_by_name = {entry.name: entry.parameter for entry in self._every}
            distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
            # `.grad` tells ‖ĝ‖² later and for nothing, unless it also holds other backwards or other ranks.
            self._eager = distributed or any(p.grad is not None for p in self._parameters_by_name.values())
        return self

    # --- one backward ----------------------------------------------------------------------------------------------

    def _begun(self, run: Backward) -> None:
        run.state = _Rows()
        if self._rows and not self._eager and self._asked["sq_norms"]:
            self._eager = True
            self._read_grads(self._rows[0])

    def _consume(self, run: Backward, name: str, factors: Factors) -> None:
        rows: _Rows = run.state
        if self._asked["sq_norms"]:
            rows.sq_norms[name] = factors.sqnorm()
            if self._fused:
                link = factors.link if isinstance(factors, FusedFactors) else None
                self._links.setdefault(name, []).append(link)
        if self._sketch is not None:
            vectors = self._sketch.apply(name, factors)
            key = "" if self._sketch.reduce else name
            rows.sketches[key] = _added(rows.sketches.get(key), vectors)
        if self._asked["gram"]:
            rows.gram = _added(rows.gram, factors.gram())
        if self._asked["moments"]:
            rows.moments[name] = factors.moments()

    def _received(self, run: Backward, name: str, grad: torch.Tensor) -> None:
        if self._eager and self._asked["sq_norms"]:
            with self._backwards.quiet():
                run.state.grad_sqnorm = _added(run.state.grad_sqnorm, _sqnorm(grad))

    def _finished(self, run: Backward) -> None:
        rows: _Rows = run.state
        assert run.B is not None
        rows.B = run.B
        scale = self._loss_scale.get_scale() if hasattr(self._loss_scale, "get_scale") else self._loss_scale
        rows.factor = (run.B if self._mean else 1) / scale
        if rows.sq_norms:
            torch._foreach_mul_(list(rows.sq_norms.values()), rows.factor**2)
        for vectors in rows.sketches.values():
            vectors.mul_(rows.factor)
        if rows.gram is not None:
            rows.gram.mul_(rows.factor**2)
        for name, (first, second) in rows.moments.items():
            first.mul_(rows.factor), second.mul_(rows.factor**2)
            if self._rows:  # one pair a parameter, however many backwards
                total = self._rows[0].moments.setdefault(name, (torch.zeros_like(first), torch.zeros_like(second)))
                total[0].add_(first), total[1].add_(second)
        if self._rows:
            rows.moments = {}
        if not self._eager:
            for name in run.received:
                parameter = self._parameters_by_name[name]
                grad = parameter.grad
                if grad is not None:
                    rows.grads.append((name, parameter, weakref.ref(grad), grad._version))
        self._rows.append(rows)

    # --- results ---------------------------------------------------------------------------------------------------

    def _results(self, asked: str, argument: str) -> list[_Rows]:
        if not self._asked[asked]:
            raise RuntimeError(f"this record did not collect it; open it with gf.record(model, {argument})")
        if not self._rows:
            raise RuntimeError("no backward has finished inside this record yet; read results after loss.backward()")
        return self._rows

    @property
    def sq_norms_by_parameter(self) -> dict[str, torch.Tensor]:
        """{name: [B] ‖∇_name ℓ_b‖²}; zero rows for a backward that did not use the parameter."""
        passes = self._results("sq_norms", "sq_norms=True")
        like = next((norms for rows in passes for norms in rows.sq_norms.values()), torch.zeros(0))
        return {
            name: torch.cat([rows.sq_norms.get(name, like.new_zeros(rows.B)).to(like.device) for rows in passes])
            for name in self.names
        }

    @property
    def sq_norms(self) -> torch.Tensor:
        """[B] ‖∇ℓ_b‖² over all recorded parameters."""
        passes = self._results("sq_norms", "sq_norms=True")
        by_parameter = passes[0].sq_norms if len(passes) == 1 else self.sq_norms_by_parameter
        norms = [by_parameter[name] for name in self.names if name in by_parameter]
        like = norms[0]
        return torch.stack([n.to(like.device, torch.promote_types(n.dtype, like.dtype)) for n in norms]).sum(0)

    @property
    def fused_parameters(self) -> list[str]:
        """Names of the weights whose gradient was made together with their norms in every backward that used them."""
        self._results("sq_norms", "sq_norms=True")
        made = {name: all(link is not None and link.made for link in links) for name, links in self._links.items()}
        return [name for name in self.names if made.get(name)]

    @property
    def sketch(self) -> Sketch | None:
        """The sketch that the record was opened with."""
        return self._sketch

    @property
    def sketches(self) -> torch.Tensor:
        """[B, dim] random projections of ∇ℓ_b, parameters added up, or side by side for ``Sketch(reduce=False)``."""
        passes = self._results("sketch", "sketch=gf.Sketch(dim=256)")
        keys = [key for key in ("", *self.names) if any(key in rows.sketches for rows in passes)]
        blocks = []
        for rows in passes:
            like = {key: next(r.sketches[key] for r in passes if key in r.sketches) for key in keys}
            parts = [
                rows.sketches.get(key, like[key].new_zeros(rows.B, like[key].shape[1])).to(like[keys[0]].device)
                for key in keys
            ]
            blocks.append(torch.cat(parts, 1))
        return torch.cat(blocks)

    @property
    def gram(self) -> torch.Tensor:
        """[B, B] ⟨∇ℓ_b, ∇ℓ_c⟩ over all recorded parameters, of the record's only backward."""
        passes = self._results("gram", "gram=True")
        if len(passes) > 1 or passes[0].gram is None:
            raise RuntimeError(
                f"gram needs exactly one backward, this record saw {len(passes)}: inner products across backwards "
                f"would need both of their factors; open one record a backward, or take sketches and multiply them"
            )
        return passes[0].gram

    @property
    def moments(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """{name: (Σ_b g_b, Σ_b g_b∘g_b)}, shaped like the parameters, over all rows of the record."""
        passes = self._results("moments", "moments=True")
        found = passes[0].moments
        zeros = {
            name: next(iter(found.values()))[0].new_zeros(self._shapes[name])
            for name in self.names
            if name not in found
        }
        return {name: found[name] if name in found else (zeros[name], zeros[name].clone()) for name in self.names}

    def noise_scale(self, group: Any = None) -> NoiseScale:
        """Gradient noise scale tr Σ / ‖ḡ‖² of the recorded parameters, estimated without bias in both parts.

        ``tr Σ ≈ B (mean‖g_b‖² − ‖ĝ‖²)/(B − 1)`` and ``‖ḡ‖² ≈ (B ‖ĝ‖² − mean‖g_b‖²)/(B − 1)``, each averaged over the
        record's backwards. The ratio of one batch is noisy, and negative where the batch is too small to see the
        gradient: average ``.trace`` and ``.gradient_sqnorm`` over steps and divide then.

        Args:
            group: a ``torch.distributed`` process group, e.g. ``torch.distributed.group.WORLD``: both parts are
                averaged over the backwards of all its ranks, and every rank gets the same result. All ranks must call
                it. Four numbers are sent, never gradients: each rank's parts come from its own rows and its own batch
                gradient, before DDP or FSDP reduce it. None: this process alone.

        Returns:
            A float with the attributes ``trace`` and ``gradient_sqnorm``.

        Raises:
            RuntimeError: with one example only, or when ``.grad`` was changed (cleared, clipped, stepped) before; with
                ``group``, on every rank where this happens on one.
        """
        if group is None:
            trace, gradient_sqnorm, backwards = self._noise_parts()
            return NoiseScale(trace / backwards, gradient_sqnorm / backwards)
        failed: RuntimeError | None = None
        try:
            parts = (*self._noise_parts(), 0)
        except RuntimeError as error:  # the other ranks wait for this one's numbers
            failed, parts = error, (0.0, 0.0, 0, 1)
        device = next((norms.device for rows in self._rows for norms in rows.sq_norms.values()), self._device)
        sums = torch.tensor(parts, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(sums, group=group)
        if failed is not None:
            raise failed
        trace, gradient_sqnorm, backwards, failures = sums.tolist()
        if failures:
            raise RuntimeError(f"noise_scale() failed on {int(failures)} other rank(s) of the group; see their errors")
        return NoiseScale(trace / backwards, gradient_sqnorm / backwards)

    def _noise_parts(self) -> tuple[float, float, int]:
        """Sums over the record's backwards of both parts, and how many there are."""
        trace = gradient_sqnorm = 0.0
        passes = self._results("sq_norms", "sq_norms=True")
        for rows in passes:
            if rows.B < 2:
                raise RuntimeError(
                    f"noise_scale() needs at least 2 examples a backward, got {rows.B}; use larger batches"
                )
            if rows.grad_sqnorm is None:
                self._read_grads(rows)
            if rows.grad_sqnorm is None:
                raise RuntimeError(f"noise_scale() needs the batch gradient, but {self._no_grad_sqnorm}")
            batch = float(rows.grad_sqnorm) * (rows.factor / rows.B) ** 2
            total: Any = None
            for norms in rows.sq_norms.values():
                total = _added(total, norms.sum(dtype=torch.float64))
            mean = float(total) / rows.B
            trace += rows.B * (mean - batch) / (rows.B - 1)
            gradient_sqnorm += (rows.B * batch - mean) / (rows.B - 1)
        return trace, gradient_sqnorm, len(passes)

    def _read_grads(self, rows: _Rows) -> None:
        """‖ĝ‖² from `.grad`, as long as it is what the backward left."""
        if not rows.grads:
            self._no_grad_sqnorm = "the backward wrote no .grad; use loss.backward()"
            return
        total: Any = None
        for name, parameter, grad, version in rows.grads:
            now, then = parameter.grad, grad()
            if then is None or now is not then or then._version != version:
                self._no_grad_sqnorm = (
                    f"{name}.grad was changed since; call rec.noise_scale() before zero_grad(), clipping or step(), "
                    f"and open one record a step"
                )
                return
            total = _added(total, _sqnorm(then))
        rows.grad_sqnorm = total
        rows.grads = []


def _sqnorm(grad: torch.Tensor) -> torch.Tensor:
    values = grad.detach().coalesce().values() if grad.is_sparse else grad.detach()
    return torch.linalg.vector_norm(values, dtype=torch.float64).square()


def _added(total: Any, term: torch.Tensor) -> torch.Tensor:
    return term if total is None else total + term.to(total.device)


def _unused(name: str, factors: Factors) -> None:
    raise AssertionError("record consumes factors itself")
