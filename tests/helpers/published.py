"""Folder of published corpora, which only some machines have."""

import os
from pathlib import Path

FOLDER = Path(os.environ.get("MEGAFT_TEST_DATA", Path(__file__).parents[3] / "shared"))
"""Corpora in data/, with the hashes in data/MANIFEST.sha256, and a GPT-2 trained on one in models/."""
IS_PRESENT = (FOLDER / "data/MANIFEST.sha256").is_file()
ABSENT = f"no published corpora at {FOLDER} (set MEGAFT_TEST_DATA)"
