import os
import subprocess
import sys
from pathlib import Path

from megaft.base.library_environment import LIBRARY_ENVIRONMENT, set_library_environment

HAS_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage").exists()
PROGRAM = """
from megaft.base.library_environment import set_library_environment
set_library_environment()
import torch
tensor = torch.ones(2**24)
print(any(" hg" in line for line in open("/proc/self/smaps") if line.startswith("VmFlags")))
"""


def test_what_the_user_set_stays(monkeypatch):
    for name in LIBRARY_ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    set_library_environment()
    assert os.environ["TQDM_DISABLE"] == "1"
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"


def test_torch_asks_for_huge_pages():
    environment = {name: value for name, value in os.environ.items() if name not in LIBRARY_ENVIRONMENT}
    output = subprocess.check_output([sys.executable, "-c", PROGRAM], env=environment, text=True)
    assert output.strip() == str(HAS_HUGE_PAGES)  # Linux may grant them later, or never
