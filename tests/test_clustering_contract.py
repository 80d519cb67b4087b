"""What clustering promises beside its strata: repeatability, no trace, errors that name the cause."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clustered import EXACT_SKETCH, METHODS, clustering, gradients, losses, small_data, small_model, variance
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradclust_fast as gf
from gradclust_fast.clustering.sketches import merge_equal_rows


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_strata(method):
    data = small_data()
    first, again = (clustering(method, seed=3).fit(data, losses) for _ in range(2))
    other = clustering(method, seed=4).fit(data, losses)
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(first.variance, again.variance)
    assert not torch.equal(first.labels, other.labels)


@pytest.mark.parametrize("batch_size, num_workers", [(7, 0), (40, 0), (16, 2)])
def test_loading_makes_no_difference(batch_size, num_workers):
    data = small_data()
    strata = clustering().fit(data, losses, batch_size=13)
    other = clustering().fit(data, losses, batch_size=batch_size, num_workers=num_workers)
    assert torch.equal(strata.labels, other.labels)


@pytest.mark.parametrize("method", METHODS)
def test_a_loader_that_yields_indices_serves_as_the_data_set(method):
    data = small_data()
    loader = DataLoader(gf.with_indices(data), batch_size=16, shuffle=True)
    assert torch.equal(
        clustering(method).fit(loader, losses).labels, clustering(method).fit(data, losses, batch_size=16).labels
    )


def test_forward_serves_any_kind_of_sample():
    data = small_data()
    dicts = [{"image": x, "label": y} for x, y in data]
    strata = clustering().fit(dicts, forward=lambda model, batch: losses(model(batch["image"]), batch["label"]))
    assert torch.equal(strata.labels, clustering().fit(data, losses).labels)


def test_only_the_chosen_parameters_count():
    data, model = small_data(), small_model()
    strata = clustering(model=model, sketch=EXACT_SKETCH, parameters="4.*").fit(data, losses)
    last = gradients(model, data)[:, -(27 * 4 + 4) :]
    assert strata.distortion / 40**2 == pytest.approx(variance(last, strata.labels, 6), rel=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_a_second_fit_starts_from_the_first(method):
    data, model = small_data(), small_model()
    warm = clustering(method, model=model)
    first, begun = warm.fit(data, losses), warm.history[0]
    warm.fit(data, losses)
    if method == "exact":
        assert warm.history[0] == pytest.approx(first.distortion)
    assert warm.history[0] < begun
    fewer = small_data(30)  # other data: a fresh start
    assert torch.equal(warm.fit(fewer, losses).labels, clustering(method, model=model).fit(fewer, losses).labels)


@pytest.mark.parametrize("method", METHODS)
def test_without_a_warm_start_every_fit_is_the_first(method):
    data, cold = small_data(), clustering(method, warm_start=False)
    assert torch.equal(cold.fit(data, losses).labels, cold.fit(data, losses).labels)


class Explodes:
    """A data set that fails in the middle of a pass."""

    def __init__(self, data, error):
        self.data, self.error = data, error

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        if i == 20:
            raise self.error
        return self.data[i]


def state(model):
    return {
        "grads": [p.grad for p in model.parameters()],
        "hooks": [(p._backward_hooks, len(m._forward_hooks)) for m in model.modules() for p in m.parameters()],
        "modes": [m.training for m in model.modules()],
        "buffers": [b.clone() for b in model.buffers()],
        "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), OSError("disk")], ids=["fit", "interrupted", "failed"])
def test_nothing_is_left_on_the_model(method, error):
    model = nn.Sequential(small_model(), nn.BatchNorm1d(4, affine=False).double())
    model.train()
    model[0][0].weight.grad = torch.ones_like(model[0][0].weight)
    before, grad = state(model), model[0][0].weight.grad
    found = clustering(method, model=model)
    if error is None:
        found.fit(small_data(), losses)
    else:
        with pytest.raises(type(error)):
            found.fit(Explodes(small_data(), error), losses)
        assert found.strata is None
    after = state(model)
    assert after["grads"][0] is grad and torch.equal(grad, torch.ones_like(grad))
    assert all(g is None for g in after["grads"][1:])
    assert all(torch.equal(a, b) for a, b in zip(before.pop("buffers"), after.pop("buffers")))
    before.pop("grads"), after.pop("grads")
    assert before == after
    small = small_data(4)
    model(small.tensors[0]).sum().backward()  # and it still trains


def test_a_failed_fit_keeps_the_last_strata():
    found = clustering()
    strata = found.fit(small_data(), losses)
    history = found.history
    with pytest.raises(OSError, match="disk"):
        found.fit(Explodes(small_data(), OSError("disk")), losses)
    assert found.strata is strata and found.history is history


def test_train_mode_is_used_when_asked():
    seen = set()
    model, data = nn.Linear(3, 2).eval(), TensorDataset(torch.randn(6, 3), torch.zeros(6, dtype=torch.int64))
    model.register_forward_hook(lambda module, args, output: seen.add(module.training))
    clustering(model=model, K=2).fit(data, losses, mode="train")
    assert seen == {True} and not model.training
    seen.clear()
    clustering(model=model, K=2).fit(data, losses)
    assert seen == {False}


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_shown_on_a_terminals_stderr_only(capsys, monkeypatch, terminal):
    pytest.importorskip("rich")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    clustering("factored", rounds=1).fit(small_data(), losses, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and ("round 1/1" in err) == terminal


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"K": 0}, ValueError, "num_clusters must be at least 1, got 0"),
        ({"K": "8"}, TypeError, "num_clusters must be an integer, got '8'"),
        ({"method": "kmeans"}, ValueError, "method must be one of 'exact', 'factored', 'online', got 'kmeans'"),
        ({"model": 3}, TypeError, "model must be a torch.nn.Module, got int"),
        ({"sketch": 256}, TypeError, "sketch must be a gf.Sketch, got int"),
        ({"rounds": 3}, ValueError, "rounds is not an option of method='exact', which has max_sweeps, tol"),
        ({"method": "factored", "tol": 0.1}, ValueError, "tol is not an option of method='factored'"),
        ({"max_sweeps": 0}, ValueError, "max_sweeps must be at least 1, got 0"),
        ({"tol": -1.0}, ValueError, "tol must be a finite number, at least 0"),
        ({"method": "factored", "rounds": 0}, ValueError, "rounds must be at least 1"),
        ({"method": "factored", "min_size": -1}, ValueError, "min_size must be at least 0"),
        ({"seed": 0.5}, TypeError, "seed must be an integer"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        clustering(**arguments)


@pytest.mark.parametrize("method", METHODS)
def test_bad_data_is_named(method):
    data, found = small_data(), clustering(method)
    with pytest.raises(ValueError, match="dataset is empty"):
        found.fit([], losses)
    with pytest.raises(ValueError, match=r"must return per-example losses \[40\], got \[\]"):
        found.fit(data, F.cross_entropy)
    with pytest.raises(ValueError, match="more than once"):
        found.fit(DataLoader(gf.with_indices(data), sampler=[0, 1, 1, *range(3, 40)]), losses)
    with pytest.raises(ValueError, match="skipped 35 of 40 examples, the first of them index 5"):
        found.fit(DataLoader(gf.with_indices(data), sampler=range(5)), losses)
    with pytest.raises(TypeError, match="does not yield indices"):
        found.fit(DataLoader(data), losses)
    with pytest.raises(TypeError, match="map-style"):
        found.fit(iter(data), losses)
    with pytest.raises(ValueError, match="batch_size=None, which yields single examples"):
        found.fit(DataLoader(gf.with_indices(data), batch_size=None), losses)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        found.fit(data, losses, batch_size=0)
    with pytest.raises(ValueError, match="mode must be"):
        found.fit(data, losses, mode="test")


@pytest.mark.parametrize("method", METHODS)
def test_examples_without_a_finite_gradient_are_named(method):
    x, y = small_data().tensors
    x[[7, 23], 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"2 example\(s\) is not finite: index 7, 23"):
        clustering(method).fit(TensorDataset(x, y), losses)


@pytest.mark.parametrize("method", METHODS)
def test_a_finite_loss_with_an_infinite_gradient_is_named(method):
    def steep(output, target):
        return losses(output, target) + output[:, 0].abs().clamp(min=1e-30).mul(0).sqrt()  # slope inf·0 = NaN

    with pytest.raises(ValueError, match=r"40 example\(s\) is not finite: index 0, 1,"):
        clustering(method).fit(small_data(), steep)


@pytest.mark.parametrize("method", METHODS)
def test_one_example_with_an_infinite_gradient_is_named_alone(method):
    class Blowup(torch.autograd.Function):
        @staticmethod
        def forward(ctx, output):
            return output.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad.index_fill(0, torch.tensor([2]), float("inf"))

    with pytest.raises(ValueError, match=r"1 example\(s\) is not finite"):
        clustering(method).fit(small_data(), lambda output, target: losses(Blowup.apply(output), target), batch_size=40)


def test_a_parameter_without_a_route_is_named():
    model = nn.Sequential(nn.Embedding(5, 4, scale_grad_by_freq=True), nn.Linear(4, 2))
    data = TensorDataset(torch.zeros(6, dtype=torch.int64), torch.zeros(6, dtype=torch.int64))
    with pytest.raises(NotImplementedError, match=r"0\.weight"):
        gf.GradientClustering(model, 2).fit(data, losses)


@pytest.mark.parametrize("method", METHODS)
def test_recomputed_modules_are_clustered_too(method):
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2))
    data = TensorDataset(torch.randn(12, 3), torch.arange(12) % 2)
    strata = gf.GradientClustering(model, 3, method=method).fit(data, losses)
    assert len(strata.labels) == 12


def test_a_chain_of_small_steps_is_not_merged_from_end_to_end():
    chain = torch.linspace(1, 1.1, 50001).unsqueeze(1)  # neighbours 2e-6 apart, the ends 0.1
    assert (merge_equal_rows(chain) - chain).abs().max() <= 2e-5


@pytest.mark.parametrize("batch_size", [1, 7, 60])
def test_copies_of_one_example_share_a_stratum_wherever_they_stand(batch_size):
    x, y = small_data().tensors
    which = torch.arange(60)[torch.randperm(60)] % 6
    strata = clustering(K=6).fit(TensorDataset(x[which], y[which]), losses, batch_size=batch_size)
    for example in range(6):
        assert len(strata.labels[which == example].unique()) == 1
