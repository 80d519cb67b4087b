"""Strata and the sampler's watch over several ranks: two gloo processes against one that has all the data."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gradclust_fast as gf

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo")
N, K, B = 80, 4, 4


def parts(num_replicas, rank):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64) + 3 * (torch.arange(N) % K)[:, None]
    torch.manual_seed(1)
    model = nn.Linear(3, 2, bias=False).double()
    clustering = gf.GradientClustering(model, K, "online", sketch=gf.Sketch(dim=16), num_examples=N)
    sampler = gf.StratifiedBatchSampler(
        clustering.strata, B * 2 // num_replicas, num_replicas=num_replicas, rank=rank, refresh="auto"
    )
    return model, x, clustering, sampler


def run(num_replicas, rank, group):
    model, x, clustering, sampler = parts(num_replicas, rank)
    ratios = []
    for epoch in range(2):
        for index in sampler:
            index = torch.tensor(index)
            if num_replicas == 1:  # in the order in which the ranks' examples are gathered
                index = torch.cat([index[0::2], index[1::2]])
            weights = sampler.weights(index).double()
            with gf.record(model, sketch=clustering.sketch) as rec:
                (weights * model(x[index]).square().sum(1)).mean().backward()
            model.zero_grad()
            ratios.append(sampler.observe(rec, index, group=group))
            clustering.update(rec, index, weights, group=group)
        if epoch == 0:
            sampler.set_strata(clustering.strata)
    return {"labels": clustering.strata.labels, "ratios": ratios, "history": clustering.history}


def work(rank, port, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(run(2, rank, dist.group.WORLD), f"{folder}/{rank}.pt")
    model, x, clustering, _sampler = parts(2, rank)
    with gf.record(model, sketch=clustering.sketch) as rec:
        model(x[:4]).square().sum(1).mean().backward()
    with pytest.raises(IndexError if rank else RuntimeError, match="index 99" if rank else "rank 1"):
        clustering.update(rec, [0, 1, 2, 99 if rank else 3], group=dist.group.WORLD)
    dist.destroy_process_group()


def test_all_ranks_come_to_the_strata_and_ratios_of_one_process_and_fail_together(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, str(tmp_path)), nprocs=2)
    alone = run(1, 0, None)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(found["labels"], alone["labels"])
        torch.testing.assert_close(torch.tensor(found["ratios"]), torch.tensor(alone["ratios"]), equal_nan=True)
        torch.testing.assert_close(torch.tensor(found["history"]), torch.tensor(alone["history"]))
    assert alone["history"] and not torch.tensor(alone["ratios"][-3:]).isnan().any()
