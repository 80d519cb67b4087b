"""How a stratified batch is composed: how many examples of which stratum, their weights, and the resulting variance."""

from __future__ import annotations

import copy
import math

import numpy as np

from ._arguments import integer
from .strata import NO_VARIANCE, Strata

ALLOCATIONS = ("equal", "proportional", "neyman")


def water_fill(share: np.ndarray, low: np.ndarray, high: np.ndarray, total: float) -> np.ndarray:
    """clip(λ·share, low, high) with λ such that it sums to total, or all high (low) when total is out of reach."""
    if total >= high.sum():
        return high.astype(float)
    if total <= low.sum():
        return low.astype(float)
    enters, leaves = low / share, high / share  # λ at which a stratum starts and stops growing
    lam = np.unique(np.concatenate([enters, leaves]))
    below, above = 0, len(lam) - 1
    while above - below > 1:
        middle = (below + above) // 2
        if np.clip(lam[middle] * share, low, high).sum() <= total:
            below = middle
        else:
            above = middle
    at_high, at_low = leaves <= lam[below], enters >= lam[above]
    free = ~(at_high | at_low)
    out = np.where(at_high, high, low).astype(float)
    out[free] = share[free] * ((total - out[~free].sum()) / share[free].sum())
    return out


def largest_remainder(quota: np.ndarray, total: int) -> np.ndarray:
    """Integers next to quota that sum to total; ties go to the lowest index."""
    quota = np.where(np.abs(quota - np.rint(quota)) < 1e-9, np.rint(quota), quota)
    out = np.floor(quota).astype(np.int64)
    remainder = np.round(quota - out, 9)  # equal remainders must tie although they were rounded differently
    missing = total - int(out.sum())
    out[np.argsort(-remainder, kind="stable")[:missing]] += 1
    return out


def allocate(
    counts: np.ndarray, batch_size: int, allocation: str, replacement: bool, variance: np.ndarray | None
) -> np.ndarray:
    """m_k of every stratum, [K] int64: at least 1 for every non-empty one, and at most N_k without replacement.

    Needs ``(counts > 0).sum() <= batch_size``, and ``batch_size <= counts.sum()`` without replacement.
    """
    filled = counts > 0
    N_k = counts[filled].astype(float)
    low = np.ones_like(N_k)
    high = np.full_like(N_k, float(batch_size)) if replacement else N_k
    if allocation == "equal":
        share = np.ones_like(N_k)
    elif allocation == "proportional":
        share = N_k
    else:
        if variance is None:
            raise ValueError(f"allocation='neyman' needs the strata's variances, and {NO_VARIANCE}")
        V_k = variance[filled]
        if not replacement:
            V_k = np.where(N_k > 1, V_k * N_k / np.maximum(N_k - 1, 1), 0)
        share = N_k * np.sqrt(V_k)
    noisy = share > 0
    quota = low.copy()
    for_noisy = batch_size - int((~noisy).sum())  # a stratum without variance needs no more than one example
    if noisy.any():
        quota[noisy] = water_fill(share[noisy], low[noisy], high[noisy], min(for_noisy, high[noisy].sum()))
    rest = batch_size - quota[noisy].sum()
    if (~noisy).any() and rest > quota[~noisy].sum():
        quota[~noisy] = water_fill(N_k[~noisy], low[~noisy], high[~noisy], rest)
    out = np.zeros(len(counts), dtype=np.int64)
    out[filled] = largest_remainder(quota, batch_size)
    return out


class FixedSize:
    """Conditional Poisson sampling: n of M units, unit k included with probability π_k exactly, any set possible.

    Chen, Dempster & Liu 1994 (Biometrika 81): independent coins given that exactly n land heads, with odds ``w`` such
    that the inclusion probabilities are the wanted ones. Of all designs with these probabilities it has the largest
    entropy, and its joint probabilities have a closed form.

    Args:
        inclusion: [M], 0 < π_k < 1, summing to the integer n.
    """

    def __init__(self, inclusion: np.ndarray) -> None:
        self.inclusion = inclusion
        self.size = n = round(float(inclusion.sum()))
        log_odds = np.log(inclusion / (1 - inclusion))
        for _ in range(100):
            self.coin = 1 / (1 + np.exp(-log_odds))
            p = self._inclusion()
            error = np.abs(p / inclusion - 1).max()
            if error < 1e-12:
                break
            # Newton's step. The Jacobian, the indicators' covariance, is close to diag(a) − aaᵀ/Σa with
            # a(1 − a/Σa) = p(1 − p), which the step (inclusion − p)/a inverts.
            a = variance = p * (1 - p)
            for _ in range(10):
                a = variance / (1 - np.minimum(a / a.sum(), 0.5))
            log_odds = log_odds + np.clip((inclusion - p) / a, -2, 2)
            for _ in range(20):  # only ratios of odds matter: keep n the expected number of heads
                coin = 1 / (1 + np.exp(-log_odds))
                log_odds = log_odds - np.clip((coin.sum() - n) / (coin * (1 - coin)).sum(), -1, 1)
        if error > 1e-9:
            raise RuntimeError(
                f"no odds found for these inclusion probabilities (relative error {error:.1e}); choose a batch_size of "
                f"at least the number of non-empty strata"
            )

    def _spectrum(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Terms of P(number of heads = n) as a Fourier sum, [H] complex; every coin's factor, [M, H]; and e^{iθ}, [H].

        The usual recursion over n cancels when odds are large; this sum does not, since with n expected heads P is at
        least about 1/√(2πn).
        """
        c, n = self.coin, self.size
        spread = float((c * (1 - c)).sum())
        # Bernstein's bound: more than `reach` from n has probability below 1e-17, so it may fold onto the rest
        reach = 14 + math.sqrt(200 + 80 * spread)
        L = int(min(len(c) + 1, 2 * reach + 1)) | 1  # odd: a fair coin's factor is zero at θ = π
        theta = 2 * math.pi * np.arange(L // 2 + 1) / L
        theta = theta[spread * (1 - np.cos(theta)) < 40]  # |the rest| < e⁻⁴⁰
        turn = np.exp(1j * theta)
        factor = 1 - c[:, None] + c[:, None] * turn  # [M, H]
        terms = np.exp(np.log(factor).sum(0) - 1j * theta * n) * np.where(theta == 0, 1, 2) / L
        return terms, factor, turn

    def _inclusion(self) -> np.ndarray:
        terms, factor, turn = self._spectrum()
        return (((1 / factor) @ (terms * turn)).real) * self.coin / terms.real.sum()

    def covariance(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Covariance of the indicators "unit k is drawn" as ``diag(own) + basis @ diag(weight) @ basis.T``.

        Returns:
            own [M], weight [r], basis [M, r]; the rank r, about five, hardly grows with M.
        """
        terms, factor, turn = self._spectrum()
        # Joint probabilities off the diagonal are Re Σ_θ term e^{2iθ} unit_k unit_l.
        unit = self.coin[:, None] / factor * np.sqrt(terms * turn**2 / terms.real.sum())  # [M, H]
        span = np.concatenate([unit.real, unit.imag, self.inclusion[:, None]], 1)
        H = unit.shape[1]
        Q, R = np.linalg.qr(span)
        weight, vectors = np.linalg.eigh((R * np.concatenate([np.ones(H), -np.ones(H + 1)])) @ R.T)
        keep = np.abs(weight) > 1e-12 * np.abs(weight).max()
        weight, basis = weight[keep], Q @ vectors[:, keep]
        own = self.inclusion * (1 - self.inclusion) - (basis**2 @ weight)
        return own, weight, basis

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Indices of the n drawn units, ascending."""
        while True:  # one toss in about √(2π Σ c(1−c)) has n heads
            heads = rng.random((16, len(self.coin))) < self.coin
            hits = (heads.sum(1) == self.size).nonzero()[0]
            if len(hits):
                return heads[hits[0]].nonzero()[0]


class Plan:
    """The composition of every batch of one epoch.

    Attributes:
        take: [K] m_k, or None when a batch has fewer examples than there are non-empty strata.
        inclusion: [K] π_k, the probability that a batch takes stratum k (1 where m_k ≥ 1).
        certain, chance: when ``take`` is None, the strata with π_k = 1 and those with 0 < π_k < 1.
        weight: [K] weight of one example in a mean over the batch; 0 for empty strata.
        within_factor: [K] the estimator's variance is ``Σ_k within_factor_k · V_k`` plus the between-strata term.
    """

    def __init__(self, strata: Strata, batch_size: int, allocation: str = "equal", replacement: bool = False) -> None:
        check_batch(strata, batch_size, allocation, replacement)
        batch_size = integer("batch_size", batch_size)
        self.strata = copy.copy(strata)  # the plan stays what it is when load_state_dict changes the original
        self.batch_size, self.replacement = batch_size, replacement
        self.counts = counts = strata.counts.numpy()
        N, B, filled = int(counts.sum()), batch_size, counts > 0
        self.order = np.argsort(strata.labels.numpy(), kind="stable")
        self.start = np.concatenate([[0], np.cumsum(counts)[:-1]])
        self.take: np.ndarray | None = None
        self.inclusion = filled.astype(float)
        self.weight = np.zeros(len(counts))
        self.within_factor = np.zeros(len(counts))
        N_k = counts[filled].astype(float)
        if filled.sum() <= B:
            variance = None if strata.variance is None else strata.variance.numpy()
            self.take = allocate(counts, B, allocation, replacement, variance)
            m_k = self.take[filled]
            self.weight[filled] = B * N_k / (N * m_k)
            fpc = np.ones_like(N_k) if replacement else (N_k - m_k) / np.maximum(N_k - 1, 1)
            self.within_factor[filled] = (N_k / N) ** 2 / m_k * fpc
        else:
            pi = water_fill(N_k, np.zeros_like(N_k), np.ones_like(N_k), B)
            pi[pi > 1 - 1e-13] = 1  # a cap met exactly, up to rounding
            pi[pi < 1] *= (B - (pi == 1).sum()) / pi[pi < 1].sum()
            self.inclusion[filled] = pi
            self.weight[filled] = B * N_k / (N * pi)
            self.within_factor[filled] = (N_k / N) ** 2 / pi
            self.certain = (self.inclusion == 1).nonzero()[0]
            self.chance = ((self.inclusion > 0) & (self.inclusion < 1)).nonzero()[0]
            self.design = FixedSize(self.inclusion[self.chance])

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """[B] data-set indices of one batch, ordered by stratum."""
        if self.take is None:
            chosen = np.sort(np.concatenate([self.certain, self.chance[self.design.draw(rng)]]))
            position = uniform_below(rng, self.counts[chosen])
            return self.order[self.start[chosen] + position]
        stratum = np.repeat(np.arange(len(self.take)), self.take)  # [B]
        position = (
            uniform_below(rng, self.counts[stratum]) if self.replacement else _distinct(rng, self.counts, self.take)
        )
        return self.order[self.start[stratum] + position]

    def variance_terms(self) -> tuple[float, float]:
        """(within, between): total variance of the estimator from drawing examples, and from drawing strata."""
        strata = self.strata
        if strata.variance is None:
            raise ValueError(NO_VARIANCE)
        within = float((self.within_factor * strata.variance.numpy()).sum())
        if self.take is not None:
            return within, 0.0
        if strata.means is None:
            raise ValueError(
                f"batch_size={self.batch_size} is below the number of non-empty strata ({(self.counts > 0).sum()}), so "
                f"the variance depends on the strata's means, and these strata carry none; build them with "
                f"Strata.from_points(sketches, labels, num_clusters), or pass Strata(..., means=)"
            )
        y = (self.weight[self.chance] / self.batch_size)[:, None] * strata.means.numpy()[self.chance]  # [M, R]
        y -= y.mean(0)  # the covariance's rows sum to 0, so a common offset must not be left to cancel
        own, weight, basis = self.design.covariance()
        return within, float(own @ (y**2).sum(1) + weight @ ((basis.T @ y) ** 2).sum(1))


def check_strata(strata: Strata) -> None:
    if not isinstance(strata, Strata):
        raise TypeError(f"strata must be gf.Strata, got {type(strata).__name__}; make them with gf.Strata(labels, K)")


def check_batch(strata: Strata, batch_size: int, allocation: str, replacement: bool) -> None:
    """Raises when no stratified batch of this size can be drawn."""
    check_strata(strata)
    batch_size = integer("batch_size", batch_size, 1)
    if allocation not in ALLOCATIONS:
        raise ValueError(f"allocation must be one of {', '.join(map(repr, ALLOCATIONS))}, got {allocation!r}")
    if not replacement and batch_size > len(strata):
        raise ValueError(
            f"batch_size must be at most N={len(strata)} without replacement, got {batch_size}; "
            f"lower it or pass replacement=True"
        )
    if allocation == "neyman" and strata.variance is None:
        raise ValueError(f"allocation='neyman' needs the strata's variances, and {NO_VARIANCE}")


def uniform_below(rng: np.random.Generator, size: np.ndarray) -> np.ndarray:
    """One uniform integer in 0..size−1 for every entry of size."""
    # from doubles, whose stream NumPy keeps between versions; rounding can reach size itself
    return np.minimum((rng.random(len(size)) * size).astype(np.int64), size - 1)


def _distinct(rng: np.random.Generator, counts: np.ndarray, take: np.ndarray) -> np.ndarray:
    """m_k distinct integers below N_k for every stratum, concatenated; all subsets equally likely (Floyd)."""
    out = np.full((len(take), max(int(take.max()), 1)), -1, dtype=np.int64)  # [K, max m_k]
    for j in range(int(take.max())):
        active = (take > j).nonzero()[0]
        last = counts[active] - take[active] + j
        pick = uniform_below(rng, last + 1)
        seen = (out[active, :j] == pick[:, None]).any(1)
        out[active, j] = np.where(seen, last, pick)
    return out[np.arange(out.shape[1]) < take[:, None]]
