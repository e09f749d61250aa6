"""One system of the evaluation benchmark in its own process: its result, seconds and memory.

    python tools/benchmarks/evaluate_vs_peers_run.py CONTESTANT FOLDER/CASE.json

Seconds are measured from text to result: with detokenizing, tokenizing and sums, without imports and model loading.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from evaluate_vs_peers_case import Case
from torch import Tensor

BATCH_SIZE = 8
"""Megatron-LM's README evaluates with --micro-batch-size 8."""
Scored = tuple[float, float | None]
"""Nats, and accuracy if the task has one."""


def main(contestant: str, path: Path) -> None:
    """Run one system, and print its result as JSON."""
    case = Case.read(path)
    prepare = {"megaft": megaft, "megatron": megatron, "padded": padded}.get(contestant, lm_eval)
    begin = time.perf_counter()
    run = prepare(case, path.parent, contestant)
    loaded = time.perf_counter()
    nats, accuracy = run()
    seconds = time.perf_counter() - loaded
    found = {"nats": nats, "accuracy": accuracy, "seconds": seconds, "seconds_to_load": loaded - begin}
    print(json.dumps(found | {"peak_memory_bytes": peak_memory_bytes(case.device)}))


def peak_memory_bytes(device: str) -> int:
    """Return the peak memory: allocated by torch on CUDA, otherwise resident since this program started."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()  # not getrusage, which starts at the parent's peak
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # pyright: ignore[reportOptionalSubscript]


def megaft(case: Case, folder: Path, contestant: str) -> Callable[[], Scored]:
    """`python -m evaluate_zero_shot`, without its report."""
    from evaluate_zero_shot.config import EvaluateConfig
    from evaluate_zero_shot.evaluation.evaluate import evaluate
    from evaluate_zero_shot.evaluation.evaluated_model import load
    from evaluate_zero_shot.evaluation.plan import evaluation_of, find_all_data, geometries
    from evaluate_zero_shot.tasks import TASKS
    from megaft.data.tokenizer import load_tokenizer
    from megaft.scoring.batch import ScoringBatch

    config = EvaluateConfig(
        model=(str(folder / case.model),),
        task=case.task,
        protocol=case.protocol,
        data=folder / case.data,
        context_length=case.context_length,
        stride=None if case.stride is None else str(case.stride),
        dtype=case.dtype,
    )
    tokenizer = load_tokenizer(config.model[0])
    evaluated = load(config.model[0], tokenizer, config, "hugging-face", torch.device(case.device))
    ids = np.zeros((1, 8), np.int64)
    warm_up = ScoringBatch.of(ids, ids, torch.device(case.device))  # as the others have
    evaluated.scorer.configure(with_greedy=False, banned=())(warm_up)

    def run() -> Scored:
        data = find_all_data(config, {})[case.task, case.protocol]
        [geometry] = geometries(config, evaluated)
        evaluation = evaluation_of(config, evaluated, TASKS[case.task], geometry, data)
        with tempfile.TemporaryDirectory() as output:
            result = evaluate(evaluated, evaluation, Path(output))
        return result.nats, result.accuracy

    return run


def load_plainly(case: Case, folder: Path) -> tuple[Any, Any]:
    """Return transformers' model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder / case.model, dtype=getattr(torch, case.dtype))
    model = model.eval().to(case.device)
    with torch.no_grad():
        model(torch.zeros(1, 8, dtype=torch.int64, device=case.device))
    return model, AutoTokenizer.from_pretrained(folder / case.model)


def megatron(case: Case, folder: Path, contestant: str) -> Callable[[], Scored]:
    """Megatron-LM's loop of tasks/zeroshot_gpt over transformers' model: batches of 8, all logits, loss in float32."""
    import detokenizers

    model, tokenizer = load_plainly(case, folder)
    length, stride = case.context_length or model.config.n_positions, case.stride or 32

    @torch.no_grad()
    def run() -> Scored:
        text = detokenizers.get("wikitext_megatron")((folder / case.data).read_text())
        tokens = tokenizer.encode(text, add_special_tokens=False)
        nats = torch.zeros((), device=case.device)
        for batch, is_scored in windows(tokens, length, stride, tokenizer.eos_token_id):
            batch, is_scored = batch.to(case.device), is_scored.to(case.device)
            logits = model(batch[:, :-1], use_cache=False).logits
            losses = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            nats += (losses * is_scored.flatten()).sum()
        return float(nats), None

    return run


def windows(tokens: list[int], length: int, stride: int, pad: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of length + 1 tokens and of masks of their targets.

    The original goes on to (T - 1) / stride windows, the last length / stride - 1 of them with nothing to score. Of
    WikiText-103 that is 0.4 %, of a short piece most; they are left out, so that a piece stands for the whole.
    """
    rows, masks = [], []
    for index in range(1 + math.ceil(max(len(tokens) - 1 - length, 0) / stride)):
        window = tokens[index * stride : index * stride + length + 1]
        missing = length + 1 - len(window)
        mask = [1] * (len(window) - 1) + [0] * missing
        if stride != length and index:
            mask[:-stride] = [0] * (length - stride)
        rows.append(window + [pad] * missing)
        masks.append(mask)
    for begin in range(0, len(rows), BATCH_SIZE):
        part = slice(begin, begin + BATCH_SIZE)
        yield torch.tensor(rows[part]), torch.tensor(masks[part])


def padded(case: Case, folder: Path, contestant: str) -> Callable[[], Scored]:
    """Megatron-LM's --strict-lambada: every row padded to the model's positions, all logits."""
    model, tokenizer = load_plainly(case, folder)
    length = case.context_length or model.config.n_positions

    def tokenized(text: str) -> tuple[list[int], list[int]]:
        word = text.split()[-1]
        context = text[: text.rfind(word)].strip()
        return tuple(tokenizer.encode(part, add_special_tokens=False) for part in (context, f" {word}"))

    @torch.no_grad()
    def run() -> Scored:
        lines = (folder / case.data).read_text().splitlines()
        pairs = [tokenized(json.loads(line)["text"]) for line in lines]
        nats, right = 0.0, 0
        for begin in range(0, len(pairs), BATCH_SIZE):
            part = pairs[begin : begin + BATCH_SIZE]
            rows = [(context + word + [tokenizer.eos_token_id] * length)[: length + 1] for context, word in part]
            batch = torch.tensor(rows, device=case.device)
            logits = model(batch[:, :-1], use_cache=False).logits
            choices = logits.argmax(-1)
            for row, (context, word) in enumerate(part):
                where = slice(len(context) - 1, len(context) + len(word) - 1)
                labels = batch[row, 1:][where]
                right += bool((choices[row, where] == labels).all())
                nats += F.cross_entropy(logits[row, where].float(), labels, reduction="sum").item()
        return nats, right / len(pairs)

    return run


def lm_eval(case: Case, folder: Path, contestant: str) -> Callable[[], Scored]:
    """lm-evaluation-harness's model `hf`, with a batch size, on its own requests."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    size = contestant.split()[1]
    make: Any = HFLM  # whose constructor its base class hides
    harness = make(
        pretrained=str(folder / case.model),
        dtype=case.dtype,
        device=case.device,
        batch_size=size if size == "auto" else int(size),
        max_length=case.context_length,
    )
    with torch.no_grad():
        harness.model(torch.zeros(1, 8, dtype=torch.int64, device=case.device))

    def rolling() -> Scored:
        text = (folder / case.data).read_text()
        pages = re.split(r"(?m)^(?= = [^=].*[^=] = \n)", text)[1:]
        pages = [*(page.removesuffix("\n") for page in pages[:-1]), pages[-1]]  # as its dataset has them
        detokenized = [wikitext_detokenizer({"page": page}) for page in pages]
        requests = [Instance("loglikelihood_rolling", {}, (page,), i) for i, page in enumerate(detokenized)]
        return -sum(harness.loglikelihood_rolling(requests, disable_tqdm=True)), None

    def last_words() -> Scored:
        rows = [json.loads(line)["text"].split(" ") for line in (folder / case.data).read_text().splitlines()]
        pairs = [(" ".join(row[:-1]), f" {row[-1]}") for row in rows]
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        found = harness.loglikelihood(requests, disable_tqdm=True)
        return -sum(nats for nats, _ in found), sum(is_correct for _, is_correct in found) / len(found)

    return rolling if case.protocol == "lm-eval" else last_words


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
