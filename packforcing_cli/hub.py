"""The Hugging Face Hub: what a repository holds at a commit, and its files in the Hub's own cache.

    repository, revision -> Snapshot (commit, files with size and hash) -> fetch -> a file in the cache every
                                                                           Hub program shares, never a copy

What the Hub is asked, where its cache is and how a file is entered there is huggingface_hub's business, and with it
HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE. The bytes are read here: huggingface_hub 2.4 throws
an unfinished file away (each download has a temporary file of its own), and a shard of 5 GB has to go on where it
stopped, also in a later process. An unfinished file is `blobs/<etag>.packforcing.incomplete`; it is taken up by a
range request with If-Range, hashed while it is read, and enters the cache only with the hash the Hub tells.
Knows no models and no packages.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import IO, Any, TypeVar

from packforcing_cli import durable
from packforcing_cli.errors import DiskFullError, OfflineError, PackforcingError, UsageError, WeightsError

RETRY_SECONDS: tuple[float, ...] = (1, 2, 4, 8)  # pauses between attempts that bring nothing new
LONGEST_WAIT = 60.0  # seconds of a Retry-After that are waited; a longer one is told to the person
TIMEOUT = 30.0  # seconds without a byte
CHUNK = 1 << 20
COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO = re.compile(r"[\w.-]+/[\w.-]+")

T = TypeVar("T")


@dataclass(frozen=True)
class RepoFile:
    """One file of a repository.

    sha256: None for a small file, which the Hub keeps in git and knows by its git hash.
    etag:   the name of its content in the cache: the sha256, or the git hash.
    """

    path: str
    size: int
    sha256: str | None
    etag: str


@dataclass(frozen=True)
class Snapshot:
    """What a repository holds at a commit. files: path -> RepoFile."""

    repo: str
    commit: str
    files: Mapping[str, RepoFile]


class Hub:
    """One endpoint of the Hub, asked with patience.

    endpoint: None = HF_ENDPOINT or huggingface.co.
    offline:  ask nobody; HF_HUB_OFFLINE has the same effect.
    note:     is told what a person should know while waiting.
    """

    def __init__(
        self, *, endpoint: str | None = None, offline: bool = False, note: Callable[[str], None] | None = None
    ) -> None:
        library = _library()
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise UsageError(
                f"--endpoint {endpoint} is not a web address",
                hint="For example --endpoint https://hf-mirror.com",
            )
        self.endpoint = (endpoint or library.constants.ENDPOINT).rstrip("/")
        self.offline = offline or library.constants.is_offline_mode()
        self.note = note or (lambda _: None)

    def snapshot(self, repo: str, revision: str) -> Snapshot:
        """Ask for the commit and the files of a revision.

        Offline it is what the cache holds of it.
        Raises: UsageError if there is no such repository or revision; OfflineError if the Hub cannot be asked.
        """
        check_repo(repo)
        if self.offline:
            return self._cached_snapshot(repo, revision)
        api = _library().HfApi(endpoint=self.endpoint)

        def ask() -> Snapshot:
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
            files = {}
            for entry in info.siblings or ():
                sha256 = entry.lfs.sha256 if entry.lfs else None
                if entry.size is not None and (sha256 or entry.blob_id):
                    files[entry.rfilename] = RepoFile(
                        entry.rfilename, entry.size, sha256, sha256 or entry.blob_id
                    )
            if not info.sha or not COMMIT.fullmatch(info.sha):
                raise ValueError("it names no commit")
            return Snapshot(repo, info.sha, files)

        found = self._patiently(f"{repo} at {revision}", ask)
        if revision != found.commit:
            _remember_commit(repo, revision, found.commit)
        return found

    def _cached_snapshot(self, repo: str, revision: str) -> Snapshot:
        commit = cached_commit(repo, revision)
        folder = snapshot_folder(repo, commit) if commit else None
        if commit is None or folder is None or not folder.is_dir():
            raise self._offline(f"{repo} at {revision}")
        files = {}
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            with path.open("rb") as content:
                sha256 = hashlib.file_digest(content, "sha256").hexdigest()
            name = path.relative_to(folder).as_posix()
            files[name] = RepoFile(name, path.stat().st_size, sha256, sha256)
        return Snapshot(repo, commit, files)

    @staticmethod
    def _offline(what: str) -> OfflineError:
        return OfflineError(
            f"{what} is not on this machine, and the network is switched off (--offline or HF_HUB_OFFLINE)",
            hint="Run it once with the network on, or carry a bundle over: packforcing models pack --with-parts.",
        )

    def fetch(
        self, repo: str, commit: str, file: RepoFile, advance: Callable[[int], None] = lambda _: None
    ) -> Path:
        """Bring one file into the Hub's cache, going on with an unfinished one. Returns its path there.

        Args:
            advance: called with the bytes gained; negative when an unfinished file had to be given up.
        Raises: WeightsError if the content is not what the Hub announced (nothing is left of it); OfflineError if
            it cannot be had (what is there stays, for the next attempt); DiskFullError.
        """
        present = cached(repo, commit, file.path)
        if present is not None and present.stat().st_size == file.size:
            advance(file.size)
            return present
        if present is not None:
            discard(present)
        library = _library()
        blob = _repo_folder(repo) / "blobs" / file.etag
        lock = cache_folder() / ".locks" / _repo_folder(repo).name / f"{file.etag}.packforcing.lock"
        try:
            blob.parent.mkdir(parents=True, exist_ok=True)
            lock.parent.mkdir(parents=True, exist_ok=True)
            with library.utils.WeakFileLock(lock):
                if blob.is_file() and blob.stat().st_size == file.size:
                    advance(file.size)
                else:
                    url = library.hf_hub_url(repo, file.path, revision=commit, endpoint=self.endpoint)
                    self._download(url, blob, file, advance)
                return Path(self._enter(repo, commit, file))
        except OSError as error:
            full = _disk_full(error, blob.parent)
            if full is not None:
                raise full from error
            raise

    def _enter(self, repo: str, commit: str, file: RepoFile) -> str:
        """Give the finished content its name in the cache's snapshot."""
        library = _library()

        def enter() -> str:
            path: str = library.hf_hub_download(
                repo, file.path, revision=commit, endpoint=self.endpoint, cache_dir=cache_folder()
            )
            return path

        with _no_bars(library):
            return self._patiently(f"{file.path} of {repo}", enter)

    def _download(self, url: str, blob: Path, file: RepoFile, advance: Callable[[int], None]) -> None:
        library = _library()
        partial = blob.with_name(f"{file.etag}.packforcing.incomplete")
        tag = partial.with_name(partial.name + ".etag")
        digest = _digest(file)
        position = 0
        if partial.is_file():
            with partial.open("rb") as content:
                while chunk := content.read(CHUNK):
                    digest.update(chunk)
                    position += len(chunk)
            advance(position)
        with partial.open("ab") as target:

            def start_over() -> None:
                nonlocal digest, position
                target.truncate(0)
                advance(-position)
                digest, position = _digest(file), 0

            def read_on() -> None:
                nonlocal position
                if position > file.size:
                    start_over()
                # Asked for each attempt: the address behind it is signed and gets old.
                at = library.get_hf_file_metadata(url, timeout=TIMEOUT, endpoint=self.endpoint)
                with self._open(at.location, position, tag) as response:
                    if position and response.status != http.client.PARTIAL_CONTENT:
                        start_over()  # the server's file is another one, or it knows no ranges
                    tag.write_text(response.headers.get("ETag") or "", "utf-8")
                    while chunk := response.read(CHUNK):
                        target.write(chunk)
                        digest.update(chunk)
                        position += len(chunk)
                        advance(len(chunk))
                        if position > file.size:
                            break
                if position < file.size:
                    raise ConnectionError("the connection was cut")

            while True:
                before = position
                if position == file.size:
                    break
                try:
                    self._patiently(f"{file.path}", read_on, progressed=lambda: position > before)  # noqa: B023
                except _Progress:
                    self.note(f"{file.path}: the connection was cut, going on after {_gb(position)}")
                    continue
                break
            target.flush()
            os.fsync(target.fileno())
        if position != file.size or digest.hexdigest() != file.etag:
            partial.unlink()
            tag.unlink(missing_ok=True)
            what = f"{position} instead of {file.size} bytes" if position != file.size else "another hash"
            raise WeightsError(
                f"{file.path} arrived damaged: it has {what}, not what {self.endpoint} announced; it was thrown away",
                hint="Try again; if it happens again, the server or a proxy changes files on the way.",
            )
        partial.chmod(0o644)
        partial.replace(blob)
        tag.unlink(missing_ok=True)

    def _open(self, url: str, position: int, tag: Path) -> Any:
        """Start reading at a position. The token goes to the Hub only, not to where it sends us."""
        headers = {"Accept-Encoding": "identity"}
        for name, value in _library().utils.build_hf_headers().items():
            if name.lower() != "authorization" or _same_host(url, self.endpoint):
                headers[name] = value
        if position:
            headers["Range"] = f"bytes={position}-"
            known = tag.read_text("utf-8") if tag.is_file() else ""
            if known and not known.startswith("W/"):
                headers["If-Range"] = known
        request = urllib.request.Request(url, headers=headers)
        try:
            return _opener().open(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
            error.close()
            return _opener().open(
                urllib.request.Request(url, headers={k: v for k, v in headers.items() if k[-5:] != "Range"}),
                timeout=TIMEOUT,
            )

    def _patiently(
        self, what: str, ask: Callable[[], T], *, progressed: Callable[[], bool] | None = None
    ) -> T:
        """Ask, and ask again after a pause when that may help.

        Raises: _Progress when an attempt failed that brought something new; else the translated failure.
        """
        if self.offline:
            raise self._offline(what)
        failures: tuple[type[Exception], ...] = (
            OSError,
            ValueError,
            http.client.HTTPException,
            *_transport_errors(),
        )
        for pause in (*RETRY_SECONDS, None):
            try:
                return ask()
            except failures as error:
                if isinstance(error, urllib.error.HTTPError):
                    error.close()
                if progressed is not None and progressed() and _disk_full(error, Path()) is None:
                    raise _Progress from error
                wait = self._wait(error, pause)
                if wait is None:
                    raise self._failure(what, error) from error
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _wait(self, error: Exception, pause: float | None) -> float | None:
        """Seconds until another attempt makes sense; None if it does not."""
        if pause is None or _disk_full(error, Path()) is not None:
            return None
        status, headers = _status(error)
        if status is None:
            return None if isinstance(error, ValueError) else pause
        if status == 403 and isinstance(error, urllib.error.HTTPError):
            return pause  # a signed address that got old
        if status not in (408, 429) and status < 500:
            return None
        try:
            wait = float(headers.get("Retry-After") or pause)
        except ValueError:  # a date; those who send one do not mean seconds
            wait = pause
        if wait > LONGEST_WAIT:
            return None
        if status == 429:
            self.note(f"the Hub asks for patience (429); waiting {wait:g} s")
        return wait

    def _failure(self, what: str, error: Exception) -> PackforcingError:
        """What a failure means for a person."""
        library = _library()
        errors = library.errors
        full = _disk_full(error, cache_folder())
        if full is not None:
            return full
        status, headers = _status(error)
        if isinstance(error, errors.GatedRepoError) or status == 403:
            return OfflineError(
                f"{what} is gated: {self.endpoint} gives it only to people who accepted its terms",
                hint="Accept them on its page, then log in with `hf auth login` or set HF_TOKEN.",
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return UsageError(f"{what}: there is no such revision", hint="Check what follows the @.")
        if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
            return UsageError(
                f"{what} does not exist on {self.endpoint}, or is private",
                hint="Check the name; for a private one log in with `hf auth login` or set HF_TOKEN.",
            )
        if status == 404:
            return WeightsError(f"{what} is not on {self.endpoint} any more", hint="Look at its page there.")
        again = "What has arrived is kept; the same command goes on from there."
        if status == 429:
            wait = headers.get("Retry-After")
            return OfflineError(
                f"{self.endpoint} refuses more requests for now (429"
                + (f", it asks to wait {wait} s)" if wait else ")"),
                hint="Try again later; people who are logged in may ask more often (`hf auth login`). "
                + again,
            )
        if status is not None:
            return OfflineError(
                f"{self.endpoint} answers {status} for {what}", hint="Try again later. " + again
            )
        said = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ValueError):
            return OfflineError(
                f"{self.endpoint} does not answer like the Hub: {said}",
                hint="Check HF_ENDPOINT and --endpoint, and whether this network wants a login first.",
            )
        return OfflineError(
            f"{self.endpoint} cannot be reached for {what}: {said}",
            hint="Check the network. " + again,
        )


class _Progress(Exception):
    """An attempt failed, but brought something new: the count of attempts starts again."""


# ------------------------------------------------------------------------------------------------------ the cache


def cache_folder() -> Path:
    """Where the Hub's cache is (HF_HUB_CACHE, HF_HOME)."""
    return Path(_library().constants.HF_HUB_CACHE)


def cached(repo: str, commit: str, path: str) -> Path | None:
    """Where a file of a commit lies in the cache, if it is there; no network."""
    found = _library().try_to_load_from_cache(repo, path, revision=commit, cache_dir=cache_folder())
    return Path(found) if isinstance(found, str) and Path(found).is_file() else None


def snapshot_folder(repo: str, commit: str) -> Path:
    """The folder of a commit in the cache, whether it is there or not."""
    return _repo_folder(repo) / "snapshots" / commit


def cached_commit(repo: str, revision: str) -> str | None:
    """The commit a revision stood for when it was last looked at; None if it never was."""
    if COMMIT.fullmatch(revision):
        return revision
    ref = _repo_folder(repo) / "refs" / revision
    return ref.read_text("utf-8").strip() if ref.is_file() else None


def _remember_commit(repo: str, revision: str, commit: str) -> None:
    """Note what `cached_commit` reads. Files enter the cache by commit, so nobody else does."""
    ref = _repo_folder(repo) / "refs" / revision
    if cached_commit(repo, revision) == commit:
        return
    lock = cache_folder() / ".locks" / _repo_folder(repo).name / "refs.packforcing.lock"
    with contextlib.suppress(OSError):  # a cache that cannot be written still serves what it has
        ref.parent.mkdir(parents=True, exist_ok=True)
        lock.parent.mkdir(parents=True, exist_ok=True)
        with _library().utils.WeakFileLock(lock):
            durable.write(ref, commit.encode())


def unfinished_bytes(repo: str, file: RepoFile) -> int:
    """Bytes of a file that an interrupted download left for the next one."""
    partial = _repo_folder(repo) / "blobs" / f"{file.etag}.packforcing.incomplete"
    return min(partial.stat().st_size, file.size) if partial.is_file() else 0


def same_content(path: Path, file: RepoFile) -> bool:
    """Whether a file on this machine has the content a repository lists."""
    if path.stat().st_size != file.size:
        return False
    digest = _digest(file)
    with path.open("rb") as content:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
    return bool(digest.hexdigest() == file.etag)


def discard(path: Path) -> None:
    """Take a file out of the cache, name and content."""
    content = path.resolve()
    path.unlink(missing_ok=True)
    content.unlink(missing_ok=True)


def require_space(size_bytes: int) -> None:
    """Raises: DiskFullError if the cache's disk has not that much room."""
    folder = cache_folder()
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if size_bytes > free:
        raise DiskFullError(
            f"{_gb(size_bytes)} have to be downloaded and {folder} has {_gb(free)} free",
            hint="Free some space, or set HF_HOME to a folder on a larger disk.",
        )


def check_repo(repo: str) -> None:
    """Raises: UsageError if this is no repository name."""
    if not _REPO.fullmatch(repo) or ".." in repo:
        raise UsageError(
            f"{repo!r} is not a Hub repository", hint="Write it as hf:owner/name or hf:owner/name@revision."
        )


def _repo_folder(repo: str) -> Path:
    return cache_folder() / f"models--{repo.replace('/', '--')}"


# ------------------------------------------------------------------------------------------------------- pieces


def _library() -> ModuleType:
    """huggingface_hub, which must not phone home."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    import huggingface_hub
    import huggingface_hub.constants
    import huggingface_hub.errors
    import huggingface_hub.utils

    return huggingface_hub


@contextlib.contextmanager
def _no_bars(library: ModuleType) -> Any:
    """huggingface_hub draws nothing and logs nothing inside: what there is to say is said here."""
    was_off = library.utils.are_progress_bars_disabled()
    level = library.utils.logging.get_verbosity()
    library.utils.disable_progress_bars()
    library.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        library.utils.logging.set_verbosity(level)
        if not was_off:
            library.utils.enable_progress_bars()


def _transport_errors() -> tuple[type[Exception], ...]:
    """What the HTTP library under huggingface_hub raises when the network fails; which one it is depends on its
    version, and requests' errors are OSErrors."""
    names = ("httpx2", "httpx")
    errors = [_library().errors.HfHubHTTPError]
    errors += [sys.modules[name].TransportError for name in names if name in sys.modules]
    return tuple(errors)


def _status(error: Exception) -> tuple[int | None, Mapping[str, str]]:
    """HTTP status and headers of a failure, (None, {}) if there was no answer."""
    headers: Mapping[str, str]
    if isinstance(error, urllib.error.HTTPError):
        status, headers = error.code, dict(error.headers or {})
    else:
        response = getattr(error, "response", None)
        if response is None:
            return None, {}
        status, headers = response.status_code, response.headers
    return status, {str(name).title(): str(value) for name, value in headers.items()}


def _disk_full(error: BaseException, folder: Path) -> DiskFullError | None:
    if not durable.is_full_disk(error):
        return None
    return DiskFullError(
        f"the disk of {folder} is full",
        hint="Free some space, or set HF_HOME to a larger disk; the same command goes on where it stopped.",
    )


class _GitDigest:
    """Git's hash of a file of known size."""

    def __init__(self, size: int) -> None:
        self._hash = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)

    def update(self, chunk: bytes) -> None:
        self._hash.update(chunk)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _digest(file: RepoFile) -> Any:
    return hashlib.sha256() if file.sha256 else _GitDigest(file.size)


def _same_host(url: str, endpoint: str) -> bool:
    a, b = urllib.parse.urlsplit(url), urllib.parse.urlsplit(endpoint)
    return (a.scheme, a.hostname, a.port) == (b.scheme, b.hostname, b.port)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, without the token where they lead to another host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and not _same_host(newurl, req.full_url):
            following.remove_header("Authorization")
        return following


@cache
def _opener() -> urllib.request.OpenerDirector:
    context = ssl.create_default_context()
    with contextlib.suppress(ImportError):  # some Pythons know no certificates of their own
        import certifi

        context.load_verify_locations(certifi.where())
    return urllib.request.build_opener(_Redirects, urllib.request.HTTPSHandler(context=context))


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 10**8 else f"{size_bytes / 1e6:.1f} MB"
