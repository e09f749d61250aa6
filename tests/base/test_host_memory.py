import pytest

from megaft.base.host_memory import available_memory

GIB = 2**30
LIMITS = {
    "no limit": ({}, "0::/user.slice\n", 8),
    "version 2, of a job's step": (
        {
            "job/memory.max": 6 * GIB,
            "job/memory.current": 5 * GIB,
            "job/memory.stat": f"anon 1\nactive_file {GIB}\ninactive_file {GIB}",
            "job/step/memory.max": "max",
            "job/step/memory.current": GIB,
        },
        "0::/job/step\n",
        3,
    ),
    "version 1": (
        {"memory/job/memory.limit_in_bytes": 4 * GIB, "memory/job/memory.usage_in_bytes": 2 * GIB},
        "5:cpu,cpuacct:/job\n9:memory:/job\n",
        2,
    ),
    "a limit above what the host has": ({"memory.max": 64 * GIB, "memory.current": GIB}, "0::/\n", 8),
    "a container that sees its own group as the top": (
        {"memory.max": 2 * GIB, "memory.current": GIB},
        "0::/docker/0123\n",
        1,
    ),
}


@pytest.mark.parametrize("case", LIMITS)
def test_memory_left_here_and_in_the_control_groups(case, tmp_path):
    files, groups, expected = LIMITS[case]
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {8 * 2**20} kB\n")
    (proc / "self/cgroup").write_text(groups)
    for name, content in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    assert available_memory(tmp_path) == expected * GIB


def test_memory_is_told():
    assert 1 << 24 < available_memory() < 1 << 50
