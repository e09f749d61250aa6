"""megaft's code has no call that runs code from a file or text, and the search detects such calls."""

import re
from pathlib import Path

import pytest
from unsafe_calls import unsafe_calls

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("folder", ["megaft", "evaluate_zero_shot", "tools"])
def test_our_code_runs_nothing_that_a_file_says(folder):
    paths = [*(ROOT / folder).rglob("*.py"), ROOT / "setup.py"]
    assert len(paths) > 10
    assert {str(path): found for path in paths if (found := unsafe_calls(path.read_text()))} == {}


@pytest.mark.parametrize("folder", ["slurm", ".ci"])
def test_our_scripts_evaluate_no_text(folder):
    paths = [path for path in (ROOT / folder).iterdir() if path.is_file()]
    assert paths
    assert not [path for path in paths if re.search(r"\beval\b|\bbash -c\b", path.read_text())]


@pytest.mark.parametrize(
    "bad",
    [
        "import pickle; pickle.load(f)",
        "import pickle as p; p.loads(b)",
        "from pickle import load; load(f)",
        "from pickle import Unpickler as U; U(f).load()",
        "from pickle import *",
        "import cloudpickle; later = cloudpickle.load",
        "import yaml; yaml.load(f)",
        "import yaml; yaml.load(f, Loader=yaml.Loader)",
        "eval(text)",
        "import builtins; builtins.exec(text)",
        "exec(text)",
        "import os; os.system(text)",
        "from os import system as run; run(text)",
        "import subprocess; subprocess.run(text, shell=True)",
        "import subprocess; subprocess.Popen(text, shell=flag)",
        "import numpy as np; np.load(f, allow_pickle=True)",
        "tarfile.open(f).extractall(folder)",
        "tarfile.open(f).extractall(folder, filter='fully_trusted')",
        "import shutil; shutil.unpack_archive(f)",
        "import torch; torch.load(f)",
        "import torch; torch.load(f, weights_only=False)",
        "from torch import load as read; read(f, weights_only=flag)",
        "engine.load_checkpoint(folder)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_search_finds(bad):
    assert unsafe_calls(bad)


@pytest.mark.parametrize(
    "good",
    [
        "model.eval()",
        "class C:\n    eval: int = 0",
        "import re; re.compile(pattern)",
        "import json; json.load(f)",
        "import yaml; yaml.safe_load(f)",
        "from pickle import UnpicklingError",
        "import torch; torch.load(f, weights_only=True)",
        "tarfile.open(f).extractall(folder, filter='data')",
        "import subprocess; subprocess.run([text], shell=False)",
        "AutoModel.from_pretrained(name, trust_remote_code=False)",
    ],
)
def test_the_search_leaves_alone(good):
    assert unsafe_calls(good) == []
