"""Record the exact results of small runs, evaluations and datasets, and compare them after a code change.

    python tools/benchmarks/same_run.py --record before.json --keep FOLDER
    python tools/benchmarks/same_run.py --compare before.json
    python tools/benchmarks/same_run.py --compare before.json --continue FOLDER

It uses only commands and flags and imports nothing from megaft, so modules may move between recording and comparison.
--keep leaves runs and evaluations stopped part-way; with --continue, later code finishes copies of them and compares
with the recorded, uninterrupted results. All inputs are made from Python's own documentation. Python, torch,
transformers and the kind of CPU must be those of the recording.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import tyro
from same_run_cases import DATASETS, EVALUATIONS, RUNS, Evaluation, Run
from same_run_inputs import make_inputs

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR") or f"{sys.prefix}/torch_extensions",
}
TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
STEPS = 6
STOPPED = 1
"""Exit code of torchrun if a rank exits with a code other than 0, as after the file STOP."""
CHANGING = {"seconds", "tokens_per_second", "command", "environment", "model"}
"""Fields of a result that differ between two evaluations of one model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Record the exact results of small runs, evaluations and datasets, or compare with such a record."""

    record: Path | None = None
    """Write the results to this file."""
    compare: Path | None = None
    """Compare the results with this file; exit with 1 if any differ."""
    keep: Path | None = None
    """New folder for runs and evaluations stopped part-way."""
    continued: Annotated[Path | None, tyro.conf.arg(name="continue")] = None
    """With --compare: finish copies of the runs that --keep left in this folder, and compare only those."""
    seed: int = 0
    """Seed of models, runs and sampled text."""


def main(arguments: Arguments) -> int | str:
    """Collect results; record them, or print the differences from a record."""
    if arguments.keep:
        stop_part_way(arguments.keep.resolve(), arguments.seed)
    if (arguments.record is None) == (arguments.compare is None):
        return 0 if arguments.keep else "Give --record FILE or --compare FILE."
    recorded = json.loads(arguments.compare.read_text()) if arguments.compare else {}
    with tempfile.TemporaryDirectory() as temporary:
        found = results(arguments, Path(temporary))
    if arguments.record:
        arguments.record.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        return 0
    names = found if arguments.continued else {**recorded, **found}
    differing = [name for name in sorted(names) if found.get(name) != recorded.get(name)]
    print("\n".join([*(f"differs: {name}" for name in differing), f"{len(names)} results, {len(differing)} differ"]))
    return 1 if differing else 0


def results(arguments: Arguments, work: Path) -> dict[str, Any]:
    """Return all results by name, as in a record."""
    if arguments.continued:
        inputs = arguments.continued.resolve() / "inputs"
        for name in ("runs", "evaluations"):
            shutil.copytree(arguments.continued / name, work / name)
        found = finished(inputs, work, arguments.seed)
        require_continued(arguments.continued, work)
        return found
    inputs = work / "inputs"
    prepare(inputs, arguments.seed)
    return datasets(inputs) | finished(inputs, work, arguments.seed) | texts(inputs, work, arguments.seed)


def finished(inputs: Path, work: Path, seed: int) -> dict[str, Any]:
    """Train and evaluate to the end, resuming from the folder; return the results."""
    runs = [(run, inputs, work / "runs" / name, seed) for name, run in RUNS.items()]
    evaluations = [(each, inputs, work / "evaluations" / name) for name, each in EVALUATIONS.items()]
    two_at_a_time(train, runs)
    two_at_a_time(evaluate, evaluations)
    found = [(folder, outcome(folder)) for _, _, folder, _ in runs]
    found += [(folder, scores(folder)) for _, _, folder in evaluations]
    return {f"{folder.relative_to(work)}/{key}": value for folder, values in found for key, value in values.items()}


def two_at_a_time(call: Callable[..., Any], rows: Iterable[tuple[Any, ...]]) -> None:
    """Call with each row's values; most of the time is that of imports, on one core."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda row: call(*row), rows))


def command(*words: str | Path, expected: int = 0) -> str:
    """Run this Python with the words, print them, and return its stdout; end if the exit code is another."""
    print("python", *words, flush=True)
    environment = os.environ | ENVIRONMENT
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != expected:
        sys.exit(f"{done.stdout}{done.stderr}\nexit code {done.returncode}")
    return done.stdout


def prepare(inputs: Path, seed: int) -> None:
    """Make the inputs and prepare the datasets."""
    make_inputs(inputs, seed)
    for name, (text, *flags) in DATASETS.items():
        words = ("-m", "megaft", "prepare", inputs / text, f"--output={inputs / name}")
        command(*words, f"--tokenizer={inputs / 'gpt2'}", *flags)


def train(run: Run, inputs: Path, folder: Path, seed: int, expected: int = 0) -> None:
    """Train on two ranks until the last step or the file STOP."""
    settings = inputs / f"{folder.name}.json"
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
    """Return the SHA-256 over the names, dtypes, shapes and bytes of all tensors in a folder's safetensors files."""
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
        "--tokens-per-batch=1024",
        *evaluation.flags,
    )


def scores(output: Path) -> dict[str, Any]:
    """Return the fields of every entry of results.json that two evaluations of one model share."""
    entries = json.loads((output / "results.json").read_text())["results"]
    return {f"{entry['task']}/{entry['protocol']}": shared(entry) for entry in entries}


def shared(entry: Mapping[str, Any]) -> Any:
    """Return the fields that do not change from one command to the next."""
    return exact({key: value for key, value in entry.items() if key not in CHANGING})


def datasets(inputs: Path) -> dict[str, Any]:
    """Return each dataset's receipt, without versions and paths, and the SHA-256 of its other files."""
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
    """Return generated texts: one greedy, one sampled."""
    prompts = ("--prompt", "The import statement", "class", "--max-new-tokens=40", "--ignore-eos", "--json")
    found: dict[str, Any] = {}
    for name, model in {"gpt2": inputs / "gpt2", "run": work / "runs/documents"}.items():
        for way, flags in {"greedy": ["--temperature=0"], "drawn": [f"--seed={seed + 1}", "--top-p=0.9"]}.items():
            lines = command("-m", "megaft", "generate", f"--model={model}", *prompts, *flags).splitlines()
            found[f"texts/{name}/{way}"] = [shared(json.loads(line)) for line in lines]
    return found


def stop_part_way(folder: Path, seed: int) -> None:
    """Stop every run by the file STOP after a step, and leave every evaluation as if killed in its last batch."""
    inputs = folder / "inputs"
    prepare(inputs, seed)
    for name in RUNS:
        (folder / "runs" / name).mkdir(parents=True)
        (folder / "runs" / name / "STOP").touch()
    two_at_a_time(train, [(run, inputs, folder / "runs" / name, seed, STOPPED) for name, run in RUNS.items()])
    stopped = {path.parents[1].name for path in (folder / "runs").glob("*/checkpoints/step-00000001")}
    if stopped != set(RUNS):
        sys.exit(f"not stopped after a step: {', '.join(set(RUNS) - stopped)}")
    firsts = [(each.first, inputs, folder / "evaluations" / name) for name, each in EVALUATIONS.items()]
    two_at_a_time(evaluate, firsts)
    for path in (folder / "evaluations").rglob("*.nats"):
        os.truncate(path, path.stat().st_size - 1)


def require_continued(begun: Path, work: Path) -> None:
    """Exit if a run or an evaluation started over instead of continuing."""
    for name in RUNS:
        before, after = ((folder / "runs" / name / "metrics.jsonl").read_bytes() for folder in (begun, work))
        if not after.startswith(before):
            sys.exit(f"runs/{name} began anew")
    for name in EVALUATIONS:
        first = json.loads((work / "evaluations" / name / "results.json").read_text())["results"][0]
        if first["tokens_per_second"] is not None:  # None if an earlier command had scored some batches
            sys.exit(f"evaluations/{name} began anew")


def exact(value: Any) -> Any:
    """Return a JSON value with its floats in hexadecimal, which is exact."""
    if isinstance(value, Mapping):
        return {key: exact(part) for key, part in value.items()}
    if isinstance(value, list):
        return [exact(part) for part in value]
    return value.hex() if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
