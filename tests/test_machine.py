"""Free memory as a process may really take it, on machines with and without container limits."""

from __future__ import annotations

from pathlib import Path

import pytest

from packforcing_cli import machine

GB = 10**9


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A made-up /proc and /sys/fs/cgroup: 64 GB free, no limits."""
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "cgroup")
    write(tmp_path / "proc/meminfo", f"MemTotal: 99 kB\nMemAvailable:   {64 * GB // 1024} kB\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def limit(folder: Path, most: object, used: int, clean: int) -> None:
    write(folder / "memory.max", f"{most}\n")
    write(folder / "memory.current", f"{used}\n")
    write(folder / "memory.stat", f"anon 1\ninactive_file {clean}\n")


def test_without_a_limit_it_is_what_the_system_has_left(system: Path) -> None:
    assert machine.available_memory() == 64 * GB // 1024 * 1024
    write(system / "proc/self/cgroup", "0::/app\n")
    limit(system / "cgroup/app", "max", GB, 0)
    assert machine.available_memory() == 64 * GB // 1024 * 1024


def test_the_tightest_cgroup_above_the_process_counts_and_clean_pages_are_free(system: Path) -> None:
    write(system / "proc/self/cgroup", "0::/pod/app\n")
    limit(system / "cgroup/pod/app", 16 * GB, 6 * GB, 2 * GB)
    assert machine.available_memory() == 12 * GB
    limit(system / "cgroup/pod", 10 * GB, 7 * GB, GB)
    assert machine.available_memory() == 4 * GB


def test_in_a_container_whose_path_is_the_hosts_the_mounted_root_counts(system: Path) -> None:
    write(system / "proc/self/cgroup", "0::/kubepods/pod1/abc\n")
    limit(system / "cgroup", 8 * GB, GB, 0)
    assert machine.available_memory() == 7 * GB


def test_cgroup_version_1(system: Path) -> None:
    write(system / "proc/self/cgroup", "5:cpu,cpuacct:/app\n4:memory:/app\n1:name=systemd:/app\n")
    folder = system / "cgroup/memory/app"
    write(folder / "memory.limit_in_bytes", str(4 * GB))
    write(folder / "memory.usage_in_bytes", str(3 * GB))
    write(folder / "memory.stat", f"cache 5\ntotal_inactive_file {GB}\n")
    assert machine.available_memory() == 2 * GB


def test_a_limit_that_is_used_up_leaves_nothing_and_odd_files_are_no_limit(system: Path) -> None:
    write(system / "proc/self/cgroup", "0::/app\nnonsense\n")
    limit(system / "cgroup/app", GB, 2 * GB, 0)
    assert machine.available_memory() == 0
    limit(system / "cgroup/app", "a lot", 2 * GB, 0)
    assert machine.available_memory() == 64 * GB // 1024 * 1024


def test_this_machine_tells(tmp_path: Path) -> None:
    assert 0 < machine.available_memory() <= machine.UNKNOWN_MEMORY
    assert machine.free_disk(tmp_path / "not" / "yet") == machine.free_disk(tmp_path)
    assert isinstance(machine.has_nvidia_driver(), bool)


def test_the_driver_is_seen_by_its_file(system: Path) -> None:
    write(system / "proc/driver/nvidia/version", "NVRM version: 580.1")
    assert machine.has_nvidia_driver()


def test_the_age_of_the_process_is_from_its_start(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Field 22 of /proc/self/stat, in ticks since boot; a program's name may have brackets and spaces in it."""
    monkeypatch.setattr(machine.os, "sysconf", lambda name: {"SC_CLK_TCK": 100}[name])
    monkeypatch.setattr(machine.time, "CLOCK_BOOTTIME", 7, raising=False)
    monkeypatch.setattr(machine.time, "clock_gettime", lambda clock: {7: 1002.5}[clock])
    fields = ["R", *(str(n) for n in range(4, 22)), "100025", *(str(n) for n in range(23, 53))]
    write(system / "proc/self/stat", f"4711 (a) b (c)) {' '.join(fields)}\n")
    assert machine.process_seconds() == pytest.approx(1002.5 - 1000.25)
    (system / "proc/self/stat").unlink()
    assert machine.process_seconds() is None


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_this_process_is_older_than_this_test() -> None:
    first = machine.process_seconds()
    second = machine.process_seconds()
    assert first is not None and second is not None
    assert 0 < first <= second
