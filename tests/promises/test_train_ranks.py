"""Training properties that need several ranks: one launch per world size, a toy model per case."""

import os
import re
import shutil
from dataclasses import dataclass, replace

import pytest
import toy
from run_folders import losses, rows, shard_hashes

from megaft.weights import manifest as manifest_module
from megaft.weights.checkpoint_reader import CheckpointReader

pytestmark = pytest.mark.slow

STEPS, CUT_AT = 4, 2
GLOBAL_BATCH_SIZE = 6
VALID_BYTES = 600
"""Characters of validation text: five batches of windows."""


@dataclass(frozen=True)
class Case:
    """DeepSpeed settings and flags of a run."""

    name: str
    stage: int
    precision: str | None = None
    flags: tuple[str, ...] = ()
    is_offloaded: bool = False
    micro_batch_size: int = 1
    continues: str = ""
    """Run whose checkpoint of step CUT_AT this one resumes."""

    def deepspeed_json(self):
        zero = {"stage": self.stage, **({"stage3_param_persistence_threshold": 0} if self.stage == 3 else {})}
        if self.is_offloaded:
            zero["offload_optimizer"] = {"device": "cpu"}
        precision = {self.precision: {"enabled": True}} if self.precision else {}
        return {
            "train_batch_size": GLOBAL_BATCH_SIZE,
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_clipping": 1.0,
            "zero_optimization": zero,
            **precision,
        }


def train_cases(folder, common, cases):
    toy.train_in_turn(prepared(folder, common, case) for case in cases)


def prepared(folder, common, case):
    """Return a case's run for toy.train_in_turn, with its first checkpoint in place."""
    run_dir = folder / case.name
    if case.continues and os.environ["RANK"] == "0":
        copy_checkpoint(folder / case.continues, run_dir)
    return folder / f"{case.name}.json", case.deepspeed_json(), [f"--run.dir={run_dir}", *common, *case.flags]


def copy_checkpoint(source, target):
    """Start a run with only the checkpoint of step CUT_AT of another."""
    shutil.copytree(manifest_module.folder_of(source, CUT_AT), manifest_module.folder_of(target, CUT_AT))


@pytest.fixture(scope="module")
def common(toy_model, tmp_path_factory):
    train, valid = toy.make_texts(tmp_path_factory.mktemp("texts"), valid_bytes=VALID_BYTES)
    return [
        f"--model.path={toy_model}",
        f"--data.train={train}",
        f"--data.valid={valid}",
        "--data.context-length=32",
        "--eval.batch-size=4",
        "--optim.schedule=constant",
        "--run.export=none",
    ]


def grad_norms(run_dir):
    return [row["grad_norm"] for row in rows(run_dir) if "loss" in row]


def validations(run_dir):
    return {row["step"]: row["validation"] for row in rows(run_dir) if "validation" in row}


CUT = ("--model.backend=megatron", "--parallel.tensor-parallel-size=2")
ENGINES = [
    *(Case(f"fp32-{stage}", stage) for stage in range(4)),
    *(Case(f"bf16-{stage}", stage, "bf16") for stage in (1, 2, 3)),
    Case("fp32-2-offload", 2, is_offloaded=True),
    Case("sgd-1", 1, flags=("--optim.name=sgd", "--optim.momentum=0.9")),
    Case("adafactor-0", 0, flags=("--optim.name=adafactor",)),
    Case("lora-1", 1, flags=("--lora.rank=4",)),
    Case("lora-3", 3, flags=("--lora.rank=4",)),
    Case("recompute-2", 2, flags=("--model.activation-checkpointing",)),
    *(Case(f"cut-fp32-{stage}", stage, flags=CUT) for stage in range(4)),
    *(Case(f"cut-bf16-{stage}", stage, "bf16", flags=CUT) for stage in (1, 2, 3)),
    Case("cut-recompute-2", 2, flags=(*CUT, "--model.activation-checkpointing")),
]


EXPORTED = ("fp32-0", "fp32-2", "fp32-3", "bf16-3", "lora-3", "cut-fp32-3", "cut-bf16-1")


@pytest.fixture(scope="module")
def resumed(run_ranks, common, memory_folder):
    """Run each engine on two ranks with dropout: once uninterrupted, and once resumed from its checkpoint half-way."""
    folder = memory_folder / "resumed"
    folder.mkdir()
    cases = []
    for engine in ENGINES:
        flags = (*engine.flags, "--model.dropout=0.1", f"--run.max-steps={STEPS}", f"--checkpoint.every={CUT_AT}")
        exports = ("--run.export=last",) if engine.name in EXPORTED else ()
        whole = f"{engine.name}-whole"
        cases.append(replace(engine, name=whole, flags=(*flags, *exports)))
        cases.append(replace(engine, name=f"{engine.name}-cut", flags=flags, continues=whole))
    run_ranks(2, train_cases, folder, common, cases)
    return folder


@pytest.mark.parametrize("engine", [engine.name for engine in ENGINES])
def test_a_resumed_run_is_the_whole_run_bit_for_bit(resumed, engine):
    whole, cut = resumed / f"{engine}-whole", resumed / f"{engine}-cut"
    assert [*losses(whole)] == [*range(1, STEPS + 1)]
    assert losses(cut) == {step: loss for step, loss in losses(whole).items() if step > CUT_AT}
    assert shard_hashes(whole, STEPS) == shard_hashes(cut, STEPS)  # weights and moments
    assert validations(whole)[STEPS] == validations(cut)[STEPS]


@pytest.mark.parametrize("engine", EXPORTED)
def test_an_export_has_the_nats_of_the_trained_model(resumed, engine):
    """Every engine publishes the export, which it does only after this check."""
    card = (resumed / f"{engine}-whole" / "export" / "README.md").read_text()
    found, trained = re.search(
        r"held-out tokens at (\S+) nats per token; the trained model had (\S+)\.\n", card
    ).groups()
    assert float(found) == pytest.approx(float(trained), rel=1e-5)
    assert "megaft" not in (resumed / f"{engine}-whole" / "export" / "config.json").read_text()  # an attention's name


@pytest.mark.parametrize("name", ["fp32-2", "cut-fp32-2"])
def test_recomputing_activations_changes_no_bit(resumed, name):
    recomputed = resumed / f"{name.replace('fp32', 'recompute')}-whole"
    assert losses(resumed / f"{name}-whole") == losses(recomputed)
    assert shard_hashes(resumed / f"{name}-whole", STEPS) == shard_hashes(recomputed, STEPS)


def test_dropout_is_the_same_at_every_stage(resumed):
    """Masks are keyed by the samples, so stages differ by rounding only."""
    first, *others = (losses(resumed / f"fp32-{stage}-whole") for stage in range(4))
    for other in others:
        assert [float.fromhex(x) for x in other.values()] == pytest.approx(
            [float.fromhex(x) for x in first.values()], abs=1e-5
        )


def test_every_stage_tells_the_same_gradient_norm(resumed):
    """megaft computes stage 0's from the gradients; DeepSpeed computes the others."""
    first, *others = (grad_norms(resumed / f"fp32-{stage}-whole") for stage in range(4))
    assert len(first) == STEPS
    for other in others:
        assert other == pytest.approx(first, rel=1e-4)


@pytest.fixture(scope="module")
def on_three_ranks(run_ranks, common, tmp_path_factory):
    """The same runs on one rank and on three; 5 batches of validation windows do not divide by 3."""
    cases = [
        Case("stage3", 3, flags=("--run.max-steps=2", "--optim.learning-rate=0", "--run.validate-every=1")),
        Case("stage1", 1, flags=("--run.max-steps=2", "--model.dropout=0.1")),
    ]
    folders = {}
    for world_size in (1, 3):
        folders[world_size] = tmp_path_factory.mktemp(f"world{world_size}")
        run_ranks(world_size, train_cases, folders[world_size], common, cases)
    return folders


def test_validation_is_the_same_bits_on_three_ranks_at_stage_3(on_three_ranks):
    one, three = (validations(on_three_ranks[world] / "stage3") for world in (1, 3))
    assert set(one) == {0, 1, 2}
    assert one == three


def test_learning_rate_zero_changes_nothing(on_three_ranks):
    measured = validations(on_three_ranks[3] / "stage3")
    assert measured[0] == measured[1] == measured[2]


def test_with_one_micro_batch_size_dropout_is_exact_on_any_number_of_ranks(on_three_ranks):
    one, three = (losses(on_three_ranks[world] / "stage1") for world in (1, 3))
    assert [float.fromhex(x) for x in three.values()] == pytest.approx(
        [float.fromhex(x) for x in one.values()], abs=1e-5
    )


def test_a_checkpoint_of_two_ranks_continues_on_one(resumed, run_ranks, common, tmp_path_factory):
    """Another stage and number of ranks: the format depends on neither."""
    folder = tmp_path_factory.mktemp("elastic")
    copy_checkpoint(resumed / "fp32-2-whole", folder / "elastic")
    case = Case("elastic", 3, flags=("--model.dropout=0.1", f"--run.max-steps={STEPS}"))
    run_ranks(1, train_cases, folder, common, [case])
    whole, continued = losses(resumed / "fp32-2-whole"), losses(folder / "elastic")
    assert [*continued] == [*range(CUT_AT + 1, STEPS + 1)]
    for step, loss in continued.items():
        assert float.fromhex(loss) == pytest.approx(float.fromhex(whole[step]), abs=1e-5)
    weights = [
        CheckpointReader(path, manifest_module.verify(path))
        for path in (
            manifest_module.folder_of(folder / "elastic", STEPS),
            manifest_module.folder_of(resumed / "fp32-2-whole", STEPS),
        )
    ]
    for name in weights[0].shapes:
        assert (weights[0].whole(name, "weight") - weights[1].whole(name, "weight")).abs().max() < 1e-5
