"""Elastic checkpoints: any ZeRO stage and number of ranks resumes at any other with the same state and losses."""

import os
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from plain_engine import IDENTITY, WEIGHT_DECAY

from megaft.checkpoint import engine_state, resume
from megaft.checkpoint.resume import load
from megaft.checkpoint.run_state import RunState
from megaft.checkpoint.saver import Saver
from megaft.config.train import CheckpointConfig, OptimConfig
from megaft.weights.checkpoint_reader import CheckpointReader
from megaft.weights.manifest import folder_of, verify

pytestmark = pytest.mark.slow

GLOBAL_BATCH_SIZE, CUT_AT, STEPS = 8, 3, 5
SIZES = (7, 13, 5)  # no rank's part is a whole parameter, and none is like another
STAGES = range(4)


@dataclass(frozen=True)
class Hop:
    """A checkpoint saved at one stage and loaded at another."""

    source: str
    stage: int

    @property
    def target(self):
        return f"{self.source}-{self.stage}"


def make_engine(stage, dtype="fp32", persistence_threshold=0):
    import deepspeed

    from megaft.models.parameters import parameter_groups
    from megaft.run.optim import build_optimizer

    torch.manual_seed(0)
    layers = [torch.nn.Linear(SIZES[0], SIZES[1]), torch.nn.GELU(), torch.nn.Linear(SIZES[1], SIZES[2])]
    model = torch.nn.Sequential(*layers)
    config = OptimConfig(weight_decay=WEIGHT_DECAY, learning_rate=1e-2)
    groups = parameter_groups(model.named_parameters(), WEIGHT_DECAY)
    assert [group["weight_decay"] for group in groups] == [WEIGHT_DECAY, 0.0]
    zero = (
        {"stage": stage, "stage3_param_persistence_threshold": persistence_threshold}
        if stage == 3
        else {"stage": stage}
    )
    settings = {
        "train_batch_size": GLOBAL_BATCH_SIZE,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        **({dtype: {"enabled": True}} if dtype != "fp32" else {}),
    }
    return deepspeed.initialize(
        model=model, optimizer=build_optimizer(groups, config, device_type="cpu"), config=settings
    )[0]


def train(engine, first, last):
    """Train steps [first, last), with each step's samples split over ranks; return the losses."""
    from megaft.base import parallel

    rank, size = parallel.data_parallel_rank(), parallel.data_parallel_size()
    share = slice(rank * GLOBAL_BATCH_SIZE // size, (rank + 1) * GLOBAL_BATCH_SIZE // size)
    losses = []
    for step in range(first, last):
        samples = torch.randn(GLOBAL_BATCH_SIZE, SIZES[0], generator=torch.Generator().manual_seed(step))
        dtype = next(engine.module.parameters()).dtype
        loss = engine(samples[share].to(dtype)).float().square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(float(parallel.sum_over_data_ranks(loss.detach().clone())) / size)
    return losses


def save(engine, run_dir, step, **settings):
    saver = Saver(run_dir, IDENTITY, CheckpointConfig(keep_last=9, **settings))
    saver.save(engine, RunState(step=step))
    return saver


def joined(function):
    """Run a function as the rank given by the environment."""
    from megaft.base import parallel

    parallel.join(parallel.discover(os.environ))
    result = function()
    parallel.leave()
    return result


def first_runs(folder):
    """Train at every stage and save in the middle; go back and train again; also save asynchronously."""

    def run():
        return {stage: first_run(folder / f"{stage}", make_engine(stage)) for stage in STAGES} | {
            f"{stage} {dtype} {threshold}": first_run(
                folder / f"{dtype}-{threshold}-{stage}", make_engine(stage, dtype, threshold)
            )
            for stage, dtype, threshold in ((1, "bf16", 0), (2, "bf16", 0), (3, "bf16", 0), (3, "fp32", 100_000))
        }

    return joined(run)


def first_run(run_dir, engine):
    save(engine, run_dir, 0)  # before the optimizer has moments
    whole = train(engine, 0, CUT_AT)
    save(engine, run_dir, CUT_AT)
    later = train(engine, CUT_AT, STEPS)
    again = {}
    for step in (CUT_AT, 0):
        assert load(engine, folder_of(run_dir, step), IDENTITY).step == step
        again[step] = train(engine, step, STEPS)
    load(engine, folder_of(run_dir, CUT_AT), IDENTITY)
    saver = save(engine, run_dir / "background", CUT_AT, in_background=True)
    train(engine, CUT_AT, STEPS)
    assert saver.is_pending
    saver.publish()
    return {"losses": whole + later, "again": again}


def hops(folder, hops):
    """Resume each hop's checkpoint; return the losses, and the weights and moments that this rank read."""
    return joined(lambda: {hop.target: continued(folder, hop) for hop in hops})


def continued(folder, hop):
    engine = make_engine(hop.stage)
    num_read = 0

    class CountingReader(CheckpointReader):
        def read(self, name, kind, offset, numel):
            nonlocal num_read
            num_read += numel
            return super().read(name, kind, offset, numel)

    resume.CheckpointReader = CountingReader
    load(engine, folder_of(folder / hop.source, CUT_AT), IDENTITY)
    resume.CheckpointReader = CheckpointReader
    save(engine, folder / hop.target, CUT_AT)
    own = sum(place.numel for place in engine_state.partition_slices(engine))
    return {"losses": train(engine, CUT_AT, STEPS), "read": num_read, "own": own}


@pytest.fixture(scope="module")
def folder(memory_folder):
    return memory_folder


@pytest.fixture(scope="module")
def first(run_ranks, folder):
    return run_ranks(2, first_runs, folder)


OFFSETS = {1: (0, 1, 2, 3), 4: (1, 2), 2: (2,), 8: (2,)}
"""Numbers of ranks in the order of resuming, and how many stages higher each checkpoint is loaded."""


@pytest.fixture(scope="module")
def continuations(run_ranks, folder, first):
    """2 ranks -> 1 -> 4 -> 2 and 8: every stage to every stage on the first way, and from and to each on the others."""
    results, sources = {}, {str(stage): stage for stage in STAGES}
    for world_size, offsets in OFFSETS.items():
        way = [Hop(source, (stage + offset) % 4) for source, stage in sources.items() for offset in offsets]
        for hop, ranks in zip(way, zip_ranks(run_ranks(world_size, hops, folder, way)), strict=True):
            results[world_size, hop] = ranks
        # One checkpoint of every stage goes on, each of another history.
        sources = {hop.target: hop.stage for hop in way if hop.stage != sources[hop.source]}
        sources = {source: stage for stage, source in {stage: source for source, stage in sources.items()}.items()}
    return results


def zip_ranks(ranks):
    return [[rank[target] for rank in ranks] for target in ranks[0]]


def whole_state(folder):
    """Return every whole weight and moment."""
    pieces = CheckpointReader(folder, verify(folder))
    return {
        (name, kind): pieces.read(name, kind, 0, shape.numel())
        for name, shape in pieces.shapes.items()
        for kind in ("weight", "exp_avg", "exp_avg_sq")
    }


def test_every_stage_trains_the_same(first):
    for stage in STAGES:
        assert first[0][stage]["losses"] == pytest.approx(first[0][0]["losses"], abs=1e-5)


@pytest.mark.parametrize("name", [*STAGES, "1 bf16 0", "2 bf16 0", "3 bf16 0", "3 fp32 100000"])
def test_going_back_in_a_run_repeats_it_bit_for_bit(first, name):
    for rank in first:
        whole = rank[name]["losses"]
        assert rank[name]["again"] == {CUT_AT: whole[CUT_AT:], 0: whole}


@pytest.mark.parametrize("stage", STAGES)
def test_in_the_background_the_state_at_the_save_is_written(first, folder, stage):
    one, other = (folder_of(run_dir, CUT_AT) for run_dir in (folder / f"{stage}", folder / f"{stage}" / "background"))
    assert verify(one)["files"] == verify(other)["files"]


def test_every_way_was_gone(continuations):
    ways = {(world_size, int(hop.source[-1]), hop.stage) for world_size, hop in continuations}
    assert {way[1:] for way in ways if way[0] == 1} == {(a, b) for a in STAGES for b in STAGES}
    for world_size in (4, 2, 8):
        assert {way[1] for way in ways if way[0] == world_size} == {*STAGES}
        assert {way[2] for way in ways if way[0] == world_size} == {*STAGES}


def test_weights_and_moments_are_exact_after_every_load(continuations, folder):
    for _, hop in continuations:
        before, after = (whole_state(folder_of(folder / name, CUT_AT)) for name in (hop.source, hop.target))
        assert before.keys() == after.keys()
        for key, values in before.items():
            assert torch.equal(values, after[key]), (hop, key)


def test_losses_are_those_of_the_uninterrupted_run(continuations, first):
    for (world_size, hop), ranks in continuations.items():
        for rank in ranks:
            expected = first[0][int(hop.source[0])]["losses"][CUT_AT:]
            assert rank["losses"] == pytest.approx(expected, abs=1e-5), (world_size, hop)


def test_no_rank_reads_more_than_its_own(continuations):
    numel = sum(a * b + b for a, b in pairwise(SIZES))
    for (world_size, hop), ranks in continuations.items():
        assert all(rank["read"] == 3 * rank["own"] for rank in ranks)
        assert sum(rank["own"] for rank in ranks) == (numel * world_size if hop.stage == 0 else numel), hop
        if hop.stage:
            assert max(rank["own"] for rank in ranks) <= numel / world_size + 32  # alignment
