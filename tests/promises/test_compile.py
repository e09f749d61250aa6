"""Training with compiled blocks: the losses of eager mode, one graph for equal blocks, and resumes bit for bit.

`make test` captures graphs and runs them without torch's code generator (the backend aot_eager), which takes a minute.
"""

import json
import os
from functools import partialmethod

import pytest
import toy

from megaft.models.compiled import missing_compiler

pytestmark = pytest.mark.slow

BACKENDS = [
    "aot_eager",
    pytest.param(
        "inductor",
        marks=[
            pytest.mark.long,
            pytest.mark.skipif(missing_compiler() != "", reason=f"{missing_compiler()}, which torch.compile needs"),
        ],
    ),
]
CONTEXT, STEPS, CUT, DROPOUT = 32, 4, 2, 0.1
ENGINES = {"fp32-2": {"stage": 2}, "bf16-1": {"stage": 1, "bf16": True}}
FLAGS = {
    "eager": [["off", STEPS]],
    "compiled": [["on", STEPS]],
    "resumed": [["on", CUT], ["on", STEPS]],
}
"""By run, `--model.compile` and the last step of each of its parts."""


def train(folder, flags, backend):
    """Train every run in this process; return torch's counters of graphs and of breaks in them, by engine."""
    import torch
    from torch._dynamo.utils import counters

    from megaft.models import compiled

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    found = {}
    if backend != "inductor":
        compiled.OPTIONS = None
        compiled.missing_compiler = lambda: ""
        torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend=backend)

    def cases():
        for engine, settings in ENGINES.items():
            torch._dynamo.reset()
            counters.clear()
            for name, parts in FLAGS.items():
                for compile_choice, last_step in parts:
                    own = [f"--run.dir={folder / engine / name}", f"--model.compile={compile_choice}"]
                    yield folder / f"{engine}.json", json_of(**settings), [*own, f"--run.max-steps={last_step}", *flags]
            found[engine] = counters["stats"]["unique_graphs"], dict(counters["graph_break"])

    toy.train_in_turn(cases())
    return found


def json_of(stage, bf16=False):
    return {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
    } | ({"bf16": {"enabled": True}} if bf16 else {})


@pytest.fixture(scope="module", params=BACKENDS)
def trained(request, run_ranks, toy_model, toy_texts, memory_folder):
    """Folder of the runs, and torch's counters."""
    folder = memory_folder / request.param
    folder.mkdir()
    flags = [f"--model.path={toy_model}", f"--data.train={toy_texts[0]}", f"--data.valid={toy_texts[1]}"]
    flags += [f"--data.context-length={CONTEXT}", f"--model.dropout={DROPOUT}", "--optim.schedule=constant"]
    flags += ["--run.export=none", f"--run.validate-every={STEPS}"]
    return folder, run_ranks(1, train, folder, flags, request.param)[0]


def rows(folder, engine, run):
    return [json.loads(line) for line in (folder / engine / run / "metrics.jsonl").read_text().splitlines()]


def losses(folder, engine, run):
    return [row["loss"] for row in rows(folder, engine, run) if "loss" in row]


@pytest.mark.parametrize("engine", ENGINES)
def test_losses_are_those_of_eager_mode(trained, engine):
    """Dropout masks included."""
    folder, _ = trained
    compiled, eager = losses(folder, engine, "compiled"), losses(folder, engine, "eager")
    assert len(compiled) == STEPS
    assert compiled == pytest.approx(eager, rel=1e-6 if engine.startswith("fp32") else 1e-3)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resume_gives_the_same_bits(trained, engine):
    folder, _ = trained
    assert losses(folder, engine, "resumed") == losses(folder, engine, "compiled")
    saved = [next((folder / engine / run / "checkpoints").glob(f"*{STEPS}")) for run in ("resumed", "compiled")]
    weights = [sorted(checkpoint.glob("*.safetensors")) for checkpoint in saved]
    assert weights[0]
    assert [path.read_bytes() for path in weights[0]] == [path.read_bytes() for path in weights[1]]


@pytest.mark.parametrize("engine", ENGINES)
def test_equal_blocks_share_one_graph(trained, engine):
    """Validation adds none."""
    assert trained[1][engine] == (1, {})
