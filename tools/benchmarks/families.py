"""Test every causal model family of the installed transformers: python tools/benchmarks/families.py --output FILE.

A tiny random model of each is trained, scored, generated from, partitioned by ZeRO-3, packed and sharded as a user's
would be. Every number is compared with plain forward passes of transformers. Each cell is right, refused in one line,
silently wrong (SILENT) or an unexpected exception (TRACEBACK).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

PARTS = ("trains", "scores", "generates", "ZeRO-3", "isolates packed documents", "megatron", "megatron TP 2")
KINDS = ("right", "refused", "SILENT", "TRACEBACK", "not tried")
QUICK = [
    "bert",
    "bert as an encoder",
    "bloom",
    "deepseek_v4",
    "gemma3_text",
    "gpt2",
    "llama",
    "llama4_text",
    "mamba",
    "mixtral",
    "xlm",
]
PER_PROCESS = 20


def main() -> None:
    """Test all families, a few per process, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="Markdown file of the table.")
    parser.add_argument("--quick", action="store_true", help=f"Only {', '.join(QUICK)}.")
    parser.add_argument("--types", nargs="*", help="Only these model types.")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rows:
        _try_here(arguments.types, arguments.rows)
        return
    from families_models import VARIANTS, model_types

    types = arguments.types or (QUICK if arguments.quick else sorted([*model_types(), *VARIANTS]))
    rows = {}
    for begin in range(0, len(types), PER_PROCESS):
        rows |= _try_in_process(types[begin : begin + PER_PROCESS])
    text = report(rows)
    print(text)
    if arguments.output:
        arguments.output.write_text(text)
    sys.exit(any(cell.startswith(("SILENT", "TRACEBACK")) for row in rows.values() for cell in row.values()))


def _try_in_process(types: list[str]) -> dict[str, dict[str, str]]:
    """Test some families in a subprocess, so that a crash loses only the family that caused it."""
    rows: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        while left := [name for name in types if name not in rows]:
            file.write_text("")
            command = [sys.executable, __file__, "--rows", str(file), "--types", *left]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            rows |= {name: row for line in file.read_text().splitlines() for name, row in [json.loads(line)]}
            if ended.returncode:
                last = next((name for name in left if name not in rows), None)
                if last is not None:
                    said = (ended.stderr.strip().splitlines() or ["no message"])[-1]
                    rows[last] = dict.fromkeys(PARTS, f"TRACEBACK: the process ended with {ended.returncode}: {said}")
    return {name: rows[name] for name in types}


def _try_here(types: list[str], file: Path) -> None:
    from transformers.utils import logging

    from megaft.base import parallel

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(parallel.free_port())}
    parallel.join(parallel.discover(os.environ))
    parallel.start_tensor_parallelism(1)
    with file.open("a") as rows:
        for name in types:
            print(json.dumps([name, try_family(name)]), file=rows, flush=True)
    parallel.leave()


def try_family(model_type: str, parts: tuple[str, ...] = PARTS) -> dict[str, str]:
    """Return the outcome of each check of a family: a word and a reason."""
    from families_cases import CASES
    from families_models import VARIANTS, tiny_config

    try:
        config = tiny_config(*VARIANTS.get(model_type, (model_type, {})))
    except Exception as error:
        return dict.fromkeys(parts, f"not tried: {_one_line(error)}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            model = _save(config, folder)
        except Exception as error:
            return dict.fromkeys(parts, f"not tried: {_one_line(error)}")
        return {part: outcome(CASES[part], folder, model).replace(folder, "MODEL") for part in parts}


def _save(config: Any, folder: str) -> Any:
    """Save and return a tiny model; None if transformers cannot create one, with the reason in the folder."""
    import torch
    from families_models import tiny_model
    from safetensors.torch import save_file
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        model = tiny_model(config)
    except (AttributeError, ImportError, ValueError):
        config.save_pretrained(folder)
        save_file({"none": torch.zeros(1)}, f"{folder}/model.safetensors", metadata={"format": "pt"})
        return None
    with torch.no_grad():
        logits = model(input_ids=torch.arange(9).unsqueeze(0), use_cache=False).logits
    assert logits.isfinite().all(), "logits are not finite"
    model.save_pretrained(folder)
    if type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:  # the text model inside a larger model's folder
        config.save_pretrained(folder)
    return model


def outcome(case: Callable[[str, Any], None], folder: str, model: Any) -> str:
    """Return the outcome of one check."""
    from megaft.base.errors import UserError

    try:
        case(folder, model)
    except UserError as error:
        lines = str(error).splitlines()
        return f"refused: {lines[0]}" if len(lines) == 1 else f"TRACEBACK: a refusal of {len(lines)} lines: {lines}"
    except AssertionError as error:
        if str(error).startswith("differs"):
            return f"SILENT: {_one_line(error)}"
        return f"TRACEBACK: {_one_line(error)}"
    except Exception as error:
        return f"TRACEBACK: {_one_line(error)}"
    return "right"


def _one_line(error: Any) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def report(rows: dict[str, dict[str, str]]) -> str:
    """Return the page: versions, counts, the table, and each reason once."""
    counts = {part: Counter(_kind(row[part]) for row in rows.values()) for part in PARTS}
    lines = [
        "# Model families",
        "",
        _wrapped(
            "Support for every model type that AutoModelForCausalLM accepts, tested on a tiny random model of each. "
            "*Right* means equal to plain forward passes of the same model in transformers: weights and greedy "
            "tokens exactly, losses and nats to 2e-5. *Refused* means a one-line error before anything is trained or "
            "printed. *Isolates packed documents* is `--data.attend-within-documents`. Numbers refer to the notes "
            "below the table, in which NAME is the model type, CLASS its class and MODEL the folder."
        ),
        "",
        _wrapped(
            "`python tools/benchmarks/families.py --output docs/families.md` with transformers "
            f"{version('transformers')}, torch {version('torch')}, deepspeed {version('deepspeed')}, on a CPU."
        ),
        "",
        f"| {len(rows)} configurations | {' | '.join(KINDS)} |",
        f"|---|{'---:|' * len(KINDS)}",
        *(f"| {part} | {' | '.join(str(counts[part][kind]) for kind in KINDS)} |" for part in PARTS),
        "",
        f"| model type | {' | '.join(PARTS)} |",
        f"|---|{'---|' * len(PARTS)}",
    ]
    notes: dict[str, int] = {}
    for name, row in rows.items():
        cells = [_cell(_without_names(row[part]), notes) for part in PARTS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *(_wrapped(f"{number}. {note}") for note, number in notes.items()), ""]
    return "\n".join(lines)


def _wrapped(text: str) -> str:
    """Wrap a paragraph or list item at 120 columns."""
    indent = " " * (text.find(" ") + 1) if text[0].isdigit() else ""
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _without_names(cell: str) -> str:
    """Replace names in a cell, so that families with the same reason share a note."""
    cell = re.sub(r"\w+ \(model_type [\w-]+\)", "CLASS (model_type NAME)", cell)
    return re.sub(r"(model_type(?: is)?) (?!NAME\b|is\b)[\w-]+", r"\1 NAME", cell)


def _kind(cell: str) -> str:
    return cell.partition(":")[0]


def _cell(cell: str, notes: dict[str, int]) -> str:
    kind, _, reason = cell.partition(": ")
    return f"{kind} {notes.setdefault(reason, len(notes) + 1)}" if reason else kind


if __name__ == "__main__":
    main()
