"""One sweep of exact moves, literally: one example after the other, everything in float64.

Write A_k(x) = N_k‖x‖² − 2 s_k·x + Q_k, which is Σ_{j in k} ‖x − x_j‖². Moving example i from cluster k to l changes
J = Σ_k N_k Σ_{i in k} ‖x_i − c_k‖² by A_l(x_i) − A_k(x_i), where k counts i: so i belongs where A is smallest.

Rounding. ‖s_k‖² ≤ N_k Q_k, so 2|s_k·x| ≤ M_k := N_k‖x‖² + Q_k. The sums of length R in s_k·x and in the squared norms
err by at most R·2⁻⁵³ of M_k each, in whatever order they are added; s_k and Q_k carry their own rounding along
(two floats each), so a cluster's size and its history add nothing; the final additions err by a few units. Hence
|error of A_k| ≤ (2R + 16)·2⁻⁵³ M_k, and a difference within ``tau = (R + 8)·2⁻⁵²·(M_k + M_l)`` is zero up to rounding.

Sweeps end. A move with ΔJ < −tau lowers J. A move at ΔJ = 0 goes to a cluster that is at least as large as the one it
leaves (N_l ≥ N_k, k counting i), so Σ_k N_k² grows by 2(N_l − N_k) + 2 > 0. The pair (J, −Σ_k N_k²) falls
lexicographically with every move, and there are finitely many partitions: no sequence of moves comes back, and after
finitely many sweeps nothing moves. (Exactly so when no ΔJ other than 0 is smaller than the rounding, as for duplicates
and for points on a grid; between points in general position such a ΔJ is a coincidence of 14 digits.)
"""

from __future__ import annotations

import torch

SAMPLE = 256


def visiting_order(N: int, seed: int) -> torch.Tensor:
    """[N] A permutation that depends on nothing but its arguments."""
    return torch.randperm(N, generator=torch.Generator().manual_seed(seed))


def center(points: torch.Tensor) -> torch.Tensor:
    """[R] float64: a point amid the points, which are shifted by it. J does not change under any common shift.

    The median of a spread-out sample, per coordinate: one far row does not drag it away, and it is a value that the
    points themselves have, so that x − center is exact for float32 data and ties stay ties.
    """
    N, R = points.shape
    if N == 0:
        return points.new_zeros(R, dtype=torch.float64)
    sample = points[:: -(-N // SAMPLE)].double()  # [at most SAMPLE, R]
    # The lower median by a sort, which has the same bits every time on a GPU too.
    return torch.sort(sample, 0).values[(len(sample) - 1) // 2].contiguous()


def tie_factor(R: int) -> float:
    """How far apart two costs may be, relative to their magnitudes, and still tie."""
    return (R + 8) * 2.0**-52


def add_exactly(high: torch.Tensor, low: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(high + low) + x with the rounding error of the large sum kept in the small one (Knuth's two-sum)."""
    total = high + x
    part = total - high
    return total, low + ((high - (total - part)) + (x - part))


def objective(rows: torch.Tensor, labels: torch.Tensor, num_clusters: int) -> torch.Tensor:
    """J. Deviations are taken from a member first: a cluster of equal rows costs exactly 0, not its mean's rounding."""
    N, R = rows.shape
    counts = torch.bincount(labels, minlength=num_clusters)  # [K]
    member = labels.new_full((num_clusters,), N).scatter_reduce_(0, labels, torch.arange(N), "amin")  # [K] the first
    deviation = rows - rows[member[labels]]
    mean = rows.new_zeros(num_clusters, R).index_add_(0, labels, deviation) / counts.clamp(min=1).unsqueeze(1)
    within = (deviation - mean[labels]).square().sum(1)  # [N]
    return (counts[labels] * within).sum()


def exact_moves(
    points: torch.Tensor, labels: torch.Tensor, num_clusters: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(labels, J before, J after, moved). Runs on the host: each example's choice waits for the one before it."""
    device = points.device
    points, labels = points.cpu(), labels.cpu().clone()
    N, R = points.shape
    rows = points.double() - center(points)  # [N, R]
    before = objective(rows, labels, num_clusters)
    sqnorm = rows.square().sum(1)  # [N]
    count = torch.bincount(labels, minlength=num_clusters)  # [K]
    total, total_low = rows.new_zeros(2, num_clusters, R)  # s_k
    square, square_low = rows.new_zeros(2, num_clusters)  # Q_k
    for i, k in enumerate(labels.tolist()):
        total[k], total_low[k] = add_exactly(total[k], total_low[k], rows[i])
        square[k], square_low[k] = add_exactly(square[k], square_low[k], sqnorm[i])
    moved = 0
    for i in visiting_order(N, seed).tolist():
        x, own = rows[i], int(labels[i])
        magnitude = count * sqnorm[i] + (square + square_low)  # [K]
        cost = magnitude - 2 * ((total + total_low) @ x)  # [K]
        new = destination(cost, magnitude, count, own, tie_factor(R))
        if new != own:
            for k, sign in ((own, -1), (new, 1)):
                total[k], total_low[k] = add_exactly(total[k], total_low[k], sign * x)
                square[k], square_low[k] = add_exactly(square[k], square_low[k], sign * sqnorm[i])
                count[k] += sign
                if count[k] == 0:  # exactly nothing, not what rounding left
                    total[k], total_low[k], square[k], square_low[k] = 0, 0, 0, 0
            labels[i] = new
            moved += 1
    # No move raised J, so a sum that came out higher did so by its own rounding.
    after = torch.minimum(before, objective(rows, labels, num_clusters)) if moved else before.clone()
    return labels.to(device), before.to(device), after.to(device), torch.tensor(moved, device=device)


def destination(cost: torch.Tensor, magnitude: torch.Tensor, count: torch.Tensor, own: int, factor: float) -> int:
    """Where an example of cluster ``own`` goes: of the clusters that tie for cheapest the largest, then the lowest."""
    cheapest = int(cost.argmin())
    tied = cost - cost[cheapest] <= factor * (magnitude + magnitude[cheapest])  # [K]
    largest = int(torch.where(tied, count, -1).argmax())
    falls = cost[own] - cost[largest] > factor * (magnitude[own] + magnitude[largest])
    return largest if tied[own] or falls else cheapest
