"""Peak memory of a recorded step beside the plain one: factors are consumed as they come, and nothing else is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradclust_fast as gf
from bench.memory import peak_bytes
from bench.training.models import Transformer, classify, group_norm, next_token, resnet


def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed (pip install --no-deps works)")


def gpt2():
    sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 200, "n_positions": 64}
    library = transformers()
    return library.GPT2LMHeadModel(library.GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, use_cache=False)).eval()


def bert():
    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
    library = transformers()
    return library.BertForSequenceClassification(
        library.BertConfig(**sizes, vocab_size=200, max_position_embeddings=64, num_labels=3)
    ).eval()


def images(B, side=32, classes=10):
    return torch.randn(B, 3, side, side), torch.randint(0, classes, (B,))


def tokens(B, T, V):
    return (torch.randint(0, V, (B, T)),)


ARCHITECTURES = {  # name: (model, batch, loss); activations weigh more than parameters in all of them
    "mlp": (
        lambda: nn.Sequential(
            *(nn.Flatten(), nn.Linear(192, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()),
            *(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)),
        ),
        lambda: images(256, 8),
        classify,
    ),
    "cnn": (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 5), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(784, 10)),
        lambda: images(32),
        classify,
    ),
    "resnet8-group-norm": (lambda: resnet([8, 16, 32], 1, group_norm), lambda: images(8), classify),
    "resnet18-batch-norm-eval": (lambda: resnet([8] * 4, 2, nn.BatchNorm2d).eval(), lambda: images(8), classify),
    "resnet18-batch-norm-train": (lambda: resnet([8] * 4, 2, nn.BatchNorm2d), lambda: images(8), classify),
    "transformer": (lambda: Transformer(200, 64, 2, 4), lambda: tokens(8, 32, 200), next_token),
    "gpt2": (gpt2, lambda: tokens(8, 32, 200), next_token),
    "bert": (
        bert,
        lambda: (*tokens(8, 32, 200), torch.randint(0, 3, (8,))),
        lambda model, index, y: F.cross_entropy(model(input_ids=index).logits, y),
    ),
}


def most(model, step):
    for p in model.parameters():
        p.grad = None
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]) + peak_bytes(step)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_norms_of_an_architecture_take_no_memory_beyond_the_plain_step(name):
    build, batch, loss = ARCHITECTURES[name]
    model, batch = build(), batch()

    def step():
        loss(model, *batch).backward()

    def recorded():
        with gf.record(model) as rec:
            step()
        return rec

    step(), recorded()
    plain, watched = most(model, step), most(model, recorded)
    parameters = sum(p.nbytes for p in model.parameters())
    assert plain > 2 * parameters, "the activations are too small to tell anything"
    assert watched <= 1.15 * plain, f"{watched / 1e6:.2f} MB recorded, {plain / 1e6:.2f} MB plain"


def test_a_sketch_costs_its_matrices_and_its_rows():
    model, batch = resnet([8, 16, 32], 1, group_norm), images(16)
    sketch = gf.Sketch(dim=64, sides=(8, 8))

    def step():
        classify(model, *batch).backward()

    def recorded():
        with gf.record(model, sketch=sketch):
            step()

    step(), recorded()
    assert most(model, recorded) <= 1.15 * most(model, step)


class Blocks(nn.ModuleList):
    def __init__(self, n, reentrant):
        super().__init__(nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 32)) for _ in range(n))
        self.reentrant = reentrant

    def forward(self, x):
        for block in self:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def test_a_reentrant_checkpoint_saves_what_it_saves_without_a_record():
    model, x = Blocks(8, True), torch.randn(64, 16, 32, requires_grad=True)

    def step():
        x.grad = None
        model(x).square().mean().backward()

    def recorded():
        with gf.record(model):
            step()

    step(), recorded()
    assert most(model, recorded) <= 1.15 * most(model, step)
