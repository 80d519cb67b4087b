from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from recorded import MODELS, Tied, logits, mlp, one_at_a_time
from torch import nn

import gradclust_fast as gf
from gradclust_fast.watching import Watch

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel", "ignore:.*torch.jit.script_method"
)


def batch(shape=(6,), B=5, classes=3):
    return torch.randn(B, *shape), torch.randint(0, classes, (B,))


def losses_of(x, y):
    return lambda model: F.cross_entropy(logits(model(x.to(next(model.parameters()).dtype))), y, reduction="none")


class Norms:
    """A consumer that checks that every parameter comes once a backward."""

    def __init__(self):
        self.rows = {}

    def __call__(self, name, factors):
        self.rows.setdefault(name, []).append(factors.sqnorm())


@pytest.mark.parametrize("name", MODELS)
def test_backward_without_weight_gradients_gives_the_same_factors(name):
    build, shape = MODELS[name]
    model, norms = build(), Norms()
    x, y = batch(shape)
    with Watch(model, norms) as watch:
        for _ in range(2):
            watch.backward(losses_of(x, y)(model))
    assert all(p.grad is None for p in model.parameters())
    for parameter, oracle in one_at_a_time(model, losses_of(x, y)).items():
        assert len(norms.rows[parameter]) == 2
        for got in norms.rows[parameter]:
            torch.testing.assert_close(got.double(), oracle.flatten(1).square().sum(1), rtol=2e-5, atol=1e-9)


def test_backward_computes_no_weight_gradient():
    model = mlp()
    x, y = batch()
    touched = []
    for p in model.parameters():
        p.register_hook(lambda grad: touched.append(grad.shape))
    with Watch(model, lambda name, factors: None) as watch:
        watch.backward(losses_of(x, y)(model))
    assert not touched


def test_consumers_may_keep_factors_and_subtract_another_backward():
    model, kept = Tied(), []
    x, y = batch()
    before = one_at_a_time(model, losses_of(x, y))
    with Watch(model, lambda name, factors: kept.append((name, factors))) as watch:
        watch.backward(losses_of(x, y)(model))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    first = dict(kept)
    after = one_at_a_time(model, losses_of(x, y))
    kept.clear()
    with Watch(model, lambda name, factors: kept.append((name, factors))) as watch:
        watch.backward(losses_of(x, y)(model))
    for name, factors in kept:
        want = (after[name] - before[name]).flatten(1).square().sum(1)
        torch.testing.assert_close(factors.subtract(first[name]).sqnorm().double(), want, rtol=1e-4, atol=1e-9)


def test_an_ordinary_backward_is_watched_too():
    model, norms = mlp(), Norms()
    x, y = batch()
    with Watch(model, norms) as watch:
        losses_of(x, y)(model).sum().backward()
        watch.backward(losses_of(x, y)(model))
    assert watch.backwards == 2
    for rows in norms.rows.values():
        assert torch.equal(*rows)


def test_each_parameter_is_consumed_as_soon_as_it_is_complete():
    model = mlp()
    x, y = batch()
    order = []
    model[3].register_full_backward_hook(lambda *_: order.append("tanh backward"))
    with Watch(model, lambda name, factors: order.append(name)):
        losses_of(x, y)(model).sum().backward()
    assert order.index("4.weight") < order.index("tanh backward") < order.index("0.weight")


# --- what raises -------------------------------------------------------------------------------------------------


def step(model, x=None, y=None):
    if x is None:
        x, y = batch()
    F.cross_entropy(logits(model(x)), y).backward()


def test_parameters_without_a_route_are_all_named_on_entry():
    model = nn.ModuleList([nn.Embedding(6, 3, scale_grad_by_freq=True) for _ in range(2)] + [nn.Linear(6, 3)])
    message = r"0.weight \(Embedding\); 1.weight \(Embedding\).*parameters=.*requires_grad_\(False\)"
    with pytest.raises(NotImplementedError, match=message):
        gf.record(model).__enter__()
    with gf.record(model, parameters="2.*") as rec:
        step(model[2])
    assert rec.names == ["2.weight", "2.bias"]


class Using(nn.Module):
    """A linear layer whose weight is also used by ``how``."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(6, 3), how

    def forward(self, x):
        return self.linear(x) + self.how(self.linear.weight, x)


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        return weight.sum()

    @staticmethod
    def backward(ctx, grad):
        return grad.expand(3, 6)


class Turned(Hidden):
    @staticmethod
    def backward(ctx, grad):
        return grad.expand(6, 3)


def assigned(weight, x):
    out = x.new_zeros(3, 6)
    out[:] = weight
    return out.sum()


@pytest.mark.parametrize(
    "how, function",
    [
        (lambda w, x: w.square().sum(), "square"),
        (lambda w, x: (w @ x.t()).t(), "matmul"),
        (lambda w, x: (x @ w.T).sum() + w.T.square().sum(), "square"),
        (lambda w, x: (x @ w.t()).sum() + w.t()[0].sum(), "__getitem__"),
        (lambda w, x: (w.t() @ w).sum(), "matmul"),
        (lambda w, x: F.embedding(torch.zeros(5, 2, dtype=torch.long), w.t()).sum(), "embedding"),
        (lambda w, x: x.sum() + Turned.apply(w.t()), "TurnedBackward"),
        (lambda w, x: torch.einsum("bi,oi->bo", x, w), "einsum"),
        (lambda w, x: torch.stack([w, w]).sum(), "stack"),
        (lambda w, x: x[0] @ w.t(), "matmul"),
        (lambda w, x: torch.addmm(x[:, :3], x, w.t(), beta=2), "addmm"),
        (lambda w, x: F.linear(w, torch.ones(3, 6)).sum(), "used in a place of this function"),
        (assigned, "__setitem__"),
        (lambda w, x: Hidden.apply(w), "HiddenBackward"),
    ],
)
def test_a_use_without_a_route_names_the_parameter_and_the_function(how, function):
    model = Using(how)
    with pytest.raises(NotImplementedError, match=r"linear\.weight") as error, gf.record(model):
        step(model)
    assert function in str(error.value) and "parameters=" in str(error.value)


@pytest.mark.parametrize(
    "how",
    [
        lambda w, x: w.shape[0],
        lambda w, x: w.detach().sum(),
        lambda w, x: w.data.norm(),
        lambda w, x: w.requires_grad_().to(torch.float32).is_leaf,
    ],
)
def test_reading_a_parameter_without_differentiating_is_no_use(how):
    model = Using(how)
    with gf.record(model) as rec:
        step(model)
        with torch.no_grad():
            torch.optim.SGD(model.parameters(), 0.1).step()
    assert rec.sq_norms.shape == (5,)


def test_a_gradient_through_an_unseen_use_is_an_error_on_exit():
    class Opaque(nn.Linear):
        pass

    layer = Opaque(6, 3)
    model = nn.ModuleDict({"seen": nn.Linear(6, 3), "opaque": layer})
    x, y = batch()
    early = Hidden.apply(layer.weight)
    with pytest.raises(NotImplementedError, match=r"opaque.weight was used by HiddenBackward"), gf.record(model):
        (F.cross_entropy(model["seen"](x), y) + early).backward()
    early = Hidden.apply(layer.weight)
    with (
        pytest.raises(
            RuntimeError, match=r"opaque.weight received a gradient through a use that the record did not see"
        ),
        gf.record(model),
    ):
        loss = F.cross_entropy(model["seen"](x), y) + early
        torch.autograd.Variable._execution_engine.run_backward(
            (loss,), (torch.ones(()),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )


def test_a_record_without_backward_raises_and_does_not_hide_the_users_exception():
    model = mlp()
    x, _ = batch()
    with pytest.raises(RuntimeError, match=r"received nothing.*both forward and backward inside"), gf.record(model):
        model(x)
    with pytest.raises(ZeroDivisionError), gf.record(model):
        1 / 0  # noqa: B018


def test_recording_twice_at_once_raises():
    model = mlp()
    with pytest.raises(RuntimeError, match=r"already being recorded \(0.weight"), gf.record(model), gf.record(model):
        pass
    with gf.record(model, parameters="0.*"), gf.record(model, parameters="2.*"):
        step(model)
    with gf.record(model) as rec:
        step(model)
    with pytest.raises(RuntimeError, match="used before"), rec:
        pass


def test_batch_sizes_that_disagree_name_the_layer_and_batch_dim():
    model = nn.Sequential(nn.Linear(6, 4), nn.Flatten(0, 1), nn.Linear(4, 3))
    x = torch.randn(5, 2, 6)
    message = r"0.weight: .* has 5 examples, but 2.weight has 10.*batch_dim=1.*batch_size="
    with pytest.raises(ValueError, match=message), gf.record(model):
        model(x).sum().backward()
    with pytest.raises(ValueError, match="has 10 examples, but batch_size has 4"), gf.record(model, batch_size=4):
        model(x).sum().backward()


@pytest.mark.parametrize("model, x", [(nn.Linear(6, 3), torch.randn(6)), (nn.Conv2d(2, 3, 3), torch.randn(2, 5, 5))])
def test_unbatched_inputs_are_refused(model, x):
    with pytest.raises(ValueError, match=r"weight.*without a batch dimension; unsqueeze\(0\)"), gf.record(model):
        model(x).sum().backward()


def test_an_input_modified_in_place_is_refused_by_name():
    model = mlp()
    x, y = batch()
    with (
        pytest.raises(RuntimeError, match=r"0.weight, 0.bias: the layer's input was modified in place"),
        gf.record(model),
    ):
        loss = F.cross_entropy(model(x), y)
        x.add_(1)
        loss.backward()


def test_gradients_of_gradients_are_refused():
    model = mlp()
    x, y = batch()
    x.requires_grad_()
    with pytest.raises(NotImplementedError, match=r"4.weight, 4.bias: create_graph=True"), gf.record(model):
        torch.autograd.grad(F.cross_entropy(model(x), y), x, create_graph=True)


def test_a_backward_of_something_else_is_refused():
    model = mlp()
    x, y = batch()
    x.requires_grad_()
    with pytest.raises(RuntimeError, match=r"passed through .* without computing their gradient"), gf.record(model):
        torch.autograd.grad(F.cross_entropy(model(x), y), x)
    with pytest.raises(RuntimeError, match=r"passed through 4.bias without"), gf.record(model):
        F.cross_entropy(model(x), y).backward(inputs=[model[4].weight])


def test_backward_inputs_may_name_every_recorded_parameter():
    model = mlp()
    x, y = batch()
    with gf.record(model) as rec:
        F.cross_entropy(model(x), y).backward(inputs=list(model.parameters()))
    assert rec.sq_norms.shape == (5,)


def test_watch_backward_checks_its_losses():
    model = mlp()
    x, y = batch()
    watch = Watch(model, lambda name, factors: None)
    with pytest.raises(RuntimeError, match="inside the `with` block"):
        watch.backward(torch.ones(5))
    with watch:
        losses = losses_of(x, y)(model)
        with pytest.raises(ValueError, match=r"per-example losses \[B\].*got shape \[\]"):
            watch.backward(losses.mean())
        with pytest.raises(ValueError, match="requires_grad=False"):
            watch.backward(losses.detach())
        with pytest.raises(ValueError, match=r"losses must be \[5\].*got \[1\]"):
            watch.backward(losses.mean().unsqueeze(0))
        watch.backward(losses_of(x, y)(model))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"loss_reduction": "none"}, ValueError, "loss_reduction must be 'mean' or 'sum', got 'none'"),
        ({"loss_scale": 0.0}, ValueError, "loss_scale must be a finite number"),
        ({"loss_scale": "big"}, ValueError, "loss_scale must be a finite number"),
        ({"sketch": 256}, TypeError, "sketch must be a gf.Sketch"),
        ({"sq_norms": False}, ValueError, "nothing was asked for"),
        ({"batch_dim": 2}, ValueError, "batch_dim must be 0 or 1, got 2"),
        ({"batch_dim": True}, TypeError, "batch_dim must be an integer, got True"),
        ({"batch_size": 2.5}, TypeError, r"batch_size \(the number of examples, or None\) must be an integer, got 2.5"),
        ({"batch_size": True}, TypeError, "must be an integer, got True"),
        ({"batch_size": -1}, ValueError, "must be at least 0, got -1"),
        ({"parameters": "heads.*"}, ValueError, r"the glob 'heads.\*' matches none .*0.weight"),
        ({"parameters": [nn.Parameter(torch.ones(1))]}, TypeError, "got a Parameter; pass names, not the parameters"),
        ({"parameters": 3}, TypeError, "parameters must be name globs or a predicate"),
        ({"parameters": lambda name, p: False}, ValueError, "no trainable parameter to record"),
    ],
)
def test_wrong_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message), gf.record(mlp(), **options):
        pass


def test_a_model_must_be_a_module():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"), gf.record([mlp()]):
        pass


def test_lazy_modules_must_be_initialised_first():
    with pytest.raises(ValueError, match=r"0.weight.*run one forward"), gf.record(nn.Sequential(nn.LazyLinear(3))):
        pass


def test_quantities_that_were_not_asked_for_say_which_argument_to_pass():
    model = mlp()
    with gf.record(model) as rec:
        with pytest.raises(RuntimeError, match="no backward has finished"):
            rec.sq_norms  # noqa: B018
        step(model)
    for quantity, argument in (("sketches", "sketch=gf.Sketch"), ("gram", "gram=True"), ("moments", "moments=True")):
        with pytest.raises(RuntimeError, match=argument):
            getattr(rec, quantity)
    with gf.record(model, sq_norms=False, gram=True) as rec:
        step(model)
        step(model)
    for quantity in (lambda: rec.sq_norms, lambda: rec.sq_norms_by_parameter, rec.noise_scale):
        with pytest.raises(RuntimeError, match="sq_norms=True"):
            quantity()
    with pytest.raises(RuntimeError, match="exactly one backward, this record saw 2"):
        rec.gram  # noqa: B018


def test_a_failed_backward_leaves_no_rows():
    model = mlp()
    x, y = batch()

    def refuse(grad):
        raise KeyError("refused")

    with gf.record(model, moments=True) as rec:
        hidden = model[:2](x)
        hidden.register_hook(refuse)
        with pytest.raises(KeyError):
            F.cross_entropy(model[2:](hidden), y).backward()
        model.zero_grad()
        step(model, x, y)
    assert rec.sq_norms.shape == (5,)
    torch.testing.assert_close(rec.moments["4.weight"][0] / 5, model[4].weight.grad)


def test_a_nan_stays_in_its_own_row():
    model = mlp()
    x, y = batch()
    with gf.record(model) as clean:
        step(model, x, y)
    x[2, 1] = float("nan")
    with gf.record(model) as rec:
        F.cross_entropy(model(x), y, reduction="none").sum().div(5).backward()
    others = [0, 1, 3, 4]
    assert rec.sq_norms[2].isnan() and torch.equal(rec.sq_norms[others], clean.sq_norms[others])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripted_models_are_refused_by_name_and_leave_nothing():
    model = nn.Sequential(nn.Linear(6, 4), torch.jit.script(nn.Sequential(nn.Tanh(), nn.Linear(4, 3))))
    for scripted, names in ((torch.jit.script(model[0]), "weight, bias"), (model, r"1\.1\.weight, 1\.1\.bias")):
        for _ in range(2):
            with pytest.raises(NotImplementedError, match=f"{names}: scripted or traced"), gf.record(scripted):
                pass
    assert [row.route for row in gf.coverage(model)] == ["factored", "sum", "none", "none"]
    with gf.record(model, parameters="0.*") as rec:
        model(torch.randn(5, 6)).square().mean(1).mean().backward()
    assert rec.sq_norms.shape == (5,)
