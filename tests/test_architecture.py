"""The order of docs/architecture.md: which module may import which, who speaks to ranks, and how long a file may be."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from imports import Tree

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "megaft": ROOT / "megaft",
    "evaluate_zero_shot": ROOT / "evaluate_zero_shot",
    "detokenizers": ROOT / "tools" / "detokenizers",
}
ROOMS = ("base", "config", "data", "weights", "models", "scoring", "checkpoint", "run")
EVALUATION_USES = ("base", "config", "data", "weights", "models", "scoring")
EVALUATION = ("formats", "protocols", "tasks", "config"), ("texts",), ("evaluation",), ("report",), ("__main__",)
SPEAKS_TO_RANKS = ("megaft.base.parallel", "megaft.base.topology")
PROBES = "megaft.commands.doctor."
"""`megaft doctor` tries the collectives themselves."""
MAX_FILE_LINES = 400


def level(module: str) -> tuple[int, int]:
    """Return a module's height: of its package or room, and inside evaluate_zero_shot of its folder."""
    package, _, rest = module.partition(".")
    first = rest.partition(".")[0]
    if package == "detokenizers":
        return 0, 0
    if package == "megaft":
        return (1 + ROOMS.index(first), 0) if first in ROOMS else (1 + len(ROOMS) if rest else 0, 0)
    heights = {name: height for height, names in enumerate(EVALUATION) for name in names}
    return 2 + len(ROOMS), heights[first] if rest else 0


def is_allowed(module: str, imported: str) -> bool:
    """Return True if a module may import another: what is at its own height or below."""
    if module.startswith("evaluate_zero_shot") and imported.startswith("megaft."):
        return imported.split(".")[1] in EVALUATION_USES
    return level(imported) <= level(module)


def climbing(tree: Tree) -> list[str]:
    return [
        f"{module} imports {imported}"
        for module, imports in tree.imports.items()
        for imported in sorted(imports)
        if not is_allowed(module, imported)
    ]


def asking(tree: Tree) -> list[str]:
    """Return the collectives, and questions about ranks, of modules that must leave them to others."""
    return [
        f"{module}: {asked}"
        for module in tree.files
        if module not in SPEAKS_TO_RANKS and not module.startswith(PROBES)
        for asked in sorted(tree.collectives(module))
    ]


def configs(tree: Tree) -> list[str]:
    return [m for m in tree.files if m.startswith("megaft.config") or m.endswith(".config")]


def importing_torch(tree: Tree, *folders: Path) -> list[str]:
    """Return the first configuration that imports torch, itself or by way of others, in a new process."""
    check = "import sys\nfor name in sys.argv[1:]:\n    __import__(name)\n    if 'torch' in sys.modules: sys.exit(name)"
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {[str(f) for f in folders]}\n{check}", *configs(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr.splitlines()


def too_long(*folders: Path) -> list[str]:
    return [
        f"{path.name}: {lines} lines"
        for folder in folders
        for path in sorted(folder.rglob("*.py"))
        if (lines := path.read_text(encoding="utf-8").count("\n")) > MAX_FILE_LINES
    ]


@pytest.fixture(scope="module")
def house():
    return Tree(PACKAGES)


def test_no_import_climbs(house):
    assert not climbing(house)


def test_no_modules_import_each_other(house):
    assert not house.circles()


def test_one_file_speaks_to_ranks(house):
    assert not asking(house)


def test_configurations_do_without_torch(house):
    assert len(configs(house)) > 8
    assert not importing_torch(house, ROOT, ROOT / "tools")


def test_no_file_is_long():
    assert not too_long(*PACKAGES.values(), ROOT / "tools", ROOT / "tests")


def missing_paths(page: str, *roots: Path) -> list[str]:
    """Return the files and folders that a page names and no root has."""
    named = re.findall(r"`((?:\w+/)+(?:\w+\.\w+)?|\w+\.\w+)`", page)
    return sorted({path for path in named if not any((root / path).exists() for root in roots)})


def test_what_the_page_names_is_there():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for room in ROOMS:
        assert f"`megaft/{room}/`" in page
    roots = (ROOT, ROOT / "megaft", ROOT / "evaluate_zero_shot", ROOT / "tools" / "detokenizers")
    missing = set(missing_paths(page, *roots)) - {"results.json"}  # which an evaluation writes
    assert not missing


# Each rule finds its fault in a tree made up for it.


@pytest.fixture
def made(tmp_path):
    """made({"megaft/base/a.py": "..."}) is the tree of these files."""

    def make(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return Tree({name: tmp_path / name for name in PACKAGES if (tmp_path / name).is_dir()})

    return make


@pytest.mark.parametrize(
    ("module", "line", "imported"),
    [
        ("megaft/base/a.py", "from megaft.config import train", "megaft.config.train"),
        ("megaft/base/a.py", "from ..config import train", "megaft.config.train"),
        ("megaft/config/a.py", "import megaft.run.plan", "megaft.run.plan"),
        ("megaft/data/a.py", "def f():\n    from megaft.run.plan import x", "megaft.run.plan"),
        ("megaft/data/a.py", "if TYPE_CHECKING:\n    from megaft.run.plan import x", "megaft.run.plan"),
        ("megaft/run/a.py", "from megaft import train", "megaft.train"),
        ("megaft/run/a.py", "from evaluate_zero_shot import tasks", "evaluate_zero_shot.tasks"),
        ("detokenizers/a.py", "from megaft.config.train import x", "megaft.config.train"),
        ("evaluate_zero_shot/evaluation/a.py", "from megaft.run.plan import x", "megaft.run.plan"),
        ("evaluate_zero_shot/texts/a.py", "from megaft.train import x", "megaft.train"),
        ("evaluate_zero_shot/config.py", "from evaluate_zero_shot.texts import b", "evaluate_zero_shot.texts.b"),
    ],
)
def test_a_climb_is_found(made, module, line, imported):
    others = ("megaft/config/train.py", "megaft/run/plan.py", "megaft/train.py")
    others += ("evaluate_zero_shot/tasks.py", "evaluate_zero_shot/texts/b.py")
    tree = made(dict.fromkeys(others, "") | {module: line})
    (found,) = climbing(tree)
    assert found.endswith(f" imports {imported}")


def test_going_down_is_no_climb(made):
    tree = made({"megaft/base/a.py": "", "megaft/run/b.py": "from megaft.base.a import x\nimport torch"})
    assert tree.imports["megaft.run.b"] == {"megaft.base.a"}
    assert not climbing(tree)


def test_a_circle_is_found(made):
    lines = {
        "a": "from megaft.base import b",
        "b": "def f():\n    import megaft.base.c",
        "c": "from . import a",
        "d": "",
    }
    tree = made({f"megaft/base/{name}.py": line for name, line in lines.items()})
    assert tree.circles() == [{"megaft.base.a", "megaft.base.b", "megaft.base.c"}]


@pytest.mark.parametrize(
    "line",
    [
        "import torch.distributed as dist\ndist.all_reduce(x)",
        "import torch\ntorch.distributed.barrier()",
        "from torch import distributed\ntimed(distributed.barrier)",
        "from torch.distributed import get_rank as who\nwho()",
        "from deepspeed import comm\ncomm.get_world_size()",
        "import os\nos.environ['RANK']",
        "from os import environ\nenviron.get('LOCAL_RANK', 0)",
        "import os\nos.getenv('WORLD_SIZE')",
        "NAME = 'RANK'\nenvironment[NAME]",
    ],
)
def test_a_question_to_ranks_is_found(made, line):
    tree = made({"megaft/run/a.py": line, "megaft/base/parallel.py": line, "megaft/commands/doctor/ranks.py": line})
    (found,) = asking(tree)
    assert found.startswith("megaft.run.a: ")


def test_other_reductions_ask_no_rank(made):
    assert not asking(made({"megaft/run/a.py": "import torch\ntorch.gather(x)\nos.environ['HOME']\nqueue.send(1)"}))


def test_a_configuration_that_imports_torch_is_found(made, tmp_path):
    lines = {
        "torch.py": "",
        "megaft/base/a.py": "import torch",
        "megaft/config/a.py": "from megaft.base.a import torch",
    }
    tree = made({"megaft/__init__.py": "", **lines})
    assert importing_torch(tree, tmp_path) == ["megaft.config.a"]


def test_a_long_file_is_found(tmp_path):
    (tmp_path / "a.py").write_text("\n" * MAX_FILE_LINES)
    assert not too_long(tmp_path)
    (tmp_path / "a.py").write_text("\n" * (MAX_FILE_LINES + 1))
    assert too_long(tmp_path) == ["a.py: 401 lines"]


def test_a_missing_folder_is_found(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "a.py").write_text("")
    assert missing_paths("`base/` has `base/a.py` and `base/b.py`; `run/` is `a.b.c` or `x`", tmp_path) == [
        *("base/b.py", "run/"),
    ]
