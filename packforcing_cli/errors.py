"""Everything that can go wrong on purpose: one tree, each error with a message, a next step and an exit code.

    PackforcingError                1   the base; catch this one
    ├── UsageError                  2   wrong input: a flag, a file, a name
    │   ├── ConfigError             2   a value in an option, a variable or a TOML file
    │   └── LayoutError             2   numbers that describe no possible context
    ├── EnvironmentProblem          4   a missing device, library or system feature
    ├── MemoryFitError              5   does not fit in memory
    ├── DiskFullError               6   no room left on the disk
    ├── WeightsError                7   bad or unverified weights
    ├── OfflineError                8   needed from the network, and the network is off
    ├── LockedError                 9   another process holds the run folder
    ├── GenerationError             1   the model produced something that is not a video (NaN)
    │   └── UnhealthyError          1   a block failed its health check, and --guard stop ended the video
    ├── RunFolderError              1   a run folder is damaged or cannot be written
    └── VideoError                  1   a video file cannot be read or written

A message says what happened, with the value. A hint is the next step, a full sentence, empty when there is none.
The remaining exit codes are no errors of this tree: 3 batch partly failed, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

REINSTALL = "install packforcing again from a fresh checkout"
"""The step that mends or updates the program itself: it is on no package index."""


class PackforcingError(Exception):
    """Base of all expected failures.

    Args:
        message: what happened, with the value; no trailing full stop needed.
        hint:    what to do next, for example the command to run.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process borders by pickling; the default would lose the keyword-only hint.
        return (_rebuild, (type(self), self.message, self.hint))


def _rebuild(kind: type[PackforcingError], message: str, hint: str) -> PackforcingError:
    return kind(message, hint=hint)


class UsageError(PackforcingError):
    """The request itself is wrong; nothing was started."""

    exit_code = 2


class ConfigError(UsageError):
    """A value from a flag, a variable or a file is not allowed."""


class LayoutError(UsageError):
    """These numbers describe no possible context (a negative slot, no room for mid blocks)."""


class EnvironmentProblem(PackforcingError):
    """The machine lacks something: a device, a library, a system feature."""

    exit_code = 4


class MemoryFitError(PackforcingError):
    """The request does not fit in memory."""

    exit_code = 5


class DiskFullError(PackforcingError):
    """No room left on the disk."""

    exit_code = 6


class WeightsError(PackforcingError):
    """Weights are missing, damaged or not verified."""

    exit_code = 7


class OfflineError(PackforcingError):
    """Something must be downloaded and the network is off or out of reach."""

    exit_code = 8


class LockedError(PackforcingError):
    """Another process is using the run folder."""

    exit_code = 9


class GenerationError(PackforcingError):
    """The model produced something that is not a video, for example NaN."""


class UnhealthyError(GenerationError):
    """A block failed its health check under --guard stop: the video ends before it."""


class RunFolderError(PackforcingError):
    """A run folder is damaged or cannot be written."""


class VideoError(PackforcingError):
    """A video file cannot be read or written."""
