"""Models, texts and questions for same_run.py, made from Python's own documentation without importing megaft."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

END = "<|endoftext|>"
WORDS = ("the", "a", "of", "to", "is", "in", "and", "function", "object", "import")


def make_inputs(folder: Path, seed: int) -> None:
    """Write models, texts and questions."""
    from pydoc_data.topics import topics

    folder.mkdir(parents=True)
    pages = [f" = {name} = \n\n{topics[name].strip()}\n" for name in sorted(topics)]
    (folder / "train.txt").write_text("\n".join(pages[:8]))
    (folder / "valid.txt").write_text(pages[9][:4000])
    (folder / "first.txt").write_text("\n".join(page[:2400] for page in sorted(pages, key=len)[-3:]))
    write_records(folder / "second.jsonl", [{"text": page[:3200]} for page in sorted(pages, key=len)[-6:-3]])
    write_records(folder / "chosen.jsonl", [{"prompt": page[:60], "completion": page[60:500]} for page in pages[:40]])
    make_models(folder, "\n".join(pages), seed)
    write_task_files(folder / "data", pages[20:])


def write_records(path: Path, records: Iterable[Mapping[str, str]]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_models(folder: Path, text: str, seed: int) -> None:
    """Save a random GPT-2 and a random Llama, each with a tokenizer trained on the text."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    shared: dict[str, Any] = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.2}
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **shared)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128}
    llama = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes, **shared)
    models: dict[str, Any] = {"gpt2": lambda: GPT2LMHeadModel(gpt2), "llama": lambda: LlamaForCausalLM(llama)}
    for name, model in models.items():
        torch.manual_seed(seed)
        model().save_pretrained(folder / name)
        save_tokenizer(folder / name, text)


def save_tokenizer(folder: Path, text: str) -> None:
    """Train a byte-level BPE of 512 tokens on the text, and save it for transformers."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], vocab_size=512, special_tokens=[END], show_progress=False)
    file = str(folder / "tokenizer.json")
    bpe.save(file)
    PreTrainedTokenizerFast(tokenizer_file=file, bos_token=END, eos_token=END).save_pretrained(folder)


def write_task_files(folder: Path, pages: list[str]) -> None:
    """Write a small file with each task's name and format."""
    folder.mkdir()
    text = "\n".join(page[:600] for page in pages[:4])
    for name in ("wiki.test.tokens", "wiki.test.raw", "ptb.test.txt", "enwik8", "text8"):
        (folder / name).write_text(text.replace(pages[0][40:48], "<unk>") if name.endswith("tokens") else text)
    (folder / "news.en.heldout-00000-of-00050").write_text("\n".join(filter(None, text.split("\n")[:20])) + "\n")
    # A random model with tied embeddings tends to repeat a token, so some of these last words are its greedy choice.
    passages = [[*page.split()[:150], word, word] for page, word in zip(pages, WORDS, strict=False)]
    write_records(folder / "lambada_test.jsonl", [{"text": " ".join(words)} for words in passages])
    for letters in ("CN", "NE"):
        (folder / f"cbtest_{letters}_valid_2000ex.txt").write_text("\n".join(map(question, pages[30:40])))


def question(page: str) -> str:
    """Return a question of the Children's Book Test: twenty sentences, and one whose blank ten words may fill."""
    words = page.split()
    sentences = [f"{number} {' '.join(words[5 * number : 5 * number + 5])} ." for number in range(1, 21)]
    candidates = list(dict.fromkeys(words))[:10]
    answer = candidates[len(page) % 10]
    return "\n".join([*sentences, f"21 {words[0]} XXXXX {words[1]} .\t{answer}\t\t{'|'.join(candidates)}", ""])
