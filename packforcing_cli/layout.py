"""The one formula of the context: which blocks a block sees, at which slots, in how many tokens and bytes.

Integers and exact fractions only; no tensors. The planner, the live cache, `inspect-cache` and the tests all read it.

Block 9 with frames_per_block 4, sink_blocks 2, recent_blocks 1, top_k 3, bank 5, mid_span 2. History is blocks 0..8:

    block       0     1   |  2  |  3     4     5     6     7   |   8    |   9
    partition   sink      |gone | mid: the bank, newest 5      | recent | current
    active      yes   yes |     |  3           5     6         |   8    |   9      (3 of 5, the model chooses)
    tokens      full  full|     |  N_c         N_c   N_c       |  full  |  full
    slot        0..3  4..7|     |  8..9       10..11 12..13    | 14..17 | 18..21
                                                     walking back from here <───────┘

Slots are temporal RoPE positions in latent frames. Every active block takes the next contiguous slots, counted back
from the current block; everything is then shifted so that the oldest active frame (the first sink frame) is slot 0.
RoPE only sees differences, so the shift changes nothing (docs/method.md 5.3). A dropped or inactive block leaves no
gap.
A mid block takes `mid_span` slots: frames_per_block (the paper's reading), fewer, or "fit", which spreads the slots
that are left in the range the model was trained on (docs/method.md 5.5).

Without RoPE adjustment (`rope_adjustment=False`, docs/method.md 5.1) a block keeps the slots of its own time: block b
sits at frames_per_block * b and takes frames_per_block slots, whatever was dropped between it and the current block.
Distances then grow with the video, and where a mid sits depends on which block it is: `slots` is told a layer's ids.

Keys are turned to their slot once, when their block is committed. Only where more than one block is recent do they move
again, and are kept as they were before RoPE, too.

Life of a block: current -> sink (the first sink_blocks of a video), otherwise current -> recent -> bank -> gone.
A bank block attends only while it is active. With top_k 0 there is no bank: what leaves recent is gone.

A cut at block c: from c on, what was made before it is no longer recent; it goes on to the bank at once. A pinned
block stays in the bank when it is full and is recalled by every later block, within top_k.

Policies are presets of the same numbers: `packforcing` as given; `sink` top_k 0; `window` no sink, no mid, the same
full-resolution memory all in recent; `full` every block a sink, so everything stays at full resolution.

Source: PackForcing (arXiv 2603.25730) 3.1-3.5; docs/method.md 2, 5. Block numbers start at 0 here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from packforcing_cli.errors import LayoutError, UsageError

TEMPORAL_STRIDE = (
    4  # pixel frames a latent frame stands for; the first latent frame of a video is 1 pixel frame
)
PATCH = 2  # latent rows and columns a token covers: patch (1,2,2)
CELL = 4  # patch rows and columns a compressed token covers: 8 latent rows = 64 pixels
COMPRESSED_TIME_ROWS = (
    2  # rows of compressed tokens in time, for blocks of 3 and of 4 frames (docs/method.md 3.5)
)
SUMMARY_DTYPE_BYTES = 4  # key and query sums are float32
POLICIES = ("packforcing", "sink", "window", "full")
KV_BYTES = {"bf16": 2, "fp8": 1, "int8": 1}
"""Bytes of a kept number of a compressed block, by the name of its kind; "auto" is the grid's own."""
SCALE_BYTES = 4  # of fp8 and int8: a float32 a token and head
NEAR_LAYERS = 2  # whose recalled blocks are where the model runs at a time, when the bank is in host memory

Span = Fraction | Literal["fit"]
Position = tuple[Fraction, Fraction, Fraction]
"""(slot, row, column) of one token, in units of latent frames and of patch-token rows and columns."""


@dataclass(frozen=True)
class Lengths:
    """Blocks, pixel frames and seconds of a video: the first latent frame is one pixel frame, every other one four.

    frames_per_block: latent frames generated together.
    """

    frames_per_block: int

    def block_frames(self, block: int) -> int:
        """Pixel frames of one block."""
        return TEMPORAL_STRIDE * self.frames_per_block - (TEMPORAL_STRIDE - 1 if block == 0 else 0)

    def frames_for(self, num_blocks: int) -> int:
        """Pixel frames of a video of num_blocks blocks, and those before block num_blocks."""
        return self.block_frames(0) + self.block_frames(1) * (num_blocks - 1) if num_blocks else 0

    def block_at(self, frame: int) -> int:
        """The block a pixel frame is in."""
        return (frame + self.block_frames(1) - self.block_frames(0)) // self.block_frames(1)

    def whole_blocks(self, frames: int) -> int:
        """Blocks that a number of pixel frames has from the beginning, what is left over not counted."""
        return self.block_at(frames)

    def nearest_block(self, seconds: Fraction, fps: int) -> int:
        """The block whose beginning is nearest to a time; of two the later one."""
        block = self.block_at(math.floor(seconds * fps))
        before, after = self.frames_for(block), self.frames_for(block + 1)
        return block if seconds * fps - before < after - seconds * fps else block + 1

    def blocks_for(self, seconds: float | Fraction, fps: float | Fraction) -> int:
        """Whole blocks nearest to the length of a video, at least one; halves round up.

        Raises: UsageError if seconds or fps is not a positive number.
        """
        first, later = self.block_frames(0), self.block_frames(1)
        return self._nearest(seconds, fps, later - first)

    def blocks_more(self, seconds: float | Fraction, fps: float | Fraction) -> int:
        """Whole blocks nearest to a length that follows other blocks, at least one; halves round up.

        Raises: as `blocks_for`.
        """
        return self._nearest(seconds, fps, 0)

    def _nearest(self, seconds: float | Fraction, fps: float | Fraction, missing: int) -> int:
        for name, value in (("seconds", seconds), ("fps", fps)):
            if not math.isfinite(value) or value <= 0:
                raise UsageError(f"{name} must be a positive number, got {value}")
        wanted = Fraction(seconds) * Fraction(fps) + missing
        return max(1, math.floor(wanted / self.block_frames(1) + Fraction(1, 2)))


@dataclass(frozen=True)
class Shown:
    """Which blocks of the memory are in the file of a video, and as what.

    A video of ours has every block, each a group of frames. One that goes on with somebody's video begins with the
    frames before the first block (the lead, in pieces), and block 0 may have copies in front that the file has not:

        memory            [ copies | block 0 ][ block 1 ] … [ history - 1 ][ new ] …
        file   [ lead ]            [ block 0 ][ block 1 ] … [ history - 1 ][ new ] …
        file, only_new                                                     [ new ] …

    history: blocks of the other video.  lead: frames before block 0.  padded: copies in front of it.
    """

    lengths: Lengths
    history: int = 0
    lead: int = 0
    padded: int = 0
    only_new: bool = False

    @property
    def first(self) -> int:
        """The first block that is in the file."""
        return self.history if self.only_new else 0

    @property
    def lead_pieces(self) -> tuple[int, ...]:
        """Frames of the groups before block 0, each at most a block."""
        if self.only_new:
            return ()
        most = self.lengths.block_frames(1)
        return (*[most] * (self.lead // most), *([self.lead % most] if self.lead % most else []))

    @property
    def late(self) -> int:
        """Frames of the other video before the first frame of the memory; negative if there are copies."""
        return self.lead - self.padded

    @property
    def shift(self) -> int:
        """What a frame's number in the memory is off from its number in the file."""
        return -self.lengths.frames_for(self.history) if self.only_new else self.late

    def block_frames(self, block: int) -> int:
        """Frames that the file has of a block."""
        if block < self.first:
            return 0
        return self.lengths.block_frames(block) - (self.padded if block == 0 else 0)

    def frame_of(self, block: int) -> int:
        """Number of a block's first frame in the file; negative for a block that is not in it."""
        if self.only_new:
            return self.lengths.frames_for(block) - self.lengths.frames_for(self.history)
        return self.late + self.lengths.frames_for(block) + (self.padded if block == 0 else 0)

    def groups(self, blocks: int) -> tuple[int, ...]:
        """Frames of every group of the file after so many blocks."""
        return (*self.lead_pieces, *map(self.block_frames, range(self.first, blocks))) if blocks else ()

    def frames_for(self, blocks: int) -> int:
        """Frames of the file after so many blocks."""
        if blocks <= self.first:
            return 0
        skipped = self.lengths.frames_for(self.first) if self.only_new else -self.late
        return self.lengths.frames_for(blocks) - skipped

    def blocks_in(self, groups: int) -> int:
        """Blocks of the memory that need not be written when the file has so many groups."""
        return self.first + max(0, groups - len(self.lead_pieces))

    def blocks_of(self, frames: int) -> int | None:
        """After how many blocks the file has so many frames; None if it never has."""
        skipped = self.lengths.frames_for(self.first) if self.only_new else -self.late
        blocks = self.lengths.whole_blocks(max(0, frames + skipped))
        return blocks if blocks > self.first and self.frames_for(blocks) == frames else None


@dataclass(frozen=True)
class Grid(Lengths):
    """The shape of a block in one model at one size.

    rows, cols:       patch tokens of one latent frame (832x480 pixels -> 30 rows, 52 columns).
    layers:           transformer layers, each with its own keys and values.
    kv_dim:           heads * head dim.
    heads:            attention heads.
    dtype_bytes:      bytes of one cached number (2 for bf16, 4 for fp32).
    identity:         the identity baseline: a compressed block keeps all its tokens, nothing is compressed.
    Raises: LayoutError if a number is not positive, or the frame is too small for one compressed token.
    """

    rows: int
    cols: int
    layers: int
    kv_dim: int
    heads: int
    dtype_bytes: int = 2
    identity: bool = False

    def __post_init__(self) -> None:
        for name in ("frames_per_block", "rows", "cols", "layers", "kv_dim", "heads", "dtype_bytes"):
            if getattr(self, name) < 1:
                raise LayoutError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.kv_dim % self.heads:
            raise LayoutError(f"kv_dim {self.kv_dim} is not a multiple of {self.heads} heads")
        if self.compressed_tokens < 1:
            raise LayoutError(
                f"a frame of {self.cols * 16}x{self.rows * 16} pixels has no room for a compressed token",
                hint="Use at least 64x64 pixels.",
            )

    @property
    def tokens_per_frame(self) -> int:
        return self.rows * self.cols

    @property
    def block_tokens(self) -> int:
        return self.frames_per_block * self.tokens_per_frame

    @property
    def latent_rows(self) -> int:
        return PATCH * self.rows

    @property
    def latent_cols(self) -> int:
        return PATCH * self.cols

    @property
    def compressed_shape(self) -> tuple[int, int, int]:
        """(time rows, rows, columns) of the compressed tokens; rows that do not fill a cell are dropped (60 -> 7)."""
        if self.identity:
            return (self.frames_per_block, self.rows, self.cols)
        cell = CELL * PATCH
        return (COMPRESSED_TIME_ROWS, self.latent_rows // cell, self.latent_cols // cell)

    @property
    def compressed_rows(self) -> int:
        """Rows of compressed tokens in time."""
        return self.compressed_shape[0]

    @property
    def compressed_tokens(self) -> int:
        """N_c, tokens of one compressed block."""
        return math.prod(self.compressed_shape)

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of one token in all layers."""
        return self.layers * 2 * self.kv_dim * self.dtype_bytes

    @property
    def summary_bytes(self) -> int:
        """One float32 vector a layer and head: a block's key sum, or the query sum."""
        return self.layers * self.kv_dim * SUMMARY_DTYPE_BYTES

    def compressed_positions(self, start: Fraction | int, span: Fraction | int) -> tuple[Position, ...]:
        """Where the tokens of a compressed block sit: the centres of the cells they stand for.

        Token j, r, c of the default compressor: t = start + (j+1/2)*span/2 - 1/2, h = 4r + 3/2, w = 4c + 3/2.

        Args:
            start: slot of the block's first frame.
            span:  slots the block takes.
        Returns: N_c positions in token order: time row, row, column.
        Source: docs/method.md 5.4.
        """
        time_rows, rows, cols = self.compressed_shape
        cell = 1 if self.identity else CELL
        half = Fraction(1, 2)
        times = [Fraction(start) + (j + half) * Fraction(span) / time_rows - half for j in range(time_rows)]
        ys = [cell * r + Fraction(cell - 1, 2) for r in range(rows)]
        xs = [cell * c + Fraction(cell - 1, 2) for c in range(cols)]
        return tuple((t, y, x) for t in times for y in ys for x in xs)


@dataclass(frozen=True)
class BlockView:
    """What block `current` may see. Block numbers, oldest first.

    sink, recent: at full resolution, all attend.
    mid:          the compressed blocks in the bank, from which each layer takes `active`.
    """

    current: int
    sink: range
    mid: Sequence[int]
    recent: range
    active: int


@dataclass(frozen=True)
class Slots:
    """First slot of each active block; see the module's drawing.

    sink_starts, mid_starts, recent_starts: oldest first. mid_starts has one entry an active position, whichever
    block a layer puts there; a position takes `span` slots.
    oldest: first slot that is attended, above 0 only without RoPE adjustment and without sinks.
    """

    sink_starts: tuple[Fraction, ...]
    mid_starts: tuple[Fraction, ...]
    recent_starts: tuple[Fraction, ...]
    current_start: Fraction
    span: Fraction
    frames_per_block: int
    oldest: Fraction = Fraction(0)

    @property
    def sink_start(self) -> Fraction:
        return Fraction(0)

    @property
    def total(self) -> Fraction:
        """Slots from the oldest that is attended to the current block's last."""
        return self.current_start + self.frames_per_block - self.oldest

    @property
    def max_distance(self) -> Fraction:
        """Largest slot distance a query of the current block meets: its last frame to the oldest slot."""
        return self.total - 1


@dataclass(frozen=True)
class TokenCount:
    """Tokens a layer's queries attend, by partition; `mid` counts active blocks only."""

    sink: int
    mid: int
    recent: int
    current: int

    @property
    def stored(self) -> int:
        return self.sink + self.mid + self.recent

    @property
    def active(self) -> int:
        """The attention length |C| of docs/method.md 2.1."""
        return self.stored + self.current


@dataclass(frozen=True)
class MemoryBytes:
    """Bytes of the cache's tensors for one video, all layers.

    stored:   rotated keys and values of sink, active mid and recent: the paper's count.
    current:  scratch keys and values of the block being denoised.
    raw_keys: keys before RoPE of recent blocks, where they move from slot to slot (`Layout.turns_again`).
    backups:  compressed keys, values and key sums of the blocks in recent, ready for the bank.
    bank:     compressed keys (before RoPE), values and key sums of the bank, and the query sum that scores them.
    """

    stored: int
    current: int
    raw_keys: int
    backups: int
    bank: int

    @property
    def live(self) -> int:
        return self.stored + self.current + self.raw_keys + self.backups + self.bank


@dataclass(frozen=True)
class Layout:
    """The context of every block of a video.

    grid:           shape of a block.
    sink_blocks:    first blocks, kept at full resolution for ever.
    recent_blocks:  newest blocks at full resolution.
    top_k:          compressed blocks that attend; 0 = no compressed memory at all.
    bank:           compressed blocks kept, the oldest goes first; None = all.
    mid_span:       slots one active compressed block takes, above 0 and at most frames_per_block, or "fit".
    trained_frames: latent frames of the longest clip the model was trained on: slot distances stayed below it.
    cuts:           blocks that see none of the recent blocks before them; these go on to the bank.
    pins:           blocks that are recalled by every later block and never dropped.
    rope_adjustment: active blocks take contiguous slots; False = every block keeps those of its own time.
    kv_dtype:       how compressed blocks are kept: "auto" as the model computes, or a name of KV_BYTES.
    Raises: LayoutError if the numbers describe no possible context.
    """

    grid: Grid
    sink_blocks: int = 2
    recent_blocks: int = 1
    top_k: int = 16
    bank: int | None = 256
    mid_span: Span = "fit"
    trained_frames: int = 20
    cuts: tuple[int, ...] = ()
    pins: frozenset[int] = frozenset()
    rope_adjustment: bool = True
    kv_dtype: str = "auto"

    def __post_init__(self) -> None:
        if self.kv_dtype != "auto" and self.kv_dtype not in KV_BYTES:
            raise LayoutError(f"kv_dtype {self.kv_dtype!r}", hint=f"Use auto, {', '.join(KV_BYTES)}.")
        for name in ("sink_blocks", "recent_blocks", "top_k"):
            if getattr(self, name) < 0:
                raise LayoutError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.trained_frames < 1:
            raise LayoutError(f"trained_frames must be at least 1, got {self.trained_frames}")
        pins, room = len(self.mid_pins), self.top_k if self.bank is None else min(self.top_k, self.bank - 1)
        if pins and pins > room:
            raise LayoutError(
                f"{pins} blocks are pinned and the memory has room for {max(0, room)}: pins are among the top_k"
                f" {self.top_k} blocks that are recalled, and the bank keeps one place for new ones",
                hint=f"Pin less, or use --top-k {pins}, with a --bank above it.",
            )
        if self.top_k == 0:
            return
        if self.recent_blocks < 1:
            raise LayoutError(
                "recent_blocks must be at least 1: a block is compressed while it is recent",
                hint="Use --recent-blocks 1, or --top-k 0 for no compressed memory.",
            )
        if self.bank is not None and self.bank < 1:
            raise LayoutError(
                f"bank must be at least 1 block, got {self.bank}",
                hint="Use --top-k 0 for no compressed memory.",
            )
        if not self.rope_adjustment and self.mid_span != self.grid.frames_per_block:
            raise LayoutError(
                f"mid_span {self.mid_span} contradicts no RoPE adjustment: every block keeps the"
                f" {self.grid.frames_per_block} slots of its own time",
                hint="Use --mid-span block, or --rope-adjustment.",
            )
        if self.mid_span == "fit":
            if self._room_for_mid <= 0:
                full = (self.sink_blocks + self.recent_blocks + 1) * self.grid.frames_per_block
                raise LayoutError(
                    f"mid_span fit is impossible: sink, recent and current take {full} slots and the model was"
                    f" trained on {self.trained_frames}",
                    hint="Use fewer --sink-blocks or --recent-blocks, or give a number, for example --mid-span 1.",
                )
        elif not 0 < self.mid_span <= self.grid.frames_per_block:
            raise LayoutError(
                f"mid_span must be above 0 and at most frames_per_block {self.grid.frames_per_block},"
                f" got {self.mid_span}",
                hint="Use for example --mid-span 1, or --mid-span fit.",
            )

    @classmethod
    def from_policy(
        cls,
        policy: str,
        *,
        grid: Grid,
        num_blocks: int,
        sink_blocks: int = 2,
        recent_blocks: int = 1,
        top_k: int = 16,
        bank: int | None = 256,
        mid_span: Span | int = "fit",
        trained_frames: int = 20,
        rope_adjustment: bool = True,
        kv_dtype: str = "auto",
    ) -> Layout:
        """The numbers of a policy, see the module docstring.

        Args:
            num_blocks: length of the video, which `full` needs.
        Raises: UsageError if the policy is unknown; LayoutError as Layout.
        """
        if policy == "sink":
            top_k = 0
        elif policy == "window":
            sink_blocks, recent_blocks, top_k = 0, sink_blocks + recent_blocks, 0
        elif policy == "full":
            sink_blocks, recent_blocks, top_k = num_blocks, 0, 0
        elif policy != "packforcing":
            raise UsageError(f"unknown policy {policy!r}", hint=f"Choose one of {', '.join(POLICIES)}.")
        span: Span = "fit" if mid_span == "fit" else Fraction(mid_span)
        return cls(
            grid,
            sink_blocks,
            recent_blocks,
            top_k,
            bank,
            span,
            trained_frames,
            rope_adjustment=rope_adjustment,
            kv_dtype=kv_dtype,
        )

    @property
    def _room_for_mid(self) -> int:
        """Slots that sink, recent and current leave in the trained range, in the full setting."""
        full_blocks = self.sink_blocks + self.recent_blocks + 1
        return self.trained_frames - full_blocks * self.grid.frames_per_block

    def view(self, block: int) -> BlockView:
        """What a block sees; its history is all blocks before it.

        Raises: LayoutError if block is negative.
        """
        if block < 0:
            raise LayoutError(f"block must not be negative, got {block}")
        sinks = min(block, self.sink_blocks)
        recent = min(block, max(self.run_start(block), block - self.recent_blocks))
        mid = range(recent, recent) if self.top_k == 0 else self._bank(sinks, recent)
        return BlockView(block, range(sinks), mid, range(recent, block), min(self.top_k, len(mid)))

    def _bank(self, first: int, end: int) -> Sequence[int]:
        """Blocks of first .. end - 1 that the bank keeps: all that are pinned, and the newest others."""
        if self.bank is None or end - first <= self.bank:
            return range(first, end)
        start, pinned = end - self.bank, sorted(pin for pin in self.pins if first <= pin < end)
        while (older := sum(pin < start for pin in pinned)) != self.bank - (end - start):
            start = end - self.bank + older
        return (*pinned[:older], *range(start, end)) if older else range(start, end)

    @property
    def mid_pins(self) -> tuple[int, ...]:
        """Pinned blocks that are recalled from the bank: all but the sinks, which every block sees anyway."""
        return tuple(sorted(pin for pin in self.pins if pin >= self.sink_blocks))

    def run_start(self, block: int) -> int:
        """The first block that can be recent at the same time as this one: behind the sinks and the last cut."""
        return max(self.sink_blocks, *(cut for cut in self.cuts if cut <= block), 0)

    def largest_view(self, num_blocks: int) -> BlockView:
        """At least as much in every partition as any block of a video sees, and its end: the size of the buffers.

        Without cuts it is the view behind the last block. After a cut recent is short and mid is long, so then
        its parts may overlap.
        """
        view, uncut = self.view(num_blocks), replace(self, cuts=()).view(num_blocks)
        return replace(view, recent=uncut.recent)

    def views(self, num_blocks: int) -> Iterator[BlockView]:
        """The views of blocks 0 .. num_blocks - 1."""
        return (self.view(block) for block in range(num_blocks))

    def span(self, view: BlockView | int) -> Fraction:
        """Slots one active compressed block takes in a view; frames_per_block when none is active."""
        view = self.view(view) if isinstance(view, int) else view
        full = Fraction(self.grid.frames_per_block)
        if view.active == 0:
            return full
        if self.mid_span == "fit":
            return min(full, Fraction(self._room_for_mid, view.active))
        return self.mid_span

    def slots(self, view: BlockView | int, ids: Sequence[int] | None = None) -> Slots:
        """Slots of a view's active blocks: contiguous, counted back from the current block, the oldest at 0.

        Args:
            ids: the mids of a layer, ascending. They matter without RoPE adjustment only. None = mid_starts are
                those of the newest mids, and `oldest` is that of the oldest mid a layer may choose.
        Raises: LayoutError if ids are not the view's number of active blocks, or not in its bank.
        """
        view = self.view(view) if isinstance(view, int) else view
        if ids is not None and (len(ids) != view.active or not {*ids} <= {*view.mid}):
            raise LayoutError(f"{[*ids]} are not {view.active} of the mids of block {view.current}")
        if not self.rope_adjustment:
            return self._own_slots(view, ids)
        return _slots(
            self.grid.frames_per_block, len(view.sink), view.active, len(view.recent), self.span(view)
        )

    def _own_slots(self, view: BlockView, ids: Sequence[int] | None) -> Slots:
        """Slots without RoPE adjustment: those of each block's own time."""
        frames, mids = self.grid.frames_per_block, tuple(view.mid)
        active = mids[len(mids) - view.active :] if ids is None else tuple(ids)
        reachable = (mids if ids is None else active) if view.active else ()
        seen = (*view.sink, *reachable, *view.recent, view.current)

        def starts(blocks: Sequence[int]) -> tuple[Fraction, ...]:
            return tuple(Fraction(frames * block) for block in blocks)

        return Slots(
            sink_starts=starts(view.sink),
            mid_starts=starts(active),
            recent_starts=starts(view.recent),
            current_start=Fraction(frames * view.current),
            span=self.span(view),
            frames_per_block=frames,
            oldest=Fraction(frames * min(seen)),
        )

    @property
    def context_start(self) -> int:
        """Slot of a block in its own compressed forward with context "sinks": right behind the sinks, span B_f."""
        return self.sink_blocks * self.grid.frames_per_block

    def compressed_positions(self, start: Fraction | int, span: Fraction | int) -> tuple[Position, ...]:
        """See Grid.compressed_positions."""
        return self.grid.compressed_positions(start, span)

    def tokens(self, view: BlockView | int) -> TokenCount:
        """Tokens the queries of a block attend."""
        view = self.view(view) if isinstance(view, int) else view
        full = self.grid.block_tokens
        return TokenCount(
            sink=len(view.sink) * full,
            mid=view.active * self.grid.compressed_tokens,
            recent=len(view.recent) * full,
            current=full,
        )

    @property
    def turns_again(self) -> bool:
        """Whether a recent block is seen at more than one slot, so that its keys are kept as before RoPE, too.

        A sink has one slot for ever. A recent block moves with every block after it; where one is recent at a time, or
        every block keeps the slots of its own time, there is one slot as well. So keys are turned once, at the commit.
        """
        return self.rope_adjustment and self.recent_blocks > 1

    @property
    def compressed_block_bytes(self) -> int:
        """What is kept of a compressed block, beside its key sum."""
        grid = self.grid
        per_token = grid.bytes_per_token
        if self.kv_dtype != "auto":
            scales = grid.heads * SCALE_BYTES if KV_BYTES[self.kv_dtype] == 1 else 0
            per_token = grid.layers * 2 * (grid.kv_dim * KV_BYTES[self.kv_dtype] + scales)
        return grid.compressed_tokens * per_token

    def bank_within(self, size_bytes: int) -> int:
        """Blocks of a bank that takes at most so many bytes. Raises: LayoutError if there is no room for one."""
        one = self.compressed_block_bytes + self.grid.summary_bytes
        blocks = (size_bytes - self.grid.summary_bytes) // one
        if blocks < 1:
            raise LayoutError(
                f"a bank of {size_bytes:,} bytes has no room for a compressed block of {one:,}",
                hint=f"Use --bank-memory {-(-(one + self.grid.summary_bytes) // 1_000_000)}MB or more.",
            )
        return blocks

    def bytes(self, view: BlockView | int) -> MemoryBytes:
        """Bytes in use while a block is made, its own scratch included."""
        view = self.view(view) if isinstance(view, int) else view
        grid, tokens = self.grid, self.tokens(view)
        compressed = self.compressed_block_bytes + grid.summary_bytes
        has_bank = self.top_k > 0
        return MemoryBytes(
            stored=tokens.stored * grid.bytes_per_token,
            current=tokens.current * grid.bytes_per_token,
            raw_keys=tokens.recent * grid.bytes_per_token // 2 if self.turns_again else 0,
            backups=len(view.recent) * compressed if has_bank else 0,
            bank=len(view.mid) * compressed + grid.summary_bytes if has_bank else 0,
        )

    def far_bytes(self, num_blocks: int) -> tuple[int, int]:
        """What a bank in host memory moves there, and what it has where the model runs instead."""
        view = self.largest_view(num_blocks)
        if not self.top_k:
            return 0, 0
        blocks, one = len(view.mid) + len(view.recent), self.compressed_block_bytes
        return blocks * one, NEAR_LAYERS * min(view.active, blocks) * one // self.grid.layers

    def capacity_bytes(self, num_blocks: int) -> MemoryBytes:
        """Bytes of the cache's preallocated buffers: what the history of a whole video of num_blocks fills."""
        return self.bytes(self.largest_view(num_blocks))

    def frames_for(self, num_blocks: int) -> int:
        """See Grid.frames_for."""
        return self.grid.frames_for(num_blocks)

    def blocks_for(self, seconds: float | Fraction, fps: float | Fraction) -> int:
        """See Grid.blocks_for."""
        return self.grid.blocks_for(seconds, fps)


@lru_cache(maxsize=4096)
def _slots(frames_per_block: int, sinks: int, active: int, recents: int, span: Fraction) -> Slots:
    sink_starts = tuple(Fraction(frames_per_block * n) for n in range(sinks))
    mid_start = Fraction(frames_per_block * sinks)
    recent_start = mid_start + active * span
    return Slots(
        sink_starts=sink_starts,
        mid_starts=tuple(mid_start + n * span for n in range(active)),
        recent_starts=tuple(recent_start + n * frames_per_block for n in range(recents)),
        current_start=recent_start + recents * frames_per_block,
        span=span,
        frames_per_block=frames_per_block,
    )
