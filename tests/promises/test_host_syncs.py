"""The host waits for the device in no micro-batch, and once a step: counted in the training program itself.

Ranks compute on CPUs here, where nothing waits; see helpers/host_waits.py. DeepSpeed's synchronize calls are no
operations, and are not counted. tests/scoring/test_host_waits.py counts the waits of scoring.
"""

from collections import Counter

import pytest
import toy
from host_waits import caller, waits

pytestmark = pytest.mark.slow

MICRO_BATCHES, STEPS, COUNTED_STEP, CONTEXT = 3, 5, 4, 32
FAMILIES = ("gpt2", "llama")
ENGINES = {
    "fp32-0": (0, None),
    "fp32-1": (1, None),
    "bf16-1": (1, "bf16"),
    "fp32-2": (2, None),
    "bf16-2": (2, "bf16"),
    "fp32-3": (3, None),
    "bf16-3": (3, "bf16"),
}
"""ZeRO stage and half precision; DeepSpeed's bf16 at stage 0 is refused."""

METRICS = ("megaft/run/metrics.py", "_complete")
NORM = ("deepspeed/runtime/utils.py", "is_invalid_grad_norm")
CLIP = ("deepspeed/runtime/utils.py", "clip_tensors_by_global_norm")
OVERFLOW = ("deepspeed/runtime/zero/stage_1_and_2.py", "has_overflow")
DEEPSPEED = {
    "fp32-0": {},
    "fp32-1": {NORM: 3},
    "bf16-1": {NORM: 1, CLIP: 1},
    "fp32-2": {NORM: 3},
    "bf16-2": {NORM: 3, OVERFLOW: 1},
    "fp32-3": {NORM: 1},
    "bf16-3": {NORM: 1},
}
"""Most waits of DeepSpeed in a step: it reads the gradient norm, at stages 1 and 2 again for the loss scale and the
clipping, to skip a step that is not finite; at stage 2 in bf16 it looks for gradients that are not finite too."""


def count_waits(folder, flags, models):
    """Train every family with every engine; return the waits of a step by run, place and caller."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from megaft.data.prefetch import Prefetch
    from megaft.models.hugging_face import NatsModel

    counts, place = {}, []

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if place and waits(func._schema.name.removeprefix("aten::"), args):
                counts[place[0]][place[-1], *caller()] += 1
            return func(*args, **(kwargs or {}))

    take, forward = Prefetch.take, NatsModel.forward
    run = {}

    def take_and_mark(self, position, left_out):
        run["step"] += 1
        run["forwards"] = 0
        place[:] = [run["name"], "step"] if run["step"] == COUNTED_STEP else []
        return take(self, position, left_out)

    def forward_and_mark(self, *arguments):
        run["forwards"] += 1
        if place:  # the last micro-batch includes the optimizer's step
            place[1] = "step" if run["forwards"] == MICRO_BATCHES else "micro-batch"
        return forward(self, *arguments)

    def cases():
        for family in FAMILIES:
            for engine, (stage, precision) in ENGINES.items():
                name = f"{family}-{engine}"
                place.clear()
                run.update(name=name, step=0, forwards=0)
                counts[name] = Counter()
                settings = {
                    "train_batch_size": 2 * MICRO_BATCHES,
                    "train_micro_batch_size_per_gpu": 2,
                    "gradient_clipping": 1.0,
                    "zero_optimization": {"stage": stage}
                    | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
                } | ({precision: {"enabled": True}} if precision else {})
                own = [f"--model.path={models[family]}", f"--run.dir={folder / name}"]
                yield folder / f"{name}.json", settings, [*own, *flags]

    with pytest.MonkeyPatch.context() as patch, Waits():
        patch.setattr(Prefetch, "take", take_and_mark)
        patch.setattr(NatsModel, "forward", forward_and_mark)
        toy.train_in_turn(cases())
    return counts


@pytest.fixture(scope="module")
def counted(run_ranks, toy_model, toy_texts, tmp_path_factory):
    """Waits of one step by run: {"gpt2-fp32-0": {("micro-batch", file, function): number}}."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("syncs")
    config = LlamaConfig(
        vocab_size=toy.VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    flags = [f"--data.train={toy_texts[0]}", f"--data.context-length={CONTEXT}", f"--run.max-steps={STEPS}"]
    flags += [f"--data.tokenizer={toy_model}", "--run.export=none"]
    models = {"gpt2": toy_model, "llama": folder / "llama"}
    return run_ranks(1, count_waits, folder, flags, models)[0]


def of(counts, place, package):
    """Return the waits of a package in a place."""
    return {tuple(who): n for (where, *who), n in counts.items() if where == place and who[0].startswith(package)}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_micro_batch_waits_and_a_step_waits_once(counted, family, engine):
    counts = counted[f"{family}-{engine}"]
    assert {key: n for key, n in counts.items() if key[0] == "micro-batch"} == {}
    # The numbers of the step before, which are on the host by then: one wait for all of them.
    assert [*of(counts, "step", "megaft/")] == [METRICS]
    added = of(counts, "step", "deepspeed/")
    assert all(n <= DEEPSPEED[engine].get(who, 0) for who, n in added.items()), added
    assert len(counts) == 1 + len(added), "no other library waits"
