"""`python -m evaluate_zero_shot` from its command line to results.json."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_models import change_tensors, overflow

from evaluate_zero_shot.__main__ import main
from evaluate_zero_shot.evaluation import evaluate as evaluate_module
from evaluate_zero_shot.evaluation.finished import FinishedBatches
from evaluate_zero_shot.evaluation.results import note_on_guessing
from megaft.base.lock import locked
from megaft.base.parallel import free_port

BIN = Path(sys.executable).parent
CUT = ["--context-length=32", "--stride=16"]


@pytest.fixture(scope="module")
def toy_flags(toy_model, toy_texts):
    """Flags that score a text with a toy model."""
    return [f"--model={toy_model}", "--task=text", f"--data={toy_texts[1]}", *CUT]


def results(output):
    return json.loads((output / "results.json").read_text())["results"]


def run(*flags, output):
    assert main([*map(str, flags), f"--output={output}"]) == 0
    return results(output)


@pytest.fixture(scope="module")
def alone(toy_flags, tmp_path_factory):
    return run(*toy_flags, output=tmp_path_factory.mktemp("alone"))[0]


def test_one_command_leaves_results_and_a_report(toy_flags, alone, tmp_path, capsys):
    (result,) = run(*toy_flags, output=tmp_path)
    assert result["nats"].hex() == alone["nats"].hex()
    text = Path(toy_flags[2].removeprefix("--data=")).read_text()
    assert (result["num_words"], result["num_bytes"]) == (len(text.split()), len(text.encode()))
    assert result["num_scored_tokens"] == result["num_tokenized_tokens"]  # after a prefix token every token is scored
    assert (result["is_protocol_default"], result["data_name"], result["accuracy"]) == (False, None, None)
    assert result["confidence_interval_95"]["low"] < result["bits_per_byte"] < result["confidence_interval_95"]["high"]
    assert result["tokens_per_second"] > 0
    assert (tmp_path / "report.md").is_file()
    assert (tmp_path / "report.html").is_file()
    said = capsys.readouterr().out
    assert "bits_per_byte" in said
    assert "not comparable" not in said


def test_a_number_of_an_unknown_file_says_so_in_the_terminal(toy_flags, tmp_path, capsys):
    run(*toy_flags, "--task=ptb", "--limit=3", output=tmp_path)
    summary, note, _ = capsys.readouterr().out.splitlines()
    assert "word_perplexity" in summary
    assert re.search(r"not comparable .*unknown file, valid\.txt .*SHA-256 .*first 3 lines only", note)


def test_no_folder_of_this_machine_is_in_the_results(toy_flags, toy_model, tmp_path, monkeypatch):
    """An evaluation folder of an older version, which recorded the folders, is continued and mended."""
    program = "/home/me/megaft/evaluate_zero_shot/__main__.py"
    monkeypatch.setattr(sys, "argv", [program, *toy_flags, f"--output={tmp_path}"])
    (row,) = run(*toy_flags, output=tmp_path)
    assert row["model"] == toy_model.name
    words = ["evaluate_zero_shot/__main__.py", f"--model={toy_model.name}", "--task=text"]
    assert row["command"][:3] == words
    other = {"model": "/home/me/runs/a/export", "model_sha256": "0" * 64, "command": None}
    old = [row | {"model": str(toy_model), "command": sys.argv}, row | other]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"results": old}))
    rows = run(*toy_flags, output=tmp_path)
    assert [kept["model"] for kept in rows] == ["a/export", toy_model.name]
    assert rows[1]["nats"] == row["nats"]
    for folder in ("/home/me", str(tmp_path), str(toy_model.parent)):
        assert folder not in path.read_text()


def test_validation_in_training_says_the_same_number(toy_flags, toy_model, toy_texts, alone, tmp_path):
    import torch

    from megaft.config.prepare import PrepareConfig
    from megaft.config.train import parse_train
    from megaft.data.dataset import Dataset
    from megaft.data.prepare import prepare
    from megaft.data.tokenizer import load_tokenizer
    from megaft.models.hugging_face import NatsModel
    from megaft.run.validation import Validation
    from megaft.weights.loading.pretrained import load_language_model

    prefix = tmp_path / "valid"
    prepare(PrepareConfig(inputs=(str(toy_texts[1]),), output=prefix, tokenizer=str(toy_model), append_eod=True))
    flags = "--deepspeed-config j --data.train t --data.valid v --run.dir r --run.max-steps 1 --data.context-length 32"
    config = parse_train([*flags.split(), "--model.path", str(toy_model)])
    validation = Validation(Dataset(str(prefix)), config, load_tokenizer(str(toy_model)))
    score = validation(NatsModel(load_language_model(str(toy_model))), torch.device("cpu"))
    assert score.num_scored_tokens == alone["num_scored_tokens"]
    for name in ("nats", "perplexity", "word_perplexity", "bits_per_byte"):
        assert getattr(score, name) == pytest.approx(alone[name], rel=1e-6)


@pytest.mark.slow
def test_a_killed_evaluation_computes_no_window_twice(toy_flags, alone, tmp_path, monkeypatch):
    kept = []

    class Killed(FinishedBatches):
        def keep(self, number, values):
            super().keep(number, values)
            kept.append(number)
            if len(kept) == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_module, "FinishedBatches", Killed)
    flags = [*toy_flags, "--tokens-per-batch=64"]
    assert main([*flags, f"--output={tmp_path}"]) == 130
    assert not (tmp_path / "results.json").exists()
    (result,) = run(*flags, output=tmp_path)
    assert len(kept) == len(set(kept)) > 3
    assert result["tokens_per_second"] is None  # some were scored before
    undisturbed = run(*flags, output=tmp_path / "undisturbed")[0]
    assert result["nats"].hex() == undisturbed["nats"].hex()
    assert result["nats"] == pytest.approx(alone["nats"], rel=1e-6)  # in batches of another size


@pytest.mark.slow
def test_kept_windows_serve_no_other_model_text_or_stride(toy_flags, toy_texts, tmp_path):
    run(*toy_flags, output=tmp_path)
    folders = set((tmp_path / "windows").iterdir())
    run(*toy_flags, output=tmp_path)
    assert set((tmp_path / "windows").iterdir()) == folders
    for flag in ("--stride=8", f"--data={toy_texts[0]}", "--dtype=bfloat16", "--tokens-per-batch=64"):
        run(*toy_flags, flag, "--limit=20", output=tmp_path)
        more = set((tmp_path / "windows").iterdir())
        assert len(more) == len(folders) + 1, flag
        folders = more


@pytest.mark.slow
def test_results_of_other_commands_stay(toy_flags, tmp_path):
    run(*toy_flags, output=tmp_path)
    both = run(*toy_flags, "--stride=8,16", "--protocol=megaft,megatron", output=tmp_path)
    assert [(row["protocol"], row["stride"]) for row in both] == [
        *(("megaft", 8), ("megaft", 16)),
        *(("megatron", 8), ("megatron", 16)),
    ]
    assert len(run(*toy_flags, "--limit=3", output=tmp_path)) == 5  # does not replace the whole
    other = tmp_path / "other.txt"
    other.write_text("Another text, of a few words.")
    assert [row["data_file"] for row in run(*toy_flags, f"--data={other}", output=tmp_path)][-2:] == [
        "valid.txt",
        "other.txt",
    ]


@pytest.fixture(scope="module")
def damaged(toy_model, tmp_path_factory):
    """A model whose position 40 makes norms overflow, and a file of each kind of task."""
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copytree(toy_model, folder / "model")
    change_tensors(folder / "model", lambda tensors: overflow(tensors["transformer.wpe.weight"][40]))
    passages = [{"text": "The ship sailed far over the sea " * repeats} for repeats in (1, 1, 3)]
    (folder / "lambada.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in passages))
    sentences = "".join(f"{number} They ran , all of them .\n" for number in range(1, 21))
    (folder / "cbt.txt").write_text(f"{sentences}21 The XXXXX ran .\tcat\t\tdog|cat\n")
    return folder


@pytest.mark.parametrize(
    ("task", "protocols", "place"),
    [
        # Attention gives every other position of such a window 0 times what is not a number.
        pytest.param("text", "megaft", "token 0 of document 0", id="behind a prefix"),
        pytest.param("text", "megatron", "token 1 of document 0", id="a cap for what is finite"),
        pytest.param("text", "hf-docs", "token 1 of document 0", id="weighted by windows"),
        pytest.param("lambada", "lm-eval", "of document 0", id="last word"),
        pytest.param("cbt-cn", "megaft", "of document 0", id="cloze"),
    ],
)
def test_nats_that_are_not_finite_end_with_5_and_leave_no_figure(
    damaged, toy_texts, tmp_path, capsys, task, protocols, place
):
    data = {"text": toy_texts[1], "lambada": damaged / "lambada.jsonl", "cbt-cn": damaged / "cbt.txt"}[task]
    flags = [f"--model={damaged / 'model'}", f"--task={task}", f"--protocol={protocols}", f"--data={data}"]
    assert main([*flags, "--context-length=64", "--stride=32", f"--output={tmp_path}"]) == 5
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(rf"model, {task}, {protocols}, .* scored tokens .*non-finite.*{place}", line)
    assert "perplexity" not in out + err
    assert not list(tmp_path.glob("re*"))  # neither results.json nor a report


@pytest.mark.parametrize(("flag", "is_own"), [("--stride=3", True), ("--context-length=16", False)])
def test_prompts_that_are_cut_off_are_not_the_protocols(toy_model, tmp_path, flag, is_own):
    data = tmp_path / "lambada_test.jsonl"
    data.write_text(json.dumps({"text": "The ship sailed far over the sea " * 3}) + "\n")
    flags = [f"--model={toy_model}", "--task=lambada", f"--data={data}", "--context-length=64", flag]
    (result,) = run(*flags, output=tmp_path / "out")
    assert result["is_protocol_default"] is is_own


@pytest.mark.parametrize(("perplexity", "is_worse"), [(1000.0, False), (2718.0, False), (2719.0, True)])
def test_what_is_worse_than_a_guess_is_remarked_on(perplexity, is_worse):
    note = note_on_guessing(SimpleNamespace(model_name="mine", perplexity=perplexity), vocab_size=1000)
    assert (note is not None) == is_worse
    if note:
        assert "mine has a perplexity of 2,719 per token, worse than a guess among the tokenizer's 1,000 tokens" in note


def test_a_protocol_of_tokens_reports_perplexity_per_token(toy_flags, tmp_path):
    (row,) = run(*toy_flags, "--protocol=hf-docs", output=tmp_path)
    assert row["headline"] == row["confidence_interval_95"]["quantity"] == "perplexity"
    assert row["environment"]["packages"]["torch"]


def test_several_models_make_one_table(toy_flags, toy_model, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(toy_model, other / "export")  # as a finished training run leaves its model
    rows = run(toy_flags[0], other, *toy_flags[1:], output=tmp_path / "out")
    assert [row["model_name"] for row in rows] == ["model", "run"]
    assert rows[0]["model_sha256"] == rows[1]["model_sha256"]
    assert rows[0]["nats"] == rows[1]["nats"]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--task=wikitext"], 2, "task 'wikitext' is unknown"),
        (["--protocol=megatron-lm"], 2, "protocol 'megatron-lm' is unknown"),
        (["--stride=0"], 2, "stride is '0'"),
        (["--stride=16,"], 2, "stride is '16,'"),
        (["--limit=0"], 2, "limit is 0"),
        (["--stride=33"], 2, "stride is 33"),
        (["--context-length=4096"], 2, "the model has 128 positions"),
        (["--data=/nowhere/file.txt"], 3, "/nowhere/file.txt"),
        (["--model=/nowhere/model"], 3, "/nowhere/model"),
        (["--model", "{model}", "gpt2-typo"], 3, "gpt2-typo"),
        (["--task=lambada", "--protocol=hf-docs"], 2, "protocol hf-docs does not define task lambada"),
        (["--task=text,lambada-strict,lambada", "--protocol=megaft,hf-docs"], 2, "does not define task lambada; use"),
        (["--task=cbt-cn", "--protocol=lm-eval"], 2, "does not define task cbt-cn; use megaft or gpt2-paper"),
        (["--task=lambada"], 3, "line 1, column 1: broken JSON"),
        (["--output=/dev/null/x"], 2, "/dev/null"),
    ],
)
def test_mistakes_are_named(toy_flags, flags, code, message, capsys, tmp_path):
    try:
        flags = [flag.format(model=toy_flags[0].removeprefix("--model=")) for flag in flags]
        found = main([*toy_flags, f"--output={tmp_path}", *flags])
    except SystemExit as exit:  # the parser's own
        found = exit.code
    shown = capsys.readouterr().err
    assert found == code
    assert message in " ".join(shown.replace("│", " ").split())
    assert "Traceback" not in shown
    assert not (tmp_path / "results.json").exists()


def test_all_windows_are_tried_on_the_model_before_the_first_is_scored(toy_flags, tmp_path, capsys):
    assert main([*toy_flags, "--stride=16,32,33", f"--output={tmp_path}"]) == 2
    assert "stride is 33" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_another_programs_results_are_not_overwritten(toy_flags, tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"results": {"wikitext": 1}}')
    assert main([*toy_flags, f"--output={tmp_path}"]) == 3
    assert "not a results file" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == '{"results": {"wikitext": 1}}'


def test_a_folder_that_another_evaluation_writes_to_is_refused(toy_flags, tmp_path, capsys):
    with locked(tmp_path):
        assert main([*toy_flags, f"--output={tmp_path}"]) == 2
    assert f"{tmp_path} is in use by host" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_describe_prints_protocols_and_tasks(capsys):
    assert main(["--describe", "megatron", "lambada"]) == 0
    shown = capsys.readouterr().out
    assert "adjusted perplexity" in shown
    assert "5,153 passages" in shown
    assert main(["--describe", "nothing"]) == 2


def on_rank(*flags):
    return main(list(flags))


@pytest.mark.slow
def test_three_ranks_give_the_same_bits(run_ranks, toy_flags, alone, tmp_path):
    """The launchers' test covers two ranks."""
    assert run_ranks(3, on_rank, *toy_flags, f"--output={tmp_path}") == [0] * 3
    (result,) = results(tmp_path)
    assert result["nats"].hex() == alone["nats"].hex()
    assert (result["positions"], result["segments"]) == (alone["positions"], alone["segments"])
    assert result["world_size"] == 3


@pytest.mark.slow
def test_a_model_spread_over_three_ranks_scores_four_windows(run_ranks, toy_flags, tmp_path):
    flags = [*toy_flags, "--limit=3", "--tokens-per-batch=32"]
    (whole,) = run(*flags, output=tmp_path / "whole")
    assert run_ranks(3, on_rank, *flags, "--partition", f"--output={tmp_path}") == [0] * 3
    (result,) = results(tmp_path)
    assert result["nats"] == pytest.approx(whole["nats"], rel=1e-6)


LAUNCHERS = {
    "python": [sys.executable, "-m"],
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus=2", "--module"],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2", "-m"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_gives_the_same_bits(toy_flags, alone, tmp_path, launcher):
    command = LAUNCHERS[launcher]
    if launcher == "deepspeed":
        command = [command[0], f"--master_port={free_port()}", *command[1:]]
    done = subprocess.run(
        [*command, "evaluate_zero_shot", *toy_flags, "--output=out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(tmp_path / "out")[0]["nats"].hex() == alone["nats"].hex()
    assert done.stdout.count("bits_per_byte") == 1  # only the main rank prints
