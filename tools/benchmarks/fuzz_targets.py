"""Fuzz targets: readers of untrusted files, each with small valid files to mutate."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import toy
import toy_gguf

LINES = "".join(
    json.dumps(
        {
            "text": f"line {i}",
            "p": "a question",
            "c": " an answer",
            "m": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
        }
    )
    + "\n"
    for i in range(4)
)
CHAT_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"


@dataclass(frozen=True, slots=True)
class Target:
    """A reader, its valid files, and which of them are mutated."""

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    files: tuple[str, ...]
    """Globs below the folder."""
    mend: Callable[[Path], None] | None = None
    """Recomputes checksums of a mutated file, so that the reader gets past them."""


def _prepare(name: str, **options: Any) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        from megaft.config.prepare import PrepareConfig
        from megaft.data.prepare import prepare

        return prepare(
            PrepareConfig(
                inputs=(str(folder / name),),
                output=folder / "out",
                tokenizer=str(folder / "model"),
                workers=1,
                **options,
            )
        )

    return read


def _text(name: str, data: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        toy.make_tokenizer(folder / "model", toy.text()[:20_000])
        (folder / name).write_bytes(data)

    return make


def _zst(data: bytes) -> bytes:
    import zstandard

    return zstandard.compress(data)


def _encode(path: Path) -> None:
    """Exercise a tokenizer: encoding, decoding, a chat if it has a template, and saving."""
    from megaft.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("The import statement\n 1 + 1 😀")
    tokenizer.decode([*ids, *tokenizer.opening_ids, tokenizer.vocab_size - 1])
    if tokenizer.chat_template is not None:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    with TemporaryDirectory() as folder:
        tokenizer.save(folder)


def _make_chat_tokenizer(folder: Path) -> None:
    toy.make_tokenizer(folder, toy.text()[:20_000])
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": CHAT_TEMPLATE}))


def _make_sentencepiece(folder: Path) -> None:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    lines = toy.text()[:60_000].splitlines()
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def _make_vocabulary(folder: Path) -> None:
    from tokenizers import Tokenizer

    toy.make_tokenizer(folder, toy.text()[:20_000])
    Tokenizer.from_file(str(folder / "tokenizer.json")).model.save(str(folder))
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)


def _make_model(folder: Path) -> None:
    toy.make_model(folder, context_length=16)


def _make_sharded(folder: Path) -> None:
    from transformers import GPT2LMHeadModel

    _make_model(folder)
    model = GPT2LMHeadModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")


def _load_model(source: Path) -> None:
    """Load a model as training and evaluation do, and score three tokens."""
    import torch

    from megaft.models.hugging_face import NatsModel
    from megaft.models.trials import require_language_model
    from megaft.weights.loading.pretrained import load_language_model

    model = load_language_model(str(source))
    require_language_model(model)
    ids = torch.arange(3).unsqueeze(0)
    NatsModel(model)(ids, ids)


def _estimate(folder: Path) -> None:
    from megaft.commands.estimate.command import estimate
    from megaft.commands.estimate.config import EstimateConfig

    path = folder / "deepspeed.json"
    path.write_text('{"train_batch_size": 2, "train_micro_batch_size_per_gpu": 2}')
    estimate(EstimateConfig(model=str(folder), deepspeed_config=path, context_length=16))


def _make_gguf(folder: Path) -> None:
    toy_gguf.make_gguf(folder / "model.gguf")


def _load_gguf(folder: Path) -> None:
    """Load a GGUF file's model for training or evaluation, its tokenizer, and its weights for conversion."""
    from megaft.data.tokenizer import load_tokenizer

    path = folder / "model.gguf"
    load_tokenizer(path).encode("The import statement")
    _load_model(path)
    _read_weights(path)


def _end_ids(folder: Path) -> Any:
    from types import SimpleNamespace

    from megaft.data.end_tokens import end_ids

    tokenizer: Any = SimpleNamespace(eos_id=0)
    return end_ids(str(folder), tokenizer, 512)


def _read_weights(source: Path) -> None:
    from megaft.weights.reading import open_weights

    weights = open_weights(str(source))
    for name in weights.names:
        weights.read(name)


def _make_deepspeed(folder: Path) -> None:
    for path in (Path(__file__).parents[2] / "ds_configs").glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())


def _resolve(folder: Path) -> None:
    from megaft.config.deepspeed_json import read_deepspeed_json, resolve
    from megaft.config.train import OptimConfig

    for path in sorted(folder.glob("*.json")):
        resolve(read_deepspeed_json(path), world_size=1, optim=OptimConfig(), has_cuda=False)


def _make_prepared(folder: Path) -> None:
    _text("a.jsonl", LINES.encode())(folder)
    _prepare("a.jsonl", prompt_key="p", completion_key="c")(folder)


def _read_prepared(folder: Path) -> None:
    from megaft.config.train import DataConfig
    from megaft.data.dataset import Dataset
    from megaft.data.indexed import TokenFile
    from megaft.data.samples import DocumentSamples

    dataset = Dataset(str(folder / "out"))
    documents = DocumentSamples(dataset, 16)
    tokens = TokenFile(folder / "out", 512)
    tokens.read(0, int(tokens.document_offsets[-1]))
    DataConfig(train=(str(folder / "out"),))
    for number in range(min(len(documents), 10)):
        documents[number]


def _make_checkpoints(folder: Path) -> None:
    from hashlib import sha256

    import torch
    from safetensors.torch import save

    from megaft.weights import manifest as manifest_module

    for step in (1, 2):
        inside = manifest_module.folder_of(folder, step)
        inside.mkdir(parents=True)
        data = {"rank-0.safetensors": save({"w": torch.zeros(4)}), "state.json": b'{"step": 1, "left_out": []}'}
        for name, content in data.items():
            (inside / name).write_bytes(content)
        files = {name: {"bytes": len(content), "sha256": sha256(content).hexdigest()} for name, content in data.items()}
        manifest = {
            "format": manifest_module.FORMAT,
            "files": files,
            "identity": {"global_batch_size": 4},
            "step": step,
        }
        (inside / manifest_module.MANIFEST).write_text(manifest_module.manifest_text(manifest))
    (folder / "checkpoints" / "latest").write_text("step-00000002")


def _sign_manifests(folder: Path) -> None:
    from megaft.weights import manifest as manifest_module

    for path in folder.glob(f"checkpoints/*/{manifest_module.MANIFEST}"):
        try:
            manifest = json.loads(path.read_text())
            manifest.pop("sha256", None)
            path.write_text(manifest_module.manifest_text(manifest))
        except (OSError, ValueError, AttributeError, TypeError, RecursionError):
            continue


def _find_checkpoint(folder: Path) -> None:
    from megaft.checkpoint import resume
    from megaft.weights import manifest as manifest_module

    manifest_module.newest_manifest(folder)
    manifest_module.saved_steps(folder)
    resume.find(folder)


def _make_results(folder: Path) -> None:
    sys.path.append(str(Path(__file__).parents[2] / "tests" / "helpers"))
    from example_results import result, write_results

    write_results(folder, [result(), result(stride=512), result(task="lambada", headline="accuracy", accuracy=0.4)])


def _report(folder: Path) -> None:
    from evaluate_zero_shot.report import write

    write.write(folder)


def _make_rows(folder: Path) -> None:
    rows = [
        {"step": i, "loss": 2.5, "event": "start", "time": "now", "validation": {"nats_per_token": 2.0}}
        for i in range(5)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _read_rows(folder: Path) -> None:
    from megaft.base.files import step_rows

    path = folder / "metrics.jsonl"
    for row in step_rows(path) if path.is_file() else ():  # a run makes it, and reads it where it is
        row.get("step")


TARGETS = {
    "jsonl": Target(_text("a.jsonl", LINES.encode()), _prepare("a.jsonl"), ("a.jsonl",)),
    "jsonl-prompts": Target(
        _text("a.jsonl", LINES.encode()), _prepare("a.jsonl", prompt_key="p", completion_key="c"), ("a.jsonl",)
    ),
    "text": Target(_text("a.txt", LINES.encode()), _prepare("a.txt", unit="document", format="text"), ("a.txt",)),
    "text-gz": Target(_text("a.txt.gz", gzip.compress(LINES.encode(), mtime=0)), _prepare("a.txt.gz"), ("a.txt.gz",)),
    "text-zst": Target(_text("a.txt.zst", _zst(LINES.encode())), _prepare("a.txt.zst"), ("a.txt.zst",)),
    "tokenizer": Target(_make_chat_tokenizer, _encode, ("*.json",)),
    "sentencepiece": Target(_make_sentencepiece, lambda folder: _encode(folder / "tokenizer.model"), ("*.model",)),
    "vocabulary": Target(_make_vocabulary, _encode, ("vocab.json", "merges.txt")),
    "model-config": Target(_make_model, _load_model, ("config.json",)),
    "estimate": Target(_make_model, _estimate, ("config.json",)),
    "generation-config": Target(_make_model, _end_ids, ("generation_config.json", "config.json")),
    "safetensors": Target(_make_model, _load_model, ("model.safetensors",)),
    "safetensors-index": Target(_make_sharded, _load_model, ("model.safetensors.index.json",)),
    "weights": Target(_make_sharded, _read_weights, ("*.safetensors", "*.index.json", "config.json")),
    "gguf": Target(_make_gguf, _load_gguf, ("model.gguf",)),
    "deepspeed-json": Target(_make_deepspeed, _resolve, ("*.json",)),
    "prepared": Target(_make_prepared, _read_prepared, ("out.*",)),
    "checkpoint": Target(
        _make_checkpoints, _find_checkpoint, ("checkpoints/*/*", "checkpoints/latest"), _sign_manifests
    ),
    "results": Target(_make_results, _report, ("results.json",)),
    "rows": Target(_make_rows, _read_rows, ("metrics.jsonl",)),
}
