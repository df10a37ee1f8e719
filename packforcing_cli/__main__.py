"""python -m packforcing_cli: the same as the command packforcing."""

from __future__ import annotations

from packforcing_cli.cli import main

if __name__ == "__main__":
    main()
