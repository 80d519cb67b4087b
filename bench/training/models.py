"""The models whose training steps are timed: those of the peers' papers and issue threads, and whole architectures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Task:
    """A model, one batch for it and its mean loss. ``loss(model, *batch)`` also takes a batch of one."""

    name: str
    label: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]
    B: int
    requires: str = ""
    """A package that ``build`` imports."""


def classify(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def images(channels: int, side: int, classes: int = 10) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda B: (torch.randn(B, channels, side, side), torch.randint(0, classes, (B,)))


def mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10)),
    )


def vgg() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(8192, 256), nn.ReLU(), nn.Linear(256, 10)),
    )


class Block(nn.Module):
    """Two 3 × 3 convolutions around which the input is added."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2, self.relu1, self.relu2 = norm(outputs), norm(outputs), nn.ReLU(), nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.relu2(out + self.shortcut(x))


def resnet(widths: list[int], blocks: int, norm: Callable[[int], nn.Module]) -> nn.Module:
    """3 × 3 stem, one stage a width, global pooling: widths 16, 32, 64 with one block each is ResNet8."""
    layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), norm(widths[0]), nn.ReLU()]
    for stage, (i, o) in enumerate(zip([widths[0], *widths], widths)):
        for block in range(blocks):
            layers.append(Block(o if block else i, o, 2 if stage and not block else 1, norm))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(8, channels)


class Attention(nn.Module):
    """A pre-norm transformer layer out of linear layers and LayerNorms."""

    def __init__(self, d: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2, self.heads, self.causal = nn.LayerNorm(d), nn.LayerNorm(d), heads, causal
        self.qkv, self.proj, self.up, self.down = (
            *(nn.Linear(d, 3 * d), nn.Linear(d, d)),
            *(nn.Linear(d, 4 * d), nn.Linear(4 * d, d)),
        )

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).reshape(B, T, D)
        x = x + self.proj(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A language model; with ``positions``, GPT-2's: learned positions, and the table is the output layer's weight."""

    def __init__(self, vocabulary: int, d: int, layers: int, heads: int, positions: int = 0) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(vocabulary, d), nn.ModuleList(Attention(d, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary, bias=not positions)
        self.places = nn.Embedding(positions, d) if positions else None
        if positions:
            nn.init.normal_(self.table.weight, std=0.02)
            self.head.weight = self.table.weight

    def forward(self, index: Tensor) -> Tensor:
        x = self.table(index)
        if self.places is not None:
            x = x + self.places(torch.arange(index.shape[1], device=index.device))
        for layer in self.body:
            x = layer(x)
        return self.head(self.norm(x))


class Tokens(nn.Module):
    """A class token before the patches, and learned positions: bare parameters, in a small module of their own."""

    def __init__(self, length: int, d: int) -> None:
        super().__init__()
        self.first, self.places = nn.Parameter(torch.zeros(1, 1, d)), nn.Parameter(torch.zeros(1, length + 1, d))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1) + self.places


class VisionTransformer(nn.Module):
    def __init__(self, side: int, patch: int, d: int, layers: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patches, self.tokens = nn.Conv2d(3, d, patch, patch), Tokens((side // patch) ** 2, d)
        self.body = nn.Sequential(*(Attention(d, heads, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(self.patches(x).flatten(2).mT)
        return self.head(self.norm(self.body(x))[:, 0])


def tokens(vocabulary: int, T: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda B: (torch.randint(0, vocabulary, (B, T)),)


def next_token(model: Any, index: Tensor) -> Tensor:
    out = model(index)
    logits = out if isinstance(out, Tensor) else out.logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), index[:, 1:].flatten())


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 4000, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, use_cache=False)).eval()


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
    config = BertConfig(**sizes, vocab_size=4000, max_position_embeddings=64, num_labels=3)
    return BertForSequenceClassification(config).eval()


def sentence(model: Any, index: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(input_ids=index).logits, y)


def sentences(B: int) -> tuple[Tensor, ...]:
    return torch.randint(0, 4000, (B, 64)), torch.randint(0, 3, (B,))


RESNET18 = [32, 64, 128, 256]
TASKS = [
    Task("mlp", "MLP 784-1024-1024-10", mlp, images(1, 28), classify, 128),
    Task("cnn", "CNN 20-50 (5×5), 800-500-10, 28×28", cnn, images(1, 28), classify, 128),
    Task("vgg", "VGG-like 32-64-128, 8192-256-10, 32×32", vgg, images(3, 32), classify, 128),
    Task(
        *("resnet8-gn", "ResNet8, GroupNorm, 32×32"),
        *(lambda: resnet([16, 32, 64], 1, group_norm), images(3, 32), classify, 128),
    ),
    Task(
        *("transformer", "transformer, 4 layers, d=256, T=128"),
        *(lambda: Transformer(1000, 256, 4, 4), tokens(1000, 128), next_token, 16),
    ),
    Task("gpt2", "GPT-2, 4 layers, d=256, T=64, 4000 tokens", gpt2, tokens(4000, 64), next_token, 16, "transformers"),
    Task("bert", "BERT classifier, 4 layers, d=256, T=64", bert, sentences, sentence, 16, "transformers"),
    Task(
        *("resnet18-gn", "ResNet18 of half width, GroupNorm, 32×32"),
        *(lambda: resnet(RESNET18, 2, group_norm), images(3, 32), classify, 32),
    ),
    Task(
        *("resnet18-bn", "ResNet18 of half width, BatchNorm in eval mode, 32×32"),
        *(lambda: resnet(RESNET18, 2, nn.BatchNorm2d).eval(), images(3, 32), classify, 32),
    ),
]

GPU_TASKS = {
    "gpt2-small": Task(
        *("gpt2-small", "GPT-2 small, T=1024"),
        *(lambda: Transformer(50257, 768, 12, 12, 1024), tokens(50257, 1024), next_token, 8),
    ),
    "vit-b": Task(
        *("vit-b", "ViT-B, 16×16 patches of 224×224"),
        *(lambda: VisionTransformer(224, 16, 768, 12, 12, 1000), images(3, 224, 1000), classify, 64),
    ),
}
"""What a GPU's bars are set on; GPT-2 in the published sizes, out of plain modules."""

SMALL_TASKS = {
    "gpt2-small": Task(
        *("gpt2-small", "the same at a hundredth of the size"),
        *(lambda: Transformer(50, 16, 2, 2, 12), tokens(50, 12), next_token, 2),
    ),
    "vit-b": Task(
        *("vit-b", "the same at a hundredth of the size"),
        *(lambda: VisionTransformer(16, 8, 16, 2, 2, 5), images(3, 16, 5), classify, 2),
    ),
}
"""Their stand-ins for a dry run."""
