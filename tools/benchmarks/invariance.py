"""Train one small run split in many ways, and compare every loss and the final weights.

    python tools/benchmarks/invariance.py [--steps 20] [--output docs/invariance.md]

A split is micro-batch x accumulation x ranks x ZeRO stage x tensor parallelism, on CPU ranks joined by gloo. Documents
of unequal length, one per sample, give micro-batches different numbers of labels. Splits of one world size share a
launch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import launchers
import toy
import tyro

GLOBAL_BATCH_SIZE = 8
TOLERANCE = 1e-5
LEARNING_RATE = 1e-3


@dataclass(frozen=True, slots=True)
class Way:
    """One way to split the run."""

    world_size: int
    micro_batch_size: int
    zero_stage: int
    optimizer: str = "adamw"
    precision: str = "fp32"
    is_offloaded: bool = False
    tensor_parallel_size: int = 0
    """0 means transformers' modules, 1 or more megatron-core's."""

    @property
    def accumulation(self) -> int:
        """Micro-batches per step and rank."""
        return GLOBAL_BATCH_SIZE // self.micro_batch_size // (self.world_size // max(1, self.tensor_parallel_size))

    @property
    def name(self) -> str:
        """A folder's name."""
        return "-".join(str(value) for value in asdict(self).values())

    def deepspeed_json(self) -> dict:
        """The engine's settings."""
        zero: dict = {"stage": self.zero_stage}
        if self.zero_stage == 3:
            zero["stage3_param_persistence_threshold"] = 0  # partition even the small parameters of this model
        if self.is_offloaded:
            zero["offload_optimizer"] = {"device": "cpu"}
        settings = {
            "train_batch_size": GLOBAL_BATCH_SIZE,
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_clipping": 0.5,
            "zero_optimization": zero,
        }
        if self.precision != "fp32":
            settings[self.precision] = {"enabled": True}
        if self.precision == "fp16":
            settings["fp16"]["initial_scale_power"] = 8
        return settings


REFERENCES = {
    ("adamw", "fp32"): Way(1, 8, 0),
    ("sgd", "fp32"): Way(1, 8, 0, "sgd"),
    ("adamw", "bf16"): Way(1, 8, 1, precision="bf16"),
    ("adamw", "fp16"): Way(1, 8, 1, precision="fp16"),
}
"""Reference run of each optimizer and precision."""

WAYS = (
    *REFERENCES.values(),
    Way(1, 2, 0),
    Way(1, 1, 1),
    Way(1, 4, 3),
    Way(1, 2, 2, is_offloaded=True),
    Way(1, 2, 2, "sgd"),
    Way(2, 4, 0),
    Way(2, 1, 1),
    Way(2, 2, 2),
    Way(2, 1, 3),
    Way(2, 2, 2, is_offloaded=True),
    Way(2, 2, 3, "sgd"),
    Way(4, 2, 0),
    Way(4, 1, 1),
    Way(4, 2, 2),
    Way(4, 1, 3),
    Way(4, 1, 2, "sgd"),
    *(Way(1, 4, stage, tensor_parallel_size=1) for stage in (0, 2)),
    *(Way(2, 4, stage, tensor_parallel_size=2) for stage in range(4)),
    *(Way(4, 2, stage, tensor_parallel_size=2) for stage in range(4)),
    *(Way(4, 4, stage, tensor_parallel_size=4) for stage in range(4)),
    Way(4, 2, 2, "sgd", tensor_parallel_size=2),
    Way(2, 2, 1, precision="bf16"),
    Way(2, 2, 2, precision="bf16"),
    Way(2, 2, 3, precision="bf16"),
    Way(2, 2, 1, precision="fp16"),
    Way(2, 2, 2, precision="fp16"),
    Way(2, 2, 3, precision="fp16"),
    *(Way(4, 2, stage, precision="bf16", tensor_parallel_size=2) for stage in (1, 2, 3)),
    *(Way(4, 2, stage, precision="fp16", tensor_parallel_size=2) for stage in (1, 2, 3)),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Differences of a run from its reference."""

    way: Way
    first_loss: float
    last_loss: float
    loss_difference: float
    """Largest over all steps, in nats per token."""
    norm_difference: float
    """Largest relative difference of the gradient norm before clipping, over all steps."""
    weight_difference: float
    """Largest over all elements of all parameters."""

    @property
    def is_equal(self) -> bool:
        """Return whether losses, gradient norms and weights agree to TOLERANCE."""
        return max(self.loss_difference, self.norm_difference, self.weight_difference) <= TOLERANCE


def make_inputs(folder: Path) -> None:
    """Write the model, and paragraphs of unequal length as prepared documents."""
    from megaft.config.prepare import PrepareConfig
    from megaft.data.prepare import prepare

    toy.make_model(folder / "model")
    train, _ = toy.make_texts(folder)
    prepare(
        PrepareConfig(inputs=(str(train),), output=folder / "train", tokenizer=str(folder / "model"), unit="document")
    )


def run_ways(folder: Path, ways: list[Way], steps: int) -> None:
    """Train every split of this launch's world size on this rank, one after another."""
    from deepspeed.accelerator import get_accelerator

    # DeepSpeed asks for a CPU with fp16 instructions; torch computes fp16 without them too, slower.
    accelerator = get_accelerator()
    assert accelerator is not None
    accelerator.is_fp16_supported = lambda: True
    toy.train_in_turn((folder / f"{way.name}.json", way.deepspeed_json(), flags(folder, way, steps)) for way in ways)


def flags(folder: Path, way: Way, steps: int) -> list[str]:
    """Return the command line of a run, without its DeepSpeed JSON."""
    return [
        f"--model.path={folder / 'model'}",
        f"--data.train={folder / 'train'}",
        "--data.sample=document",
        "--data.context-length=64",
        f"--run.dir={folder / way.name}",
        f"--run.max-steps={steps}",
        "--run.export=none",
        f"--optim.name={way.optimizer}",
        f"--optim.learning-rate={LEARNING_RATE}",
        "--optim.weight-decay=0.1",
        "--optim.warmup-steps=2",
        *(["--optim.momentum=0.9"] if way.optimizer == "sgd" else []),
        *(["--model.backend=megatron"] if way.tensor_parallel_size else []),
        f"--parallel.tensor-parallel-size={max(1, way.tensor_parallel_size)}",
    ]


def outcomes(folder: Path, ways: tuple[Way, ...], steps: int) -> Iterator[Outcome]:
    """Compare every finished run with its reference."""
    for way in ways:
        reference = REFERENCES[way.optimizer, way.precision]
        losses, expected = rows_of(folder / way.name, "loss"), rows_of(folder / reference.name, "loss")
        norms, expected_norms = (rows_of(folder / one.name, "grad_norm") for one in (way, reference))
        assert len(losses) == len(expected) == steps, (way, len(losses))
        weights, expected_weights = weights_of(folder, way.name, steps), weights_of(folder, reference.name, steps)
        yield Outcome(
            way,
            losses[0],
            losses[-1],
            max(abs(a - b) for a, b in zip(losses, expected, strict=True)),
            max(abs(a - b) / b for a, b in zip(norms, expected_norms, strict=True)),
            max(float((weights[name] - expected_weights[name]).abs().max()) for name in expected_weights),
        )


def rows_of(run_dir: Path, quantity: str) -> list[float]:
    """Return a quantity of every step."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row[quantity] for row in rows if quantity in row]


def weights_of(folder: Path, name: str, step: int) -> dict:
    """Return every fp32 weight of a run's checkpoint by its name in transformers."""
    from megaft.weights import canonical, manifest
    from megaft.weights.checkpoint_reader import WEIGHT
    from megaft.weights.parameters import load_config, shapes_of

    config = load_config(str(folder / "model"))
    saved = canonical.transformers_view(manifest.folder_of(folder / name, step), config)
    return {name: saved.read(name, WEIGHT) for name in shapes_of(config)}


def table(results: list[Outcome]) -> str:
    """Return the comparison as Markdown."""
    columns = (
        "ranks",
        "tensor-parallel",
        "micro-batch",
        "accumulation",
        "ZeRO",
        "optimizer",
        "precision",
        "first loss",
        "last loss",
    )
    head = f"| {' | '.join(columns)} | loss difference | norm difference | weight difference |"
    rows = [
        f"| {r.way.world_size} | {r.way.tensor_parallel_size or '-'} | {r.way.micro_batch_size} "
        f"| {r.way.accumulation} | {r.way.zero_stage}"
        f"{' offload' if r.way.is_offloaded else ''} | {r.way.optimizer} | {r.way.precision} | {r.first_loss:.6f} | "
        f"{r.last_loss:.6f} | {r.loss_difference:.1e} | {r.norm_difference:.1e} | {r.weight_difference:.1e} |"
        for r in results
    ]
    return "\n".join([head, "|---" * 12 + "|", *rows])


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """Train one small run split in many ways, and compare every loss and the final weights."""

    steps: int = 20
    """Optimizer steps of each run."""
    output: Path | None = None
    """Write the table here, between the page's two comment lines."""
    folder: Path | None = None
    """Folder of the runs; set for the ranks of a launch."""


def main(arguments: Arguments) -> int:
    """Launch the ranks of each world size, compare, print."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_inputs(folder)
        for world_size in sorted({way.world_size for way in WAYS}):
            command = [*launchers.deepspeed(world_size), __file__, "--folder", str(folder)]
            subprocess.run([*command, "--steps", str(arguments.steps)], check=True)
        results = list(outcomes(folder, WAYS, arguments.steps))
    print(table(results))
    if arguments.output:
        write_between_marks(arguments.output, table(results))
    return 0 if all(result.is_equal for result in results if result.way.precision == "fp32") else 1


def write_between_marks(page: Path, content: str) -> None:
    """Replace the text between the page's `<!-- table -->` and `<!-- end -->`."""
    before, _, rest = page.read_text().partition("<!-- table -->\n")
    _, mark, after = rest.partition("<!-- end -->")
    page.write_text(f"{before}<!-- table -->\n{content}\n{mark}{after}")


if __name__ == "__main__":
    chosen = tyro.cli(Arguments, args=sys.argv[1:])
    if chosen.folder:  # this is a rank
        here = [way for way in WAYS if way.world_size == int(os.environ["WORLD_SIZE"])]
        run_ways(chosen.folder, here, chosen.steps)
    else:
        sys.exit(main(chosen))
