"""`python -m evaluate_zero_shot` and `megaft generate` on tensor-parallel ranks, beside transformers' modules."""

import contextlib
import io
import json
import os

import pytest
import read_once
import torch
from scoring_batches import grid_of
from tiny_models import LLAMA, make_config

from megaft.base.errors import ConfigError
from megaft.base.parallel import free_port
from megaft.commands.convert.command import main as convert
from megaft.commands.convert.config import ConvertConfig
from megaft.commands.generate.command import main as generate
from megaft.commands.generate.config import GenerateConfig, SamplingConfig
from megaft.models.backend import backend_of
from megaft.models.loss import VocabularyShard

DRAWS = {"greedy": SamplingConfig(temperature=0, repetition_penalty=1.3), "drawn": SamplingConfig(top_k=40)}
CUT = {"one rank": (1, 1), "two parts": (2, 2), "two data ranks": (2, 1)}
"""World size, tensor-parallel size."""
NEW_TOKENS = {"gpt2": 20, "llama": 70, "cut": 70}
"""New tokens to generate: the Llama's text exceeds its positions."""
BANNED = list(range(100, 1200))
"""Banned vocabulary entries, on both ranks."""


@pytest.fixture(scope="module")
def models(trained_gpt2, tmp_path_factory):
    """A GPT-2; a Llama with grouped queries, few positions and an odd vocabulary; the same in megatron's format."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gpt2, folder = trained_gpt2, tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(gpt2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config("llama", LLAMA | {"vocab_size": len(tokenizer) // 2 * 2 + 1}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    convert(ConvertConfig(source=str(folder / "llama"), to=folder / "cut", format="megatron", tensor_parallel_size=2))
    return {"gpt2": gpt2, "llama": folder / "llama", "cut": folder / "cut"}


def elsewhere(ports):
    """Use another MASTER_PORT: each program leaves its process group, and its port is not free at once."""
    os.environ["MASTER_PORT"] = str(next(ports))


def scored(output, models, data, *flags, ports=None):
    """Return the entries of results.json by model and task."""
    from evaluate_zero_shot.__main__ import main

    if ports:
        elsewhere(ports)
    flags = ["--task=wikitext2,lambada", "--protocol=lm-eval", "--context-length=60", "--limit=12", *flags]
    flags.append("--tokens-per-batch=256")  # so that there are batches for all ranks
    assert main(["--model", *map(str, models), f"--data={data}", f"--output={output}", *flags]) == 0
    rows = json.loads((output / "results.json").read_text())["results"]
    return {(row["model_name"], row["task"]): row for row in rows}


def generated(name, model, ports=None, **settings):
    """Return what `megaft generate` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for draw in DRAWS.values():
            if ports:
                elsewhere(ports)
            config = GenerateConfig(
                model=str(model),
                prompt=("The", "In 1998"),
                max_new_tokens=NEW_TOKENS[name],
                sampling=draw,
                **settings,
            )
            assert generate(config) == 0
    return out.getvalue()


def quantities(models, backend, batch):
    """Return each model's number of parameters, nats per token, and whether each token is its greedy choice."""
    from megaft.scoring.model import load_scoring_model

    found = {}
    for name, source in models.items():
        scorer = load_scoring_model(str(source), dtype=torch.float32, device=torch.device("cpu"), backend=backend)
        scorer.configure(with_greedy=True, banned=BANNED)
        found[name] = scorer.num_parameters, grid_of(scorer, *batch).tolist()
    return found


def of_a_part(models, batch):
    """Return `quantities` and the argmax of logits with many ties, on one of two tensor-parallel ranks."""
    from megaft.base import parallel

    parallel.join(parallel.discover(os.environ))
    parallel.start_tensor_parallelism(2)
    begin, end = ((0, 51), (51, 101))[parallel.rank()]
    words = VocabularyShard(begin, end, is_sharded=True).greedy_ids(equal_logits()[:, begin:end]).tolist()
    found = quantities(models, "megatron", batch)
    parallel.leave()
    return found, words


def equal_logits():
    return torch.randint(0, 3, (200, 101), generator=torch.Generator().manual_seed(0)).float()


def on_rank(ports, models, data, output, size):
    """Score (on several ranks also resumed, and with partitioned weights), then generate."""
    read_once.tokenizers(pytest.MonkeyPatch())  # until this process ends
    flags = ["--backend=megatron", f"--tensor-parallel-size={size}"]
    ports = iter(ports)
    found = [scored(output, models.values(), data, *flags, ports=ports)]
    if os.environ["WORLD_SIZE"] != "1":
        found.append(scored(output, models.values(), data, *flags, ports=ports))
        found.append(scored(output.with_suffix(".parts"), models.values(), data, *flags, "--partition", ports=ports))
    texts = {}
    for name, source in models.items() if os.environ["WORLD_SIZE"] == str(size) else ():
        backend = None if name == "cut" else "megatron"
        texts[name] = generated(name, source, ports, backend=backend, tensor_parallel_size=size)
    return found, texts


@pytest.fixture(scope="module")
def reference(models, corpora, tmp_path_factory):
    """Return the figures of transformers' modules."""
    whole = {name: source for name, source in models.items() if name != "cut"}
    with pytest.MonkeyPatch.context() as patch:
        read_once.tokenizers(patch)
        found = scored(tmp_path_factory.mktemp("reference"), whole.values(), corpora)
        texts = {name: generated(name, source) for name, source in whole.items()}
    found |= {("cut", task): found["llama", task] for task in ("wikitext2", "lambada")}
    return found, texts | {"cut": texts["llama"]}


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "size"), [pytest.param(*cut, id=name) for name, cut in CUT.items()])
def test_a_cut_changes_no_figure_and_no_text(models, corpora, reference, run_ranks, tmp_path, world_size, size):
    """Nats agree with transformers' modules to 1e-6; choices and texts are equal on every rank."""
    ports = [free_port() for _ in range(3 + len(models) * len(DRAWS))]
    ranks = run_ranks(world_size, on_rank, ports, models, corpora, tmp_path / "output", size)
    for found, _ in ranks:
        for rows in found:
            assert rows.keys() == reference[0].keys()
            for name, row in rows.items():
                expected = reference[0][name]
                assert row["nats"] == pytest.approx(expected["nats"], rel=1e-6)
                for key in ("num_scored_tokens", "num_parameters", "accuracy"):
                    assert row[key] == expected[key]
                assert (row["backend"], row["world_size"]) == ("megatron", world_size)
                assert row["tensor_parallel_size"] == size
    if world_size > 1:
        first, again, _ = ranks[0][0]
        for name, row in first.items():
            assert again[name]["nats"].hex() == row["nats"].hex()
            assert again[name]["tokens_per_second"] is None  # all batches were read from disk
    if world_size == size:
        assert ranks[0][1] == reference[1]
        assert all(text == "" for _, texts in ranks[1:] for text in texts.values())
    keepers = {path.name.partition("-")[0] for path in tmp_path.glob("output/windows/*/*.nats")}
    assert keepers == {f"{rank:05}" for rank in range(world_size // size)}


@pytest.mark.slow
def test_tokens_cost_the_same_and_choices_are_the_same(models, run_ranks):
    whole = {name: source for name, source in models.items() if name != "cut"}
    vocab_size = min(json.loads((source / "config.json").read_text())["vocab_size"] for source in whole.values())
    inputs = torch.randint(0, vocab_size, (8, 60), generator=torch.Generator().manual_seed(0))
    labels = inputs.roll(-1, 1)
    for source in whole.values():
        labels = labels_with_greedy(source, inputs, labels)
    expected = quantities(whole, "hugging-face", (inputs, labels))
    for rank, words in run_ranks(2, of_a_part, whole, (inputs, labels)):
        assert words == equal_logits().argmax(-1).tolist()  # ties go to the first entry, on either rank
        for name, (num_parameters, (nats, is_choice)) in rank.items():
            assert num_parameters == expected[name][0]
            torch.testing.assert_close(torch.tensor(nats), torch.tensor(expected[name][1][0]), rtol=1e-5, atol=1e-5)
            assert is_choice == expected[name][1][1]
            assert 100 < sum(map(sum, is_choice)) < 300


def labels_with_greedy(source, inputs, labels):
    """Return the labels with a third of the columns, another third for each model, replaced by its greedy choices."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source).eval()
    with torch.no_grad():
        choices = model(inputs).logits.argmax(-1)
    place = ["gpt2", "llama"].index(model.config.model_type)
    return torch.where(torch.arange(labels.shape[1]) % 3 == place, choices, labels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("gpt2", "hugging-face", 2), "tensor-parallel-size is 2, .* --backend megatron"),
        (("gpt2", None, 2), "tensor-parallel-size is 2, .* --backend megatron"),
        (("cut", "hugging-face", 1), "is in megatron's format; drop --backend"),
    ],
)
def test_what_no_modules_can_run_is_refused(models, settings, message):
    name, asked, size = settings
    with pytest.raises(ConfigError, match=message):
        backend_of(str(models[name]), asked, size)


def test_as_many_ranks_as_share_a_matrix_are_needed(models, corpora, tmp_path, capsys):
    flags = ["--backend=megatron", "--tensor-parallel-size=2", f"--data={corpora}", f"--output={tmp_path}"]
    from evaluate_zero_shot.__main__ import main

    assert main([f"--model={models['gpt2']}", "--task=wikitext2", *flags]) == 2
    assert "--tensor-parallel-size is 2, which does not divide 1 rank" in capsys.readouterr().err
    config = GenerateConfig(model=str(models["gpt2"]), prompt=("a",), backend="megatron", tensor_parallel_size=2)
    assert generate(config) == 2
    assert "this runs on 1 rank; start 2 ranks" in capsys.readouterr().err
