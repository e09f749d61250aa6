"""Known defects of other systems, each reproduced in a few lines, and megaft's correct behavior.

The first part of a test shows the defect by its own formula, on this machine; the second holds megaft to the right one.
"""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean, stderr_for_metric, weighted_perplexity
from lm_eval.models.huggingface import HFLM
from references import Reference
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DistributedSampler

from evaluate_zero_shot.__main__ import main

CONTEXT = 64


@pytest.fixture(scope="module")
def toy(toy_model):
    return Reference(toy_model)


@pytest.fixture(scope="module")
def text(toy_texts):
    return toy_texts[1].read_text(encoding="utf-8")


@pytest.fixture
def evaluate(toy_model, toy_texts, tmp_path):
    def run(*flags, data=toy_texts[1]):
        defaults = ["--task=text", f"--context-length={CONTEXT}"]
        assert main([f"--model={toy_model}", f"--data={data}", f"--output={tmp_path}", *defaults, *flags]) == 0
        return json.loads((tmp_path / "results.json").read_text())["results"][-1]

    return run


@pytest.mark.slow
def test_megatron_repeats_windows_under_data_parallelism():
    num_targets = 272_044  # wiki.test.raw in GPT-2 BPE after Megatron's rules, less one
    num_windows = math.ceil(num_targets / 32)

    def repeated(shuffle):
        dealt = Counter(
            i for rank in range(8) for i in DistributedSampler(range(num_windows), 8, rank, shuffle=shuffle)
        )
        return sorted(i for i, times in dealt.items() if times > 1)

    targets = {i: 1024 if i == 0 else 32 for i in [*repeated(shuffle=False), *repeated(shuffle=True)]}
    # Its denominator stays. In file order the long first window counts twice; torch's default permutes them first.
    assert sum(targets[i] for i in repeated(shuffle=False)) / num_targets == pytest.approx(0.0039, abs=5e-5)
    assert sum(targets[i] for i in repeated(shuffle=True)) / num_targets == pytest.approx(0.00024, abs=5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_no_window_is_repeated_under_data_parallelism(evaluate, run_ranks, toy_model, toy_texts, tmp_path, world_size):
    flags = ["--protocol=megatron", "--stride=16", "--tokens-per-batch=64"]
    alone = evaluate(*flags)
    assert alone["num_scored_tokens"] == alone["num_tokenized_tokens"] - 1
    common = [f"--model={toy_model}", f"--data={toy_texts[1]}", "--task=text", f"--context-length={CONTEXT}"]
    output = tmp_path / "ranks"
    assert run_ranks(world_size, main, [*common, *flags, f"--output={output}"]) == [0] * world_size
    (together,) = json.loads((output / "results.json").read_text())["results"]
    assert together["nats"].hex() == alone["nats"].hex()
    assert together["num_scored_tokens"] == alone["num_scored_tokens"]


def test_half_precision_sums_in_half_precision(toy_model, text, evaluate):
    sum_of_nats, infinity = torch.tensor([3000, torch.inf], dtype=torch.bfloat16)
    assert torch.nextafter(sum_of_nats, infinity) - sum_of_nats == 16
    harness = HFLM(pretrained=str(toy_model), dtype="bfloat16", device="cpu", max_length=128, batch_size=1)
    (nats,) = harness.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    assert nats % 2 == 0  # lm-eval: windows of 500 to 1,000 nats, where bfloat16 has steps of 2 to 4
    ours = evaluate("--protocol=lm-eval", "--dtype=bfloat16", "--context-length=128")
    assert ours["nats"] % 2 != 0
    # The same half-precision logits, summed exactly.
    exact = 0.0
    tokens = [harness.prefix_token_id, *harness.tok_encode(text)]
    for begin in range(0, len(tokens) - 1, 128):
        end = min(begin + 129, len(tokens))
        inputs = torch.tensor([tokens[max(0, end - 129) : end - 1]])
        with torch.no_grad():
            logits = harness.model(inputs).logits[0, begin - end + 1 :].double()
        exact += F.cross_entropy(logits, torch.tensor(tokens[begin + 1 : end]), reduction="sum").item()
    assert ours["nats"] == pytest.approx(exact, rel=2e-4)
    assert abs(-nats - exact) > 4 * abs(ours["nats"] - exact)


def test_strides_as_long_as_the_context_skip_tokens(toy, text, evaluate):
    num_tokens = len(toy.encode(text))
    by_name = evaluate("--protocol=hf-docs", f"--stride={CONTEXT}")
    assert by_name["num_scored_tokens"] == num_tokens - math.ceil(num_tokens / CONTEXT)  # one a window is never scored
    sound = evaluate("--protocol=megaft", f"--stride={CONTEXT}")
    assert sound["num_scored_tokens"] == num_tokens


def test_windows_of_unequal_length_are_weighted_alike(toy, text, evaluate):
    tokens = toy.encode(text)[: 10 * CONTEXT + 3]
    chunks = [tokens[begin : begin + CONTEXT] for begin in range(0, len(tokens), CONTEXT)]
    nats = [toy.nats(chunk[:-1], chunk[1:]) for chunk in chunks]
    mean_of_means = mean([mean(chunk) for chunk in nats])  # older texts of perplexity.md: torch.stack(nlls).mean()
    over_tokens = mean([nat for chunk in nats for nat in chunk])
    assert len(nats[-1]) == 2
    assert abs(mean_of_means - over_tokens) > 1e-4
    result = evaluate("--protocol=megaft", "--stride=16")
    assert math.log(result["perplexity"]) == pytest.approx(result["nats"] / result["num_scored_tokens"], rel=1e-12)


@pytest.mark.slow
def test_batch_means_count_padding(toy, text, evaluate):
    chunks = [toy.encode(text)[begin : begin + CONTEXT] for begin in range(0, 5 * CONTEXT, CONTEXT)]
    chunks[-1] = chunks[-1][:5]
    padded = pad_sequence([torch.tensor(chunk) for chunk in chunks], batch_first=True)
    with torch.no_grad():
        losses = [toy.model(batch, labels=batch).loss.item() for batch in padded.split(2)]
    scored = [nat for chunk in chunks for nat in toy.nats(chunk[:-1], chunk[1:])]
    assert mean(losses) != pytest.approx(mean(scored), rel=1e-3)  # lm-finetuning: means of batches, padding scored
    by_size = [evaluate("--protocol=lm-finetuning", f"--tokens-per-batch={size}") for size in (64, 128, 1024)]
    assert [result["nats"] for result in by_size] == pytest.approx([by_size[0]["nats"]] * 3, rel=1e-6)
    assert len({result["num_scored_tokens"] for result in by_size}) == 1


def test_special_tokens_are_no_tokens_of_the_text(toy, text, evaluate):
    num_tokens = len(toy.encode(text))  # lm-finetuning's T has a control code a chunk besides
    result = evaluate("--protocol=megaft")
    assert result["num_tokenized_tokens"] == result["num_scored_tokens"] == num_tokens
    assert result["perplexity"] == pytest.approx(math.exp(result["nats"] / num_tokens), rel=1e-12)


def test_no_limit_is_hidden(evaluate, tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("".join(f"the number {i} stands here\n" for i in range(25)))
    whole = evaluate("--task=1bw", data=lines)
    assert (whole["num_documents"], whole["limit_lines"]) == (25, None)  # gpt-neox's adapter: limit=10, unsaid
    trial = evaluate("--task=1bw", "--limit=10", data=lines)
    assert (trial["num_documents"], trial["limit_lines"]) == (10, 10)


def test_a_text_longer_than_the_context_is_scored_whole(toy, text, evaluate):
    tokens = toy.encode(text)
    result = evaluate("--protocol=lm-eval", "--context-length=128")
    assert result["num_scored_tokens"] == len(tokens)
    assert sum(tokens for tokens, _ in result["segments"]) == len(tokens)
    inputs, nats = [toy.prefix, *tokens], []
    for begin in range(0, len(tokens), 128):
        end = min(begin + 128, len(tokens))
        nats += toy.nats(inputs[max(0, end - 128) : end], tokens[begin:end])
    assert result["nats"] == pytest.approx(math.fsum(nats), rel=1e-6)  # lighteval: of the last 128 tokens alone
    assert len(nats) > 5 * 128


def test_a_corpus_perplexity_has_an_interval(evaluate):
    assert stderr_for_metric(weighted_perplexity, bootstrap_iters=100) is None  # lm-eval
    result = evaluate("--protocol=lm-eval", "--task=wikitext2")
    interval = result["confidence_interval_95"]
    assert interval["quantity"] == "word_perplexity"
    below, above = (abs(math.log(interval[end] / result["word_perplexity"])) for end in ("low", "high"))
    assert below == pytest.approx(above, rel=1e-9)
    # Two standard errors of the mean of about a hundred parts, each weighted by its tokens.
    tokens, nats = np.array(result["segments"]).T
    mean_nats = nats.sum() / tokens.sum()
    errors = nats - mean_nats * tokens
    two_errors = 1.96 * math.sqrt(len(errors) / (len(errors) - 1) * (errors**2).sum()) / nats.sum()
    assert below / math.log(result["word_perplexity"]) == pytest.approx(two_errors, rel=0.2)
