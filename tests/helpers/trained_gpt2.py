"""A small GPT-2 and its byte-level BPE, trained on the generated corpora with contexts of 1,024 tokens."""

import json
from pathlib import Path

VOCAB_SIZE = 2001
"""An odd number, like GPT-2's 50,257: 256 bytes, merges, and the end of text."""
END = "<|endoftext|>"
NUM_STEPS, ROWS, TOKENS = 200, 4, 128


def make_vocabulary(folder: Path, text: str) -> Path:
    """Write vocab.json and merges.txt in the format of OpenAI's GPT-2, and return the folder."""
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=VOCAB_SIZE - 1, min_frequency=1, show_progress=False)
    folder.mkdir(parents=True)
    tokenizer.save_model(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    assert len(vocabulary) == VOCAB_SIZE - 1
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {END: VOCAB_SIZE - 1}), encoding="utf-8")
    return folder


def make_model(folder: Path, vocabulary: Path, text: str) -> Path:
    """Train on a text for a few seconds, and save the model and its tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

    tokenizer = GPT2TokenizerFast.from_pretrained(vocabulary)
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(_config(GPT2Config)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.98))
        for step in range(NUM_STEPS):
            optimizer.param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 20, (NUM_STEPS - step) / 50)
            begins = torch.randint(0, len(tokens) - TOKENS, (ROWS, 1))
            batch = tokens[begins + torch.arange(TOKENS)]
            positions = torch.randint(0, model.config.n_positions - TOKENS, (ROWS, 1)) + torch.arange(TOKENS)
            model(batch, position_ids=positions, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _config(make):
    end = VOCAB_SIZE - 1
    without = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return make(vocab_size=VOCAB_SIZE, n_embd=64, n_layer=3, n_head=4, bos_token_id=end, eos_token_id=end, **without)
