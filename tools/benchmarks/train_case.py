"""Workload of the training benchmark, the same for every system: model shape, text, batch, precision."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import toy

RECIPES = Path(__file__).parents[2] / "ds_configs"
SEED = 0
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.01
BETAS = (0.9, 0.999)
EPSILON = 1e-8
GRADIENT_CLIPPING = 1.0
DROPOUTS = {"gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"), "llama": ("attention_dropout",)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model trained from scratch, and its training settings."""

    model: str
    """Name in reports."""
    architecture: dict[str, Any]
    """transformers' configuration: `model_type` and the sizes; special tokens and dropout are added."""
    context_length: int
    device: Literal["cpu", "cuda"]
    num_ranks: int
    micro_batch_size: int
    accumulation: int = 1
    """Micro-batches per step and rank."""
    dtype: Literal["fp32", "bf16"]
    recipe: str
    """The file of ds_configs that megaft and the Trainer run with; {dtype} is filled in."""
    dropout: float = 0.0
    warm_up_steps: int
    """First steps, which are not timed."""
    steps: int
    """Steps after them."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the case whose inputs are in `folder`."""
        return cls(**json.loads((folder / "case.json").read_text()))

    @property
    def label(self) -> str:
        """A name for files, such as gpt2-xl-bf16-dropout0.1."""
        return f"{self.model}-{self.dtype}" + (f"-dropout{self.dropout:g}" if self.dropout else "")

    @property
    def max_steps(self) -> int:
        """Optimizer steps of a run."""
        return self.warm_up_steps + self.steps

    @property
    def global_batch_size(self) -> int:
        """Samples per step over all ranks."""
        return self.micro_batch_size * self.accumulation * self.num_ranks

    @property
    def tokens_per_step(self) -> int:
        """Input tokens per step over all ranks."""
        return self.global_batch_size * self.context_length

    def deepspeed_json(self) -> dict:
        """Return the recipe with this case's batch.

        Defaults that megaft fills in are explicit, so DeepSpeed runs with the same values under the Trainer.

        Raises:
            ValueError: The recipe has a different precision.
        """
        from megaft.config.deepspeed_json import read_deepspeed_json, resolve
        from megaft.config.train import OptimConfig

        raw = read_deepspeed_json(RECIPES / self.recipe.format(dtype=self.dtype))
        raw |= {
            "train_batch_size": self.global_batch_size,
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_clipping": GRADIENT_CLIPPING,
        }
        setup = resolve(raw, world_size=self.num_ranks, optim=OptimConfig(), has_cuda=self.device == "cuda")
        if setup.dtype != {"fp32": "float32", "bf16": "bfloat16"}[self.dtype]:
            raise ValueError(f"dtype is {self.dtype}, but {self.recipe} is for {setup.dtype}; leave --dtype out.")
        return setup.engine_config

    def flops_per_token(self) -> int:
        """Return the floating-point operations of training on one token, as megaft counts them."""
        import torch
        from transformers import AutoModelForCausalLM

        from megaft.run.throughput import flops_per_token

        config = self._config()
        with torch.device("meta"):
            parameters = AutoModelForCausalLM.from_config(config).parameters()
        num_parameters = sum(parameter.numel() for parameter in parameters)
        return flops_per_token(num_parameters, config.num_hidden_layers, config.hidden_size, self.context_length)

    def _config(self):
        from transformers import AutoConfig

        sizes = {"max_position_embeddings": self.context_length, "bos_token_id": 0, "eos_token_id": 0}
        names = DROPOUTS[self.architecture["model_type"]]
        settings: dict[str, Any] = {**sizes, **self.architecture, **dict.fromkeys(names, self.dropout)}
        return AutoConfig.for_model(**settings)

    def make_inputs(self, folder: Path) -> None:
        """Write config, tokenizer, prepared text, DeepSpeed JSON and the case itself."""
        from megaft.config.prepare import PrepareConfig
        from megaft.data.prepare import prepare

        self._config().save_pretrained(folder / "model")
        text = toy.text()
        toy.make_tokenizer(folder / "tokenizer", text)
        # Enough for one epoch, at two to three bytes per token.
        copies = -(-4 * self.max_steps * self.tokens_per_step // len(text))
        (folder / "train.txt").write_text(text * copies, encoding="utf-8")
        tokenizer = str(folder / "tokenizer")
        prepare(PrepareConfig(inputs=(str(folder / "train.txt"),), output=folder / "train", tokenizer=tokenizer))
        (folder / "deepspeed.json").write_text(json.dumps(self.deepspeed_json()))
        (folder / "case.json").write_text(json.dumps(asdict(self)))


def gpt2(num_layers: int, hidden_size: int, num_heads: int, vocab_size: int = 50_257) -> dict[str, Any]:
    """Return the configuration of a GPT-2."""
    sizes = {"n_layer": num_layers, "n_embd": hidden_size, "n_head": num_heads, "vocab_size": vocab_size}
    return {"model_type": "gpt2", **sizes}


SMOLLM2_135M = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
}
LLAMA_3_2_1B = {
    "model_type": "llama",
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "tie_word_embeddings": True,
}
GPT2_ON_CPU = Case(
    model="gpt2-124m",
    architecture=gpt2(12, 768, 12),
    context_length=128,
    device="cpu",
    num_ranks=2,
    micro_batch_size=1,
    accumulation=8,
    dtype="fp32",
    recipe="zero1_{dtype}.json",
    warm_up_steps=1,
    steps=3,
)
GPT2_XL_ON_ONE_GPU = Case(
    model="gpt2-xl",
    architecture=gpt2(48, 1600, 25),
    context_length=1024,
    device="cuda",
    num_ranks=1,
    micro_batch_size=16,
    accumulation=8,
    dtype="bf16",
    recipe="gpt2_xl_1x80gb.json",
    warm_up_steps=3,
    steps=6,
)
TOY = {"context_length": 64, "micro_batch_size": 2, "accumulation": 2, "steps": 10}
PRESETS = {
    "toy": replace(GPT2_ON_CPU, model="toy", architecture=gpt2(2, 32, 4, toy.VOCAB_SIZE), **TOY),
    "gpt2-124m-cpu": GPT2_ON_CPU,
    "smollm2-135m-cpu": replace(GPT2_ON_CPU, model="smollm2-135m", architecture=SMOLLM2_135M),
    "gpt2-xl-h100": GPT2_XL_ON_ONE_GPU,
    "llama-3.2-1b-h100": replace(GPT2_XL_ON_ONE_GPU, model="llama-3.2-1b", architecture=LLAMA_3_2_1B),
}
