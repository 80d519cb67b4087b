from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys

import pytest
import torch

from gradclust_fast.sketching import Sketch, canonical_name, philox4x32

KAT = [  # Random123 1.14, tests/kat_vectors, philox4x32 10: counter, key, output
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


class LinearFactors:
    """Per-example gradients gradᵀ act of one parameter: act [B, T, I], grad [B, T, O]."""

    def __init__(self, act, grad):
        self.act, self.grad = act, grad
        self.matrix_shape = (grad.shape[2], act.shape[2])
        self.dtype, self.device = act.dtype, act.device

    def sketch(self, left, right):
        grad = self.grad if left is None else self.grad @ left
        act = self.act if right is None else self.act @ right
        return grad.mT @ act

    def full(self):
        return (self.grad.mT @ self.act).flatten(1)


def model_factors(B=4, T=3, dtype=torch.float64):
    """Weights with both, one and no long side, a long and a short bias; a and b, d and e have the same gradients."""
    act, grad = torch.randn(B, T, 40, dtype=dtype), torch.randn(B, T, 30, dtype=dtype)
    ones, small = torch.ones(B, T, 1, dtype=dtype), torch.randn(B, T, 2, dtype=dtype)
    return {
        "a.weight": LinearFactors(act, grad),
        "b.weight": LinearFactors(act, grad),
        "b.bias": LinearFactors(ones, grad),
        "c.weight": LinearFactors(act, torch.randn(B, T, 3, dtype=dtype)),
        "d.weight": LinearFactors(small, act[:, :, :3]),
        "e.weight": LinearFactors(small, act[:, :, :3]),
        "d.bias": LinearFactors(ones, torch.randn(B, T, 3, dtype=dtype)),
    }


def total(sketch, factors):
    return sum(sketch.apply(name, f) for name, f in factors.items())


@pytest.mark.parametrize("counter, key, output", KAT)
def test_philox_gives_the_published_words(counter, key, output):
    assert philox4x32(torch.tensor(counter), key).tolist() == list(output)


def test_philox_matches_python_integers_on_random_words():
    counters = torch.randint(0, 2**32, (4, 50))
    key = (0xDEADBEEF, 0x12345678)
    words = philox4x32(counters, key)
    for column in range(50):
        c, k = counters[:, column].tolist(), list(key)
        for _ in range(10):
            first, second = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [(second >> 32) ^ c[1] ^ k[0], second % 2**32, (first >> 32) ^ c[3] ^ k[1], first % 2**32]
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        assert words[:, column].tolist() == c


def fingerprint():
    matrices = Sketch(dim=200, seed=7, sides=(20, 150)).matrices(
        "layer.weight", (77, 301), torch.float32, torch.device("cpu")
    )
    return hashlib.sha256(b"".join(matrix.numpy().tobytes() for matrix in matrices)).hexdigest()


FROZEN = "8c449fe650237564335dae3e217f66bbbb2985a4d505fc02d41f77f13c851bd7"


def test_matrices_keep_their_frozen_bits():
    assert fingerprint() == FROZEN


def test_another_process_gets_the_same_bits():
    code = "import sys; sys.path.insert(0, 'tests'); from test_sketching import fingerprint; print(fingerprint())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == FROZEN


def test_entries_are_balanced_signs_over_the_root_of_the_size():
    left, right, second = Sketch(dim=256, sides=(32, 16)).matrices("w", (500, 400), torch.float64, torch.device("cpu"))
    for matrix, size, shape in ((left, 32, (500, 32)), (right, 16, (400, 16)), (second, 256, (512, 256))):
        assert matrix.shape == shape
        torch.testing.assert_close(matrix.abs(), torch.full(shape, size**-0.5, dtype=torch.float64))
        signs = matrix.sign()
        # 5 standard deviations of a mean of independent signs: overall, along each row and along each column.
        for mean, count in ((signs.mean(), signs.numel()), (signs.mean(0), shape[0]), (signs.mean(1), shape[1])):
            assert mean.abs().max() <= 5 * count**-0.5


def test_a_longer_matrix_begins_with_a_shorter_one():
    cpu = torch.device("cpu")
    short = Sketch(dim=64, sides=(8, 8)).matrices("w", (50, 50), torch.float64, cpu)
    long = Sketch(dim=200, sides=(8, 8)).matrices("w", (90, 50), torch.float64, cpu)
    assert torch.equal(short[0].sign(), long[0][:50].sign())
    assert torch.equal(short[2].sign(), long[2][:, :64].sign())


@pytest.mark.parametrize("other", [{"seed": 1}, {"name": "v"}, {"which": 1}])
def test_seed_name_and_role_each_give_other_signs(other):
    cpu = torch.device("cpu")
    base = Sketch(sides=(32, 32)).matrices("w", (256, 256), torch.float32, cpu)
    changed = Sketch(seed=other.get("seed", 0)).matrices(other.get("name", "w"), (256, 256), torch.float32, cpu)
    agreement = (base[0].sign() == changed[other.get("which", 0)].sign()).float().mean()
    assert abs(agreement - 0.5) <= 5 * 0.5 / 8192**0.5


@pytest.mark.parametrize("names", ["abcde", "ab", "de"])  # de: no first stage, so only the second tells them apart
def test_inner_products_are_unbiased_within_the_derived_error(names):
    """Var‖s‖² ≤ c‖g‖⁴ with c = (1+2/P)(1+2/Q)(1+2/R) − 1, so by polarisation
    Var⟨s_i,s_j⟩ ≤ (c/8)(‖g_i+g_j‖⁴ + ‖g_i−g_j‖⁴)."""
    P, Q, R, seeds = 4, 6, 16, 150
    factors = {name: f for name, f in model_factors().items() if name[0] in names}
    g = torch.cat([f.full() for f in factors.values()], 1)
    gram = g @ g.T
    mean = torch.zeros_like(gram)
    for seed in range(seeds):
        s = total(Sketch(dim=R, seed=seed, sides=(P, Q)), factors)
        mean += s @ s.T / seeds
    c = (1 + 2 / P) * (1 + 2 / Q) * (1 + 2 / R) - 1
    norms = gram.diagonal()
    plus, minus = norms + norms[:, None] + 2 * gram, norms + norms[:, None] - 2 * gram
    error = (c / 8 * (plus**2 + minus**2) / seeds).sqrt()
    assert ((mean - gram).abs() <= 4 * error).all()


def test_concatenated_sketches_keep_inner_products_too():
    factors = model_factors()
    g = torch.cat([f.full() for f in factors.values()], 1)
    mean = torch.zeros(4, 4, dtype=torch.float64)
    for seed in range(100):
        sketch = Sketch(seed=seed, sides=(4, 6), reduce=False)
        s = torch.cat([sketch.apply(name, f) for name, f in factors.items()], 1)
        assert s.shape[1] == sum(sketch.width(f.matrix_shape) for f in factors.values())
        mean += s @ s.T / 100
    c = (1 + 2 / 4) * (1 + 2 / 6) - 1
    norms = (g * g).sum(1)
    assert ((mean.diagonal() - norms).abs() <= 4 * (c / 100) ** 0.5 * norms).all()


def test_identity_where_no_side_is_longer():
    factors = model_factors()["d.weight"]
    out = Sketch(sides=(4, 4), reduce=False).apply("d.weight", factors)
    torch.testing.assert_close(out, factors.full())


@pytest.mark.parametrize(
    "shape, stages",
    [
        ((1000, 1000), (16, 8)),
        ((16, 8), (16, 8)),
        ((10, 1000), (10, 12)),  # the short side leaves its room to the long one
        ((1000, 4), (32, 4)),
        ((1000, 1), (128, 1)),  # a bias
        ((100, 1), (100, 1)),
        ((1, 1000), (1, 128)),
        ((0, 5), (0, 5)),
    ],
)
def test_stages_never_keep_more_than_the_sides_allow(shape, stages):
    assert Sketch(sides=(16, 8)).stages(shape) == stages


def test_rows_do_not_depend_on_the_batch_split():
    sketch, factors = Sketch(dim=32, sides=(8, 8)), model_factors(B=7)
    whole = total(sketch, factors)
    for b in range(7):
        one = {name: LinearFactors(f.act[b : b + 1], f.grad[b : b + 1]) for name, f in factors.items()}
        torch.testing.assert_close(total(sketch, one)[0], whole[b], rtol=1e-12, atol=1e-12)


def test_parameters_add_up():
    sketch, factors = Sketch(dim=32, sides=(8, 8)), model_factors()
    names = list(factors)
    parts = total(sketch, {n: factors[n] for n in names[:2]}) + total(sketch, {n: factors[n] for n in names[2:]})
    torch.testing.assert_close(parts, total(sketch, factors))


def test_linear_in_the_gradient():
    sketch = Sketch(dim=32, sides=(8, 8))
    act, one, two = torch.randn(3, 5, 40), torch.randn(3, 5, 30), torch.randn(3, 5, 30)
    s = [sketch.apply("w", LinearFactors(act, grad)) for grad in (one, two, 2 * one + two)]
    torch.testing.assert_close(2 * s[0] + s[1], s[2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "module.net.0.weight",
        "_orig_mod.net.0.weight",
        "module._orig_mod.net.0.weight",
        "_orig_mod.module.net.0.weight",
        "_fsdp_wrapped_module.net._fsdp_wrapped_module.0.weight",
        "net._checkpoint_wrapped_module.0.weight",
    ],
)
def test_wrapper_prefixes_make_no_difference(name):
    assert canonical_name(name) == "net.0.weight"
    factors = model_factors()["a.weight"]
    assert torch.equal(Sketch().apply(name, factors), Sketch().apply("net.0.weight", factors))


def test_a_users_own_module_name_is_kept():
    assert canonical_name("net.module.weight") == "net.module.weight"
    assert canonical_name("module") == "module"


def test_half_precision_gradients_use_float32_matrices():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert all(m.dtype == expected for m in Sketch().matrices("w", (99, 99), dtype, torch.device("cpu")))


def test_matrices_first_used_in_inference_mode_work_outside():
    sketch, factors = Sketch(), model_factors()["a.weight"]
    with torch.inference_mode():
        sketch.matrices("w", factors.matrix_shape, factors.dtype, factors.device)
    factors.act.requires_grad_()
    sketch.apply("w", factors).sum().backward()


def test_pickle_carries_the_settings_not_the_matrices():
    sketch = Sketch(dim=300, seed=3, sides=(40, 40))
    factors = model_factors()["a.weight"]
    before = sketch.apply("w", factors)
    data = pickle.dumps(sketch)
    assert len(data) < 500
    copy = pickle.loads(data)
    assert copy == sketch and repr(copy) == "Sketch(dim=300, seed=3, sides=(40, 40), reduce=True)"
    assert torch.equal(copy.apply("w", factors), before)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"dim": 2.5}, TypeError, "dim must be an integer, got 2.5"),
        ({"seed": "a"}, TypeError, "seed must be an integer"),
        ({"sides": (32,)}, ValueError, r"sides must be two integers \(P, Q\)"),
        ({"sides": (32, 0)}, ValueError, "sides must be at least 1, got 0"),
        ({"sides": 32}, TypeError, "sides must be two integers"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        Sketch(**arguments)
