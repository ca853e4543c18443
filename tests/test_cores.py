"""The cores that a container, a SLURM job and the system leave to a process."""

import os

import pytest

from nerve import cores


@pytest.fixture(autouse=True)
def host(monkeypatch, tmp_path):
    """A host with 64 cores and no limits; `group` sets the limits of control groups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "_MEMBERSHIP", tmp_path / "membership")

    def group(membership: str, **files: str) -> None:
        (tmp_path / "membership").write_text(membership)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name.replace("__", "/").replace("_max", ".max")
            path = path.with_name(path.name.replace("cfs_quota", "cpu.cfs_quota_us"))
            path = path.with_name(path.name.replace("cfs_period", "cpu.cfs_period_us"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return group


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64),
        ({"cpu_max": "max 100000\n"}, 64),
        ({"cpu_max": "400000 100000\n"}, 4),  # what docker run --cpus=4 sets
        ({"cpu_max": "250000 100000\n"}, 2),
        ({"cpu_max": "50000 100000\n"}, 1),
        ({"cpu_max": "12800000 100000\n"}, 64),
        ({"a__b__cpu_max": "300000 100000\n", "a__cpu_max": "max 100000\n"}, 3),
        ({"a__b__cpu_max": "max 100000\n", "a__cpu_max": "200000 100000\n"}, 2),
        ({"cpu_max": "damaged"}, 64),
        ({"cpu_max": "100000 0"}, 64),
    ],
)
def test_the_quota_of_a_container_counts(host, files, expected):
    """That of its own group and of the parents; within a container, its path may not exist."""
    host("0::/a/b\n", **files)
    assert cores.allowed() == expected
    assert cores.are_fewer() == (expected < 64)


@pytest.mark.parametrize(("quota", "expected"), [("-1", 64), ("600000", 6), ("", 64)])
def test_the_first_version_of_control_groups_counts(host, quota, expected):
    host(
        "3:memory:/x\n2:cpu,cpuacct:/docker/1\n",
        cpu__cfs_quota=quota,
        cpu__cfs_period="100000",
    )
    assert cores.allowed() == expected


@pytest.mark.parametrize(
    ("told", "expected"), [("8", 8), ("128", 64), ("0", 64), ("", 64), ("many", 64)]
)
def test_what_a_job_of_slurm_has_for_a_task_counts(monkeypatch, told, expected):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", told)
    assert cores.allowed() == expected


def test_the_fewest_count(host, monkeypatch):
    host("0::/\n", cpu_max="500000 100000")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    assert cores.allowed() == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5})
    assert cores.allowed() == 2
    assert not cores.are_fewer()


def test_where_the_system_does_not_say_they_are_all_or_one(monkeypatch):
    """As on macOS."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert cores.allowed() == 5
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores.allowed() == 1


@pytest.mark.parametrize(
    ("membership", "file", "text", "expected"),
    [
        ("0::/a/b\n", "a/memory.max", "3000\n", 3000),  # of a group around it
        ("0::/a/b\n", "a/b/memory.max", "max\n", 8192),
        ("0::/a/b\n", "memory.max", "9000\n", 8192),
        ("3:memory:/x\n0::/\n", "memory/x/memory.limit_in_bytes", "5000\n", 5000),
        ("3:cpu:/x\n", "memory/x/memory.limit_in_bytes", "5000\n", 8192),
    ],
)
def test_the_memory_is_that_of_the_host_or_what_a_container_may_have(
    host, monkeypatch, tmp_path, membership, file, text, expected
):
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2}.__getitem__)
    host(membership)
    path = tmp_path / "cgroup" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert cores.memory() == expected
