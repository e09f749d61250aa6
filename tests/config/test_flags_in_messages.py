"""Every flag that a message or a help text names exists."""

import argparse
import ast
import re
import warnings
from pathlib import Path

import pytest
import tyro

import megaft
from evaluate_zero_shot.config import EvaluateConfig
from megaft.commands.convert.config import ConvertConfig
from megaft.commands.doctor.config import DoctorConfig
from megaft.commands.estimate.config import EstimateConfig
from megaft.commands.generate.config import GenerateConfig
from megaft.commands.submit.config import SubmitConfig
from megaft.commands.tokenizer.config import CheckConfig as TokenizerCheckConfig
from megaft.commands.tokenizer.config import ExtendConfig
from megaft.commands.tokenizer.config import TrainConfig as TokenizerTrainConfig
from megaft.commands.validate import ValidateConfig
from megaft.config.flags import flags_of
from megaft.config.identity import SETTINGS
from megaft.config.prepare import PrepareConfig
from megaft.config.train import DataConfig, ModelConfig, RunConfig, TrainConfig
from megaft.run.same_settings import settings_of

ROOT = Path(megaft.__file__).parents[1]
COMMANDS = (
    *(ConvertConfig, DoctorConfig, EstimateConfig, GenerateConfig, SubmitConfig, ValidateConfig, PrepareConfig),
    *(TrainConfig, EvaluateConfig, TokenizerTrainConfig, TokenizerCheckConfig, ExtendConfig),
)
OF_OTHER_PROGRAMS = {
    "deepspeed and torchrun": {"--module", "--nproc-per-node", "--local_rank", "--rdzv-conf", "--standalone"},
    "sbatch and srun": {"--signal", "--gpus-per-task", "--mem", "--time", "--partition", "--array"},
    "git, nvidia-smi and apex's build": {
        "--porcelain",
        "--untracked-files",
        "--show-toplevel",
        "--noheader",
        "--cuda_ext",
    },
    "parsed before the settings": {"--version", "--describe", "--list"},
    "examples": {"--optim.lr", "--option"},
}
"""Words that are no flags of megaft's settings, by the program that takes them."""


def parser_of(config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # tyro has no other way to list a parser's flags
        parser = tyro.extras.get_parser(config)
    return parser


def real_flags(config):
    parser: argparse.ArgumentParser = parser_of(config)
    return {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}


@pytest.fixture(scope="module")
def all_flags():
    return set().union(*map(real_flags, COMMANDS))


FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*(?:\.[a-z][\w-]*)*(?:\.\*|\.$|\.(?=\{))?")


def texts(tree):
    """Yield line and text of every string literal; an f-string is one, with its values as {}."""
    joined = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    parts = {id(part) for node in joined for part in node.values}
    for node in joined:
        yield node.lineno, "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.lineno, node.value


def named_flags(*folders):
    """Yield file and line, text and flag of every word in a string literal that looks like a flag."""
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        for line, text in texts(ast.parse(path.read_text())):
            yield from ((f"{path}:{line} {flag}", text, flag) for flag in FLAG.findall(text))


def exists(flag, flags):
    known = flags.union(*OF_OTHER_PROGRAMS.values())
    if flag[-1] in "*.":  # a section, or the end of a sentence or of a part of an f-string
        return any(known_flag.startswith(flag.rstrip("*")) for known_flag in known) or flag[:-1] in known
    return flag in known or flag.replace("_", "-") in known


def test_every_flag_that_is_named_exists(all_flags):
    found = named_flags("megaft", "evaluate_zero_shot")
    assert [where for where, _, flag in found if not exists(flag, all_flags)] == []


def test_messages_of_a_training_run_name_its_flags_or_a_command():
    flags, found = real_flags(TrainConfig), named_flags("megaft/run", "megaft/checkpoint")
    assert [where for where, text, flag in found if "megaft " not in text and not exists(flag, flags)] == []


def test_every_other_programs_flag_is_named():
    named = {flag for *_, flag in named_flags("megaft", "evaluate_zero_shot")}
    assert set().union(*OF_OTHER_PROGRAMS.values()) <= named


@pytest.mark.parametrize("config", [TrainConfig, EvaluateConfig, ConvertConfig])
def test_the_flags_of_the_fields_are_those_of_the_parser(config):
    assert {f"--{flag}" for flag in flags_of(config).values()} <= real_flags(config)


def test_settings_that_ranks_compare_are_named_by_their_flags():
    config = TrainConfig(
        deepspeed_config=Path("x.json"),
        model=ModelConfig(path="m"),
        data=DataConfig(train=("t",)),
        run=RunConfig(dir=Path("r"), max_steps=1),
    )
    named = settings_of(config, {})
    assert "--checkpoint.async" in named
    assert named.keys() <= real_flags(TrainConfig)


def test_settings_of_a_run_are_named_by_their_flags(all_flags):
    for setting in SETTINGS.values():
        for flag in re.findall(r"--[\w.*-]+", setting.replace("{flag}", "rank" if "lora" in setting else "name")):
            assert exists(flag, all_flags), setting
