"""Blocks that are there already: of a run folder, of pictures, of somebody's video.

They go the way of new blocks, all but the denoising (rollout.py). Pixels are encoded as one stream, block by block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from packforcing_cli import staging
from packforcing_cli.config import PlanRequest
from packforcing_cli.errors import UsageError
from packforcing_cli.layout import Grid, Lengths
from packforcing_cli.registry import VideoModel
from packforcing_cli.timeline import parse_time
from packforcing_cli.vae import Codec

if TYPE_CHECKING:
    from packforcing_cli.source import History


@dataclass(frozen=True)
class PastBlock:
    """A block that is there already: it is committed to the memory, not made.

    latents:  [1,C,F,h,w] as the commit pass reads them.
    selected: [L,K] the compressed blocks each layer recalled for it; None = chosen as for a new block.
    pixels:   [1,3,T,H,W] in [0, 1], its frames; None = what the latents decode to.
    """

    latents: Tensor
    selected: Tensor | None = None
    pixels: Tensor | None = None


class HasCodec(Protocol):
    """What encoding needs of a model: a `VideoModel`, or its codec alone."""

    @property
    def codec(self) -> Codec: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...


def encode_image(model: VideoModel, pixels: NDArray[np.uint8]) -> Tensor:
    """The latent frame of an image, as the first of a video.

    Args:
        pixels: [H,W,3] uint8 RGB, in the size of the video.
    Returns: [1,C,1,h,w] in the model's dtype.
    """
    encoder = model.codec.encoder()
    latents = encoder.encode(to_pixels(pixels[None], model.device))
    last = encoder.flush()
    return (latents if last is None else torch.cat((latents, last), dim=2)).to(model.dtype)


def encode_blocks(
    model: HasCodec, pieces: Iterable[NDArray[np.uint8]], *, frames_per_block: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Encode the blocks of a video as one stream, reading no further than the encoder looks ahead.

    Args:
        pieces: frames of each block, [T,H,W,3] uint8.
    Yields: latents [1,C,F,h,w] in the model's dtype and pixels [1,3,T,H,W] in [0, 1] of each block.
    """
    encoder = model.codec.encoder()
    waiting: deque[Tensor] = deque()  # pixels of blocks whose last latent needs the frames after them
    parts: list[Tensor] = []

    def ready() -> Iterator[tuple[Tensor, Tensor]]:
        while waiting and sum(part.shape[2] for part in parts) >= frames_per_block:
            latents = torch.cat(parts, dim=2)
            parts[:] = [latents[:, :, frames_per_block:]]
            yield latents[:, :, :frames_per_block].to(model.dtype), waiting.popleft()

    for frames in pieces:
        waiting.append(to_pixels(frames, model.device))
        parts.append(encoder.encode(waiting[-1]))
        yield from ready()
    last = encoder.flush() if parts else None
    parts += [] if last is None else [last]
    yield from ready()


def still_blocks(model: VideoModel, stills: Sequence[NDArray[np.uint8]], grid: Grid) -> Iterator[PastBlock]:
    """Pictures [H,W,3] as the first blocks of a video, each held for one block; shown as the model decodes them."""
    held = (
        np.broadcast_to(picture, (grid.block_frames(n), *picture.shape)).copy()
        for n, picture in enumerate(stills)
    )
    for latents, _ in encode_blocks(model, held, frames_per_block=grid.frames_per_block):
        yield PastBlock(latents)


def history_blocks(
    model: VideoModel,
    history: History,
    known: Iterator[PastBlock],
    *,
    kept: int = 0,
    on_lead: Callable[[NDArray[np.uint8]], None],
) -> Iterator[PastBlock]:
    """The blocks of somebody's video, read as a stream.

    Args:
        known:   the first `kept` blocks as they were committed before; only their pixels are read again. Blocks behind
                 the history follow from there.
        on_lead: gets the frames before the first block in pieces, [T,H,W,3].
    Yields: every block with its pixels, then what is left of `known`.
    """

    def blocks() -> Iterator[NDArray[np.uint8]]:
        for frames, is_block in history.pieces():
            if is_block:
                yield frames
            else:
                on_lead(frames)

    if kept >= history.blocks:
        for frames, past in zip(blocks(), known, strict=False):
            yield replace(past, pixels=to_pixels(frames, model.device))
    else:
        frames_per_block = history.shown.lengths.frames_per_block
        encoded = encode_blocks(model, blocks(), frames_per_block=frames_per_block)
        for n, (latents, pixels) in enumerate(encoded):
            yield replace(next(known), pixels=pixels) if n < kept else PastBlock(latents, pixels=pixels)
    yield from known


def to_pixels(frames: NDArray[np.uint8], device: torch.device) -> Tensor:
    """[T,H,W,3] uint8 -> [1,3,T,H,W] float32 in [0, 1]; `to_uint8` is the inverse."""
    return staging.to_device(torch.from_numpy(frames), device).permute(3, 0, 1, 2)[None].float() / 255


def open_history(
    request: PlanRequest, lengths: Lengths, *, fps: int, size: tuple[int, int], fit: str = "crop"
) -> History | None:
    """The video a request goes on with, opened; None if it goes on with none.

    Raises: UsageError or VideoError if it cannot be read, or is no longer as it was.
    """
    from packforcing_cli.source import Source  # reads files, with PyAV

    wanted = request.source
    if wanted is None:
        return None
    if not wanted.path.is_file():
        raise UsageError(
            f"there is no file {wanted.path}, and the video goes on with it",
            hint="Bring it back to that place.",
        )
    source = Source(
        wanted.path,
        fps=fps,
        size=size,
        fit=getattr(request, "fit", fit),
        start=parse_time(wanted.from_time or "0"),
        end=None if wanted.to_time is None else parse_time(wanted.to_time),
    )
    history = source.history(lengths, only_new=wanted.only_new)
    if history.shown != wanted.shown(lengths):
        raise UsageError(
            f"{wanted.path} is not the video it was: it has another length",
            hint="Bring back the file that was used.",
        )
    return history
