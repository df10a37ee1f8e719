"""Drops the few log lines that importing torchao writes on machines where nothing is wrong.

transformers and diffusers import torchao by themselves, whether it is used or not; torchao then logs a line
for every optional kernel that does not match this machine and touches a deprecated torch call. Only records
of these loggers that match these patterns are dropped, and only inside the `with`, beside complaints
about string escapes in torchao's own source; every other warning gets through.
"""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_NOISE = (
    ("torchao", re.compile(r"Failed to load .*_C\w*[\w.-]*\.so\b")),
    ("torchao", re.compile(r"Skipping import of cpp extensions due to incompatible torch version")),
    ("torchao.kernel.intmm", re.compile(r"Detected no triton")),
    (
        "diffusers.quantizers.torchao.torchao_quantizer",
        re.compile(r"Unable to import `torchao` Tensor objects"),
    ),
    (
        "torch.utils._pytree",
        re.compile(r"is an Enum subclass and is now natively supported by torch\.compile"),
    ),
)


_one_at_a_time = threading.RLock()
"""These libraries import one another as they are used: two threads must not do so at once."""

_TORCHAO_SOURCE = r".*[/\\]torchao[/\\]"


@contextmanager
def known_import_noise_dropped() -> Iterator[None]:
    """Import transformers, diffusers or torchao inside this without their known noise, one thread at a time."""
    with _one_at_a_time:
        yield from _noise_dropped()


def _noise_dropped() -> Iterator[None]:
    # Python complains about torchao's source when it compiles it, which is at import where installers do not.
    warnings.filterwarnings("ignore", r"invalid escape sequence", module=_TORCHAO_SOURCE)
    added = [(logging.getLogger(name), _Drop(pattern)) for name, pattern in _NOISE]
    for logger, rule in added:
        logger.addFilter(rule)
    try:
        yield
    finally:
        for logger, rule in added:
            logger.removeFilter(rule)


class _Drop(logging.Filter):
    def __init__(self, pattern: re.Pattern[str]) -> None:
        super().__init__()
        self.pattern = pattern

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.pattern.search(record.getMessage())
