"""Recording inside the parts of a training stack: precision, compilation, checkpointing, accumulation, threads."""

from __future__ import annotations

import gc
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from recorded import MODELS, assert_matches, assert_same_grads, grads, logits, mlp, one_at_a_time
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradclust_fast as gf
from gradclust_fast import _compiled

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")
EVERYTHING = {"sq_norms": True, "gram": True, "moments": True}


def batch(shape=(6,), B=5, classes=3):
    return torch.randn(B, *shape), torch.randint(0, classes, (B,))


def losses_of(x, y):
    return lambda model: F.cross_entropy(logits(model(x.double())), y, reduction="none")


# --- mixed precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "linear-one-position-dim", "conv-strided", "tied-reused-functional"])
def test_autocast_with_a_grad_scaler_gives_unscaled_rows(name, half):
    build, shape = MODELS[name]
    model = build()
    x, y = batch(shape)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    def step():
        model.zero_grad()
        with torch.autocast("cpu", half):
            loss = F.cross_entropy(logits(model(x)).float(), y)
        scaler.scale(loss).backward()

    step()
    expected = grads(model)
    with gf.record(model, **EVERYTHING, loss_scale=scaler) as rec:
        step()
    assert_same_grads(model, expected)
    scaler.unscale_(torch.optim.SGD(model.parameters(), 0.1))
    assert_matches(rec, one_at_a_time(model, losses_of(x, y)), rtol=5e-2)
    for name, p in model.named_parameters():  # rows average to the unscaled .grad
        size = p.grad.abs().max().item()
        torch.testing.assert_close(rec.moments[name][0] / 5, p.grad, rtol=2e-2, atol=2e-2 * size)


def op_calls():
    act, grad = torch.randn(4, 3, 6), torch.randn(4, 3, 5)
    image, out = torch.randn(4, 2, 6, 6), torch.randn(4, 3, 4, 4)
    conv = {"kernel_size": (3, 3)}
    points, labels = torch.randn(12, 6), torch.arange(12) % 3
    looked_up = (torch.randint(7, (4, 3)), grad)
    return {
        "grad_sqnorm": lambda: gf.ops.grad_sqnorm(act, grad),
        "grad_sketch": lambda: gf.ops.grad_sketch(act, grad, torch.ones(5, 2), torch.ones(6, 2)),
        "grad_dot": lambda: gf.ops.grad_dot(act, grad, torch.ones(3, 5), torch.ones(3, 6)),
        "grad_gram": lambda: gf.ops.grad_gram(act, grad),
        "grad_moments": lambda: gf.ops.grad_moments(act, grad),
        "grad_weight_sqnorm": lambda: gf.ops.grad_weight_sqnorm(act, grad),
        "grad_quantities": lambda: gf.ops.grad_quantities(
            act, grad, sqnorm=True, center_grad=torch.ones(3, 5), center_act=torch.ones(3, 6)
        )[0],
        "conv_sqnorm": lambda: gf.ops.conv_sqnorm(image, out, **conv),
        "conv_sketch": lambda: gf.ops.conv_sketch(image, out, torch.ones(3, 2), torch.ones(18, 2), **conv),
        "conv_dot": lambda: gf.ops.conv_dot(image, out, torch.ones(2, 3), torch.ones(2, 18), **conv),
        "conv_gram": lambda: gf.ops.conv_gram(image, out, **conv),
        "conv_moments": lambda: gf.ops.conv_moments(image, out, **conv),
        "conv_weight_sqnorm": lambda: gf.ops.conv_weight_sqnorm(image, out, **conv),
        "embedding_sqnorm": lambda: gf.ops.embedding_sqnorm(*looked_up, num_embeddings=7),
        "embedding_sketch": lambda: gf.ops.embedding_sketch(
            *looked_up, torch.ones(7, 2), torch.ones(5, 2), num_embeddings=7
        ),
        "embedding_dot": lambda: gf.ops.embedding_dot(*looked_up, torch.ones(2, 7), torch.ones(2, 5), num_embeddings=7),
        "embedding_gram": lambda: gf.ops.embedding_gram(*looked_up, num_embeddings=7),
        "embedding_moments": lambda: gf.ops.embedding_moments(*looked_up, num_embeddings=7, padding_idx=2),
        "norm_grads": lambda: gf.ops.norm_grads(act, act, groups=3),
        "sign_product": lambda: gf.ops.sign_product(points, 5, (1, 2), 0.5),
        "assign": lambda: gf.ops.assign(points[:, :3], points[:3, 0].abs(), points[:, 0].abs()),
        "assign_points": lambda: gf.ops.assign_points(points, points[:3]),
        "cluster_sums": lambda: gf.ops.cluster_sums(points, labels, 3),
        "exact_moves": lambda: gf.ops.exact_moves(points, labels, 3),
    }


@pytest.mark.parametrize("name", gf._dispatch.OPS)
def test_an_op_computes_in_its_own_precision_inside_autocast(name, backend):
    call = op_calls()[name]
    if backend not in gf._dispatch.OPS[name].kernels:
        pytest.skip(f"{name} has no {backend} version")
    expected = call()
    with torch.autocast("cpu", torch.bfloat16):
        got = call()
        assert torch.is_autocast_enabled("cpu")
    as_tuple = (lambda out: tuple(out)) if isinstance(expected, tuple) else (lambda out: (out,))
    for one, other in zip(as_tuple(got), as_tuple(expected), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


# --- accumulation, layouts, losses -------------------------------------------------------------------------------


def test_gradient_accumulation_appends_rows_of_unscaled_losses():
    model, twin, k = mlp(), mlp(), 4
    twin.load_state_dict(model.state_dict())
    parts = [batch(B=B) for B in (3, 3, 3, 3)]

    def step(model):
        for x, y in parts:
            (F.cross_entropy(model(x), y) / k).backward()

    step(twin)
    with gf.record(model, moments=True, loss_scale=1 / k) as rec:
        step(model)
    assert_same_grads(model, grads(twin))
    x, y = (torch.cat(t) for t in zip(*parts))
    assert_matches(rec, one_at_a_time(model, losses_of(x, y)))
    for name, p in model.named_parameters():  # rows average to .grad
        torch.testing.assert_close(rec.moments[name][0] / 12, p.grad, rtol=1e-5, atol=1e-7)


class Outputs(nn.Module):
    """A batch-second model with a frozen layer, a dict inside a tuple, and a body called twice."""

    def __init__(self):
        super().__init__()
        self.body, self.frozen, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x):  # [T, B, 6]
        h = torch.tanh(self.frozen(torch.tanh(self.body(x))))
        return {"logits": self.head(torch.tanh(self.body(h)))}, h


@pytest.mark.parametrize("input_needs_grad", [False, True])
def test_batch_second_with_frozen_layers_ignored_tokens_and_class_weights(input_needs_grad):
    torch.manual_seed(3)
    model, x, y = Outputs(), torch.randn(7, 5, 6), torch.randint(0, 4, (7, 5))
    y[2:, 1], y[:, 3] = -100, -100
    weight = torch.tensor([0.3, 1.0, 2.0, 0.5])
    x.requires_grad_(input_needs_grad)

    def step():
        model.zero_grad()
        x.grad = None
        F.cross_entropy(model(x)[0]["logits"].flatten(0, 1), y.flatten(), weight=weight).backward()
        return grads(model), x.grad

    expected, input_grad = step()
    with gf.record(model, **EVERYTHING, batch_dim=1, parameters=["body.*", "head.weight"]) as rec:
        step()
    assert_same_grads(model, expected)
    assert input_grad is None if not input_needs_grad else torch.equal(x.grad, input_grad)

    def shares(model):
        out = model(x.detach().double())[0]["logits"].flatten(0, 1)
        tokens = F.cross_entropy(out, y.flatten(), weight=weight.double(), reduction="none").view(7, 5)
        return tokens.sum(0) / weight[y[y >= 0]].sum()

    names = ["body.weight", "body.bias", "head.weight"]
    assert_matches(rec, one_at_a_time(model, shares, names), scale=5)
    assert rec.sq_norms[3] == 0


def test_a_sketch_without_reduction_puts_parameters_side_by_side():
    model = mlp()
    parts = [batch(B=2), batch(B=3)]
    sketch = gf.Sketch(reduce=False, sides=(64, 64))  # wide enough to be the identity
    with gf.record(model, sketch=sketch) as rec:
        for x, y in parts:
            F.cross_entropy(model(x), y).backward()
    x, y = (torch.cat(t) for t in zip(*parts))
    want = torch.cat([g.flatten(1) for g in one_at_a_time(model, losses_of(x, y)).values()], 1)
    torch.testing.assert_close(rec.sketches.double(), want, rtol=1e-4, atol=1e-6)


# --- checkpointing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_autocast_together(reentrant):
    model = mlp()
    x, y = batch()
    x.requires_grad_()  # a reentrant checkpoint needs it

    def step():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = checkpoint(model[:4], x, use_reentrant=reentrant)
            loss = F.cross_entropy(model[4](out).float(), y)
        loss.backward()
        return grads(model)

    expected = step()
    with gf.record(model, **EVERYTHING) as rec:
        step()
    assert_same_grads(model, expected)
    assert_matches(rec, one_at_a_time(model, losses_of(x.detach(), y)), rtol=5e-2)


# --- torch.compile -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled_first", [True, False])
def test_recording_compiles_nothing_and_unrecorded_steps_are_not_recompiled(compiled_first):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    model = mlp()
    x, y = batch()
    compiled = torch.compile(model, backend="aot_eager")

    def step():
        model.zero_grad()
        F.cross_entropy(compiled(x), y).backward()
        return grads(model)

    if compiled_first:
        step()
    counters.clear()
    with gf.record(compiled, **EVERYTHING) as rec:
        step()
    assert not counters["stats"]["unique_graphs"]
    assert_matches(rec, one_at_a_time(model, losses_of(x, y)))
    recorded = grads(model)
    for _ in range(2):
        for name, grad in step().items():
            torch.testing.assert_close(grad, recorded[name], rtol=1e-5, atol=1e-7)
    assert counters["stats"]["unique_graphs"] == (0 if compiled_first else 1)


def test_a_compiler_imported_inside_of_a_record_compiles_afterwards():
    code = """
import sys, torch, gradclust_fast as gf
model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
x = torch.randn(4, 6)
assert "torch._dynamo" not in sys.modules
with gf.record(model) as plain:
    model(x).square().sum().backward()
with gf.record(model) as rec:
    compiled = torch.compile(model, backend="eager")
    compiled(x).square().sum().backward()
from torch._dynamo.utils import counters
assert torch.equal(plain.sq_norms, rec.sq_norms) and not counters["stats"]
compiled(x)
assert counters["stats"]["unique_graphs"] == 1
assert not any("gradclust" in type(finder).__module__ for finder in sys.meta_path)
"""
    root = Path(gf.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_a_record_inside_a_compiled_function_is_refused():
    model = mlp()
    x, y = batch()

    @torch.compile(backend="eager")
    def step():
        with gf.record(model):
            F.cross_entropy(model(x), y).backward()

    with pytest.raises(RuntimeError, match="cannot be opened inside a compiled function"):
        step()
    torch._dynamo.reset()
    with gf.record(model) as rec:
        F.cross_entropy(model(x), y).backward()
    assert rec.sq_norms.shape == (5,)


# --- threads and growth ------------------------------------------------------------------------------------------


def test_two_threads_record_two_models():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    models = [mlp(), mlp()]
    compiled = [torch.compile(model, backend="eager") for model in models]
    batches = [batch(B=4), batch(B=5)]
    barrier, records, errors = threading.Barrier(2), [[], []], []

    def train(i):
        x, y = batches[i]
        try:
            for _ in range(10):
                barrier.wait(60)
                with gf.record(compiled[i]) as rec:
                    barrier.wait(60)  # both are open; the first to close must leave the other's as it is
                    if i:
                        first_closed.wait(60)
                    F.cross_entropy(compiled[i](x), y).backward()
                records[i].append(rec)
                if not i:
                    first_closed.set()
                barrier.wait(60)
                if not i:
                    first_closed.clear()
                barrier.wait(60)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    first_closed = threading.Event()
    threads = [threading.Thread(target=train, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert not counters["stats"]["unique_graphs"]
    for model, mine, (x, y) in zip(models, records, batches):
        oracle = one_at_a_time(model, losses_of(x, y))
        for rec in mine:
            assert_matches(rec, oracle)
    assert _compiled._watches == 0
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_two_hundred_checkpointed_autocast_steps_leave_nothing():
    model = mlp()
    x, y = batch()
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)

    def steps(n):
        for _ in range(n):
            model.zero_grad()
            with gf.record(model, loss_scale=scaler) as rec:
                with torch.autocast("cpu", torch.bfloat16):
                    out = checkpoint(model[:4], x, use_reentrant=False)
                    loss = F.cross_entropy(model[4](out).float(), y)
                scaler.scale(loss).backward()
            rec.sq_norms.sum()

    steps(10)
    gc.collect()
    before = len(gc.get_objects())
    steps(200)
    gc.collect()
    assert len(gc.get_objects()) - before < 100
    assert all(not p._backward_hooks for p in model.parameters())


def test_the_guides_snippets_run():
    root = Path(gf.__file__).parents[1]
    text = (root / "docs" / "training.md").read_text()
    code = "\n".join(block.split("```")[0] for block in text.split("```python\n")[1:])
    assert code.count("gf.record(") >= 7
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        code = code.replace("29501", str(probe.getsockname()[1]))
    done = subprocess.run([sys.executable, "-c", code], cwd=root, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
