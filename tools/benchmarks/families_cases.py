"""Checks of a model folder against plain forward passes of the transformers model saved in it."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from families_ranks import nats_on_ranks
from torch import Tensor

from megaft.commands.generate.command import load_cached_model
from megaft.commands.generate.config import SamplingConfig
from megaft.commands.generate.sampling import continue_tokens
from megaft.config.train import LoraConfig, ModelConfig
from megaft.data.samples import IGNORE_INDEX
from megaft.models import hugging_face, trials
from megaft.models.hugging_face import NatsModel
from megaft.models.loss import token_nats
from megaft.scoring.batch import ScoringBatch
from megaft.scoring.model import load_scoring_model

TOLERANCE = 2e-5
ENGINE = {
    "train_batch_size": 1,
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def tokens_of(model: Any, *shape: int, seed: int = 1) -> Tensor:
    """Return random tokens."""
    size = model.config.get_text_config().vocab_size
    return torch.randint(2, size, shape, generator=torch.Generator().manual_seed(seed))


def check(found: Tensor, expected: Tensor, what: str) -> None:
    """Raise AssertionError if two tensors differ by more than rounding."""
    difference = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9))
    assert difference <= TOLERANCE, f"differs: {what} by {difference:.1e} of the largest"


def check_loaded(model: Any, saved: Any) -> None:
    """Raise AssertionError if a tensor is loaded differently from how it was saved."""
    found = model.state_dict()
    for name, tensor in saved.state_dict().items():
        assert torch.equal(found[name], tensor), f"differs: {name} as loaded"
    for name, parameter in saved.named_parameters():
        is_trained = model.get_parameter(name).requires_grad
        assert is_trained == parameter.requires_grad, f"differs: {name} is {'trained' if is_trained else 'frozen'}"


def trains(folder: str, saved: Any) -> None:
    """Compare weights with the saved ones, and loss and gradients with those computed from plain logits."""
    model = hugging_face.build(ModelConfig(path=folder, dropout=0.0), LoraConfig(), 0)
    check_loaded(model, saved)
    trials.require_language_model(model)
    nats_model = NatsModel(model).train()
    tokens = tokens_of(model, 2, 40)
    torch.manual_seed(0)  # for families that draw random numbers even without dropout
    expected = token_nats(model(input_ids=tokens[:, :-1], use_cache=False).logits, tokens[:, 1:]).sum()
    gradients = _gradients(expected, model)
    torch.manual_seed(0)
    found = nats_model(tokens[:, :-1], tokens[:, 1:])
    check(found, expected, "loss")
    for ours, theirs in zip(_gradients(found, model), gradients, strict=True):
        scale = theirs.abs().max().clamp(min=1e-2)
        assert (ours - theirs).abs().max() <= 1e-3 * scale, "differs: a gradient"


def _gradients(loss: Tensor, model: Any) -> list[Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros(()) if one is None else one for one in found]


@torch.no_grad()
def scores(folder: str, saved: Any) -> None:
    """Compare the nats of padded rows with those from plain logits of each prefix alone."""
    scorer = load_scoring_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    tokens = tokens_of(saved, 2, 41)
    inputs, labels = tokens[:, :-1].clone(), tokens[:, 1:].clone()
    labels[1, 17:], inputs[1, 17:] = IGNORE_INDEX, 0
    found = scorer(ScoringBatch.of(inputs.numpy(), labels.numpy(), torch.device("cpu")))[0]
    places = [(row, place) for row, length in ((0, 40), (1, 17)) for place in range(length)]
    expected = [
        token_nats(
            saved(input_ids=inputs[row : row + 1, : place + 1], use_cache=False).logits[0, -1:],
            labels[row, place : place + 1],
        )
        for row, place in places
    ]
    check(found, torch.cat(expected), "nats of a prefix")


@torch.no_grad()
def generates(folder: str, saved: Any) -> None:
    """Compare greedy tokens with those of forward passes over the whole text, without a cache."""
    decoder: Any = load_cached_model(folder, torch.float32)
    prompt = tokens_of(saved, 6).tolist()
    greedy = SamplingConfig(temperature=0)
    found = list(continue_tokens(decoder, prompt, max_new_tokens=30, settings=greedy, seed=0))
    expected = list(prompt)
    for _ in range(30):
        logits = saved(input_ids=torch.tensor([expected]), use_cache=False).logits[0, -1]
        expected.append(int(logits.argmax()))
    assert found == expected[6:], f"differs: greedy tokens {found} {expected[6:]}"


def partitions(folder: str, saved: Any) -> None:
    """Compare the loss under ZeRO-3 with that of the whole model."""
    source = ModelConfig(path=folder, dropout=0.0)
    whole = hugging_face.build(source, LoraConfig(), 0).train()
    check_loaded(whole, saved)
    tokens = tokens_of(whole, 2, 40)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = token_nats(whole(input_ids=tokens[:, :-1], use_cache=False).logits, tokens[:, 1:]).sum()
    model = hugging_face.build(source, LoraConfig(), 0, ENGINE)
    trials.require_language_model(model)
    nats_model: Any = NatsModel(model)
    optimizer = torch.optim.SGD(nats_model.parameters(), lr=0.0)
    engine: Any = deepspeed.initialize(model=nats_model, optimizer=optimizer, config=dict(ENGINE))[0]
    engine.train()
    try:
        torch.manual_seed(0)
        found = engine(tokens[:, :-1], tokens[:, 1:])
        check(found.detach(), expected, "loss at ZeRO stage 3")
        engine.backward(found)
        engine.step()
    finally:
        engine.destroy()


@torch.no_grad()
def isolates_packed_documents(folder: str, saved: Any) -> None:
    """Compare the nats of packed documents with those of each document alone."""
    model = hugging_face.build(ModelConfig(path=folder, dropout=0.0), LoraConfig(), 0).eval()
    trials.require_language_model(model)
    trials.require_document_isolation(model)
    nats_model = NatsModel(model).eval()
    lengths = (25, 14, 1, 30)
    tokens = tokens_of(model, 1, sum(lengths) + 1)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)).unsqueeze(0)
    packed = nats_model(inputs, labels, ids, positions=torch.arange(sum(lengths)))
    begin = 0
    for length in lengths:
        part = slice(begin, begin + length)
        logits = saved(input_ids=inputs[:, part], use_cache=False).logits
        check(packed[part], token_nats(logits, labels[:, part])[0], "nats of a packed document")
        begin += length


@torch.no_grad()
def cuts(folder: str, saved: Any) -> None:
    """Compare the nats of megatron-core's modules with those from transformers' logits."""
    from megaft.models import megatron

    model = megatron.build(ModelConfig(path=folder, backend="megatron", dropout=0.0), seed=0, engine_config=None)
    tokens = tokens_of(saved, 2, 40)
    found = megatron.MegatronNats(model).eval()(tokens[:, :-1], tokens[:, 1:])
    expected = token_nats(saved(input_ids=tokens[:, :-1], use_cache=False).logits, tokens[:, 1:]).sum()
    check(found, expected, "nats of megatron-core's modules")


@torch.no_grad()
def cuts_over_ranks(folder: str, saved: Any) -> None:
    """Compare the nats of megatron-core's modules on two ranks with those from transformers' logits."""
    cuts(folder, saved)  # raises the refusals
    tokens = tokens_of(saved, 2, 40)
    expected = token_nats(saved(input_ids=tokens[:, :-1], use_cache=False).logits, tokens[:, 1:])
    for found in nats_on_ranks(folder, tokens):
        check(found, expected.flatten(), "nats at tensor parallel 2")


CASES = {
    "trains": trains,
    "scores": scores,
    "generates": generates,
    "ZeRO-3": partitions,
    "isolates packed documents": isolates_packed_documents,
    "megatron": cuts,
    "megatron TP 2": cuts_over_ranks,
}
