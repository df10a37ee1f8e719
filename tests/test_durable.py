"""Durable writes: what a full disk is."""

from __future__ import annotations

import errno

import pytest
from safetensors import SafetensorError

from packforcing_cli import durable


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError(f"I/O error: No space left on device (os error {errno.ENOSPC})"), True),
        (SafetensorError(f"I/O error: Disk quota exceeded (os error {errno.EDQUOT})"), True),
        (SafetensorError(f"I/O error: something else (os error {errno.ENOSPC}0)"), False),
        (OSError(errno.EACCES, "Permission denied"), False),
        (ValueError("28"), False),
    ],
)
def test_a_full_disk_is_told_by_number_also_through_safetensors(error: Exception, full: bool) -> None:
    assert durable.is_full_disk(error) is full
