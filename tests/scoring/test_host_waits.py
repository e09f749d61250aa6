"""Scoring waits for the device only to fetch a batch's values, and only after it has launched the next batch."""

from collections import Counter

import numpy as np
import pytest
import torch
from host_waits import caller, waits
from tiny_models import VOCAB, make_model
from torch.utils._python_dispatch import TorchDispatchMode

from megaft.models.attention import attend_without_masks
from megaft.models.hugging_face import NatsModel
from megaft.scoring import score as scoring
from megaft.scoring.host_copy import HostCopy
from megaft.scoring.last_layer import AnyTrunk, GPT2Trunk, LlamaTrunk
from megaft.scoring.model import LogitsTrunk, ScoringModel
from megaft.scoring.score import rows_of, score
from megaft.scoring.windows import windows

CONTEXT, NUM_BATCHES = 16, 5
PACKED = ("transformers/masking_utils.py", "find_packed_sequence_indices")
"""transformers reads the position ids of other families for each kind of mask, before the first layer."""
TRUNKS = {  # with the waits of transformers in a batch
    "gpt2": (GPT2Trunk, {}),
    "llama": (LlamaTrunk, {}),
    "gpt-neox": (AnyTrunk, {PACKED: 1}),
    "bloom": (AnyTrunk, {}),
    "gemma2 with capped logits": (LogitsTrunk, {PACKED: 2}),
}


class Text:
    document_offsets = np.array([0, 61, 64])

    def read(self, begin, end):
        return np.random.default_rng(0).integers(0, VOCAB, 64)[begin:end]


class Waits(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.callers = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if waits(func._schema.name.removeprefix("aten::"), args):
            self.callers[caller()] += 1
        return func(*args, **(kwargs or {}))


def counted(model, monkeypatch):
    """Return the waits of scoring a text in NUM_BATCHES batches on one rank, by caller, and the fetches."""
    fetches = []
    monkeypatch.setattr(HostCopy, "wait", lambda copy, wait=HostCopy.wait: fetches.append(copy) or wait(copy))
    monkeypatch.setitem(scoring.IN_FLIGHT, "cpu", 1)
    rows = rows_of(Text(), lambda num_tokens: windows(num_tokens, CONTEXT, 6))
    with Waits() as found:
        score(Text(), rows, model, tokens_per_batch=3 * CONTEXT, device=torch.device("cpu"))
    return found.callers, len(fetches)


@pytest.mark.parametrize("name", TRUNKS)
def test_a_batch_waits_for_its_values_only(name, monkeypatch):
    scorer = ScoringModel(make_model(name), with_greedy=True, banned=range(5))
    trunk, others = TRUNKS[name]
    assert type(scorer.trunk) is trunk
    callers, fetches = counted(scorer, monkeypatch)
    assert fetches == NUM_BATCHES
    assert callers <= Counter({caller: number * NUM_BATCHES for caller, number in others.items()})


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_batch_of_validation_waits_for_its_values_only(name, monkeypatch):
    model = make_model(name)
    attend_without_masks(model)
    nats_model = NatsModel(model)

    def engine(batch):
        return nats_model(batch.input_ids, batch.labels, positions=batch.positions).unsqueeze(0)

    assert counted(engine, monkeypatch) == ({}, NUM_BATCHES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_torch_sees_no_wait_on_a_gpu(name):
    device, text = torch.device("cuda"), Text()
    rows = rows_of(text, lambda num_tokens: windows(num_tokens, CONTEXT, 6))
    settings = {"tokens_per_batch": 3 * CONTEXT}
    expected = score(text, rows, ScoringModel(make_model(name)), device=torch.device("cpu"), **settings)
    model = ScoringModel(make_model(name).to(device), with_greedy=True, banned=range(5)).to(device)

    def watched(batch):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return model(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    found = score(text, rows, watched, device=device, **settings)
    assert found.token_nats == pytest.approx(expected.token_nats, rel=1e-4, abs=1e-4)
