"""Where the command line finds what was set: flags, PACKFORCING_* variables, ./packforcing.toml, the user's file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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

    found = config.resolve(flags, env=os.environ, files=(Path(FILE_NAME), user_file()))
    return replace(found, values=with_places(found.values))


def with_places(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings in which the name of an installed package, given as the compressor, is its folder.

    The settings themselves do not know what is installed.
    """
    from packforcing_cli import config, packages

    name = values.get("compressor")
    for folder in packages.installed() if isinstance(name, str) and name not in config.COMPRESSORS else ():
        if folder.name == name:
            return {**values, "compressor": str(folder)}
    return values
