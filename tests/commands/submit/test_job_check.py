"""`megaft submit` checks a job's program before the job is queued."""

import json

import pytest

from megaft.base.errors import ConfigError, DataError
from megaft.commands.submit.job_check import ARRAY, check_program, tasks_of
from megaft.weights.manifest import FORMAT, MANIFEST, folder_of, manifest_text

JOB = {"nodes": "2", "ntasks-per-node": "4", "gpus-per-node": "4"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, on a machine with `sbatch`: a text, a model and a DeepSpeed JSON."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "t.txt").write_text("text")
    (tmp_path / "model").mkdir()
    (tmp_path / "ds.json").write_text(json.dumps({"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2}))
    return tmp_path


def flags(**changed):
    given = {"deepspeed_config": "ds.json", "model.path": "./model", "data.train": "t.txt", "run.dir": "r"}
    return [f"--{name}={value}" for name, value in (given | {"run.max-steps": "3"} | changed).items()]


def tensor_parallel(size):
    return {"model.backend": "megatron", "parallel.tensor-parallel-size": str(size)}


@pytest.mark.parametrize("nodes", ["1", "2", "1-3"])
def test_a_job_that_can_start(nodes, folder):
    check_program("finetune_multinode", flags(), JOB | {"nodes": nodes})


@pytest.mark.parametrize(
    ("changed", "nodes", "error", "said"),
    [
        pytest.param({"deepspeed_config": "x.json"}, "2", ConfigError, "x.json: No such file", id="DeepSpeed JSON"),
        pytest.param({"data.train": "x.txt"}, "2", DataError, "--data.train is x.txt", id="data"),
        pytest.param({"data.valid": "x.txt"}, "2", DataError, "--data.valid is x.txt", id="validation data"),
        pytest.param({"model.path": "./x"}, "2", DataError, "model.path is ./x; there is no such folder", id="model"),
        pytest.param({}, "3", ConfigError, "train_batch_size 16.* on 12 ranks", id="batch"),
        pytest.param(tensor_parallel(4), "3", ConfigError, "train_batch_size 16.* on 3 ranks", id="cut matrices"),
        pytest.param(tensor_parallel(8), "1", ConfigError, "tensor-parallel-size is 8, .* 4 ranks", id="groups"),
    ],
)
def test_what_training_would_refuse(changed, nodes, error, said, folder):
    with pytest.raises(error, match=said):
        check_program("finetune_multinode", flags(**changed), JOB | {"nodes": nodes})


def test_a_run_that_goes_on_fits_its_micro_batch_to_the_ranks(folder):
    job = JOB | {"nodes": "4"}
    with pytest.raises(ConfigError, match="on 16 ranks"):
        check_program("finetune_multinode", flags(), job)
    saved = folder_of(folder / "r", 1)
    saved.mkdir(parents=True)
    manifest = {"format": FORMAT, "identity": {"global_batch_size": 16}, "files": {}}
    (saved / MANIFEST).write_text(manifest_text(manifest))
    check_program("finetune_multinode", flags(), job)
    with pytest.raises(ConfigError, match="on 16 ranks"):
        check_program("finetune_multinode", [*flags(), "--run.fresh"], job)


def test_elsewhere_files_may_be_another_machines(folder, monkeypatch):
    monkeypatch.setenv("PATH", "")
    for recipe in ("finetune_1node", "finetune_multinode"):
        check_program(recipe, flags(**{"data.train": "x.txt", "deepspeed_config": "x.json"}), JOB)
    check_program("prepare_data", ["x.txt", "--tokenizer=gpt2", "--output=o"], {})
    with pytest.raises(ConfigError, match="on 12 ranks"):
        check_program("finetune_multinode", flags(), JOB | {"nodes": "3"})


def test_inputs_of_prepare_are_looked_for(folder):
    check_program("prepare_data", ["t.txt", "--tokenizer=gpt2", "--output=o"], {})
    with pytest.raises(DataError, match=r"x.txt matches no file"):
        check_program("prepare_data", ["x.txt", "--tokenizer=gpt2", "--output=o"], {})


def test_of_another_script_nothing_is_known(folder):
    check_program("mine", ["--anything"], {})


@pytest.mark.parametrize("text", ["1", "1-6", "1,3,5-9", "1-9:2%3", "1-6%2"])
def test_arrays(text):
    assert ARRAY.fullmatch(text)


@pytest.mark.parametrize("text", ["", "-1", "1-", "1,,2", "1-6%0", "1-6:0", "a", "1 2", "1-6%"])
def test_no_arrays(text):
    assert not ARRAY.fullmatch(text)


@pytest.mark.parametrize(
    ("text", "tasks"), [("2", [2]), ("1-3", [1, 2, 3]), ("1,3-4%1", [1, 3, 4]), ("1-6:2%2", [1, 3, 5])]
)
def test_tasks_of_an_array(text, tasks):
    assert list(tasks_of(text, 6)) == tasks


@pytest.mark.parametrize("text", ["0-2", "7", "3-2", "1-999999999"])
def test_tasks_that_no_line_has(text):
    with pytest.raises(ConfigError, match=f"array is {text}, .*1 to 6"):
        list(tasks_of(text, 6))


@pytest.mark.parametrize(
    ("line", "array", "said"),
    [
        pytest.param("--run.seed 1", "1-2", None, id="right"),
        pytest.param("--run.seed 1", "1-3", "has lines 1 to 2", id="more tasks than lines"),
        pytest.param("--data.train x.txt", "1-2", "line 2 of sweep.txt: --data.train is x.txt", id="a file"),
        pytest.param("--data.train x.txt", "1", None, id="a line that is not asked for"),
        pytest.param("--deepspeed_config three.json", "2", "line 2 of sweep.txt: .* on 8 ranks", id="batch"),
        pytest.param("--run.seed '1", "2", "line 2 of sweep.txt: No closing quotation", id="quote"),
    ],
)
def test_each_line_of_a_sweep_is_checked(line, array, said, folder):
    (folder / "three.json").write_text('{"train_batch_size": 3}')
    (folder / "sweep.txt").write_text(f"--run.seed 0\n{line}\n")
    if said is None:
        check_program("finetune_sweep", ["sweep.txt", *flags()], JOB | {"array": array})
        return
    with pytest.raises((ConfigError, DataError), match=said):
        check_program("finetune_sweep", ["sweep.txt", *flags()], JOB | {"array": array})


def test_a_wrong_flag_of_a_sweep_is_named_by_its_line(folder, capsys):
    (folder / "sweep.txt").write_text("--run.seed 0\n--run.sead 1\n")
    with pytest.raises(SystemExit):
        check_program("finetune_sweep", ["sweep.txt", *flags()], JOB | {"array": "1-2"})
    assert capsys.readouterr().err.endswith("error: the flags above are in line 2 of sweep.txt.\n")


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "sweep.txt: No such file"), (b" \n", "is blank"), (b"--a\r\n", "CR LF"), (b"\xff", "not UTF-8")],
)
def test_a_file_of_flags_that_cannot_be_read(content, said, folder):
    if content is not None:
        (folder / "sweep.txt").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        check_program("finetune_sweep", ["sweep.txt", *flags()], JOB | {"array": "1"})
