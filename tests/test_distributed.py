"""Recording under DistributedDataParallel and FSDP2: two gloo processes against one process that has all the data."""

from __future__ import annotations

import copy
import socket
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from recorded import assert_same_grads, grads, one_at_a_time
from torch import nn

import gradclust_fast as gf

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")
RANKS = 2
HOWS = ["ddp", "fsdp2", "fsdp2-bf16"]


class Net(nn.Module):
    """A tied head, a layer used twice and a functional use."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.norm = nn.Embedding(7, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, index):
        h = torch.tanh(self.body(self.embed(index)))
        h = self.norm(torch.tanh(self.body(h)))
        return {"logits": (self.head(h) + F.linear(torch.sin(h), self.embed.weight)).mean(1)}


def data(rank):
    generator = torch.Generator().manual_seed(10 + rank)
    return torch.randint(0, 7, (4, 3), generator=generator), torch.randint(0, 7, (4,), generator=generator)


def loss_of(model, rank):
    index, y = data(rank)
    return F.cross_entropy(model(index)["logits"], y)


def build():
    torch.manual_seed(5)
    return Net()


def whole(grad):
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def wrapped(how):
    model = build()
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options = {}
    if how == "fsdp2-bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model.body, reshard_after_forward=how == "fsdp2", **options)
    fully_shard(model, **options)
    return model


def observe(rank, how):
    """What one process saw: rows, statistics, gradients with and without the record."""
    plain = wrapped(how)
    loss_of(plain, rank).backward()
    expected = {name: whole(p.grad).clone() for name, p in plain.named_parameters()}
    model = wrapped(how)
    seen = {}
    for step in range(2):  # the second step finds FSDP's whole parameters already there
        model.zero_grad()
        with gf.record(model, moments=True, gram=True) as rec:
            loss_of(model, rank).backward()
        got = {name: whole(p.grad) for name, p in model.named_parameters()}
        assert all(torch.equal(got[name], expected[name]) for name in expected), f"step {step}: .grad changed"
        own, everyone = rec.noise_scale(), rec.noise_scale(group=dist.group.WORLD)
        seen = {
            "names": rec.names,
            "rows": rec.sq_norms_by_parameter,
            "gram": rec.gram,
            "moments": rec.moments,
            "own": (own.trace, own.gradient_sqnorm),
            "everyone": (everyone.trace, everyone.gradient_sqnorm),
            "grads": {name.removeprefix("module."): grad for name, grad in expected.items()},
        }
    if rank == 0:  # no rank waits for another to record
        with gf.record(model) as rec:
            loss_of(model, rank).backward()
    else:
        loss_of(model, rank).backward()
    one = gf.record(model.module if how == "ddp" else model)
    with one:
        index, y = data(rank)
        F.cross_entropy(model(index[: 1 + rank])["logits"], y[: 1 + rank]).backward()
    try:
        one.noise_scale(group=dist.group.WORLD)
    except RuntimeError as error:
        seen["error"] = str(error)
    return seen


def work(rank, port, folder):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    try:
        torch.save({how: observe(rank, how) for how in HOWS}, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def everything():
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (free_port(), folder), nprocs=RANKS)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(params=HOWS)
def ranks(request, everything):
    return request.param, [seen[request.param] for seen in everything]


def oracle(rank):
    index, y = data(rank)
    return one_at_a_time(build(), lambda model: F.cross_entropy(model(index)["logits"], y, reduction="none"))


def parts(rows):
    """Unbiased tr Σ and ‖ḡ‖² of one batch of per-example gradients [B, D]."""
    B = rows.shape[0]
    trace = (rows - rows.mean(0)).square().sum() / (B - 1)
    return trace, rows.mean(0).square().sum() - trace / B


def test_every_rank_has_the_rows_of_its_own_examples(ranks):
    how, seen = ranks
    rtol = 5e-2 if "bf16" in how else 2e-5
    for rank in range(RANKS):
        want = oracle(rank)
        assert list(want) == seen[rank]["names"]
        flat = {name: g.flatten(1) for name, g in want.items()}
        for name, rows in seen[rank]["rows"].items():
            torch.testing.assert_close(rows.double(), flat[name].square().sum(1), rtol=rtol, atol=1e-7, msg=name)
        everything = torch.cat(list(flat.values()), 1)
        gram = everything @ everything.T
        torch.testing.assert_close(seen[rank]["gram"].double(), gram, rtol=rtol, atol=rtol * gram.abs().max().item())


def test_rows_of_all_ranks_average_to_the_reduced_gradient(ranks):
    how, seen = ranks
    rtol = 5e-2 if "bf16" in how else 2e-5
    for name in seen[0]["names"]:
        mean = sum(one["moments"][name][0] for one in seen) / sum(one["gram"].shape[0] for one in seen)
        grad = seen[0]["grads"][name]
        torch.testing.assert_close(mean, grad, rtol=rtol, atol=rtol * grad.abs().max().item())


def test_noise_scale_of_a_group_averages_the_ranks_parts(ranks):
    how, seen = ranks
    rtol = 5e-2 if "bf16" in how else 1e-4
    expected = [parts(torch.cat([g.flatten(1) for g in oracle(rank).values()], 1)) for rank in range(RANKS)]
    for rank in range(RANKS):
        for got, want in zip(seen[rank]["own"], expected[rank]):
            assert got == pytest.approx(want.item(), rel=rtol, abs=rtol * expected[rank][0].item())
        for part, got in enumerate(seen[rank]["everyone"]):
            want = sum(one[part] for one in expected).item() / RANKS
            assert got == pytest.approx(want, rel=rtol, abs=rtol * expected[rank][0].item())
    assert seen[0]["everyone"] == seen[1]["everyone"]


def test_a_rank_that_cannot_tell_fails_on_every_rank_and_nobody_waits(ranks):
    _, seen = ranks
    assert "at least 2 examples a backward, got 1" in seen[0]["error"]
    assert "failed on 1 other rank" in seen[1]["error"]


def test_the_old_fsdp_wrapper_is_refused_by_name():
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(nn.Linear(6, 3), device_id=torch.device("cpu"))
        with pytest.raises(NotImplementedError, match=r"FullyShardedDataParallel.*fully_shard"), gf.record(model):
            pass
    finally:
        dist.destroy_process_group()


def test_tensor_parallel_layers_are_refused_by_name():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
        parallelize_module(model, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})
        with pytest.raises(NotImplementedError, match=r"0\.weight.*DTensor.*tensor parallelism"), gf.record(model):
            model(torch.randn(3, 6)).sum().backward()
    finally:
        dist.destroy_process_group()


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(x * self.scale)


def test_sharded_modules_that_need_whole_parameters_in_backward_are_refused_on_entry():
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        model = Scaled()
        fully_shard(model)
        with pytest.raises(NotImplementedError, match=r"^scale: sharded.*parameters="), gf.record(model):
            pass
        with gf.record(model, parameters="head.*") as rec:
            model(torch.randn(3, 6)).sum().backward()
        assert rec.sq_norms.shape == (3,)
    finally:
        dist.destroy_process_group()


def test_a_record_without_a_group_needs_no_process_group():
    model = build()
    twin = copy.deepcopy(model)
    loss_of(twin, 0).backward()
    with gf.record(model) as rec:
        loss_of(model, 0).backward()
    assert_same_grads(model, grads(twin))
    assert rec.noise_scale().trace > 0
