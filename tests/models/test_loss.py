import re
from pathlib import Path

import pytest
import torch
from torch import nn

from megaft.base import hardware
from megaft.data.samples import IGNORE_INDEX
from megaft.models.head import Head
from megaft.models.linear_nats import LinearNats
from megaft.models.loss import chunks, token_nats

VOCAB, WIDTH, TOKENS = 101, 16, 37


@pytest.fixture
def example():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    weight = torch.randn(VOCAB, WIDTH, generator=generator)
    bias = torch.randn(VOCAB, generator=generator)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    labels[::5] = IGNORE_INDEX
    return hidden, weight, bias, labels


def grads_of(function, *inputs):
    inputs = [None if x is None else x.clone().requires_grad_() for x in inputs]
    value = function(*inputs)
    (value * 0.3).backward()
    return [value.detach(), *(x.grad for x in inputs if x is not None)]


@pytest.mark.parametrize("chunk_tokens", [1, 5, 37, 1000])
@pytest.mark.parametrize("has_bias", [True, False])
def test_chunked_value_and_gradients_are_the_reference(example, monkeypatch, chunk_tokens, has_bias):
    monkeypatch.setitem(hardware.CHUNK_BYTES, "cpu", chunk_tokens * VOCAB * 4)
    hidden, weight, bias, labels = example
    bias = bias if has_bias else None
    chunked = grads_of(lambda h, w, b: LinearNats.apply(h, w, b, labels), hidden, weight, bias)
    reference = grads_of(lambda h, w, b: token_nats(nn.functional.linear(h, w, b), labels).sum(), hidden, weight, bias)
    for ours, theirs in zip(chunked, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-5)


def test_frozen_weight_gets_no_gradient(example):
    hidden, weight, _, labels = example
    hidden.requires_grad_()
    LinearNats.apply(hidden, weight, None, labels).backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_chunks_cover_all_tokens_within_the_budget(monkeypatch):
    monkeypatch.setitem(hardware.CHUNK_BYTES, "cpu", 4 * 10 * 7)
    parts = chunks(23, 10, torch.device("cpu"))
    assert [i for part in parts for i in range(23)[part]] == list(range(23))
    assert {len(range(23)[part]) for part in parts} == {7, 2}


def test_bf16_nats_are_summed_in_fp32(example):
    """3,000 nats in bf16 are 16 apart; the sum over bf16 hidden states stays within rounding of the inputs."""
    hidden, weight, _, labels = (x.repeat(40, 1) if x.dim() == 2 and len(x) == TOKENS else x for x in example)
    labels = labels.repeat(40)
    low = [x.bfloat16() for x in (hidden, weight)]
    exact = token_nats(low[0].float() @ low[1].float().T, labels).sum()
    nats = LinearNats.apply(*low, None, labels)
    assert nats.dtype == torch.float32
    assert abs(nats / exact - 1) < 2e-3


def test_nats_at_positions_are_the_reference(example):
    hidden, weight, bias, labels = example
    layer = nn.Linear(WIDTH, VOCAB)
    layer.weight.data, layer.bias.data = weight, bias
    head = Head(layer)
    positions = (labels != IGNORE_INDEX).nonzero().flatten()
    nats = head(hidden[None], labels[None], positions)
    torch.testing.assert_close(nats, token_nats(layer(hidden), labels)[positions].detach())
    torch.testing.assert_close(head(hidden[None], labels[None]), nats.sum())


def test_a_label_outside_the_vocabulary_is_an_error(example):
    hidden, weight, _, labels = example
    labels[1] = VOCAB
    with pytest.raises((IndexError, RuntimeError)):
        LinearNats.apply(hidden, weight, None, labels)


def test_all_labels_ignored_cost_nothing(example):
    hidden, weight, _, labels = example
    value, grad_hidden, grad_weight = grads_of(
        lambda h, w: LinearNats.apply(h, w, None, torch.full_like(labels, IGNORE_INDEX)), hidden, weight
    )
    assert value == 0
    assert grad_hidden.abs().max() == grad_weight.abs().max() == 0


def peak_kibibytes():  # not getrusage, whose figure begins at the parent's
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def growth_of_the_peak(kind):
    hidden = torch.randn(1024, 64, requires_grad=True)
    weight = torch.randn(50257, 64, requires_grad=True)
    labels = torch.randint(0, 50257, (1024,))
    before = peak_kibibytes()
    if kind == "chunked":
        LinearNats.apply(hidden, weight, None, labels).backward()
    else:
        token_nats(hidden @ weight.T, labels).sum().backward()
    return peak_kibibytes() - before


@pytest.mark.slow
def test_peak_memory_is_below_full_logits(run_ranks):
    """1,024 tokens of GPT-2's vocabulary are 196 MiB of fp32 logits; the full loss holds them and their gradients."""
    kibibytes = {kind: run_ranks(1, growth_of_the_peak, kind)[0] for kind in ("chunked", "full")}
    assert kibibytes["full"] > 196 * 1024
    assert kibibytes["chunked"] < 196 * 1024
    assert kibibytes["chunked"] < kibibytes["full"] / 2
