"""What gf.record returns, against the float64 gradient of one example at a time."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from recorded import (
    EVERYTHING,
    MODELS,
    Tied,
    assert_matches,
    assert_same_grads,
    batch,
    cross_entropy,
    logits,
    mlp,
    one_at_a_time,
    plain_step,
)
from torch import nn

import gradclust_fast as gf

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel", "ignore:.*torch.jit.script_method"
)


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
