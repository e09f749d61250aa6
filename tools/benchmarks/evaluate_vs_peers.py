"""Time zero-shot evaluation against Megatron-LM's loop and lm-evaluation-harness: same model, text and result.

    python tools/benchmarks/evaluate_vs_peers.py --preset gpt2-124m-cpu [--data CORPORA] [--quick]

It first predicts speedups from FLOPs; then every system runs in its own process, in turn, repeat after repeat. The
report goes to stdout and, with the raw figures, to tools/benchmarks/results. It fails if the results do not agree.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import tyro
from evaluate_vs_peers_case import PRESETS, Case, Shape, flops, make_model, make_text
from evaluate_vs_peers_report import Comparison, as_dict, markdown

HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Time zero-shot evaluation against other systems."""

    preset: Literal["toy", "gpt2-124m-cpu", "gpt2-xl-h100"]
    """Models, texts and device of the benchmark."""
    cases: tuple[str, ...] = ()
    """Comparisons to run: stride, pages, padded, lambada."""
    without: tuple[str, ...] = ()
    """Systems to leave out; megaft always runs."""
    data: Path | None = None
    """Folder of the real corpora and of GPT-2's vocabulary (gpt2_bpe). By default Python's documentation is used."""
    repeats: int = 3
    """Runs of each system."""
    quick: bool = False
    """Score half as much, with one repeat fewer."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Overrides the preset's."""
    results: Path = HERE / "results"
    """Folder for the report and the raw figures."""

    def chosen(self) -> list[Case]:
        """Return the selected comparisons."""
        found = [case for case in PRESETS[self.preset] if not self.cases or case.name in self.cases]
        found = [replace(case, peers=tuple(p for p in case.peers if p not in self.without)) for case in found]
        if self.quick:
            found = [replace(case, size=max(1, case.size // 2)) for case in found]
        return [replace(case, dtype=self.dtype) for case in found] if self.dtype else found


def main(arguments: Arguments) -> int:
    """Predict, measure, report; return 1 if systems give different numbers."""
    from megaft.base.environment import environment
    from megaft.base.files import write_json_atomic

    repeats = max(1, arguments.repeats - arguments.quick)
    with tempfile.TemporaryDirectory() as folder:
        made = [prepared(case, Path(folder), arguments.data) for case in arguments.chosen()]
        measured = list(measure(made, Path(folder), repeats))
    where = environment()
    where["command"] = [short(argument) for argument in where["command"]]
    page = markdown(arguments.preset, measured, where, repeats)
    print(page)
    hardware = where["device"] if measured[0].case.device == "cuda" else f"{where['num_cores']}-cores-{where['device']}"
    slug = re.sub(r"[^a-z0-9]+", "-", hardware.lower())
    stem = arguments.results / f"evaluate-{arguments.preset}_{slug}_{datetime.now(UTC):%Y%m}"
    arguments.results.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".md").write_text(page)
    write_json_atomic(stem.with_suffix(".json"), as_dict(measured, where))
    return 0 if all(comparison.is_sound for comparison in measured) else 1


def prepared(case: Case, folder: Path, data: Path | None) -> Comparison:
    """Write a case's model and text, and print the speedup predicted from FLOPs."""
    from transformers import AutoConfig

    model = folder / case.model
    if not model.exists():
        make_model(case.model, model, None if data is None else data / "gpt2_bpe")
    make_text(case, folder / case.data, data)
    (folder / f"{case.name}.json").write_text(json.dumps(asdict(case)))
    config = AutoConfig.from_pretrained(model)
    rows, context_length = planned(case, folder, config)
    found = Comparison(
        case=case,
        flops=flops(case, Shape.of(config), rows, context_length),
        num_windows=len(rows),
        num_scored_tokens=sum(targets for _, targets in rows),
        runs={contestant: [] for contestant in case.contestants},
    )
    said = ", ".join(f"{found.predicted(peer):.2f} times as fast as {peer}" for peer in case.peers)
    print(f"{case.name}: predicted {said or 'nothing'}", file=sys.stderr, flush=True)
    return found


def planned(case: Case, folder: Path, config: Any) -> tuple[list[tuple[int, int]], int]:
    """Return inputs and targets of every window that megaft scores, and the context length."""
    from evaluate_zero_shot.evaluation.geometry import resolve_geometry
    from evaluate_zero_shot.evaluation.prepared import prepare
    from evaluate_zero_shot.protocols import PROTOCOLS
    from evaluate_zero_shot.tasks import TASKS
    from evaluate_zero_shot.texts.data_files import DataFile
    from megaft.data.tokenizer import load_tokenizer

    protocol = PROTOCOLS[case.protocol]
    cut = resolve_geometry(protocol, config.max_position_embeddings, case.context_length, case.stride)
    tokenizer = load_tokenizer(str(folder / case.model))
    data = DataFile(folder / case.data, "", None)
    rows = prepare(TASKS[case.task], protocol, data, None, tokenizer, cut).rows
    return [(row.num_inputs, row.num_targets) for row in rows], cut.num_inputs


def measure(comparisons: list[Comparison], folder: Path, repeats: int) -> Iterator[Comparison]:
    """Run every system, in turn."""
    for comparison in comparisons:
        for _ in range(repeats):
            for contestant, runs in comparison.runs.items():
                runs.append(launch(contestant, folder / f"{comparison.case.name}.json"))
                seconds, nats = runs[-1]["seconds"], runs[-1]["nats"]
                line = f"{comparison.case.name} {contestant}: {seconds:.2f} s, {nats:.4f} nats"
                print(line, file=sys.stderr, flush=True)
        yield comparison


def launch(contestant: str, case: Path) -> dict[str, Any]:
    """Run one system.

    Raises:
        SystemExit: It failed; the message has its last line of output.
    """
    command = [sys.executable, str(HERE / "evaluate_vs_peers_run.py"), contestant, str(case)]
    settings = {"OMP_NUM_THREADS": str(os.cpu_count()), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{contestant} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def short(argument: str) -> str:
    """Return an argument without the machine's folders."""
    return "/".join(Path(argument).parts[-2:]) if argument.startswith(("/", "..")) else argument


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
