"""Command `python -m evaluate_zero_shot`: score language models by named protocols, and write a report."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from itertools import product
from typing import TYPE_CHECKING

from evaluate_zero_shot.config import EvaluateConfig, parse
from evaluate_zero_shot.protocols import PROTOCOLS, describe
from evaluate_zero_shot.tasks import TASKS
from megaft.base.errors import ConfigError
from megaft.base.exit_code import exit_code_of, print_help
from megaft.base.library_environment import set_library_environment

if TYPE_CHECKING:
    from megaft.base.parallel import Topology
    from megaft.models.backend import Backend


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code (see megaft.base.errors)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["--describe"]:
        return exit_code_of(explain, arguments[1:])
    if {"-h", "--help"} & {*arguments}:
        return exit_code_of(print_help, parse, arguments)  # before the heavy imports, so that help is instant
    set_library_environment()
    from megaft.base import parallel

    return parallel.exit_code_on_ranks(lambda topology: run(parse(arguments, topology.is_main), topology))


def explain(names: list[str]) -> int:
    """Print the definitions of the named protocols and tasks; without names, of all."""
    for name in names or [*PROTOCOLS, *TASKS]:
        if name in PROTOCOLS:
            print(describe(PROTOCOLS[name]), end="\n\n")
        elif name in TASKS:
            print(f"{name}: {TASKS[name].title}\n{TASKS[name].description}", end="\n\n")
        else:
            raise ConfigError(
                f"--describe {name!r} is neither a protocol ({', '.join(PROTOCOLS)}) nor a task ({', '.join(TASKS)}); "
                "use one of these names."
            )
    return 0


def run(config: EvaluateConfig, topology: Topology) -> int:
    """Evaluate every model on every task by every protocol and stride, adding each result to results.json."""
    from evaluate_zero_shot.evaluation import results
    from evaluate_zero_shot.evaluation.evaluate import evaluate
    from evaluate_zero_shot.evaluation.evaluated_model import load
    from evaluate_zero_shot.evaluation.plan import evaluation_of, find_all_data, geometries
    from evaluate_zero_shot.report import write
    from evaluate_zero_shot.report.deviations import note_on_comparison
    from megaft.base import parallel
    from megaft.base.agreement import main_first, together
    from megaft.base.device import device_of
    from megaft.base.lock import locked
    from megaft.data.tokenizer import load_tokenizer
    from megaft.models.backend import backend_of, require_whole_groups
    from megaft.weights.folder import model_source

    size = config.tensor_parallel_size
    require_whole_groups(topology.world_size, size)
    backends: list[Backend] = [backend_of(model_source(source), config.backend, size) for source in config.model]
    uses_megatron = "megatron" in backends
    is_alone = topology.world_size == 1 and not config.partition and not uses_megatron  # then DeepSpeed is not imported
    device = device_of(topology) if is_alone else parallel.join(topology)
    if uses_megatron:
        parallel.start_tensor_parallelism(size)
    # Missing data and mistyped model names end the command before any model is loaded.
    data = main_first(find_all_data, config, os.environ)
    tokenizers = [together(load_tokenizer, model_source(source)) for source in config.model]
    with locked(config.output, topology.is_main):
        done = []
        for source, tokenizer, backend in zip(config.model, tokenizers, backends, strict=True):
            evaluated = load(source, tokenizer, config, backend, device)
            all_geometries = geometries(config, evaluated)  # at once: a bad one is refused before hours of scoring
            for task, geometry in product(config.tasks, all_geometries):
                evaluation = evaluation_of(config, evaluated, TASKS[task], geometry, data[task, geometry.protocol.name])
                done.append(evaluate(evaluated, evaluation, config.output))
                if parallel.is_main():
                    results.write(config.output, done)
                    print(results.summary(done[-1]), flush=True)
                    if note := note_on_comparison(asdict(done[-1])):
                        print(note, flush=True)
                    if note := results.note_on_guessing(done[-1], evaluated.tokenizer.vocab_size):
                        print(note, file=sys.stderr)
            del evaluated  # frees memory for the next model
        if parallel.is_main():
            write.write(config.output)
            print(f"report: {config.output / 'report.html'}")
    parallel.barrier()
    return 0


if __name__ == "__main__":
    sys.exit(main())
