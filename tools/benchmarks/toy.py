"""A tiny language model, its tokenizer and a text, made from Python's documentation without a download."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

VOCAB_SIZE = 512


def text() -> str:
    """Return the topics of Python's documentation, about 700 kB of English and code."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n"


def make_tokenizer(folder: Path, corpus: str) -> None:
    """Train a byte-level BPE of VOCAB_SIZE tokens and save it for transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([corpus], trainer)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end).save_pretrained(folder)


def make_model(folder: Path, *, dropout: float = 0.0, context_length: int = 128) -> None:
    """Save a random two-layer GPT-2 of hidden size 32, with the tokenizer above."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=context_length,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    make_tokenizer(folder, text())


def make_texts(folder: Path, *, train_bytes: int = 60_000, valid_bytes: int = 4_000) -> tuple[Path, Path]:
    """Write a text to train on and another to validate on; return their paths."""
    whole = text()
    folder.mkdir(parents=True, exist_ok=True)
    train, valid = folder / "train.txt", folder / "valid.txt"
    train.write_text(whole[:train_bytes], encoding="utf-8")
    valid.write_text(whole[-valid_bytes:], encoding="utf-8")
    return train, valid


def train_in_turn(runs: Iterable[tuple[Path, dict, list[str]]]) -> None:
    """Train runs one after another on this rank; each is the path of its DeepSpeed JSON, that JSON, and other flags."""
    from megaft.base import parallel
    from megaft.config.train import parse_train
    from megaft.train import train

    topology = parallel.discover(os.environ)
    for path, settings, flags in runs:
        if topology.is_main:
            path.write_text(json.dumps(settings))
        parallel.join(topology)
        parallel.barrier()
        train(parse_train([f"--deepspeed_config={path}", *flags]), topology)
    parallel.leave()
