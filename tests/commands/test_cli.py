import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import megaft
from evaluate_zero_shot.config import parse
from megaft.base.environment import git_state
from megaft.base.errors import CheckpointError, ConfigError, DataError, NumericsError
from megaft.base.exit_code import SECONDS_FOR_MAIN, exit_code_of
from megaft.cli import COMMANDS, Command, main
from megaft.config.train import OptimConfig

ROOT = Path(megaft.__file__).parents[1]
HEAVY = {"torch", "transformers", "deepspeed", "tokenizers", "megatron", "datasets", "numpy"}


@pytest.fixture
def fake_command(monkeypatch):
    """`megaft fake`, whose main is set by the test and whose flags are OptimConfig's."""

    def install(function, config="config.train:OptimConfig"):
        module = SimpleNamespace(OptimConfig=OptimConfig, main=function)
        monkeypatch.setitem(sys.modules, "megaft.fake_program", module)
        monkeypatch.setitem(COMMANDS, "fake", Command("a stand-in", "fake_program", config))

    return install


def raising(error):
    def function(*_):
        raise error

    return function


def run_python(code, **kwargs):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "unwanted"),
    [
        *((arguments, HEAVY | {"tyro"}) for arguments in (["--help"], ["--version"], ["prepair"])),
        *(([name, "--help"], HEAVY) for name in COMMANDS),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_nothing_heavy_is_imported_to_answer_at_once(arguments, unwanted):
    done = run_python(
        "import sys\nfrom megaft.cli import main\n"
        f"try: main({arguments})\n"
        "except SystemExit: pass\n"
        f"print('heavy:', [name for name in {unwanted} if name in sys.modules])"
    )
    assert done.stdout.endswith("heavy: []\n"), done.stdout + done.stderr


def test_help_names_every_command(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        assert any(line.split() == [name, *command.summary.split()] for line in lines)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"megaft {megaft.__version__}\n"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        pytest.param("prepair", "did you mean `megaft prepare`?", id="close to one"),
        pytest.param("evaluate", "`python -m evaluate_zero_shot`", id="another program's"),
        pytest.param("xyzzy", "prepare, tokenizer, train", id="close to none"),
    ],
)
def test_unknown_command(name, said, capsys):
    assert main([name]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert name in streams.err
    assert said in streams.err


def test_flags_become_the_config(fake_command):
    seen = []
    fake_command(lambda config: seen.append(config) or 7)
    assert main(["fake", "--learning-rate", "0.5"]) == 7
    assert seen == [OptimConfig(learning_rate=0.5)]


def test_a_command_may_parse_its_own_arguments(fake_command):
    seen = []
    fake_command(lambda arguments: seen.append(arguments) or 0, config=None)
    assert main(["fake", "--a", "b"]) == 0
    assert seen == [["--a", "b"]]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        pytest.param(["fake", "--help"], 0, "megaft fake", id="help"),
        pytest.param(["fake", "--learning-rat", "1"], 2, "--learning-rate", id="unknown flag"),
    ],
)
def test_what_the_parser_answers(arguments, code, said, fake_command, capsys):
    fake_command(raising(AssertionError("must not run")))
    with pytest.raises(SystemExit) as exit_of_parser:
        main(arguments)
    assert exit_of_parser.value.code == code
    assert said in "".join(capsys.readouterr())


def test_a_refused_setting_is_one_line(fake_command, capsys):
    fake_command(raising(AssertionError("must not run")))
    assert main(["fake", "--learning-rate", "-1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --optim.learning-rate is -1.0; use")


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError, 2), (DataError, 3), (CheckpointError, 4), (NumericsError, 5)],
)
def test_a_user_error_is_a_message_and_a_code(error, code, fake_command, capsys):
    fake_command(raising(error("x is 1; use 2.")))
    assert main(["fake"]) == code
    assert capsys.readouterr().err == "error: x is 1; use 2.\n"


def test_the_main_rank_speaks_first(capsys, monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", lambda seconds: waits.append((seconds, capsys.readouterr().err)))
    assert exit_code_of(raising(DataError("no")), is_main=True) == 3
    assert (waits, capsys.readouterr().err) == ([], "error: no\n")
    assert exit_code_of(raising(DataError("alone")), is_main=False) == 3
    assert (waits, capsys.readouterr().err) == ([(SECONDS_FOR_MAIN, "")], "error: alone\n")


@pytest.mark.parametrize("is_main", [True, False])
def test_only_the_main_rank_says_what_is_wrong_with_flags(is_main, capsys, monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(SystemExit) as exit_of_parser:
        exit_code_of(lambda: len(parse(["--bogus"], is_main).model), is_main=is_main)
    assert exit_of_parser.value.code == 2
    assert ("--bogus" in capsys.readouterr().err) == is_main
    assert waits == ([] if is_main else [SECONDS_FOR_MAIN])


def test_interrupt_and_bug(fake_command):
    fake_command(raising(KeyboardInterrupt()))
    assert main(["fake"]) == 130
    fake_command(raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        main(["fake"])


@pytest.mark.parametrize("arguments", [["--help"], ["fake", "--help"]], ids=["our help", "the parser's help"])
def test_a_closed_pipe_is_quiet(arguments):
    program = (
        "import sys, types; from megaft import cli; from megaft.config.train import OptimConfig\n"
        "sys.modules['megaft.fake'] = types.SimpleNamespace(OptimConfig=OptimConfig, main=print)\n"
        "cli.COMMANDS['fake'] = cli.Command('', 'fake', 'config.train:OptimConfig')\n"
        f"sys.exit(cli.main({arguments}))"
    )
    assert run_into_closed_pipe("-c", program) == (141, b"")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["megaft/train.py", "--help"], 141),
        (["-m", "megaft", "train", "--help"], 141),
        (["-m", "megaft.doctor", "--help"], 141),
        (["-m", "evaluate_zero_shot", "--help"], 141),
        (["-m", "detokenizers", "--help"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_closed_pipe_is_quiet_for_every_program(command, code):
    returned, said = run_into_closed_pipe(*command)
    assert returned == code
    assert b"Error" not in said


def run_into_closed_pipe(*arguments):
    """Run Python with a standard output that nobody reads; return its exit code and what it wrote on stderr."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, *arguments], stdout=writing, stderr=subprocess.PIPE, timeout=60, cwd=ROOT, env=environment
    )
    os.close(writing)
    return done.returncode, done.stderr


def test_git_state_is_of_this_checkout_only(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    assert git_state(tmp_path) is None
    git("init")
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "A")
    clean = git_state(tmp_path)
    assert clean is not None
    assert len(clean["commit"]) == 40
    assert not clean["is_dirty"]
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == clean | {"is_dirty": True}
    assert git_state(tmp_path / "inner") is None
