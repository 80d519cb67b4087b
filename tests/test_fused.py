"""``record(fused=True)``: the norms of an ordinary record, and the gradients of an ordinary step up to rounding."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from recorded import Tied, assert_matches, grads, one_at_a_time
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradclust_fast as gf
from gradclust_fast._dispatch import OPS
from gradclust_fast.triton_kernels import _support

needs_interpreter = pytest.mark.skipif(
    _support.unavailable(torch.device("cpu")) is not None, reason="needs Triton's interpreter"
)


class Tower(nn.Module):
    """Linear layers with what stands around them: an in-place function, no bias, a frozen weight, one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.middle, self.frozen, self.down = (
            *(nn.Linear(6, 20), nn.Linear(20, 7, bias=False)),
            *(nn.Linear(7, 7), nn.Linear(7, 3)),
        )
        self.frozen.weight.requires_grad_(False)

    def forward(self, x):
        x = self.middle(F.relu(self.up(x), inplace=True))
        return self.down(torch.tanh(self.frozen(x)))


FUSED = ["up.weight", "middle.weight", "down.weight"]


def mean_of(out, y, dim=0):
    return (out - y).square().movedim(dim, 0).flatten(1).sum(1).mean()


def assert_step(model, x, y, expected, *, batch_dim=0, forward=None, rtol=2e-5, **options):
    """One fused step beside a plain one and beside the one-example loop; returns the record."""
    forward = forward or (lambda model, x: model(x))
    twin = copy.deepcopy(model)
    plain = mean_of(forward(twin, x), y, batch_dim)
    plain.backward()
    with gf.record(model, fused=True, batch_dim=batch_dim, **options) as rec:
        loss = mean_of(forward(model, x), y, batch_dim)
        loss.backward()
    assert rec.fused_parameters == expected
    assert torch.equal(loss, plain)
    assert_grads(model, grads(twin), rtol)
    B = x.shape[batch_dim]

    def losses(model):
        out = forward(model, x.double())
        return (out - y.double()).square().movedim(batch_dim, 0).flatten(1).sum(1)

    assert_matches(rec, one_at_a_time(model, losses, rec.names), rtol=rtol)
    assert rec.sq_norms.shape == (B,)
    return rec


def assert_grads(model, expected, rtol=2e-5):
    for name, parameter in model.named_parameters():
        want = expected[name]
        assert (parameter.grad is None) == (want is None), name
        if want is not None:
            assert parameter.grad.dtype == want.dtype and parameter.grad.shape == want.shape
            torch.testing.assert_close(parameter.grad, want, rtol=rtol, atol=rtol * float(want.abs().max()), msg=name)


@pytest.mark.parametrize("chosen", ["auto", "reference", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("shape", [(5,), (5, 9), (3, 2, 4)], ids=["vectors", "sequences", "two-position-dims"])
def test_norms_and_gradients_are_those_of_a_plain_step(chosen, shape):
    with gf.backend(chosen):
        assert_step(Tower(), torch.randn(*shape, 6), torch.randn(*shape, 3), FUSED)


@needs_interpreter
def test_the_gradient_is_the_one_kernels_own(monkeypatch):
    """Not the product of the layer: a kernel that is off by a factor shows in ``.grad``."""
    op, factor = OPS["grad_weight_sqnorm"], 3.0
    kernel = op.kernels["triton"]

    def scaled(*args):
        weight_grad, sqnorm = kernel.run(*args)
        return factor * weight_grad, sqnorm

    monkeypatch.setitem(op.kernels, "triton", type(kernel)(scaled, kernel.refuses, kernel.loses, kernel.route))
    model, x = nn.Linear(4, 3), torch.randn(5, 8, 4)
    (want,) = torch.autograd.grad(model(x).square().sum(), model.weight)
    with gf.backend("triton"), gf.record(model, fused=True):
        model(x).square().sum().backward()
    torch.testing.assert_close(model.weight.grad, factor * want)


def test_every_quantity_beside_the_fused_one():
    options = {"sketch": gf.Sketch(dim=8, seed=0), "gram": True, "moments": True}
    rec = assert_step(Tower(), torch.randn(6, 5, 6), torch.randn(6, 5, 3), FUSED, **options)
    assert rec.noise_scale().trace > 0


def test_batch_second_and_several_rows_an_example():
    assert_step(Tower(), torch.randn(5, 4, 6), torch.randn(5, 4, 3), FUSED, batch_dim=1)
    model, x = nn.Linear(6, 3), torch.randn(12, 6)
    oracle = one_at_a_time(model, lambda model: model(x.double()).square().reshape(4, -1).sum(1))
    for batch_dim, rows in ((0, x), (1, x.reshape(4, 3, 6).transpose(0, 1).reshape(12, 6))):
        model.zero_grad()
        with gf.record(model, fused=True, batch_size=4, batch_dim=batch_dim, loss_reduction="sum") as rec:
            model(rows).square().sum().backward()
        assert rec.fused_parameters == ["weight"]
        assert_matches(rec, oracle)
        torch.testing.assert_close(model.weight.grad, oracle["weight"].sum(0).float())


def test_float64_and_a_filter():
    assert_step(Tower().double(), torch.randn(4, 3, 6).double(), torch.randn(4, 3, 3).double(), FUSED, rtol=1e-12)
    assert_step(Tower(), torch.randn(4, 6), torch.randn(4, 3), ["down.weight"], parameters=["down.*", "up.bias"])


@pytest.mark.parametrize("shape", [(0,), (1,), (0, 3), (2, 1)], ids=str)
def test_no_example_one_example(shape):
    model, x = nn.Linear(6, 3), torch.randn(*shape, 6)
    with gf.record(model, fused=True) as rec:
        model(x).square().sum().backward()
    assert rec.sq_norms.shape == shape[:1] and rec.fused_parameters == ["weight"]
    want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close([p.grad for p in model.parameters()], list(want))


def test_weights_used_more_than_once_take_the_plain_way_with_their_cross_terms():
    assert_step(Tied(), torch.randn(5, 6), torch.randn(5, 3), [])


class TiedTable(nn.Module):
    """A table that is the output layer's weight too, and one layer beside."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight

    def forward(self, index):
        return self.head(torch.tanh(self.body(self.table(index))))


def test_a_tied_table_takes_the_plain_way():
    model, index = TiedTable(), torch.randint(9, (4, 5))
    twin = copy.deepcopy(model)
    twin(index).square().sum().backward()
    with gf.record(model, fused=True, loss_reduction="sum") as rec:
        model(index).square().sum().backward()
    assert rec.fused_parameters == ["body.weight"]
    assert_grads(model, grads(twin))
    assert_matches(rec, one_at_a_time(model, lambda model: model(index).square().flatten(1).sum(1)), rtol=5e-5)


class Functional(nn.Module):
    """The same weight by name, transposed, and on an output that serves all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.other = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 4))
        self.shared = nn.Linear(6, 4)

    def forward(self, x):
        everyone = self.shared(torch.linspace(0, 1, 6, dtype=x.dtype).expand(1, 6))
        return F.linear(x, self.weight) + F.linear(x, self.other.T) + everyone


def test_functional_uses_and_outputs_that_serve_everyone():
    """The module answers for its own parameters, so only the part of a linear layer may be fused."""
    model = Functional()
    del model._parameters["weight"], model._parameters["other"]
    model.a, model.b = nn.Linear(6, 4, bias=False), nn.Linear(4, 6, bias=False)
    Functional.weight, Functional.other = (
        property(lambda self: self.a.weight), property(lambda self: self.b.weight)
    )  # fmt: skip
    try:
        assert_step(model, torch.randn(5, 6), torch.randn(5, 4), ["a.weight"])
    finally:
        del Functional.weight, Functional.other


def test_dead_branches_and_layers_without_a_gradient():
    model, x = Tower(), torch.randn(4, 6)
    with gf.record(model, fused=True, loss_reduction="sum") as rec:
        model(x)  # dropped: not a second use
        kept = model.up(x)  # its gradient never comes
        model(x).square().sum().backward()
    assert rec.fused_parameters == ["middle.weight", "down.weight"]
    del kept
    assert_matches(rec, one_at_a_time(model, lambda model: model(x.double()).square().sum(1), rec.names))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("leaf", [False, True])
def test_autocast(dtype, leaf):
    model, x = Tower(), torch.randn(5, 8, 6)
    twin, inputs = copy.deepcopy(model), [x.clone().requires_grad_(leaf), x.clone().requires_grad_(leaf)]
    rows = []
    for each, x, fused in ((twin, inputs[0], False), (model, inputs[1], True)):
        with gf.record(each, fused=fused, loss_scale=8.0) as rec:
            with torch.autocast("cpu", dtype):
                loss = 8.0 * each(x).square().sum((1, 2)).mean()
            loss.backward()
        rows.append(rec.sq_norms)
    assert rec.fused_parameters == FUSED
    torch.testing.assert_close(*rows, rtol=1e-5, atol=0)
    assert_grads(model, grads(twin), 2e-2)
    if leaf:
        assert torch.equal(inputs[0].grad, inputs[1].grad)


def test_gradients_accumulate_and_backwards_append_their_rows():
    model, x, y = Tower(), torch.randn(4, 3, 6), torch.randn(4, 3, 3)
    twin = copy.deepcopy(model)
    for _ in range(3):
        mean_of(twin(x), y).backward()
    mean_of(model(x), y).backward()
    with gf.record(model, fused=True) as rec:
        for _ in range(2):
            mean_of(model(x), y).backward()
    assert rec.fused_parameters == FUSED and rec.sq_norms.shape == (8,)
    assert torch.equal(rec.sq_norms[:4], rec.sq_norms[4:])
    assert_grads(model, grads(twin))


def test_a_graph_that_is_kept_and_walked_twice():
    model, x, y = Tower(), torch.randn(4, 3, 6), torch.randn(4, 3, 3)
    twin = copy.deepcopy(model)
    loss = mean_of(twin(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    with gf.record(model, fused=True) as rec:
        loss = mean_of(model(x), y)
        loss.backward(retain_graph=True)
        loss.backward()
    assert_grads(model, grads(twin))
    assert rec.sq_norms.shape == (8,)
    torch.testing.assert_close(rec.sq_norms[:4], rec.sq_norms[4:])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(reentrant):
    model, x = Tower(), torch.randn(5, 4, 6, requires_grad=True)
    expected = FUSED if reentrant else ["down.weight"]  # a reentrant one repeats its layers in sight

    def forward(model, x):
        h = checkpoint(lambda x: model.middle(torch.relu(model.up(x))), x, use_reentrant=reentrant)
        return model.down(torch.tanh(model.frozen(h)))

    twin, y = copy.deepcopy(model), torch.randn(5, 4, 3)
    mean_of(forward(twin, x), y).backward()
    with gf.record(model, fused=True) as rec:
        mean_of(forward(model, x), y).backward()
    assert rec.fused_parameters == expected
    assert_grads(model, grads(twin))

    def losses(model):
        return (model(x.detach().double()) - y.double()).square().flatten(1).sum(1)

    assert_matches(rec, one_at_a_time(model, losses, rec.names))


def test_hooks_on_saved_tensors_see_the_plain_layer():
    model, x = nn.Linear(6, 3), torch.randn(4, 6)
    seen = []
    with gf.record(model, fused=True) as rec:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t.shape), t)[1], lambda t: t):
            out = model(x)
        out.sum().backward()
    assert rec.fused_parameters == [] and seen == [(4, 6)]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_gradient_that_a_later_hook_changes_is_the_one_that_counts(in_place):
    model, x = nn.Linear(6, 3), torch.randn(4, 6)

    def changed(grads):
        return (grads[0].mul_(2),) if in_place else (2 * grads[0],)

    with gf.record(model, fused=True) as rec:
        out = model(x)
        out.grad_fn.register_prehook(changed)
        out.square().sum().backward()
    (want,) = torch.autograd.grad(model(x).square().sum(), model.weight)
    torch.testing.assert_close(model.weight.grad, 2 * want)
    assert rec.fused_parameters == []


def test_parameter_hooks_and_inputs_modified_in_place():
    model, x = nn.Linear(6, 3), torch.randn(4, 6)
    seen = []
    model.weight.register_hook(lambda grad: seen.append(grad.clone()))
    with gf.record(model, fused=True):
        model(x).sum().backward()
    assert torch.equal(seen[0], model.weight.grad)
    h = x.clone()
    with pytest.raises(RuntimeError, match=r"modified (in place|by an inplace)"), gf.record(model, fused=True):
        out = model(h)
        h.add_(1)
        out.sum().backward()


def test_gradients_of_gradients_are_refused():
    model, x = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    with pytest.raises(NotImplementedError, match="create_graph=True"), gf.record(model, fused=True):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)


def test_without_norms_there_is_nothing_to_fuse():
    with pytest.raises(ValueError, match="fused=True makes norms and weight gradients together"):
        gf.record(nn.Linear(2, 2), sq_norms=False, gram=True, fused=True)


def test_other_layers_and_wrapped_inputs_take_the_plain_way():
    model = nn.Sequential(nn.ConvTranspose1d(3, 4, 1), nn.Flatten(), nn.LayerNorm(20), nn.Linear(20, 2))
    assert_step(model, torch.randn(5, 3, 5), torch.randn(5, 2), ["3.weight"])

    class Wrapped(torch.Tensor):
        pass

    layer, x = nn.Linear(6, 3), torch.randn(4, 6).as_subclass(Wrapped)
    with gf.record(layer, fused=True) as rec:
        layer(x).sum().backward()
    assert rec.fused_parameters == [] and rec.sq_norms.shape == (4,)


def test_nothing_is_left_behind():
    model, x = Tower(), torch.randn(4, 6)
    with gf.record(model, fused=True) as rec:
        loss = model(x).square().sum()
        loss.backward()
    links = [link for links in rec._links.values() for link in links if link is not None]
    assert links and all(link._weight_grad is None and link._from is None for link in links)
    after = model(x)
    assert "Fused" not in after.grad_fn.name()


@pytest.mark.parametrize("fused", [False, True])
def test_coverage_tells_what_is_fused_and_what_it_saves(fused):
    rows = {row.parameter: row for row in gf.coverage(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), fused=fused)}
    assert rows["0.weight"].route == ("fused" if fused else "factored")
    assert ("in one pass (C++)" in rows["0.weight"].note or "saves nothing: " in rows["0.weight"].note) == fused
    assert rows["0.bias"].route == "sum" and rows["1.weight"].route == "small"
    assert {row.route for row in gf.coverage(Tied(), fused=fused) if "head" in row.parameter} == {"factored"}
