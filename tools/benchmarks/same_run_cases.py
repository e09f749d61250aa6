"""Datasets, training runs and evaluations of same_run.py."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

PROTOCOLS = "megaft,megatron,lm-eval,lm-eval-megatron,hf-docs,fairseq,lm-finetuning,gpt2-paper,ralm,olmo"
LAST_WORDS = "lambada,lambada-strict,lambada-last-token,lambada-lm-eval,lambada-stop-word"
DATASETS = {
    "train": ("train.txt", "--unit=document"),
    "valid": ("valid.txt", "--detokenizer=wikitext"),
    "chosen": ("chosen.jsonl", "--prompt-key=prompt", "--completion-key=completion", "--append-eod"),
}
"""Inputs and flags of each prepared dataset."""


@dataclass(frozen=True, slots=True)
class Run:
    """A training run on two CPU ranks."""

    zero_stage: int
    flags: tuple[str, ...] = ()
    model: str = "gpt2"
    is_bf16: bool = False

    def deepspeed_json(self) -> dict[str, Any]:
        """Return the engine's settings."""
        zero: dict[str, Any] = {"stage": self.zero_stage}
        if self.zero_stage == 3:
            zero["stage3_param_persistence_threshold"] = 0  # partition even the small parameters of this model
        return {
            "train_batch_size": 8,
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 1.0,
            "zero_optimization": zero,
            "bf16": {"enabled": self.is_bf16},
        }


RUNS = {
    **{f"zero{stage}": Run(stage) for stage in range(4)},
    "bf16": Run(1, is_bf16=True),
    "tensor-parallel": Run(0, ("--model.backend=megatron", "--parallel.tensor-parallel-size=2")),
    "lora": Run(0, ("--lora.rank=4", "--data.sample=document", "--model.dropout=0.1")),
    "documents": Run(2, ("--data.attend-within-documents",), model="llama"),
}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Tasks and protocols of one evaluation command."""

    task: str
    protocol: str
    data: str
    """Name in the inputs' folder."""
    flags: tuple[str, ...] = ()
    ranks: int = 1

    @property
    def first(self) -> Evaluation:
        """Return the first task under the first protocol."""
        return replace(self, task=self.task.partition(",")[0], protocol=self.protocol.partition(",")[0])


EVALUATIONS = {
    "text": Evaluation("text", PROTOCOLS, "first.txt"),
    "records": Evaluation("text", PROTOCOLS, "second.jsonl"),
    "tasks": Evaluation("wikitext2,ptb,1bw,enwik8,text8", PROTOCOLS, "data"),
    "prompts": Evaluation(f"cbt-cn,cbt-ne,{LAST_WORDS}", "megaft,gpt2-paper", "data"),
    "last-words": Evaluation("lambada", "megatron,lm-eval,lm-eval-megatron", "data"),
    "tensor-parallel": Evaluation(
        "text", "megaft,lm-eval", "first.txt", ("--backend=megatron", "--tensor-parallel-size=2"), 2
    ),
}
