"""Fork server shared by all tests; its children start with the libraries imported."""

from multiprocessing import get_context

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("deepspeed", "torch._inductor.compile_fx", "transformers", "transformers.models.gpt2.modeling_gpt2"),
        *("deepspeed.runtime.zero.muon.muon_optimizer", "megaft.models.megatron"),
        *("sentencepiece", "tyro"),
        *(
            "megaft.cli",
            "megaft.train",
            "megaft.data.prepare",
            "megaft.run.start",
            "megaft.checkpoint.export",
            "megaft.run.metrics",
        ),
        *("evaluate_zero_shot.__main__", "evaluate_zero_shot.evaluation.evaluate", "evaluate_zero_shot.report.write"),
        "tools.benchmarks.preload",  # found from the folder of the repository, where tests start
    ]
)
