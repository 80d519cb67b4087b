"""Whole architectures with random weights: every per-example norm against one example at a time, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from recorded import assert_matches, assert_same_grads, grads
from torch import nn

import gradclust_fast as gf

EVERYTHING = {"sq_norms": True, "gram": True, "moments": True}
B, T = 3, 7


def alone(model, examples, loss):
    """{name: [B, *shape]}: the gradients of ``loss(model, example)``, one forward and backward an example, float64."""
    model = copy.deepcopy(model).double()
    rows = []
    for example in examples:
        model.zero_grad()
        loss(model, *example).backward()
        rows.append({n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()})
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def check(model, batch, loss, leave_out="none"):
    """Rows match the examples run alone, ``.grad`` is untouched.

    In float64, where nothing but the mathematics can differ; in float32 the bound is the rounding of a whole network's
    forward and backward against a float64 oracle.
    """
    doubled = [t.double() if t.is_floating_point() else t for t in batch]
    check_in_own_precision(copy.deepcopy(model).double(), doubled, loss, 1e-9, leave_out)
    return check_in_own_precision(model, batch, loss, 2e-4, leave_out)


def check_in_own_precision(model, batch, loss, rtol, leave_out):
    twin = copy.deepcopy(model)
    loss(twin, *batch).backward()
    with gf.record(model, **EVERYTHING, parameters=lambda name, p: leave_out not in name) as rec:
        loss(model, *batch).backward()
    assert_same_grads(model, grads(twin))
    size = len(batch[0])
    examples = [[t[b : b + 1] for t in batch] for b in range(size)]
    oracle = alone(model, examples, loss)
    assert_matches(rec, {name: rows for name, rows in oracle.items() if leave_out not in name}, rtol=rtol)
    assert gf.coverage(model).complete
    return rec


def noisy(model):
    """Away from the initial values, where biases are zero and scales are one."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed (pip install --no-deps works)")


def gpt2(head="GPT2LMHeadModel", **options):
    library = transformers()
    config = library.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=29, n_positions=12, bos_token_id=1, eos_token_id=1, **options
    )
    torch.manual_seed(0)
    return noisy(getattr(library, head)(config).eval())


def bert(head="BertForSequenceClassification", **options):
    library = transformers()
    config = library.BertConfig(
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=29,
        max_position_embeddings=12,
        num_labels=3,
        **options,
    )
    torch.manual_seed(0)
    return noisy(getattr(library, head)(config).eval())


def next_token(model, index):
    logits = model(input_ids=index).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), index[:, 1:].flatten())


@pytest.mark.parametrize("tied", [True, False])
def test_gpt2(tied):
    model = gpt2(tie_word_embeddings=tied)
    rec = check(model, (torch.randint(0, 29, (B, T)),), next_token)
    assert ("lm_head.weight" in rec.names) != tied and "transformer.h.0.attn.c_attn.weight" in rec.names
    assert "recomputed" not in {row.route for row in gf.coverage(model)}, "Conv1D has factors"


def test_gpt2_one_layer_of_it_frozen_below():
    model = gpt2()
    model.transformer.wte.requires_grad_(False)
    model.transformer.wpe.requires_grad_(False)
    index = torch.randint(0, 29, (B, T))
    with gf.record(model, parameters="*.h.0.*") as rec:
        next_token(model, index).backward()
    oracle = alone(model, [[index[b : b + 1]] for b in range(B)], next_token)
    assert_matches(rec, {name: rows for name, rows in oracle.items() if ".h.0." in name})


@pytest.mark.parametrize("size", [1, T])
def test_gpt2_batches_of_one_and_as_long_as_the_sequence(size):
    check(gpt2(), (torch.randint(0, 29, (size, T)),), next_token)


def test_gpt2_in_train_mode_with_checkpoints():
    model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    check(model, (torch.randint(0, 29, (B, T)),), next_token)


def test_bert_classifier_with_padding():
    model = bert()
    index, y = torch.randint(1, 29, (B, T)), torch.randint(0, 3, (B,))
    mask = torch.arange(T) < torch.tensor([[7], [4], [5]])
    index = index.masked_fill(~mask, 0)

    def loss(model, index, mask, y):
        return F.cross_entropy(model(input_ids=index, attention_mask=mask.long()).logits, y)

    # The softmax does not see the keys' biases: their gradient is zero but for rounding.
    check(model, (index, mask, y), loss, leave_out="key.bias")


def test_bert_masked_language_model():
    model = bert("BertForMaskedLM")
    index = torch.randint(1, 29, (B, T))

    def loss(model, index):
        logits = model(input_ids=index, token_type_ids=index % 2).logits
        return F.cross_entropy(logits.flatten(0, 1), index.flatten())

    rec = check(model, (index,), loss, leave_out="key.bias")
    assert "cls.predictions.decoder.weight" not in rec.names  # tied to the word embeddings


class Block(nn.Module):
    """A basic block of ResNet-18, with any normalisation."""

    def __init__(self, inputs, outputs, stride, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2, self.relu = norm(outputs), norm(outputs), nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x):
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class ResNet18(nn.Sequential):
    def __init__(self, norm, width=4):
        channels = [width, width, 2 * width, 4 * width, 8 * width]
        blocks = []
        for stage in range(4):
            blocks.append(Block(channels[stage], channels[stage + 1], 1 if stage == 0 else 2, norm))
            blocks.append(Block(channels[stage + 1], channels[stage + 1], 1, norm))
        super().__init__(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            norm(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(channels[-1], 5),
        )


def classify(model, x, y):
    return F.cross_entropy(model(x.to(next(model.parameters()).dtype)), y)


@pytest.mark.parametrize("norm", ["group", "batch-eval"])
def test_resnet18(norm):
    torch.manual_seed(0)
    model = noisy(ResNet18(nn.BatchNorm2d if norm == "batch-eval" else lambda c: nn.GroupNorm(2, c)))
    if norm == "batch-eval":
        with torch.no_grad():
            model(torch.randn(8, 3, 33, 31))  # running statistics
        model.eval()
    # ReLU decides by sign: float32 sums of another order must not meet a zero, so a wider tolerance.
    check(model, (torch.randn(B, 3, 33, 31), torch.randint(0, 5, (B,))), classify)


def test_resnet18_with_batchnorm_in_train_mode_is_batch_coupled():
    """Row b is example b's share: the terms that its own positions add to ∂(batch loss)/∂θ."""
    torch.manual_seed(0)
    model = noisy(ResNet18(nn.BatchNorm2d).double())
    x, y = torch.randn(B, 3, 33, 31, dtype=torch.float64), torch.randint(0, 5, (B,))
    assert all("batch-coupled" in row.note for row in gf.coverage(model))
    twin, shares = copy.deepcopy(model), {}

    def catch(name, module):
        def forward(module, args, out):
            inside = args[0].detach().clone()
            out.register_hook(lambda grad: shares.update(own(name, module, inside, grad.clone())))
            return out.clone()  # what follows works in place

        return module.register_forward_hook(forward)

    def own(name, module, inside, grad):
        """∂(batch loss)/∂θ with the output's gradient of all other examples set to zero."""
        parts = {f"{name}.{key}": [] for key, _ in module.named_parameters(recurse=False)}
        again = copy.deepcopy(module)
        again._forward_hooks.clear()
        for b in range(B):
            mine = torch.zeros_like(grad)
            mine[b] = grad[b]
            again.zero_grad()
            with torch.enable_grad():
                again(inside).backward(mine)
            for key, p in again.named_parameters(recurse=False):
                parts[f"{name}.{key}"].append(p.grad.clone())
        return {key: torch.stack(rows) for key, rows in parts.items()}

    for name, module in list(twin.named_modules()):
        if next(module.parameters(recurse=False), None) is not None:
            catch(name, module)
    classify(twin, x, y).backward()
    with gf.record(model, **EVERYTHING) as rec:
        classify(model, x, y).backward()
    assert_matches(rec, {name: B * shares[name] for name in rec.names}, rtol=1e-9)
    for name, p in model.named_parameters():
        torch.testing.assert_close(rec.moments[name][0] / B, p.grad, rtol=1e-9, atol=1e-12)


def test_nothing_is_left_behind():
    model = ResNet18(lambda c: nn.GroupNorm(2, c), 2)
    x, y = torch.randn(2, 3, 33, 31), torch.randint(0, 5, (2,))
    before = {name: list(vars(module)) for name, module in model.named_modules()}
    with gf.record(model):
        classify(model, x, y).backward()
    assert before == {name: list(vars(module)) for name, module in model.named_modules()}
    assert not any(p._backward_hooks for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
