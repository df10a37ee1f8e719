"""Where the command line finds what was set: flags, PACKFORCING_* variables, ./packforcing.toml, the user's file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packforcing_cli.config import Settings

FILE_NAME = "packforcing.toml"


def user_file() -> Path:
    """The user's own settings file, where the platform keeps such files."""
    import platformdirs

    return Path(platformdirs.user_config_dir("packforcing", appauthor=False)) / FILE_NAME


def gather(flags: Mapping[str, Any]) -> Settings:
    """Merge flags (None = not given) with the other sources. Raises: ConfigError as config.resolve."""
    import os

    from packforcing_cli import config

    return config.resolve(flags, env=os.environ, files=(Path(FILE_NAME), user_file()))
