"""The Hub's files through the real client, against a Hub on this machine: every way a download goes wrong."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, sha256

from packforcing_cli import hub
from packforcing_cli.errors import (
    DiskFullError,
    OfflineError,
    PackforcingError,
    UsageError,
    WeightsError,
)
from packforcing_cli.hub import Hub

REPO = "owner/weights"
LARGE = bytes(range(256)) * 12_000  # 3 MB: three chunks
SMALL = b'{"small": true}'


@pytest.fixture
def server(hub_server: HubServer) -> HubServer:
    hub_server.add(REPO, {"config.json": SMALL, "sub/w.safetensors": LARGE})
    return hub_server


def ask(server: HubServer, **options: Any) -> Hub:
    return Hub(endpoint=server.endpoint, **options)


def fetch(server: HubServer, path: str = "sub/w.safetensors", **options: Any) -> Path:
    at = ask(server)
    found = at.snapshot(REPO, "main")
    return at.fetch(REPO, found.commit, found.files[path], **options)


def leftovers(tmp_path: Path) -> list[str]:
    """Contents in the cache that are not whole."""
    return sorted(p.name.split(".", 1)[1] for p in (tmp_path / "hub").rglob("*incomplete*"))


def test_a_snapshot_tells_commit_sizes_and_hashes(server: HubServer) -> None:
    found = ask(server).snapshot(REPO, "main")
    assert found.commit == server.repos[REPO].refs["main"]
    assert found.files["sub/w.safetensors"].sha256 == sha256(LARGE)
    small = found.files["config.json"]
    assert (small.size, small.sha256) == (len(SMALL), None)


def test_a_file_lands_in_the_cache_other_programs_use(server: HubServer) -> None:
    """The real client finds it there without asking anybody."""
    from huggingface_hub import hf_hub_download

    commit = server.repos[REPO].refs["main"]
    for path, content in (("sub/w.safetensors", LARGE), ("config.json", SMALL)):
        mine = fetch(server, path)
        asked = len(server.requests)
        theirs = hf_hub_download(
            REPO, path, revision=commit, cache_dir=hub.cache_folder(), local_files_only=True
        )
        assert Path(theirs) == mine
        assert mine.read_bytes() == content
        assert len(server.requests) == asked


def test_what_another_program_downloaded_is_not_downloaded_again(server: HubServer) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download(REPO, "sub/w.safetensors", endpoint=server.endpoint, cache_dir=hub.cache_folder())
    before = len(server.asked("GET /cdn"))
    gained: list[int] = []
    assert fetch(server, advance=gained.append).read_bytes() == LARGE
    assert len(server.asked("GET /cdn")) == before
    assert gained == [len(LARGE)]


def test_a_cut_connection_is_taken_up_in_the_same_run(server: HubServer, tmp_path: Path) -> None:
    server.fail("GET /cdn", cut=1_000_000)
    server.fail("GET /cdn", cut=500_000)
    gained: list[int] = []
    assert fetch(server, advance=gained.append).read_bytes() == LARGE
    assert [h.get("range") for h in server.asked("GET /cdn")] == [None, "bytes=1000000-", "bytes=1500000-"]
    assert sum(gained) == len(LARGE)
    assert leftovers(tmp_path) == []


def test_a_download_goes_on_in_a_later_process(server: HubServer, tmp_path: Path) -> None:
    server.fail("GET /cdn", cut=2_000_000)
    server.fail("HEAD .*resolve", status=500, times=0)
    code = (
        "import os, sys\n"
        f"os.environ.update(HF_HUB_CACHE={str(tmp_path / 'hub')!r}, HF_HUB_OFFLINE='0')\n"
        "from packforcing_cli import hub\n"
        "hub.RETRY_SECONDS = ()\n"
        f"at = hub.Hub(endpoint={server.endpoint!r})\n"
        f"found = at.snapshot({REPO!r}, 'main')\n"
        "file = found.files['sub/w.safetensors']\n"
        "def stop(n):\n"
        "    if hub.unfinished_bytes(found.repo, file) >= 1 << 20: os._exit(9)\n"
        "at.fetch(found.repo, found.commit, file, stop)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert killed.returncode == 9, killed.stderr
    assert leftovers(tmp_path) == ["packforcing.incomplete", "packforcing.incomplete.etag"]
    there = next((tmp_path / "hub").rglob("*.incomplete")).stat().st_size
    assert 0 < there < len(LARGE)
    assert fetch(server).read_bytes() == LARGE
    last = server.asked("GET /cdn")[-1]
    assert (last["range"], last["if-range"]) == (f"bytes={there}-", f'"{sha256(LARGE)}"')
    assert leftovers(tmp_path) == []


def test_two_downloads_of_one_file_at_once_are_one(server: HubServer) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(fetch, server) for _ in range(2)]
        assert [done.result().read_bytes() for done in both] == [LARGE, LARGE]
    assert len(server.asked("GET /cdn")) == 1


def test_nothing_phones_home(server: HubServer, monkeypatch: pytest.MonkeyPatch, run_command: Any) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    fetch(server)
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    run_command("--version")
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert {path.split("/")[1] for _, path, _ in server.requests} == {"api", "owner", "cdn"}


def unfinished(tmp_path: Path, content: bytes, tag: str = "") -> None:
    """As an interrupted download leaves it."""
    blobs = tmp_path / "hub" / "models--owner--weights" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{sha256(LARGE)}.packforcing.incomplete").write_bytes(content)
    (blobs / f"{sha256(LARGE)}.packforcing.incomplete.etag").write_text(tag)


def test_a_server_without_ranges_or_with_another_file_starts_over(server: HubServer, tmp_path: Path) -> None:
    server.ranges = False
    unfinished(tmp_path, LARGE[:100])
    gained: list[int] = []
    assert fetch(server, advance=gained.append).read_bytes() == LARGE
    assert sum(gained) == len(LARGE)
    shutil.rmtree(tmp_path / "hub")
    server.ranges = True
    unfinished(tmp_path, b"older" * 20, '"of an older file"')
    assert fetch(server).read_bytes() == LARGE
    assert server.asked("GET /cdn")[-1]["if-range"] == '"of an older file"'


def test_wrong_bytes_are_thrown_away_and_the_next_attempt_succeeds(server: HubServer, tmp_path: Path) -> None:
    server.fail("GET /cdn", replace=b"\0" * len(LARGE))
    with pytest.raises(WeightsError, match="arrived damaged: it has another hash") as caught:
        fetch(server)
    assert (caught.value.exit_code, leftovers(tmp_path)) == (7, [])
    assert not list((tmp_path / "hub").rglob("w.safetensors"))
    unfinished_damage = LARGE[:50] + b"!" * 50
    (
        tmp_path / "hub" / "models--owner--weights" / "blobs" / f"{sha256(LARGE)}.packforcing.incomplete"
    ).write_bytes(unfinished_damage)
    with pytest.raises(WeightsError, match="another hash"):
        fetch(server)
    assert fetch(server).read_bytes() == LARGE


def test_a_small_file_with_wrong_bytes_is_found_out_by_gits_hash(server: HubServer, tmp_path: Path) -> None:
    server.fail("GET .*config.json", replace=b'{"small": 1234}')
    with pytest.raises(WeightsError, match=r"config\.json arrived damaged"):
        fetch(server, "config.json")
    assert fetch(server, "config.json").read_bytes() == SMALL


def test_a_file_of_another_length_is_refused(server: HubServer, tmp_path: Path) -> None:
    server.fail("GET /cdn", replace=b"<html>please log in</html>" * 200_000)
    with pytest.raises(WeightsError, match="instead of 3072000 bytes"):
        fetch(server)
    assert leftovers(tmp_path) == []
    assert fetch(server).read_bytes() == LARGE


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("where", ["GET /api", "HEAD .*resolve", "GET /cdn"])
def test_a_busy_hub_is_asked_again(server: HubServer, status: int, where: str) -> None:
    server.fail(where, status=status, headers={"Retry-After": "0"})
    assert fetch(server).read_bytes() == LARGE


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (429, {"Retry-After": "3600"}, "it asks to wait 3600 s"),
        (429, {}, r"refuses more requests for now \(429\)"),
        (503, {}, "answers 503 for sub/w.safetensors"),
    ],
)
def test_a_hub_that_stays_busy_is_told(
    server: HubServer, tmp_path: Path, status: int, headers: dict[str, str], message: str
) -> None:
    server.fail("GET /cdn", cut=1_000_000)
    server.fail("GET /cdn", status=status, headers=headers, times=9)
    with pytest.raises(OfflineError, match=message) as caught:
        fetch(server)
    assert caught.value.exit_code == 8
    assert "goes on from there" in caught.value.hint
    server.faults.clear()
    assert fetch(server).read_bytes() == LARGE
    assert server.asked("GET /cdn")[-1]["range"] == "bytes=1000000-"


@pytest.mark.parametrize("header", ["Retry-After", "retry-after"])
@pytest.mark.parametrize("where", ["GET /api", "HEAD .*resolve", "GET /cdn"])
def test_a_pause_is_as_long_as_the_hub_asks(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, where: str, header: str
) -> None:
    slept: list[float] = []
    said: list[str] = []
    monkeypatch.setattr(hub.time, "sleep", slept.append)
    server.fail(where, status=429, headers={header: "7"})
    at = ask(server, note=said.append)
    found = at.snapshot(REPO, "main")
    at.fetch(REPO, found.commit, found.files["sub/w.safetensors"])
    assert slept == [7.0]
    assert said == ["the Hub asks for patience (429); waiting 7 s"]


def test_no_network_is_exit_code_8(hub_server: HubServer) -> None:
    at = Hub(endpoint="http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(OfflineError, match=r"http://127.0.0.1:9 cannot be reached") as caught:
        at.snapshot(REPO, "main")
    assert caught.value.exit_code == 8


def test_an_answer_that_is_not_the_hubs_is_told(server: HubServer) -> None:
    server.fail("GET /api", status=200, replace=b"<html>Welcome to our hotel</html>")
    with pytest.raises(OfflineError, match="does not answer like the Hub"):
        ask(server).snapshot(REPO, "main")


@pytest.mark.parametrize(
    ("repo", "revision", "message", "error"),
    [
        ("owner/nothing", "main", "does not exist on .*, or is private", UsageError),
        (REPO, "v9", "there is no such revision", UsageError),
        ("weights", "main", "is not a Hub repository", UsageError),
        ("../../etc", "main", "is not a Hub repository", UsageError),
    ],
)
def test_what_is_not_there_is_a_usage_error(
    server: HubServer, repo: str, revision: str, message: str, error: type[PackforcingError]
) -> None:
    with pytest.raises(error, match=message) as caught:
        ask(server).snapshot(repo, revision)
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_a_gated_repository_wants_a_token_and_takes_it(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server.repos[REPO].gated = True
    server.token = "hf_secret"
    with pytest.raises(OfflineError, match="is gated") as caught:
        fetch(server)
    assert "HF_TOKEN" in caught.value.hint
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(OfflineError, match="is gated"):
        fetch(server)
    assert leftovers(tmp_path) in ([], ["packforcing.incomplete"])
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert fetch(server).read_bytes() == LARGE
    assert server.asked("HEAD .*resolve")[-1]["authorization"] == "Bearer hf_secret"
    assert "authorization" not in server.asked("GET /cdn")[-1]  # another host


def test_a_full_disk_is_exit_code_6_before_and_while_downloading(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(hub.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 1000))
        with pytest.raises(DiskFullError, match=r"0.0 MB free") as caught:
            hub.require_space(len(LARGE))
        assert caught.value.exit_code == 6
        assert "HF_HOME" in caught.value.hint
        hub.require_space(1000)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(hub.os, "fsync", full)
        with pytest.raises(DiskFullError, match="is full"):
            fetch(server)
    assert fetch(server).read_bytes() == LARGE


def test_offline_nobody_is_asked(server: HubServer) -> None:
    at = ask(server, offline=True)
    with pytest.raises(OfflineError, match="the network is switched off"):
        at.snapshot(REPO, "main")
    fetch(server)
    asked = len(server.requests)
    commit = server.repos[REPO].refs["main"]
    found = at.snapshot(REPO, commit)
    assert list(found.files) == ["sub/w.safetensors"]
    assert at.fetch(REPO, commit, found.files["sub/w.safetensors"]).read_bytes() == LARGE
    assert len(server.requests) == asked


def test_offline_a_branch_is_the_commit_it_was_when_last_looked_at(server: HubServer, tmp_path: Path) -> None:
    older = server.repos[REPO].refs["main"]
    fetch(server)
    assert ask(server, offline=True).snapshot(REPO, "main").commit == older
    newer = server.add(REPO, {"config.json": b"{}"})
    assert ask(server, offline=True).snapshot(REPO, "main").commit == older
    fetch(server, "config.json")
    assert ask(server, offline=True).snapshot(REPO, "main").commit == newer
    refs = tmp_path / "hub" / "models--owner--weights" / "refs"
    assert {path.name: path.read_text() for path in refs.iterdir()} == {"main": newer}
    ask(server).snapshot(REPO, newer)  # a commit needs no note
    assert [path.name for path in refs.iterdir()] == ["main"]


def test_a_note_of_a_branch_that_cannot_be_written_stops_nothing(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(hub.durable, "write", full)
    assert ask(server).snapshot(REPO, "main").commit == server.repos[REPO].refs["main"]


def test_the_environment_can_switch_the_network_off(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OfflineError, match="HF_HUB_OFFLINE"):
        ask(server).snapshot(REPO, "main")
    assert server.requests == []


def test_an_endpoint_is_an_address(hub_server: HubServer) -> None:
    with pytest.raises(UsageError, match="is not a web address"):
        Hub(endpoint="localhost")
