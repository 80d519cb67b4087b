"""Faults of other packages and the wishes of their users, one test each: the row named first is whose it is.

Every per-example quantity is compared with float64 gradients of one example at a time.
"""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from recorded import Mean, assert_matches, assert_same_grads, grads, one_at_a_time
from torch import nn

import gradclust_fast as gf
from bench.memory import peak_bytes

EVERYTHING = {"sq_norms": True, "sketch": gf.Sketch(dim=16, sides=(3, 4)), "gram": True, "moments": True}
B = 5


def check(model, x, y, **options):
    """`.grad` as without the record, and every quantity as one example at a time gives it."""
    twin = copy.deepcopy(model)
    F.cross_entropy(twin(x), y).backward()
    with gf.record(model, **EVERYTHING, **options) as rec:
        F.cross_entropy(model(x), y).backward()
    assert_same_grads(model, grads(twin))

    def losses(model):
        return F.cross_entropy(model(x.double() if x.is_floating_point() else x), y, reduction="none")

    assert_matches(rec, one_at_a_time(model, losses))
    return rec


def classes(n=3, size=B):
    return torch.randint(0, n, (size,))


def noisy(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


# --- convolutions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups, O", [(2, 6), (4, 4), (4, 8)], ids=["grouped", "depthwise", "depthwise-multiplier"])
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_backpack_and_fastdp_grouped_and_depthwise_convolutions(spatial, groups, O):
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][spatial - 1](4, O, 3, stride=2, padding=1, groups=groups)
    model = nn.Sequential(conv, nn.ReLU(inplace=True), Mean(*range(2, spatial + 2)), nn.Linear(O, 3))
    check(model, torch.randn(B, 4, *(7, 6, 5)[:spatial]), classes())


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_opacus_and_backpack_padding_modes_of_convolutions(mode):
    conv = nn.Conv2d(2, 4, (3, 2), padding=(1, 2), stride=(1, 2), padding_mode=mode)
    check(nn.Sequential(conv, nn.Tanh(), Mean(2, 3), nn.Linear(4, 3)), torch.randn(B, 2, 6, 5), classes())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("kernel", [3, 2, (4, 1)])
def test_backpack_same_padding(kernel, mode):
    conv = nn.Conv2d(2, 4, kernel, padding="same", dilation=2, padding_mode=mode)
    check(nn.Sequential(conv, nn.Tanh(), Mean(2, 3), nn.Linear(4, 3)), torch.randn(B, 2, 6, 7), classes())


# --- linear layers, embeddings, normalisations -------------------------------------------------------------------


@pytest.mark.parametrize("positions", [(2, 3), (2, 3, 2), (2, 1, 3, 2)])
def test_opacus_linear_layers_with_four_and_more_dimensions(positions):
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3), nn.Flatten(1, -2), Mean(1))
    check(model, torch.randn(B, *positions, 6), classes())


@pytest.mark.parametrize("padding", [0, 4, -1])
def test_opacus_padding_idx(padding):
    model = nn.Sequential(nn.Embedding(9, 6, padding_idx=padding), nn.Tanh(), Mean(1), nn.Linear(6, 3))
    index = torch.randint(0, 9, (B, 7))
    index[0], index[1, :4] = padding % 9, padding % 9  # only padding; much of it
    rec = check(model, index, classes())
    assert rec.sq_norms_by_parameter["0.weight"][0] == 0


def test_opacus_layernorm_without_bias():
    model = nn.Sequential(noisy(nn.LayerNorm((4, 6), bias=False)), nn.Tanh(), Mean(1), nn.Linear(6, 3))
    check(model, 1 + torch.randn(B, 4, 6), classes())


# --- tied and reused parameters ----------------------------------------------------------------------------------


class Shared(nn.Module):
    """One weight in several places of one step."""

    def __init__(self, how):
        super().__init__()
        self.table, self.body, self.how = nn.Embedding(9, 6), nn.Linear(6, 6), how
        self.head = nn.Linear(6, 9, bias=False)
        if how == "tied-modules":
            self.head.weight = self.table.weight

    def forward(self, index):
        x = torch.tanh(self.body(self.table(index)))
        if self.how == "reused-layer":
            x = torch.tanh(self.body(x))
        if self.how == "functional":
            return F.linear(x.mean(1), self.table.weight) + self.head(x.mean(1))
        if self.how == "recurrent":
            h = torch.zeros_like(x[:, 0])
            for t in range(x.shape[1]):
                h = torch.tanh(x[:, t] + self.body(h))
            return self.head(h)
        return self.head(x.mean(1))


@pytest.mark.parametrize("how", ["tied-modules", "reused-layer", "functional", "recurrent"])
def test_opacus_backpack_and_fastdp_tied_and_reused_parameters(how):
    check(Shared(how), torch.randint(0, 9, (B, 4)), classes(9))


# --- training loops ----------------------------------------------------------------------------------------------


def test_opacus_ghost_accumulation_keeps_every_micro_batch():
    model, sizes = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (4, 1, 3)
    parts = [(torch.randn(size, 6), classes(size=size)) for size in sizes]
    with gf.record(model, moments=True, loss_reduction="sum") as rec:
        for x, y in parts:
            F.cross_entropy(model(x), y, reduction="sum").backward()
    x, y = (torch.cat(tensors) for tensors in zip(*parts))
    assert rec.sq_norms.shape == (8,)
    assert_matches(rec, one_at_a_time(model, lambda m: F.cross_entropy(m(x.double()), y, reduction="none")))


@pytest.mark.parametrize("training", [True, False])
def test_opacus_ghost_eval_mode(training):
    """With a frozen trunk in the other mode and BatchNorm's running statistics in use."""
    norm = noisy(nn.BatchNorm2d(4))
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.ReLU(inplace=True), nn.Dropout(0.0), Mean(2, 3), nn.Linear(4, 3))
    model.train(training)
    norm.eval()
    before = [module.training for module in model.modules()]
    check(model, torch.randn(B, 2, 6, 5), classes())
    assert before == [module.training for module in model.modules()]


def test_opacus_ghost_batchnorm_in_train_mode_gives_shares_that_add_up():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), noisy(nn.BatchNorm2d(4)), nn.Tanh(), Mean(2, 3), nn.Linear(4, 3)).double()
    x, y = torch.randn(B, 2, 6, 5, dtype=torch.float64), classes()
    with gf.record(model, moments=True) as rec:
        F.cross_entropy(model(x), y).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(rec.moments[name][0] / B, p.grad, rtol=1e-9, atol=1e-12)
    # The oracle: what the positions of one example add to the gradient of the batch's loss.
    conv, norm, rest = model[0], model[1], model[2:]
    inner = conv(x)
    normal = F.batch_norm(inner, None, None, training=True)
    out = norm(inner)
    inner_grad, out_grad = torch.autograd.grad(F.cross_entropy(rest(out), y), (inner, out))
    want = (B * (out_grad * normal).sum((2, 3))).square().sum(1)
    torch.testing.assert_close(rec.sq_norms_by_parameter["1.weight"], want)
    rows = [torch.autograd.grad(conv(x[b : b + 1]), conv.weight, inner_grad[b : b + 1])[0] for b in range(B)]
    want = (B * torch.stack(rows)).flatten(1).square().sum(1)
    torch.testing.assert_close(rec.sq_norms_by_parameter["0.weight"], want)
    assert all("batch-coupled" in row.note for row in gf.coverage(model))


def test_opacus_frozen_trunk_without_a_wrapper():
    """Norms without a differential-privacy engine: the model stays what it is, before, while and after."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    kinds, attributes = [type(m) for m in model.modules()], [set(vars(m)) for m in model.modules()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = torch.randn(B, 6), classes()
    oracle = one_at_a_time(model, lambda m: F.cross_entropy(m(x.double()), y, reduction="none"))
    with gf.record(model, **EVERYTHING) as rec:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert_matches(rec, oracle)
    assert kinds == [type(m) for m in model.modules()] and attributes == [set(vars(m)) for m in model.modules()]
    assert rec.names == ["2.weight", "2.bias"] and model[0].weight.grad is None


def test_fastdp_the_route_follows_every_batchs_own_length():
    act, grad = torch.randn(2, 512, 24), torch.randn(2, 512, 24)
    first, later = (str(gf.explain("grad_sqnorm", act[:, :t], grad[:, :t])) for t in (4, 512))
    assert ("Gram" in first or "reference" in first) and first != later
    model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3), Mean(1))
    for t in (4, 512, 1, 40):
        model.zero_grad()
        check(model, act[:, :t], classes(size=2))


# --- numerics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("T", [16, 300])
def test_all_half_precision_gram_sums_on_near_constant_activations(backend, half, T):
    act = (1 + 1e-2 * torch.randn(3, T, 64)).to(half)
    grad = torch.randn(3, T, 48)
    grad = (grad - grad.mean(1, keepdim=True)).to(half)
    want = (grad.double().mT @ act.double()).square().sum((1, 2))
    got = gf.ops.grad_sqnorm(act, grad)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_flash_kmeans_tight_clusters_on_a_large_mean(backend, dtype):
    generator = torch.Generator().manual_seed(1)
    steps = {torch.float16: 1.0, torch.bfloat16: 16.0, torch.float32: 1e-2}[dtype]  # a few of its roundings at 1000
    corners = torch.randint(0, 2, (8, 32), generator=generator) * 8.0
    jitter = torch.randint(-1, 2, (400, 32), generator=generator)
    points = (1000 + steps * (corners[torch.arange(400) % 8] + jitter)).to(dtype)
    centers = (1000 + steps * corners).to(dtype)
    dist = torch.cdist(points.double(), centers.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    label, cost = gf.ops.assign_points(points, centers)
    assert torch.equal(label, dist.argmin(1))
    torch.testing.assert_close(cost.double(), dist.min(1).values, rtol=1e-5, atol=0)


def test_triton_argmin_rows_of_nan_are_told(backend):
    nan = float("nan")
    points, centers = torch.tensor([[0.0, 1.0], [nan, nan], [5.0, nan], [4.0, 4.0]]), torch.tensor([[0.0, 0], [4, 4]])
    label, cost = gf.ops.assign_points(points, centers)
    assert cost.isnan().tolist() == [False, True, True, False] and label.tolist() == [0, 0, 0, 1]
    dot = points @ centers.T
    label, cost = gf.ops.assign(dot, centers.square().sum(1), points.square().sum(1))
    assert cost.isnan().tolist() == [False, True, True, False] and label.tolist() == [0, 0, 0, 1]
    with pytest.raises(ValueError, match=r"not finite: index 1"):
        gf.GradientClustering(nn.Linear(2, 2), num_clusters=2).fit(
            torch.utils.data.TensorDataset(points, torch.zeros(4, dtype=torch.long)),
            lambda out, y: F.cross_entropy(out, y, reduction="none"),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fast_jl_same_seed_same_matrix(backend, dtype):
    """The entries are signs from a counter: nothing of the device, the backend or the batch is in them."""
    act, grad = torch.randn(B, 3, 70, dtype=dtype), torch.randn(B, 3, 50, dtype=dtype)
    G = (grad.double().mT @ act.double()).flatten(1)
    left, right, second = gf.Sketch(dim=32, seed=7).matrices("0.weight", (50, 70), torch.float64, act.device)
    model = nn.Linear(70, 50, bias=False, dtype=dtype)
    named = nn.Sequential(model)
    for part in (slice(0, 2), slice(2, B), slice(0, B)):
        with gf.record(named, sketch=gf.Sketch(dim=32, seed=7), loss_reduction="sum") as rec:
            (named(act[part]) * grad[part]).sum().backward()
        want = (left.T @ G[part].reshape(-1, 50, 70) @ right).flatten(1) @ second
        torch.testing.assert_close(rec.sketches.double(), want, rtol=1e-4, atol=1e-4)


def test_fast_jl_a_kernel_that_cannot_run_raises():
    act, grad = torch.randn(2, 4), torch.randn(2, 3)
    for name in ("cuda", "triton"):
        if name == "cuda" and torch.cuda.is_available():
            continue
        try:
            with gf.backend(name):
                got = gf.ops.grad_sqnorm(act, grad)
        except RuntimeError as error:
            assert len(str(error)) > 20
        else:  # a backend that does run here computes
            torch.testing.assert_close(got, act.square().sum(1) * grad.square().sum(1))


# --- what users ask for ------------------------------------------------------------------------------------------


def test_wish_a_large_embedding_without_vocabulary_sized_memory():
    """1,000,000 × 5 at a batch of 16,384: the gradients of the examples would be 328 GB."""
    V, D, size = 1_000_000, 5, 16_384
    table, head = nn.Embedding(V, D, sparse=True), nn.Linear(D, 1)
    model = nn.Sequential(table, Mean(1), head)
    index = torch.randint(0, V, (size, 3))
    index[:, 2] = index[:, 0]  # a token that comes twice

    def step():
        model.zero_grad()
        model(index).square().mean().backward()

    def recorded():
        with gf.record(model) as rec:
            step()
        return rec

    plain, most = peak_bytes(step), peak_bytes(recorded)
    table_bytes = V * D * 4
    assert most - plain < table_bytes / 2, f"{most / 1e6:.0f} MB, plain {plain / 1e6:.0f} MB"
    norms = recorded().sq_norms_by_parameter["0.weight"]
    some = torch.randint(0, size, (20,))
    rows, at = torch.unique(index[some], return_inverse=True)
    small = nn.Sequential(nn.Embedding(rows.numel(), D), Mean(1), copy.deepcopy(head))
    with torch.no_grad():
        small[0].weight.copy_(table.weight[rows])
    want = one_at_a_time(small, lambda m: m(at).square().flatten())["0.weight"].flatten(1).square().sum(1)
    torch.testing.assert_close(norms[some].double(), want, rtol=1e-4, atol=0)


def test_wish_norms_of_large_layers_without_one_gradient_an_example():
    model = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512))
    x = torch.randn(64, 512)

    def step():
        model.zero_grad()
        model(x).square().mean().backward()

    def recorded():
        with gf.record(model) as rec:
            step()
        rec.noise_scale()

    step(), recorded()
    plain, most = peak_bytes(step), peak_bytes(recorded)
    assert most - plain < 4 * 512 * 512, f"{(most - plain) / 2**20:.1f} MiB more"  # one example's gradient of one layer


def test_wish_compiled_models():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    compiled, x, y = torch.compile(model, backend="eager"), torch.randn(B, 6), classes()
    with gf.record(compiled, **EVERYTHING) as rec:
        F.cross_entropy(compiled(x), y).backward()
    assert_matches(rec, one_at_a_time(model, lambda m: F.cross_entropy(m(x.double()), y, reduction="none")))
    assert not any("_orig_mod" in name for name in rec.names)


def test_wish_mixed_precision_gives_unscaled_float32_rows():
    model, x, y = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(B, 6), classes()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    with gf.record(model, **EVERYTHING, loss_scale=scaler) as rec:
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(x).float(), y)
        scaler.scale(loss).backward()
    assert rec.sq_norms.dtype == torch.float32
    oracle = one_at_a_time(model, lambda m: F.cross_entropy(m(x.double()), y, reduction="none"))
    assert_matches(rec, oracle, rtol=2e-2)  # of half-precision activations


class Sequence(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(6, 3)

    def forward(self, x):
        out = self.layer(x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)
        return self.head(torch.tanh(out[0].mean(1)))


@pytest.mark.parametrize("kind", ["lstm", "gru", "attention"])
def test_wish_recurrent_layers_and_attention(kind):
    layer = {
        "lstm": lambda: nn.LSTM(6, 3, 2, bidirectional=True, batch_first=True),
        "gru": lambda: nn.GRU(6, 6, batch_first=True),
        "attention": lambda: nn.MultiheadAttention(6, 2, batch_first=True),
    }[kind]()
    check(noisy(Sequence(layer)), torch.randn(B, 4, 6), classes())


def test_wish_kmeans_labels_do_not_depend_on_the_batch_split(backend):
    points, centers = torch.randn(301, 20), torch.randn(7, 20)
    centers[4] = centers[2]  # a tie everywhere
    label, cost = gf.ops.assign_points(points, centers)
    for size in (1, 37, 256):
        parts = [gf.ops.assign_points(part, centers) for part in points.split(size)]
        assert torch.equal(torch.cat([part[0] for part in parts]), label)
        assert torch.equal(torch.cat([part[1] for part in parts]), cost)
    assert not (label == 4).any()
    sums, counts = gf.ops.cluster_sums(points, label, 7)
    assert counts[4] == 0 and not sums[4].any()  # an empty cluster: no NaN


def test_wish_kmeans_without_the_matrix_of_distances(backend):
    points, centers = torch.randn(60_000, 4), torch.randn(1000, 4)
    distances = 4 * 60_000 * 1000
    assert peak_bytes(lambda: gf.ops.assign_points(points, centers)) < distances


def test_wish_results_keep_nothing_alive():
    model, x = nn.Linear(6, 3), torch.randn(B, 6)
    with gf.record(model, **EVERYTHING) as rec:
        loss = model(x).square().mean()
        loss.backward()
    watched = weakref.ref(rec)
    del rec
    gc.collect()
    assert watched() is None and loss.requires_grad
