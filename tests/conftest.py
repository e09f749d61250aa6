"""What every test may ask for: the real corpora and models, and a small launcher of ranks."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the shared test data: data/ (real corpora) and models/ (a small trained GPT-2)."""
    folder = Path(os.environ.get("MEGAFT_TEST_DATA", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip(f"no test data at {folder}; set MEGAFT_TEST_DATA")
    return folder
