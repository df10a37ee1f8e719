"""What every test shares: one thread, no network, no settings of the person who runs the tests.

Warnings are errors by pyproject.toml; the markers gpu and slow are opt-in there too.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Before anything imports torch, a Hub client or matplotlib; subprocesses inherit these.
_GUARD = Path(__file__).parent / "guard"
_ROOT = Path(__file__).parent.parent
os.environ.update(
    OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"),
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="Agg",
    PYTHONPATH=os.pathsep.join(
        [str(_GUARD), str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])],
    ),
)
for _path in (str(_ROOT), str(_GUARD)):
    if _path not in sys.path:
        sys.path.insert(0, _path)
if "sitecustomize" in sys.modules and not hasattr(sys.modules["sitecustomize"], "NetworkBlocked"):
    del sys.modules["sitecustomize"]  # the system has its own

import pytest  # noqa: E402
import sitecustomize  # noqa: E402  (tests/guard; blocks the network of this process)
from hub_server import HubServer  # noqa: E402

sitecustomize.install()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """torch with as many threads as OMP_NUM_THREADS says; torch is not loaded for tests that do not need it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fixtures that several tests share keep their runs here, not among the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("shared-state")))
        yield


@pytest.fixture(autouse=True)
def _own_settings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No PACKFORCING_* variables, no settings file and no runs of the user."""
    for name in [name for name in os.environ if name.startswith("PACKFORCING_")]:
        monkeypatch.delenv(name)
    home = str(tmp_path_factory.getbasetemp() / "home")
    for variable in ("XDG_CONFIG_HOME", "XDG_CACHE_HOME", "APPDATA", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, home)
    monkeypatch.setenv(
        "XDG_STATE_HOME", str(tmp_path_factory.mktemp("state"))
    )  # run folders: every test its own


@dataclass(frozen=True)
class CommandResult:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def run_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., CommandResult]:
    """Run a packforcing command line in this process, in an empty folder."""
    from packforcing_cli.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> CommandResult:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(_as_list(arguments))
        captured = capsys.readouterr()
        return CommandResult(int(stop.value.code or 0), captured.out, captured.err)

    return run


def _as_list(arguments: Sequence[str]) -> list[str]:
    return [str(argument) for argument in arguments]


@pytest.fixture
def hub_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on this machine, and caches of this test's own; failed requests are repeated without a pause."""
    import huggingface_hub.utils
    from huggingface_hub import constants

    from packforcing_cli import hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "RETRY_SECONDS", (0, 0))
    with HubServer() as server:
        yield server
    huggingface_hub.utils.close_session()
