"""What crosses between the host and a GPU, without either waiting for the other.

    to_device   host ----> GPU   as soon as the stream is there; the host goes on
    to_host     GPU -----> host  complete behind the next `Mark`; whoever reads it waits for that mark, and nobody else

A copy from or to ordinary host memory stops the host until the GPU has done all it was given before. So everything
that crosses does it in page-locked memory. PyTorch's allocator of such memory knows which stream copies to or from a
piece, and gives it out again only when the copy is done: a piece may be forgotten as soon as the copy is asked for, and
must not be written again by hand. On other devices everything is there at once.

Source: torch/cuda notes on page-locked memory and `non_blocking`; CachingHostAllocator.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Mark:
    """A point in a stream's work; on the CPU all work up to it is done."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))
        self._device = device

    def wait(self) -> None:
        """Let the host wait until the work is done."""
        if self._event is not None:
            self._event.synchronize()

    def before(self, stream: torch.cuda.Stream | None) -> None:
        """Let a stream wait for it, None = the current one; the host goes on."""
        if self._event is not None:
            (stream or torch.cuda.current_stream(self._device)).wait_event(self._event)


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor where the model runs; itself if it is there."""
    if torch.device(device).type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def write(x: Tensor, into: Tensor) -> None:
    """Copy a tensor of the host into one where the model runs, of the same shape and dtype and in one piece."""
    if into.is_cuda:
        x = x.pin_memory()
    into.copy_(x, non_blocking=True)


def to_host(x: Tensor) -> Tensor:
    """A tensor on the host, a copy if it was elsewhere; from a GPU it is complete behind the next `Mark`."""
    if not x.is_cuda:
        return x.cpu()
    there = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return there.copy_(x, non_blocking=True)


class Coming:
    """A tensor on its way to the host."""

    def __init__(self, x: Tensor) -> None:
        self._there, self._mark = to_host(x), Mark(x.device)

    def wait(self) -> Tensor:
        """It; the host waits until what made it, and all that the stream was given before, is done."""
        self._mark.wait()
        return self._there
