"""Example results.json with plausible invented numbers."""

import json
import math
from dataclasses import asdict

from evaluate_zero_shot.protocols import PROTOCOLS

SIZES = {"gpt2": 124439808, "gpt2-medium": 354823168, "gpt2-large": 774030080, "gpt2-xl": 1557611200}
FILES = {"wikitext2": "WikiText-2 test", "wikitext103": "WikiText-103 test", "lambada": "LAMBADA test, OpenAI's copy"}


def result(model="gpt2", task="wikitext103", protocol="megatron", **changed):
    """Return one entry; arguments replace invented values."""
    per_token = 3.55 - 0.2 * list(SIZES).index(model) if model in SIZES else 4.0
    per_token -= 0.05 * math.log2(1024 / changed.get("stride", 32))
    values = {
        "model": f"models/{model}",
        "model_name": model,
        "num_parameters": SIZES.get(model, 1000000),
        "model_sha256": "aa" * 32,
        "tokenizer_sha256": "bb" * 32,
        "task": task,
        "task_title": FILES.get(task, task),
        "protocol": protocol,
        "detokenizer": "wikitext_megatron",
        "data_file": "wiki.test.tokens",
        "data_name": "WikiText raw test" if protocol in ("lm-eval", "hf-docs") else FILES.get(task),
        "data_sha256": "56db52eb157b1ab5c89646eef70510c1eca6e12a3bfdb99f0d6b05b4eacb75b9",
        "limit_lines": None,
        "context_length": 1024,
        "stride": 32,
        "is_protocol_default": True,
        "dtype": "float32",
        "tokens_per_batch": 8192,
        "nats": per_token * 270329,
        "num_scored_tokens": 270329,
        "num_tokenized_tokens": 270330,
        "num_original_tokens": 245566,
        "num_words": 245565,
        "num_bytes": 1281077,
        "num_documents": 1,
        "headline": "word_perplexity",
        "perplexity": math.exp(per_token),
        "word_perplexity": math.exp(per_token * 270329 / 245565),
        "byte_perplexity": math.exp(per_token * 270329 / 1281077),
        "bits_per_byte": per_token * 270329 / 1281077 / math.log(2),
        "accuracy": None,
        "confidence_interval_95": None,
        "positions": [(32 * i, 264, 264 * (per_token - 0.4 + 3.2 / (1 + 4 * i) ** 0.5)) for i in range(32)],
        "segments": [(2703, 2703 * (per_token + 0.3 * math.sin(i * i + 0.1 * i))) for i in range(100)],
        "segment_unit": "block",
        "seconds": 123.4,
        "tokens_per_second": 2190.7,
        "world_size": 1,
        "backend": "hugging-face",
        "tensor_parallel_size": 1,
        "device": "cpu",
        "command": ["/opt/megaft/evaluate_zero_shot/__main__.py", "--model", "models/gpt2", "--data", "my data/x.txt"],
    }
    low, high = values["word_perplexity"] * 0.97, values["word_perplexity"] * 1.03
    method = "ratio estimate over 100 blocks"
    values["confidence_interval_95"] = {"quantity": "word_perplexity", "low": low, "high": high, "method": method}
    return values | changed


def lambada(model="gpt2", protocol="lm-eval", accuracy=0.3256, **changed):
    """Return an entry of LAMBADA."""
    interval = {
        "quantity": "accuracy",
        "low": accuracy - 0.013,
        "high": accuracy + 0.013,
        "method": "Wilson, 5153 examples",
    }
    values = {
        "headline": "accuracy",
        "accuracy": accuracy,
        "word_perplexity": 40.0549,
        "bits_per_byte": None,
        "byte_perplexity": None,
        "num_bytes": None,
        "num_words": 5153,
        "num_documents": 5153,
        "detokenizer": "lambada",
        "data_file": "lambada_test.jsonl",
        "data_name": FILES["lambada"],
        "confidence_interval_95": interval,
        "segment_unit": "documents",
        "positions": [],
    }
    return result(model, "lambada", protocol, **values | changed)


def four_sizes():
    """Return the four GPT-2 sizes on three tasks by three protocols, one of them swept over strides."""
    strides = [
        result(model, stride=stride, is_protocol_default=stride == 32) for model in SIZES for stride in (32, 256, 1024)
    ]
    pages = [result(model, "wikitext2", "hf-docs", stride=512, headline="perplexity") for model in SIZES]
    pages[2]["perplexity"] = 16.4412
    words = [lambada(model, accuracy=0.3256 + 0.06 * i) for i, model in enumerate(SIZES)]
    return [*strides, *pages, *words]


def write_results(folder, results):
    """Write folder/results.json."""
    used = {one["protocol"] for one in results}
    environment = {"megaft": "0.1.0", "git": {"commit": "a8e521c", "is_dirty": False}, "packages": {"torch": "2.13.0"}}
    environment["cuda"] = None
    content = {
        "results": [{"environment": environment} | one for one in results],
        "protocols": {name: asdict(PROTOCOLS[name]) for name in used},
    }
    (folder / "results.json").write_text(json.dumps(content), encoding="utf-8")
