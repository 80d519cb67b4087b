"""Weights on the right of a product, transposed convolutions and bags of embeddings, against one example at a time."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from recorded import Mean, assert_matches, one_at_a_time
from test_layer_routes import EVERYTHING, check, randomised
from torch import nn

import gradclust_fast as gf

TRANSPOSED = {  # name: (layer, shape of one example)
    "1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (4, 5)),
    "2d": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), bias=False), (4, 5, 3)),
    "3d": (lambda: nn.ConvTranspose3d(2, 3, (2, 1, 2), stride=(1, 2, 1)), (2, 2, 3, 2)),
    "strided-padded": (lambda: nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1), (4, 3, 4)),
    "output-padding": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (4, 3, 4)),
    "output-padding-beyond": (lambda: nn.ConvTranspose1d(4, 6, 2, stride=3, output_padding=2), (4, 3)),
    "output-padding-dilated": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, dilation=4, output_padding=3), (4, 3)),
    "wide-padding": (lambda: nn.ConvTranspose1d(4, 6, 2, stride=2, padding=3), (4, 7)),
    "grouped-dilated": (lambda: nn.ConvTranspose2d(4, 6, (2, 3), dilation=(1, 2), groups=2), (4, 4, 3)),
    "depthwise": (lambda: nn.ConvTranspose1d(4, 8, 3, stride=2, groups=4), (4, 4)),
}


@pytest.mark.parametrize("name", TRANSPOSED)
@pytest.mark.parametrize("B", [1, 5])
def test_transposed_convolutions(name, B):
    build, shape = TRANSPOSED[name]
    layer = randomised(build())
    channels = layer.out_channels
    spatial = tuple(range(2, len(shape) + 1))
    model = nn.Sequential(nn.Tanh(), layer, nn.ReLU(inplace=True), Mean(*spatial), nn.Linear(channels, 3))
    check(model, torch.randn(B, *shape), torch.randint(0, 3, (B,)))


def test_a_transposed_convolution_with_several_images_an_example_or_none():
    layer = nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2)
    x = torch.randn(6, 4, 3)
    with gf.record(layer, **EVERYTHING, batch_size=3, loss_reduction="sum") as rec:
        layer(x).square().sum().backward()
    assert_matches(rec, one_at_a_time(layer, lambda m: m(x.double()).square().reshape(3, -1).sum(1)))
    with gf.record(layer, **EVERYTHING) as rec:
        layer(x[:0]).square().sum().backward()
    assert rec.sq_norms.shape == (0,)
    with pytest.raises(ValueError, match="without a batch dimension"), gf.record(layer):
        layer(x[0]).sum().backward()


def test_a_transposed_convolution_on_near_constant_images_keeps_its_digits():
    layer = nn.ConvTranspose2d(3, 4, 3, stride=2)
    x = 1 + 1e-3 * torch.randn(3, 3, 9, 9)
    target = torch.randn(3, 4, 19, 19)
    target -= target.mean((2, 3), keepdim=True)
    with gf.record(layer, loss_reduction="sum") as rec:
        (layer(x) * target).sum().backward()
    oracle = one_at_a_time(layer, lambda m: (m(x.double()) * target).flatten(1).sum(1))
    want = oracle["weight"].flatten(1).square().sum(1)
    torch.testing.assert_close(rec.sq_norms_by_parameter["weight"].double(), want, rtol=1e-4, atol=0)


class Bags(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(9, 4, **options), nn.Linear(4, 3)

    def forward(self, index, *rest, **named):
        return self.head(torch.tanh(self.bag(index, *rest, **named)))


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize(
    "mode, layout",
    [(mode, layout) for mode in ("sum", "mean") for layout in ("rows", "offsets", "last-offset")]
    + [("sum", "weighted"), ("sum", "weighted-offsets")],
)
def test_bags_of_embeddings(mode, layout, padding):
    weighted = layout.startswith("weighted")
    model = Bags(mode=mode, include_last_offset=layout == "last-offset", padding_idx=padding)
    index, y = torch.randint(0, 9, (20,)), torch.randint(0, 3, (5,))
    index[3:5] = 2  # padding, and repeated
    offsets = torch.tensor([0, 1, 5, 5, 12] + ([20] if layout == "last-offset" else []))  # one bag is empty
    weights = torch.randn(20) if weighted else None
    if layout in ("rows", "weighted"):
        index, offsets, weights = index.reshape(5, 4), None, None if weights is None else weights.reshape(5, 4)

    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.bags = model

        def forward(self, index):
            kind = self.bags.bag.weight.dtype
            named = {} if weights is None else {"per_sample_weights": weights.to(kind)}
            return self.bags(index, offsets, **named)

    check(Given(), index, y)


@pytest.mark.parametrize("options", [{"mode": "max"}, {"mode": "sum", "scale_grad_by_freq": True}])
def test_bags_that_no_example_has_alone_are_refused(options):
    model = Bags(**options)
    with pytest.raises(NotImplementedError, match=r"bag.weight \(EmbeddingBag\)"), gf.record(model):
        pass


class Head(nn.Module):
    """A table tied to the output layer in one of several spellings, and a product with a weight [I, O]."""

    SPELLINGS: ClassVar = {
        "matmul-t": lambda x, w: x @ w.t(),
        "matmul-T": lambda x, w: torch.matmul(x, w.T),
        "transpose": lambda x, w: x.matmul(w.transpose(0, 1)),
        "mT-keyword": lambda x, w: torch.matmul(x, other=w.mT),
        "mm": lambda x, w: torch.mm(x.reshape(-1, 6), w.t()).reshape(*x.shape[:-1], 9),
        "linear": lambda x, w: F.linear(x, w),
        "onto-rows": lambda x, w: torch.softmax(x @ w.t(), -1) @ w @ w.t(),
        "linear-t": lambda x, w: F.linear(torch.tanh(F.linear(x, w)), w.t()) @ w.t(),
        "addmm": lambda x, w: torch.addmm(torch.zeros(9, dtype=w.dtype), x.reshape(-1, 6), w.t()).reshape(
            *x.shape[:-1], 9
        ),
    }

    def __init__(self, spelling):
        super().__init__()
        self.table, self.spelling = nn.Embedding(9, 6), self.SPELLINGS[spelling]

    def forward(self, index):
        return self.spelling(torch.tanh(self.table(index)), self.table.weight).flatten(1, -2).mean(1)


@pytest.mark.parametrize("spelling", Head.SPELLINGS)
def test_products_with_a_tied_table(spelling):
    index = torch.randint(0, 9, (5, 4))
    rows = {"batch_size": 5} if spelling in ("mm", "addmm") else {}
    check(Head(spelling), index, torch.randint(0, 9, (5,)), **rows)


def test_a_transpose_is_forgotten_with_the_tensor():
    model = Head("matmul-t")
    with gf.record(model) as rec:
        for _ in range(3):
            with torch.no_grad():
                model(torch.zeros(2, 3, dtype=torch.long))
        F.cross_entropy(model(torch.zeros(2, 3, dtype=torch.long)), torch.zeros(2, dtype=torch.long)).backward()
        assert not rec._forward.turned and len(rec._forward.entries) == 1


def test_sketch_and_centres_of_a_transposed_product():
    from gradclust_fast.layers import LinearFactors, TransposedFactors

    factors = TransposedFactors(LinearFactors(torch.randn(5, 4, 6), torch.randn(5, 4, 3)))
    plain = factors.linear()
    assert factors.shape == plain.shape == (6, 3)
    left, right = torch.randn(6, 4), torch.randn(3, 2)
    for sides in ((left, right), (left, None), (None, right), (None, None)):
        torch.testing.assert_close(factors.sketch(*sides), plain.sketch(*sides), rtol=1e-4, atol=1e-5)
    centres = torch.randn(3, 2, 6), torch.randn(3, 2, 3)
    torch.testing.assert_close(factors.dot(*centres), plain.dot(*centres), rtol=1e-4, atol=1e-5)
    a, d = factors.rank1()
    b, e = plain.rank1()
    torch.testing.assert_close(d.unsqueeze(2) * a.unsqueeze(1), e.unsqueeze(2) * b.unsqueeze(1))
    assert factors.subtract(factors).sqnorm().max() < 1e-8
