"""Toy runs that end with an export, and the contents of their checkpoints and exports."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_tokenizers import make_sentencepiece

from megaft.base.parallel import Topology
from megaft.checkpoint.export import export
from megaft.checkpoint.export_check import load_weights
from megaft.checkpoint.run_state import RunState
from megaft.config.train import parse_train
from megaft.data.tokenizer import load_tokenizer
from megaft.models import hugging_face
from megaft.run.sources import prepare_sources
from megaft.run.validation import Validation, held_out_rows
from megaft.weights import canonical, manifest
from megaft.weights.manifest import folder_of

STEPS, CLIP, WEIGHT_DECAY, EPSILON = 3, 0.5, 0.1, 1e-5
RATES = [0.5e-3, 1e-3, 1e-3]  # two steps of warm-up to 1e-3, then the cosine's first step
VALID_BYTES = 1_200
"""Characters of validation text: more tokens than the export check compares."""
TOPOLOGY = Topology("test", 0, 0, 1, "", 0)
LLAMA = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "eos_token_id": 7,
}


def deepspeed_json(**settings):
    return {
        "train_batch_size": 6,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": 0},
        **settings,
    }


def train_all(argument_lists):
    from megaft.base import parallel
    from megaft.train import train

    topology = parallel.discover(os.environ)
    for arguments in argument_lists:
        train(parse_train(arguments), topology)
    parallel.leave()


def make_runs(folder, toy_model, toy_texts, run_ranks):
    """Train three toy models on one rank in one launch; return the flags of each run by name."""
    train, whole_valid = toy_texts
    valid = folder / "valid.txt"
    valid.write_text(whole_valid.read_text()[-VALID_BYTES:])
    # Documents of every length, so that micro batches score different numbers of tokens.
    text = train.read_text()
    documents = [text[begin : begin + 7 * (1 + begin % 29)] for begin in range(0, 20_000, 500)]
    train = folder / "train.jsonl"
    train.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    pieces = make_sentencepiece(folder / "pieces", vocab_size=500)
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text(json.dumps(LLAMA))

    cases = {
        "full": (deepspeed_json(), [f"--model.path={toy_model}", "--run.validate-every=1"]),
        "adapters": (deepspeed_json(), [f"--model.path={toy_model}", "--lora.rank=4", "--optim.learning-rate=0.05"]),
        "ends": (
            deepspeed_json(),
            [
                *(f"--model.path={toy_model}", "--lora.rank=4", "--optim.learning-rate=0.05", "--run.export=last"),
                *("--lora.target-modules", "wte", "lm_head", "c_attn"),
            ],
        ),
        "half": (
            deepspeed_json(zero_optimization={"stage": 1}, bf16={"enabled": True}),
            [f"--model.from-scratch={folder / 'llama'}", f"--data.tokenizer={pieces}", "--run.export=last"],
        ),
    }
    common = [
        f"--data.train={train}",
        f"--data.valid={valid}",
        "--data.sample=document",
        "--data.context-length=32",
        f"--optim.weight-decay={WEIGHT_DECAY}",
        f"--optim.epsilon={EPSILON}",
        "--optim.warmup-steps=2",
        f"--run.max-steps={STEPS}",
        "--checkpoint.every=1",
        f"--checkpoint.keep-last={STEPS}",
    ]
    flags = {}
    for name, (settings, own) in cases.items():
        (folder / f"{name}.json").write_text(json.dumps(settings))
        rate = [] if name in ("adapters", "ends") else [f"--optim.learning-rate={max(RATES)}"]
        flags[name] = [
            f"--deepspeed_config={folder / f'{name}.json'}",
            f"--run.dir={folder / name}",
            *common,
            *rate,
            *own,
        ]
    run_ranks(1, train_all, list(flags.values()))
    return flags


def of(*names):
    return pytest.mark.parametrize("config", names, indirect=True)


EVERY = of("full", "adapters", "ends", "half")


def rows_of(config, key):
    rows = [json.loads(line) for line in (config.run.dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def saved_model(config, step):
    """Return a transformers model with the weights of a checkpoint."""
    model = hugging_face.build(config.model, config.lora, config.run.seed)
    load_weights(model, canonical.transformers_view(folder_of(config.run.dir, step), model.config))
    return model.eval()


def state_of(config, step=STEPS):
    return RunState.from_json(manifest.read_manifest(folder_of(config.run.dir, step))["state"])


def exported(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def copy_of(config, folder):
    """Return the settings of a copy of the run, which a test may change."""
    own = shutil.copytree(config.run.dir, folder / config.run.dir.name)
    return replace(config, run=replace(config.run, dir=own))


def export_again(config, state=None, dtype="float32"):
    """Export as at the end of a run, checked on tokens of the validation text."""
    tokenizer = load_tokenizer(config.tokenizer_source)
    sources = prepare_sources(config.data, config.tokenizer_source, tokenizer, config.run.dir, TOPOLOGY)
    rows = held_out_rows(Validation(sources.valid, config, tokenizer), None, config.longest_input)
    return export(config, state or state_of(config), tokenizer, dtype, rows)


def logits_of(model):
    ids = torch.randint(0, 512, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits
