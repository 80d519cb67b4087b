"""What measuring promises beside its numbers: it leaves no trace, and names what is wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from measured import data_for, loss_fn, mlp, random_strata
from torch import nn
from torch.utils.data import TensorDataset

import gradclust_fast as gf


class Failing(TensorDataset):
    def __getitem__(self, i):
        if i == 17:
            raise OSError("disk gone")
        return super().__getitem__(i)


@pytest.mark.parametrize("fails", [False, True])
def test_measuring_leaves_no_trace(fails):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(), nn.Linear(6, 3)).double().train()
    model[2].eval()
    snapshot = copy.deepcopy(model)
    data = data_for([nn.Linear(1, 1)])
    if fails:
        data = Failing(*data.tensors)
    loss_fn(model(data.tensors[0]), data.tensors[1]).sum().backward()
    model[0].bias.grad = None
    grads = [(p.grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()

    def measure():
        gf.gradient_stats(model, data, loss_fn, mode="train", batch_size=4)
        estimators = [gf.Uniform(2), gf.SVRG(2, snapshot), gf.Stratified(random_strata(23, 4))]
        gf.compare_estimators(model, data, loss_fn, estimators, monte_carlo=2, batch_size=4)

    if fails:
        with pytest.raises(OSError, match="disk gone"):
            measure()
    else:
        measure()
    assert torch.equal(rng, torch.get_rng_state())
    for net in (model, snapshot):
        assert net.training and net[0].training and not net[2].training
        for module in net.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks
        assert all(not p._backward_hooks for p in net.parameters())
    for p, (grad, value) in zip(model.parameters(), grads):
        assert p.grad is grad and (grad is None or torch.equal(grad, value))
    assert all(p.grad is None for p in snapshot.parameters())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    gf.gradient_stats(model, data_for([nn.Linear(1, 1)]), loss_fn)  # nothing is still being watched


def small():
    model = mlp()
    return model, data_for(model)


def broken_data():
    x, y = data_for(mlp()).tensors
    x = x.clone()
    x[[3, 11]] = float("nan")
    return TensorDataset(x, y)


class Blowup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[1] = float("inf")
        return grad


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda m, d: gf.gradient_stats(m, d, nn.CrossEntropyLoss()), ValueError, "reduction='none'"),
        (lambda m, d: gf.gradient_stats(m, broken_data(), loss_fn), ValueError, "2 example.*index 3, 11"),
        (
            lambda m, d: gf.gradient_stats(m, d, lambda o, y: loss_fn(Blowup.apply(o), y), batch_size=9),
            ValueError,
            "the gradient of .* is not finite: index 1;",
        ),
        (lambda m, d: gf.gradient_stats(m, TensorDataset(torch.zeros(0, 5)), loss_fn), ValueError, "empty"),
        (lambda m, d: gf.gradient_stats(m, d), TypeError, "loss_fn must be"),
        (lambda m, d: gf.gradient_stats(m, d, 3), TypeError, "loss_fn must be a function.*got int"),
        (
            lambda m, d: gf.compare_estimators(m, d, loss_fn, [gf.SVRG(4, m.state_dict())]),
            ValueError,
            r"snapshot shares the memory of \d+ parameters.*deepcopy\(model.state_dict\(\)\)",
        ),
        (lambda m, d: gf.gradient_stats(m, d, loss_fn, mode="test"), ValueError, "'eval' or 'train'"),
        (lambda m, d: gf.gradient_stats(m, d, loss_fn, parameters="x.*"), ValueError, "x.*"),
        (lambda m, d: gf.gradient_stats(m, d, loss_fn).normalized_variance(24, replacement=False), ValueError, "N=23"),
        (lambda m, d: gf.compare_estimators(m, d, loss_fn, []), ValueError, "estimators is empty"),
        (lambda m, d: gf.compare_estimators(m, d, loss_fn, [128]), TypeError, "got int"),
        (
            lambda m, d: gf.compare_estimators(m, d, loss_fn, gf.Uniform(2)),
            TypeError,
            "must be a list, got one Uniform",
        ),
        (
            lambda m, d: gf.compare_estimators(m, d, loss_fn, [gf.SVRG(2, nn.Linear(5, 3))]),
            ValueError,
            "SVRG.2.: snapshot is not a copy of this model",
        ),
        (lambda m, d: gf.gradient_stats(m, d, loss_fn, batch_size=2.5), TypeError, "batch_size must be an integer"),
        (lambda m, d: gf.compare_estimators(m, d, loss_fn, [gf.Uniform(24, False)]), ValueError, "at most N=23"),
        (
            lambda m, d: gf.compare_estimators(m, d, loss_fn, [gf.Stratified(random_strata(9, 2))]),
            ValueError,
            "strata are of 9 examples, the data has 23",
        ),
        (lambda m, d: gf.compare_estimators(m, d, loss_fn, [gf.SVRG(2, m)]), ValueError, "copy.deepcopy"),
        (lambda m, d: gf.compare_estimators(m, d, loss_fn, [gf.SVRG(2, {"a": 1})]), ValueError, "not a state_dict"),
        (lambda m, d: gf.compare_estimators(m, d, loss_fn, [gf.Uniform(2)], monte_carlo=1), ValueError, "at least 2"),
        (lambda m, d: gf.SVRG(2, [1]), TypeError, "snapshot must be a copy"),
        (lambda m, d: gf.Uniform(0), ValueError, "at least 1, got 0"),
        (lambda m, d: gf.Uniform(1.5), TypeError, "must be an int"),
        (lambda m, d: gf.Stratified([0, 1]), TypeError, "strata must be gf.Strata"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(*small())
