from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from recorded import MODELS, Tied, assert_matches, assert_same_grads, grads, logits, mlp, one_at_a_time
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradclust_fast as gf
from gradclust_fast.watching import _watched

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel", "ignore:.*torch.jit.script_method"
)
EVERYTHING = {"sq_norms": True, "gram": True, "moments": True}


def batch(shape=(6,), B=5, classes=3):
    return torch.randn(B, *shape), torch.randint(0, classes, (B,))


def cross_entropy(x, y, **options):
    """losses(model) for the oracle."""
    return lambda model: F.cross_entropy(logits(model(x.double())), y, reduction="none", **options)


def plain_step(model, step):
    """What an unrecorded step leaves in .grad."""
    twin = copy.deepcopy(model)
    state = torch.get_rng_state()
    step(twin)
    torch.set_rng_state(state)
    return grads(twin)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("backend, mode", [("auto", "train"), ("reference", "eval")])
def test_every_quantity_matches_one_example_at_a_time(backend, name, mode):
    build, shape = MODELS[name]
    model = build().train(mode == "train")
    x, y = batch(shape)

    def step(model):
        F.cross_entropy(logits(model(x)), y).backward()

    expected = plain_step(model, step)
    with gf.backend(backend), gf.record(model, **EVERYTHING) as rec:
        step(model)
    assert_same_grads(model, expected)
    assert_matches(rec, one_at_a_time(model, cross_entropy(x, y)))


def test_unreduced_sketches_stand_side_by_side():
    model = mlp()
    x, y = batch()
    sketch = gf.Sketch(sides=(3, 4), reduce=False)
    for _ in range(2):  # several backwards append their rows
        with gf.record(model, sketch=sketch) as rec:
            F.cross_entropy(logits(model(x)), y).backward()
            F.cross_entropy(logits(model(x[:2])), y[:2]).backward()
    widths = [sketch.width((p.shape[0], p.shape[1:].numel())) for p in model.parameters()]
    assert rec.sketches.shape == (7, sum(widths))
    with gf.record(model, parameters="*weight", sketch=gf.Sketch(sides=(99, 99), reduce=False)) as rec:
        F.cross_entropy(logits(model(x)), y).backward()
    torch.testing.assert_close(rec.sketches.square().sum(1), rec.sq_norms)  # identity sides: the gradients themselves


def test_float64_model_gives_float64_rows():
    model = mlp().double()
    x, y = batch()
    with gf.record(model, **EVERYTHING) as rec:
        F.cross_entropy(model(x.double()), y).backward()
    assert rec.sq_norms.dtype == rec.gram.dtype == torch.float64
    assert_matches(rec, one_at_a_time(model, cross_entropy(x, y)), rtol=1e-12)


@pytest.mark.parametrize("B", [0, 1])
def test_batches_of_zero_and_one(B):
    model = mlp()
    x, y = batch(B=B)
    with gf.record(model, **EVERYTHING) as rec:
        F.cross_entropy(model(x), y, reduction="sum").backward()
    assert rec.sq_norms.shape == (B,) and rec.gram.shape == (B, B)
    if B:
        assert_matches(rec, one_at_a_time(model, cross_entropy(x, y)))


def test_rows_average_to_grad_under_mean_and_add_up_under_sum():
    x, y = batch(B=6)
    for reduction, total in (("mean", 6), ("sum", 1)):
        model = mlp()
        with gf.record(model, moments=True, loss_reduction=reduction) as rec:
            F.cross_entropy(model(x), y, reduction=reduction).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(rec.moments[name][0] / total, p.grad, rtol=1e-5, atol=1e-7)
        assert_matches(rec, one_at_a_time(model, cross_entropy(x, y)))


def test_class_weights_and_ignore_index_give_shares_of_the_weighted_mean():
    model = mlp()
    x, y = batch(B=6)
    y[2] = -100
    weight = torch.tensor([0.2, 1.0, 3.0])
    with gf.record(model, **EVERYTHING) as rec:
        F.cross_entropy(model(x), y, weight=weight).backward()
    total = weight[y[y >= 0]].sum()

    def shares(model):
        return F.cross_entropy(model(x.double()), y, weight=weight.double(), reduction="none") / total

    assert_matches(rec, one_at_a_time(model, shares), scale=6)
    assert rec.sq_norms[2] == 0


def test_token_mean_gives_shares_of_the_tokens():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(True), nn.Linear(5, 3))
    x, y = torch.randn(4, 7, 6), torch.randint(0, 3, (4, 7))
    y[0, 2:], y[3, 5:] = -100, -100
    with gf.record(model, **EVERYTHING) as rec:
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()

    def shares(model):
        tokens = F.cross_entropy(model(x.double()).flatten(0, 1), y.flatten(), reduction="none")
        return tokens.view(4, 7).sum(1) / (y >= 0).sum()

    assert_matches(rec, one_at_a_time(model, shares), scale=4)


def test_loss_scale_is_divided_out():
    model = mlp()
    x, y = batch()
    for scale in (0.25, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        with gf.record(model, **EVERYTHING, loss_scale=scale) as rec:
            loss = F.cross_entropy(model(x), y)
            (scale.scale(loss) if hasattr(scale, "scale") else scale * loss).backward()
        assert_matches(rec, one_at_a_time(model, cross_entropy(x, y)))


def test_several_backwards_append_their_rows():
    model = mlp()
    parts = [batch(B=3), batch(B=4), batch(B=1)]
    expected = plain_step(model, lambda m: [F.cross_entropy(m(x), y).backward() for x, y in parts])
    with gf.record(model, moments=True) as rec:
        for x, y in parts:
            F.cross_entropy(model(x), y).backward()
    assert_same_grads(model, expected)
    x, y = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    assert_matches(rec, one_at_a_time(model, cross_entropy(x, y)))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_forwards_first_then_one_backward_each(order):
    model = Tied()
    parts = [batch(B=3), batch(B=2)]
    with gf.record(model, moments=True) as rec:
        losses = [F.cross_entropy(model(x), y) for x, y in parts]
        for i in order:
            losses[i].backward()
    x, y = (torch.cat([parts[i][k] for i in order]) for k in (0, 1))
    assert_matches(rec, one_at_a_time(model, cross_entropy(x, y)))


def test_two_forwards_in_one_backward_add_their_cross_terms():
    model = mlp()
    x, y = batch()
    with gf.record(model, **EVERYTHING) as rec:
        (F.cross_entropy(model(x), y) + F.cross_entropy(model(2 * x), y)).backward()

    def shares(model):
        return cross_entropy(x, y)(model) + cross_entropy(2 * x, y)(model)

    assert_matches(rec, one_at_a_time(model, shares))


def test_a_retained_graph_can_be_used_again():
    model = Tied()
    x, y = batch()
    with gf.record(model, moments=True) as rec:
        loss = F.cross_entropy(model(x), y)
        loss.backward(retain_graph=True)
        (2 * loss).backward()
    oracle = one_at_a_time(model, cross_entropy(x, y))
    assert_matches(rec, {name: torch.cat([g, 2 * g]) for name, g in oracle.items()})


def test_a_forward_whose_loss_is_dropped_changes_nothing():
    model = Tied()
    x, y = batch()
    with gf.record(model, **EVERYTHING) as rec:
        model(torch.randn(2, 6)).sum()
        with torch.no_grad():
            model(torch.randn(9, 6))
        F.cross_entropy(model(x), y).backward()
    assert_matches(rec, one_at_a_time(model, cross_entropy(x, y)))


def test_a_parameter_without_gradient_has_zero_rows():
    model = nn.ModuleDict({"used": nn.Linear(6, 3), "unused": nn.Linear(6, 3)})
    x, y = batch()
    with gf.record(model, moments=True, sketch=gf.Sketch(dim=8)) as rec:
        F.cross_entropy(model["used"](x), y).backward()
    assert rec.sq_norms_by_parameter["unused.weight"].eq(0).all()
    assert rec.moments["unused.bias"][1].eq(0).all() and rec.sq_norms.gt(0).all()
    assert rec.sketches.shape == (5, 8)


def test_frozen_and_filtered_parameters_are_left_alone():
    model = mlp()
    model[0].weight.requires_grad_(False)
    x, y = batch()
    oracle = one_at_a_time(model, cross_entropy(x, y))
    with gf.record(model) as rec:
        F.cross_entropy(model(x), y).backward()
    assert rec.names == ["0.bias", "2.weight", "4.weight", "4.bias"]
    assert_matches(rec, oracle)
    for parameters, names in (
        ("4.*", ["4.weight", "4.bias"]),
        (["2.*", "*.bias"], ["0.bias", "2.weight", "4.bias"]),
        (lambda name, p: p.dim() == 2, ["2.weight", "4.weight"]),
    ):
        with gf.record(model, parameters=parameters) as rec:
            F.cross_entropy(model(x), y).backward()
        assert_matches(rec, {name: oracle[name] for name in names})


def test_inputs_that_require_grad_get_theirs():
    model = mlp()
    x, y = batch()
    x.requires_grad_()
    F.cross_entropy(model(x), y).backward()
    expected, x.grad = x.grad.clone(), None
    with gf.record(model) as rec:
        F.cross_entropy(model(x), y).backward()
    assert torch.equal(x.grad, expected)
    assert_matches(rec, one_at_a_time(model, lambda m: F.cross_entropy(m(x.detach().double()), y, reduction="none")))


def test_gradients_through_torch_autograd_grad_count_too():
    model = mlp()
    x, y = batch()
    with gf.record(model, **EVERYTHING) as rec:
        torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    assert_matches(rec, one_at_a_time(model, cross_entropy(x, y)))
    with gf.record(model, **EVERYTHING) as rec:
        torch.autograd.backward(F.cross_entropy(model(x), y))
    assert_matches(rec, one_at_a_time(model, cross_entropy(x, y)))


def test_a_users_hook_on_the_output_is_part_of_the_gradient():
    model = mlp()
    x, y = batch()

    def forward(model, x):
        out = model[0](x)
        out.register_hook(lambda g: 3 * g)
        return model[2:](torch.relu(out))

    with gf.record(model, **EVERYTHING) as rec:
        F.cross_entropy(forward(model, x), y).backward()
    assert_matches(rec, one_at_a_time(model, lambda m: F.cross_entropy(forward(m, x.double()), y, reduction="none")))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dropout_in_train_mode_uses_the_masks_of_the_step(p):
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(p), nn.ReLU(True), nn.Linear(8, 3))
    x, y = batch()
    masks = torch.rand(5, 8) >= p

    class Fixed(nn.Module):
        def forward(self, x):
            return x * masks / (1 - p)

    twin = copy.deepcopy(model)
    twin[1] = Fixed()
    model[1].forward = lambda x: x * masks / (1 - p)
    with gf.record(model) as rec:
        F.cross_entropy(model(x), y).backward()
    assert_matches(rec, one_at_a_time(twin, cross_entropy(x, y)))


def test_recording_draws_no_random_numbers():
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    x, y = batch()
    expected = plain_step(model, lambda m: F.cross_entropy(m(x), y).backward())
    with gf.record(model, sketch=gf.Sketch(dim=8)):
        F.cross_entropy(model(x), y).backward()
    assert_same_grads(model, expected)


def test_batchnorm_in_train_mode_gives_each_examples_positions():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(True), nn.Linear(8, 3))
    x, y = batch(B=6)
    with gf.record(model, moments=True, parameters=["0.*", "3.*"]) as rec:
        F.cross_entropy(model(x), y).backward()
    twin = copy.deepcopy(model).double()
    for module in twin:
        module.zero_grad()
    hidden = twin[0](x.double())
    grad = torch.autograd.grad(F.cross_entropy(twin[1:](hidden), y), hidden)[0]
    rows = 6 * torch.einsum("bo,bi->boi", grad, x.double())
    torch.testing.assert_close(
        rec.sq_norms_by_parameter["0.weight"].double(), rows.square().sum((1, 2)), rtol=1e-4, atol=1e-9
    )
    torch.testing.assert_close(rec.moments["0.weight"][0] / 6, model[0].weight.grad, rtol=1e-4, atol=1e-7)


def test_batchnorm_in_eval_mode_is_exact():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Flatten(), nn.Linear(64, 3))
    model(torch.randn(20, 2, 6, 6))
    model.eval()
    x, y = batch((2, 6, 6))
    chosen = ["0.weight", "0.bias", "4.weight", "4.bias"]
    with gf.record(model, **EVERYTHING, parameters=chosen) as rec:
        F.cross_entropy(model(x), y).backward()
    assert_matches(rec, one_at_a_time(model, cross_entropy(x, y), chosen))


# --- activation checkpointing ------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """A shared layer inside and outside of two checkpointed blocks."""

    def __init__(self, reentrant: bool, shared: bool) -> None:
        super().__init__()
        self.reentrant, self.use_shared = reentrant, shared
        self.first, self.block, self.shared, self.head = (
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 3),
        )

    def inside(self, x):
        x = torch.relu_(self.block(x))
        return torch.tanh(self.shared(x)) if self.use_shared else x

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = checkpoint(self.inside, x, use_reentrant=self.reentrant)
        x = checkpoint(self.inside, x, use_reentrant=self.reentrant)
        return self.head(torch.tanh(self.shared(x)) if self.use_shared else x)


class Plain(Checkpointed):
    def forward(self, x):
        x = self.inside(self.inside(torch.tanh(self.first(x))))
        return self.head(torch.tanh(self.shared(x)) if self.use_shared else x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("backwards", [1, 2])
def test_activation_checkpointing(reentrant, shared, backwards):
    model = Checkpointed(reentrant, shared)
    if not shared:
        del model.shared
    x, y = batch()
    expected = plain_step(model, lambda m: [F.cross_entropy(m(x), y).backward() for _ in range(backwards)])
    with gf.record(model, moments=True) as rec:
        for _ in range(backwards):
            F.cross_entropy(model(x), y).backward()
    assert_same_grads(model, expected)
    plain = copy.deepcopy(model)
    plain.__class__ = Plain
    oracle = one_at_a_time(plain, cross_entropy(x, y))
    assert_matches(rec, {name: torch.cat([g] * backwards) for name, g in oracle.items()})


# --- mixed precision and compilation -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "linear-one-position-dim", "conv-strided", "tied-reused-functional"])
@pytest.mark.parametrize("leaf", [False, True])
def test_autocast_rows_are_those_of_the_half_precision_factors(name, leaf):
    build, shape = MODELS[name]
    model = build()
    x, y = batch(shape)
    x.requires_grad_(leaf)

    def step(model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(logits(model(x)).float(), y)
        loss.backward()

    expected = plain_step(model, step)
    input_grad, x.grad = x.grad, None
    with gf.record(model, **EVERYTHING) as rec:
        step(model)
    assert_same_grads(model, expected)
    assert not leaf or torch.equal(x.grad, input_grad)
    assert rec.sq_norms.dtype == torch.float32
    x = x.detach()
    assert_matches(rec, one_at_a_time(model, cross_entropy(x, y)), rtol=5e-2)


def test_a_record_opened_inside_autocast_after_another_forward():
    model = mlp()
    x, y = batch()
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(3, 6)).sum()
        with gf.record(model) as rec:
            loss = F.cross_entropy(model(x).float(), y)
            loss.backward()
    assert_matches(rec, one_at_a_time(model, cross_entropy(x, y)), rtol=5e-2)


def test_backward_under_autocast_still_accumulates_in_float32():
    model = mlp()
    x, y = batch()
    with gf.record(model, gram=True) as rec, torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x).float(), y)
        loss.backward()
    assert rec.gram.dtype == torch.float32
    torch.testing.assert_close(rec.gram.diagonal(), rec.sq_norms, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_models(half):
    model = mlp().to(half)
    x, y = batch()
    with gf.record(model, **EVERYTHING) as rec:
        F.cross_entropy(model(x.to(half)).float(), y).backward()
    assert_matches(rec, one_at_a_time(model, cross_entropy(x.to(half), y)), rtol=5e-2)


def test_a_compiled_model_is_recorded_eagerly():
    model = mlp()
    compiled = torch.compile(model, backend="eager")
    x, y = batch()
    compiled(x)
    with gf.record(compiled, **EVERYTHING) as rec:
        F.cross_entropy(compiled(x), y).backward()
    assert_matches(rec, one_at_a_time(model, cross_entropy(x, y)))
    torch.testing.assert_close(compiled(x), model(x))


def test_wrapper_prefixes_are_stripped_from_names():
    class Parallel(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    x, y = batch()
    for model in (Parallel(mlp()), torch.compile(Parallel(mlp()), backend="eager"), Parallel(torch.compile(mlp()))):
        with gf.record(model, parameters="0.*") as rec:
            F.cross_entropy(model(x), y).backward()
        assert rec.names == ["0.weight", "0.bias"]


# --- batch layout ------------------------------------------------------------------------------------------------


def test_batch_second_layout():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(True), nn.Linear(5, 3))
    x, y = torch.randn(7, 4, 6), torch.randint(0, 3, (4,))
    with gf.record(model, **EVERYTHING, batch_dim=1) as rec:
        F.cross_entropy(model(x).mean(0), y).backward()

    def shares(model):
        return F.cross_entropy(model(x.double()).mean(0), y, reduction="none")

    assert_matches(rec, one_at_a_time(model, shares))


def test_batch_second_with_a_head_on_pooled_features():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.body(x).tanh().mean(0))

    model, x, y = Model(), torch.randn(7, 4, 6), torch.randint(0, 3, (4,))
    with gf.record(model, **EVERYTHING, batch_dim=1) as rec:
        F.cross_entropy(model(x), y).backward()
    assert_matches(rec, one_at_a_time(model, cross_entropy(x, y)))


@pytest.mark.parametrize("batch_dim", [0, 1])
@pytest.mark.parametrize("groups", [0, 1, 2])
def test_rows_folded_into_the_batch_are_unfolded_with_batch_size(batch_dim, groups):
    """groups 0: a linear layer; else a convolution."""
    feature = (6,) if groups == 0 else (2, 5, 4)
    layer = nn.Linear(6, 4) if groups == 0 else nn.Conv2d(2, 4, 3, groups=groups)
    model = nn.ModuleDict({"frames": layer, "head": nn.Linear(4, 3)})
    shape = (5, 3) if batch_dim == 0 else (3, 5)
    x, y = torch.randn(*shape, *feature), torch.randint(0, 3, (5,))

    def forward(model, x):
        frames = model["frames"](x.flatten(0, 1))
        frames = frames.flatten(2).mean(2) if groups else frames
        return model["head"](frames.tanh().unflatten(0, shape).mean(1 - batch_dim))

    with gf.record(model, **EVERYTHING, batch_size=5, batch_dim=batch_dim) as rec:
        F.cross_entropy(forward(model, x), y).backward()
    oracle = one_at_a_time(model, lambda m: F.cross_entropy(forward(m, x.double()), y, reduction="none"))
    assert_matches(rec, oracle)


# --- noise scale -------------------------------------------------------------------------------------------------


def expected_noise_scale(parts):
    """McCandlish et al. from rows: parts are [B, P] per-example gradients of each backward."""
    traces, sqnorms = [], []
    for rows in parts:
        B, mean, batch = len(rows), rows.square().sum(1).mean(), rows.mean(0).square().sum()
        traces.append(B * (mean - batch) / (B - 1))
        sqnorms.append((B * batch - mean) / (B - 1))
    return sum(traces) / len(traces), sum(sqnorms) / len(sqnorms)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("grads_before", [False, True])
@pytest.mark.parametrize("backwards", [1, 3])
def test_noise_scale_from_one_or_several_batches(reduction, grads_before, backwards):
    model = Tied()
    x, y = batch(B=12)
    if grads_before:
        for p in model.parameters():
            p.grad = torch.randn_like(p)
    with gf.record(model, loss_reduction=reduction, loss_scale=4.0) as rec:
        for part in torch.arange(12).chunk(backwards):
            (4 * F.cross_entropy(model(x[part]), y[part], reduction=reduction)).backward()
    oracle = one_at_a_time(model, cross_entropy(x, y))
    rows = torch.cat([g.flatten(1) for g in oracle.values()], 1)
    trace, sqnorm = expected_noise_scale(rows.chunk(backwards))
    noise = rec.noise_scale()
    assert noise.trace == pytest.approx(trace.item(), rel=1e-5)
    assert noise.gradient_sqnorm == pytest.approx(sqnorm.item(), rel=1e-4)
    assert float(noise) == pytest.approx((trace / sqnorm).item(), rel=1e-4)


@pytest.mark.parametrize("spoil", ["clear", "zero", "clip", "replace"])
def test_noise_scale_after_the_gradient_was_changed_says_what_to_do(spoil):
    model = mlp()
    x, y = batch()
    with gf.record(model) as rec:
        F.cross_entropy(model(x), y).backward()
    if spoil in ("clear", "zero"):
        model.zero_grad(set_to_none=spoil == "clear")
    elif spoil == "clip":
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    else:
        model[0].weight.grad = model[0].weight.grad.clone()
    with pytest.raises(RuntimeError, match=r"call rec.noise_scale\(\) before zero_grad"):
        rec.noise_scale()
    assert rec.sq_norms.shape == (5,)


def test_noise_scale_is_remembered_and_needs_two_examples():
    model = mlp()
    x, y = batch()
    with gf.record(model) as rec:
        F.cross_entropy(model(x), y).backward()
    first = rec.noise_scale()
    model.zero_grad()
    assert rec.noise_scale() == first
    with gf.record(model) as rec:
        F.cross_entropy(model(x[:1]), y[:1]).backward()
    with pytest.raises(RuntimeError, match="at least 2 examples"):
        rec.noise_scale()


# --- nothing left behind -----------------------------------------------------------------------------------------


def state_of(model):
    return (
        [(p._backward_hooks, getattr(p, "_post_accumulate_grad_hooks", None)) for p in model.parameters()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        torch.get_num_threads(),
        len(torch.overrides._get_current_function_mode_stack()),
        dict(_watched),
    )


@pytest.mark.parametrize("fail", [None, "before forward", "before backward", "in backward"])
def test_nothing_is_left_behind(fail):
    model = Tied()
    x, y = batch()
    before = state_of(model)

    def refuse(grad):
        raise KeyError("in backward")

    def run():
        with gf.record(model, sketch=gf.Sketch(dim=4), **EVERYTHING) as rec:
            if fail == "before forward":
                raise KeyError(fail)
            out = model(x)
            if fail == "before backward":
                raise KeyError(fail)
            if fail == "in backward":
                out.register_hook(refuse)
            F.cross_entropy(out, y).backward()
        return rec

    if fail is None:
        reference = weakref.ref(run())
    else:
        with pytest.raises(KeyError, match=fail):
            run()
        reference = None
    assert state_of(model) == before
    gc.collect()
    assert reference is None or reference() is None
    with gf.record(model) as rec:  # the next record works
        F.cross_entropy(model(x), y).backward()
    assert_matches(rec, one_at_a_time(model, cross_entropy(x, y)))


def test_activations_are_freed_although_the_loss_is_kept():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = batch()
    seen = []
    model[1].register_forward_hook(lambda m, i, out: seen.append(weakref.ref(out)))
    with gf.record(model):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        gc.collect()
        assert seen[0]() is None
    assert loss.grad_fn is not None


def test_a_graph_that_outlives_the_record_works_and_is_not_recorded():
    model = mlp()
    x, y = batch()
    with gf.record(model) as rec:
        F.cross_entropy(model(x), y).backward()
        late = F.cross_entropy(model(x), y)
    expected = grads(model)
    late.backward()
    assert rec.sq_norms.shape == (5,)
    assert_same_grads(model, {name: 2 * g for name, g in expected.items()})


def test_two_hundred_steps_do_not_grow():
    model = mlp()
    x, y = batch()

    def steps(n):
        for _ in range(n):
            with gf.record(model, sketch=gf.Sketch(dim=4)) as rec:
                F.cross_entropy(model(x), y).backward()
            rec.sq_norms.sum()

    steps(20)
    gc.collect()
    before = len(gc.get_objects())
    steps(200)
    gc.collect()
    assert len(gc.get_objects()) - before < 100


def test_two_models_can_be_recorded_at_once():
    one, two = mlp(), mlp()
    x, y = batch()
    with gf.record(one) as rec_one, gf.record(two) as rec_two:
        (F.cross_entropy(one(x), y) + F.cross_entropy(two(x), y)).backward()
    assert_matches(rec_one, one_at_a_time(one, cross_entropy(x, y)))
    assert_matches(rec_two, one_at_a_time(two, cross_entropy(x, y)))


def test_the_backend_of_the_record_is_used_in_backward(monkeypatch):
    from gradclust_fast import _dispatch

    seen = set()
    original = _dispatch.Op.choose
    monkeypatch.setattr(
        _dispatch.Op, "choose", lambda op, *a: seen.add(_dispatch.current_backend()) or original(op, *a)
    )
    model = mlp()
    x, y = batch()
    with gf.backend("reference"), gf.record(model):
        loss = F.cross_entropy(model(x), y)
        with gf.backend("auto"):
            loss.backward()
    assert seen == {"reference"}
