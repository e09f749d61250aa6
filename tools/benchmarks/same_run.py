"""Record every bit of what small runs, evaluations and datasets come to, and compare it after a change of the code.

    python tools/benchmarks/same_run.py --record before.json [--keep FOLDER]
    python tools/benchmarks/same_run.py --compare before.json
    python tools/benchmarks/same_run.py --compare before.json --continue FOLDER

Only commands and flags are used, nothing is imported from megaft, so that modules may move between the recording and
the comparison. --keep leaves runs and evaluations that were stopped part-way; with --continue, later code finishes
copies of them and compares with the recorded results, which were never interrupted. All inputs are made from Python's
own documentation. Python, torch and transformers must be those of the recording, and the machine's CPU of its kind.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import tyro

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR") or f"{sys.prefix}/torch_extensions",
}
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
STOPPED = 93
"""Exit code of a run that the file STOP ended."""
STEPS = 6
END = "<|endoftext|>"
PROTOCOLS = "megaft,megatron,lm-eval,lm-eval-megatron,hf-docs,fairseq,lm-finetuning,gpt2-paper,ralm,olmo"
LAST_WORDS = "lambada,lambada-strict,lambada-last-token,lambada-lm-eval,lambada-stop-word"
DATASETS = {
    "train": ("train.txt", "--unit=document"),
    "valid": ("valid.txt", "--detokenizer=wikitext"),
    "chosen": ("chosen.jsonl", "--prompt-key=prompt", "--completion-key=completion", "--append-eod"),
}
"""Inputs and flags of each prepared dataset."""
CHANGING = {"seconds", "tokens_per_second", "command", "environment", "model"}
"""Fields of a result that differ between two evaluations of one model."""


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
            zero["stage3_param_persistence_threshold"] = 0  # partition even this model's small parameters
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
        task, protocol = self.task.partition(",")[0], self.protocol.partition(",")[0]
        return Evaluation(task, protocol, self.data, self.flags, self.ranks)


EVALUATIONS = {
    "text": Evaluation("text", PROTOCOLS, "first.txt"),
    "records": Evaluation("text", PROTOCOLS, "second.jsonl"),
    "tasks": Evaluation("wikitext2,wikitext103,ptb,1bw,enwik8,text8", PROTOCOLS, "data"),
    "prompts": Evaluation(f"cbt-cn,cbt-ne,{LAST_WORDS}", "megaft,gpt2-paper", "data"),
    "last-words": Evaluation("lambada", "megatron,lm-eval,lm-eval-megatron", "data"),
    "tensor-parallel": Evaluation(
        "text", "megaft,lm-eval", "first.txt", ("--backend=megatron", "--tensor-parallel-size=2"), 2
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Record every bit of what small runs, evaluations and datasets come to, or compare with such a record."""

    record: Path | None = None
    """Write the results to this file."""
    compare: Path | None = None
    """Compare the results with this file's; exit with 1 if any differ."""
    keep: Path | None = None
    """With --record: an empty or new folder, to leave runs and evaluations in that were stopped part-way."""
    continued: Annotated[Path | None, tyro.conf.arg(name="continue")] = None
    """With --compare: finish copies of what --keep left in this folder, and compare only that."""
    seed: int = 0
    """Seed of models, runs and drawn text."""


def main(arguments: Arguments) -> int:
    """Collect results; record them, or print what differs from a record."""
    if (arguments.record is None) == (arguments.compare is None):
        sys.exit("Give --record FILE or --compare FILE.")
    with tempfile.TemporaryDirectory() as temporary:
        found = results(arguments, Path(temporary))
    if arguments.record:
        arguments.record.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        return 0
    recorded = json.loads(arguments.compare.read_text()) if arguments.compare else {}
    names = found if arguments.continued else {**recorded, **found}
    differing = [name for name in sorted(names) if found.get(name) != recorded.get(name)]
    print("\n".join([*(f"differs: {name}" for name in differing), f"{len(names)} results, {len(differing)} differ"]))
    return 1 if differing else 0


def results(arguments: Arguments, work: Path) -> dict[str, Any]:
    """Return all results by name, as a record holds them."""
    if arguments.continued:
        inputs = arguments.continued.resolve() / "inputs"
        for name in ("runs", "evaluations"):
            shutil.copytree(arguments.continued / name, work / name)
        found = finished(inputs, work, arguments.seed)
        require_continued(arguments.continued, work)
        return found
    inputs = (arguments.keep or work).resolve() / "inputs"
    make_inputs(inputs, arguments.seed)
    found = datasets(inputs) | finished(inputs, work, arguments.seed) | texts(inputs, work, arguments.seed)
    if arguments.keep:
        stop_part_way(inputs, arguments.keep.resolve(), arguments.seed)
    return found


def finished(inputs: Path, work: Path, seed: int) -> dict[str, Any]:
    """Train and evaluate to the end, continuing what is in the folder; return the results."""
    found: dict[str, Any] = {}
    for name, run in RUNS.items():
        train(run, inputs, work / "runs" / name, seed)
        found |= {f"runs/{name}/{key}": value for key, value in outcome(work / "runs" / name).items()}
    for name, evaluation in EVALUATIONS.items():
        evaluate(evaluation, inputs, work / "evaluations" / name)
        found |= {f"evaluations/{name}/{key}": value for key, value in scores(work / "evaluations" / name).items()}
    return found


def command(*words: str | Path, expected: int = 0) -> str:
    """Run this Python with the words, print them, and return its stdout; end if the exit code is another."""
    print("python", *words, flush=True)
    environment = os.environ | ENVIRONMENT
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != expected:
        sys.exit(f"{done.stdout}{done.stderr}\nexit code {done.returncode}")
    return done.stdout


def train(run: Run, inputs: Path, folder: Path, seed: int, expected: int = 0) -> None:
    """Train on two ranks until the last step, or the file STOP."""
    settings = inputs / f"zero{run.zero_stage}{'-bf16' if run.is_bf16 else ''}.json"
    settings.write_text(json.dumps(run.deepspeed_json()))
    command(
        *TWO_RANKS,
        "megaft/train.py",
        f"--deepspeed-config={settings}",
        f"--model.path={inputs / run.model}",
        f"--data.train={inputs / 'train'}",
        f"--data.valid={inputs / 'valid'}",
        "--data.context-length=64",
        f"--run.dir={folder}",
        f"--run.max-steps={STEPS}",
        f"--run.seed={seed}",
        "--optim.learning-rate=0.001",
        "--checkpoint.every=4",
        *run.flags,
        expected=expected,
    )


def outcome(folder: Path) -> dict[str, Any]:
    """Return a run's losses, gradient norms, validations and weights."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    newest = max((folder / "checkpoints").glob("step-*"))
    return {
        **{key: [exact(row[key]) for row in rows if key in row] for key in ("loss", "grad_norm", "validation")},
        "export": weights(folder / "export"),
        "checkpoint": {newest.name: weights(newest)},
    }


def weights(folder: Path) -> str:
    """Return the SHA-256 of all tensors in a folder's safetensors files: names, dtypes, shapes and bytes."""
    import torch
    from safetensors.torch import load_file

    digest = sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            digest.update(f"{path.relative_to(folder)} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def evaluate(evaluation: Evaluation, inputs: Path, output: Path) -> None:
    """Score the GPT-2."""
    command(
        *(TWO_RANKS if evaluation.ranks == 2 else ()),
        *("-m", "evaluate_zero_shot"),
        f"--model={inputs / 'gpt2'}",
        f"--task={evaluation.task}",
        f"--protocol={evaluation.protocol}",
        f"--data={inputs / evaluation.data}",
        f"--output={output}",
        "--tokens-per-batch=8192",
        *evaluation.flags,
    )


def scores(output: Path) -> dict[str, Any]:
    """Return the fields of every entry of results.json that two evaluations of one model share."""
    entries = json.loads((output / "results.json").read_text())["results"]
    return {
        f"{entry['task']}/{entry['protocol']}": exact({k: v for k, v in entry.items() if k not in CHANGING})
        for entry in entries
    }


def datasets(inputs: Path) -> dict[str, Any]:
    """Return each dataset's receipt, less versions and paths, and the SHA-256 of its other files."""
    found: dict[str, Any] = {}
    for name in DATASETS:
        receipt = json.loads((inputs / f"{name}.json").read_text())
        del receipt["megaft_version"], receipt["tokenizer"]["source"]
        receipt["sources"] = [{k: v for k, v in source.items() if k != "path"} for source in receipt["sources"]]
        found[f"datasets/{name}/receipt"] = exact(receipt)
        for suffix in (".bin", ".idx", ".scored.bin", ".scored.idx"):
            if (path := inputs / f"{name}{suffix}").exists():
                found[f"datasets/{name}/{suffix}"] = sha256(path.read_bytes()).hexdigest()
    return found


def texts(inputs: Path, work: Path, seed: int) -> dict[str, Any]:
    """Return what models generate: the most likely text, and one drawn."""
    prompts = ("--prompt", "The import statement", "class", "--max-new-tokens=40", "--ignore-eos", "--json")
    found: dict[str, Any] = {}
    for name, model in {"gpt2": inputs / "gpt2", "run": work / "runs/documents"}.items():
        for way, flags in {"greedy": ["--temperature=0"], "drawn": [f"--seed={seed + 1}", "--top-p=0.9"]}.items():
            lines = command("-m", "megaft", "generate", f"--model={model}", *prompts, *flags).splitlines()
            found[f"texts/{name}/{way}"] = [exact(json.loads(line)) for line in lines]
    return found


def stop_part_way(inputs: Path, folder: Path, seed: int) -> None:
    """Leave every run as the file STOP ends it after a step, and every evaluation as if it was killed in a batch."""
    for name, run in RUNS.items():
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "STOP").touch()
        train(run, inputs, folder / "runs" / name, seed, expected=STOPPED)
    for name, evaluation in EVALUATIONS.items():
        evaluate(evaluation.first, inputs, folder / "evaluations" / name)
        for path in (folder / "evaluations" / name).rglob("*.nats"):
            os.truncate(path, path.stat().st_size * 2 // 3)


def require_continued(begun: Path, work: Path) -> None:
    """End if a run or an evaluation began anew where it was to go on."""
    for name in RUNS:
        before, after = ((folder / "runs" / name / "metrics.jsonl").read_bytes() for folder in (begun, work))
        if not after.startswith(before):
            sys.exit(f"runs/{name} began anew")
    for name in EVALUATIONS:
        first = json.loads((work / "evaluations" / name / "results.json").read_text())["results"][0]
        if first["tokens_per_second"] is not None:  # it is None where an earlier command had scored some batches
            sys.exit(f"evaluations/{name} began anew")


def make_inputs(folder: Path, seed: int) -> None:
    """Write models, texts and questions, and prepare the datasets."""
    from pydoc_data.topics import topics

    folder.mkdir(parents=True)
    pages = [f" = {name} = \n\n{topics[name].strip()}\n" for name in sorted(topics)]
    (folder / "train.txt").write_text("\n".join(pages[:8]))
    (folder / "valid.txt").write_text(pages[9][:4000])
    (folder / "first.txt").write_text("\n".join(page[:1200] for page in pages[10:13]))
    write_records(folder / "second.jsonl", [{"text": page[:800]} for page in pages[13:17]])
    write_records(folder / "chosen.jsonl", [{"prompt": page[:60], "completion": page[60:500]} for page in pages[:40]])
    make_models(folder, "\n".join(pages), seed)
    write_task_files(folder / "data", pages[20:])
    for name, flags in DATASETS.items():
        output = f"--output={folder / name}"
        words = [str(folder / word) if word.endswith((".txt", ".jsonl")) else word for word in flags]
        command("-m", "megaft", "prepare", *words, output, f"--tokenizer={folder / 'gpt2'}")


def write_records(path: Path, records: Iterable[Mapping[str, str]]) -> None:
    """Write a JSON object a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_models(folder: Path, text: str, seed: int) -> None:
    """Save a random GPT-2 and a random Llama, each with a tokenizer trained on the text."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    shared: dict[str, Any] = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.1}
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **shared)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128}
    llama = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes, **shared)
    for name, kind, config in (("gpt2", GPT2LMHeadModel, gpt2), ("llama", LlamaForCausalLM, llama)):
        torch.manual_seed(seed)
        kind(config).save_pretrained(folder / name)
        save_tokenizer(folder / name, text)


def save_tokenizer(folder: Path, text: str) -> None:
    """Train a byte-level BPE of 512 tokens on the text, and save it for transformers."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], vocab_size=512, special_tokens=[END], show_progress=False)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END)
    made.save_pretrained(folder)


def write_task_files(folder: Path, pages: list[str]) -> None:
    """Write a small file of each task's name and form."""
    folder.mkdir()
    text = "\n".join(page[:600] for page in pages[:4])
    for name in ("wiki.test.tokens", "wiki.test.raw", "ptb.test.txt", "enwik8", "text8"):
        (folder / name).write_text(text.replace(pages[0][40:48], "<unk>") if name.endswith("tokens") else text)
    (folder / "news.en.heldout-00000-of-00050").write_text("\n".join(filter(None, text.split("\n")[:20])) + "\n")
    write_records(folder / "lambada_test.jsonl", [{"text": " ".join(page.split()[:40])} for page in pages[:12]])
    for letters in ("CN", "NE"):
        (folder / f"cbtest_{letters}_valid_2000ex.txt").write_text("\n".join(map(question, pages[30:33])))


def question(page: str) -> str:
    """Return a question of the Children's Book Test: twenty sentences, and one whose blank ten words may fill."""
    words = page.split()
    sentences = [f"{number} {' '.join(words[5 * number : 5 * number + 5])} ." for number in range(1, 21)]
    answers = "|".join(dict.fromkeys(words))
    candidates = "|".join(answers.split("|")[:10])
    return "\n".join([*sentences, f"21 {words[0]} XXXXX {words[1]} .\t{candidates.split('|')[3]}\t\t{candidates}", ""])


def exact(value: Any) -> Any:
    """Return a JSON value with its floats in hexadecimal, which rounds nothing."""
    if isinstance(value, Mapping):
        return {key: exact(part) for key, part in value.items()}
    if isinstance(value, list):
        return [exact(part) for part in value]
    return value.hex() if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
