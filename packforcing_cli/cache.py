"""The three-partition memory of one video: full-resolution sink and recent blocks, a bank of compressed ones.

The life of a block, for sink_blocks = 2 and recent_blocks = 1:

    denoise i ........... context(i) is read; nothing but the scratch is written
    commit(i, kv) ....... i < 2: sink, for good. Else: recent; the block leaving recent goes on to the bank.
                          Before a cut all of recent does, block i too, as soon as its backup is there
    add_backup(i, kv) ... keys and values of i's compressed tokens: what goes on when i leaves recent
    the bank is full .... its oldest block that is not pinned makes room, and another takes its place

What attention reads is one buffer a layer, in which all that is valid is one contiguous run, so that no mask
is needed (attention does not care in which order keys come):

    keys, values   [ scratch: own tokens | sink | recent (a ring) | active mids, oldest first ]
                                         grows to the right until the memory is full -->

Keys are turned to their slots when they come to where they are attended, once: those of sink and recent in `commit`,
those of mids when they are recalled. Every pass over a block reads the same tensors. Where recent blocks move from
slot to slot (`Layout.turns_again`) their keys are kept as they were before RoPE, too, and `context(i)` turns afresh
what has moved, so nothing drifts. Values are never turned.

The state changes in `commit` and `add_backup` only: raw keys, compressed blocks, sums, and the keys and values of sink
and recent, which live in the buffer. All else in the buffer is derived from it. Inference only: gradients stay
outside.

Which blocks are where, at which slots and in how many bytes is said by `layout.py`, and nowhere else. Knows
neither the model nor the compressor: it is handed keys and values.

Source: PackForcing (arXiv 2603.25730) 3.1-3.5; docs/method.md 2, 4, 5.
Letters: L layers, B batch, S tokens, N heads, D head dim, n tokens of a block, N_c compressed tokens of a
block, M blocks in the bank, K active mids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor

from packforcing_cli import rope, selection, staging
from packforcing_cli.bank import DEPTH, Bank
from packforcing_cli.errors import LayoutError
from packforcing_cli.layout import BlockView, Layout, MemoryBytes, Position, Slots
from packforcing_cli.staging import Coming


class BlockKV(Protocol):
    """What a clean pass leaves of a block: un-rotated keys and values [L,B,S,N,D], query sums [L,B,N,D]."""

    @property
    def k(self) -> Tensor: ...
    @property
    def v(self) -> Tensor: ...
    @property
    def q_sum(self) -> Tensor: ...


@dataclass(frozen=True)
class CacheStats:
    """What the cache holds: bytes of its tensors, block numbers; `active` has one tuple of them a layer.

    pinned: blocks of the bank that are always recalled.
    near:   bytes where the model runs of what a bank in host memory has recalled, beside `bytes`.
    """

    bytes: MemoryBytes
    sink: tuple[int, ...]
    bank: tuple[int, ...]
    recent: tuple[int, ...]
    active: tuple[tuple[int, ...], ...]
    pinned: tuple[int, ...] = ()
    near: int = 0


class CacheContext:
    """What one block attends, the same in every pass over it. Satisfies `transformer.Context`.

    positions:  [n, 3] float64 (slot, row, column) of the block's own tokens.
    selected:   [L, K] int64 numbers of the active mids, ascending; -1 until `affinity` has met the layer.
    scores:     [L, M] of the bank, oldest first; NaN where not yet scored; None if nothing is scored.
    degenerate: [L] bool, layers whose scores said nothing and that took the newest mids.
    """

    def __init__(self, cache: KVCache, view: BlockView, *, scored: bool) -> None:
        layers, device, slots = cache.layers, cache.device, cache.layout.slots(view)
        self.block, self.layout = view.current, cache.layout
        self.positions = cache._block_positions(slots.current_start)
        self.selected = torch.full((layers, view.active), -1, dtype=torch.int64, device=device)
        self.scores = torch.full((layers, len(view.mid)), torch.nan, device=device) if scored else None
        self.degenerate = torch.zeros(layers, dtype=torch.bool, device=device)
        self._cache = cache
        self._num_tokens = cache.layout.tokens(view).stored
        self._view = view
        self._shared_angles = self._mid_angles(slots) if cache.layout.rope_adjustment else None
        self._bank = cache.bank_blocks  # what there is to choose from, oldest first
        self._index = cache._bank_index(self._bank) if view.active else None
        self._places = torch.zeros_like(self.selected)  # where in the bank they are
        self._chosen, self._ready = [False] * layers, [False] * layers
        # The host copies or finds what is recalled, or turns it to slots that depend on the choice.
        self._asks_host = cache._bank.asks_host or self._shared_angles is None
        self._on_host: dict[int, list[int]] = {}  # which blocks a layer recalls
        self._coming: list[tuple[range, Coming]] = []  # the same of layers it does not know yet

    @property
    def is_complete(self) -> bool:
        """Whether all that is attended is there already: reading a layer then writes the block's own tokens only."""
        return all(self._ready)

    def layer(self, layer: int, k: Tensor, v: Tensor, q_sum: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (rotated) and values this layer attends: the block's own and the context's.

        Args:
            k, v:  [B, n, N, D] of the block itself, k rotated. They overwrite the scratch and nothing else.
            q_sum: [B, N, D] sum of its un-rotated queries; `affinity` chooses with it in the first pass.
        Returns: views [B, n + S_context, N, D] into the cache, good until this layer is read again.
        Raises: ValueError if the cache has moved on: the block was committed, or its context made again.
        """
        self._check_open()
        if not self._ready[layer]:
            one = range(layer, layer + 1)
            if not self._chosen[layer]:
                self._choose(one, q_sum.unsqueeze(0))
            self._recall(one)
        return self._cache._beside_own(layer, k, v, self._num_tokens)

    @property
    def fixed(self) -> tuple[object, ...] | None:
        """Equal for contexts that give every layer memory of the same place and size; None while one has to choose.

        Raises: ValueError if the cache has moved on.
        """
        self._check_open()
        return self._cache._places(self._num_tokens) if all(self._ready) else None

    def settle(self, q_sums: Tensor) -> None:
        """Choose for the layers that no pass over the block has read: a clean pass stops before the last one attends.

        Args:
            q_sums: [L, B, N, D] sums of the block's un-rotated queries.
        """
        self._check_open()
        for layer, chosen in enumerate(self._chosen):
            if not chosen:
                self._choose(range(layer, layer + 1), q_sums[layer : layer + 1])

    @torch.no_grad()
    def _choose(
        self, layers: range, q_sums: Tensor | None = None, *, forced: Sequence[list[int]] | None = None
    ) -> None:
        """Choose the mids of these layers, or take the forced block numbers [l][K]."""
        cache, part = self._cache, slice(layers.start, layers.stop)
        self._chosen[part] = [True] * len(layers)
        if self._index is None:
            return
        blocks, places, pinned = self._index
        if self.scores is not None:
            self.scores[part] = cache._score(part, q_sums, places)
        if forced is not None:
            self._on_host |= dict(zip(layers, forced, strict=True))
            at = {block: n for n, block in enumerate(self._bank)}
            among = torch.tensor([[at[block] for block in row] for row in forced])
            among = staging.to_device(among, cache.device)
            ids = blocks[among]
        else:
            choice = selection.choose(
                cache.select,
                blocks,
                active=self.selected.shape[1],
                layers=len(layers),
                scores=None if self.scores is None else self.scores[part],
                seed=cache.seed,
                block=self.block,
                pinned=pinned > 0 if cache.layout.pins else None,
            )
            among, ids, self.degenerate[part] = choice.among, choice.ids, choice.degenerate
            if self._asks_host:
                self._coming.append((layers, Coming(ids)))
        self.selected[part], self._places[part] = ids, places[among]

    def _recalled(self, layer: int) -> list[int]:
        """Which blocks a layer recalls, as the host knows it.

        The one point at which the host waits for the GPU before a block is made: once a block, under `affinity` once a
        layer, and only if the host has a part in recalling. With a bank in host memory the GPU was given before what
        does not depend on it; else it has nothing to do meanwhile.
        """
        while layer not in self._on_host:
            layers, coming = self._coming.pop(0)
            self._on_host |= dict(zip(layers, coming.wait().tolist(), strict=True))
        return self._on_host[layer]

    def _fetch_from(self, first: int) -> None:
        """Have a layer's mids, and those of the next ones for which there is room near, on their way."""
        cache, bank = self._cache, self._cache._bank
        for layer in range(first, min(first + DEPTH, cache.layers)):
            if self._chosen[layer] and not self._ready[layer] and not bank.has_near(layer):
                bank.fetch(layer, [cache._place_of[block] for block in self._recalled(layer)])

    @torch.no_grad()
    def _recall(self, layers: range) -> None:
        """Bring these layers' chosen mids into the buffer, behind all that is valid there."""
        cache, count = self._cache, self.selected.shape[1]
        bank = cache._bank
        if len(layers) > 1 and self._asks_host:
            for layer in layers:
                self._recall(range(layer, layer + 1))
            return
        part, first = slice(layers.start, layers.stop), layers.start
        turns, ids = self._shared_angles, list[int]()
        if count and self._asks_host:
            ids = self._recalled(first)
            turns = turns or self._mid_angles(cache.layout.slots(self._view, ids))
        if count and bank.is_far:
            self._fetch_from(first)
        self._ready[part] = [True] * len(layers)
        if not count:
            return
        assert turns is not None
        end = cache._n + self._num_tokens
        to = slice(end - count * cache.layout.grid.compressed_tokens, end)
        bank.recall(
            layers,
            self._places[part],
            turns,
            cache._k[part, :, to],
            cache._v[part, :, to],
            on_host=[cache._place_of[block] for block in ids],
        )
        if bank.is_far:
            self._fetch_from(first + 1)

    def _mid_angles(self, slots: Slots) -> tuple[Tensor, Tensor]:
        """Rotations of the active mids; without RoPE adjustment each layer has its own."""
        cache = self._cache

        def positions() -> Tensor:
            mids = [cache.layout.compressed_positions(start, slots.span) for start in slots.mid_starts]
            return cache._positions([position for mid in mids for position in mid])

        return cache._turns((slots.span, *slots.mid_starts), positions)

    def _check_open(self) -> None:
        if self._cache._open is not self:
            raise ValueError(f"this context of block {self.block} is closed: ask for a new one")


class CompressedContext:
    """What the compressed tokens of a block attend. Satisfies `transformer.Context`.

    positions: [N_c, 3] float64 (slot, row, column) of the tokens: the centres of the cells they stand for.
    """

    def __init__(self, cache: KVCache, cells: Sequence[Position], sees: CacheContext | int) -> None:
        """`sees`: the block's own context, or the tokens at the start of the buffer: those of the sinks."""
        self.positions = cache._positions(cells)
        self._cache = cache
        self._history = sees if isinstance(sees, CacheContext) else None
        self._num_tokens = sees._num_tokens if isinstance(sees, CacheContext) else sees

    @property
    def fixed(self) -> tuple[object, ...] | None:
        """As `CacheContext.fixed`."""
        if self._history is not None and self._history.fixed is None:
            return None
        return self._cache._places(self._num_tokens)

    def layer(self, layer: int, k: Tensor, v: Tensor, q_sum: Tensor) -> tuple[Tensor, Tensor]:
        """As `CacheContext.layer`, for N_c own tokens; `q_sum` is not used."""
        if self._history is not None:
            self._history._check_open()
            if not self._history._ready[layer]:
                raise ValueError(f"layer {layer} has no mids yet: a pass over the block comes first")
        return self._cache._beside_own(layer, k, v, self._num_tokens)


class KVCache:
    """Keys and values of one video (or of B videos of equal length), all layers, in preallocated tensors."""

    def __init__(
        self,
        layout: Layout,
        *,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        bank_device: torch.device | str | None = None,
        batch: int = 1,
        select: str = "affinity-recent",
        seed: int = 0,
        compressed_context: str = "sinks",
    ) -> None:
        """Allocate all that a video of `num_blocks` blocks needs; an unlimited bank grows block by block.

        Args:
            bank_device: where the bank is kept, if that is far from where the model runs: see bank.py. None = near.
                Scores never read its keys and values.
            select:      a mode of `selection.py`; with top_k 0 there is nothing to select, whatever it says.
            seed:        of `select="random"`.
            compressed_context: "sinks" or "history", see the method of that name.
        Raises: LayoutError or UsageError if the settings contradict each other.
        """
        grid, full, has_mid = layout.grid, layout.largest_view(num_blocks), layout.top_k > 0
        selection.check_mode(select)
        if has_mid and select == "none":
            raise LayoutError("selecting none contradicts top_k > 0", hint="Use a layout with top_k = 0.")
        if compressed_context not in ("sinks", "history"):
            raise LayoutError(f"compressed context {compressed_context!r}", hint="Use sinks or history.")
        if dtype.itemsize != grid.dtype_bytes:
            raise LayoutError(f"{dtype} has {dtype.itemsize} bytes a number, the layout {grid.dtype_bytes}")
        self.layout, self.num_blocks = layout, num_blocks
        self.layers, self.dtype, self.device = grid.layers, dtype, torch.device(device)
        self.select, self.seed = select if has_mid else "none", seed
        self._compressed_context = compressed_context
        self._n, self._head_dim = grid.block_tokens, grid.kv_dim // grid.heads

        def zeros(*shape: int, dtype: torch.dtype = dtype, device: torch.device | str = device) -> Tensor:
            per_head = (grid.heads, self._head_dim)
            return torch.zeros(grid.layers, batch, *shape, *per_head, dtype=dtype, device=device)

        tokens, compressed = layout.tokens(full), grid.compressed_tokens
        self._backups = len(full.recent) if has_mid else 0
        self._growing = layout.bank is None
        self._k, self._v = zeros(tokens.active), zeros(tokens.active)
        self._raw_k = zeros(tokens.recent if layout.turns_again else 0)
        self._bank = Bank(
            layers=grid.layers,
            batch=batch,
            places=self._backups + (0 if self._growing else len(full.mid)),
            tokens=compressed,
            heads=grid.heads,
            head_dim=self._head_dim,
            dtype=dtype,
            kv_dtype=layout.kv_dtype,
            device=self.device,
            far=None if bank_device is None else torch.device(bank_device),
            recalled=full.active,
            grows_to=self._backups + len(full.mid) if self._growing else None,
        )
        # Of the bank: block numbers, places, whether pinned; written anew for each context.
        self._index = torch.zeros(3 * len(full.mid), dtype=torch.int64, device=self.device)
        self._q_sum = zeros(dtype=torch.float32) if has_mid else zeros(0, dtype=torch.float32)

        self.blocks = 0  # committed so far
        self._sinks, self._ring = len(full.sink), max(1, len(full.recent))
        self._place_of: dict[int, int] = {}  # of every block that is kept in compressed form
        self._banked: set[int] = set()  # those of them that are in the bank; the others are backups
        # Which block lies turned in a place of recent, and to which slot.
        self._turned: dict[int, tuple[int, Fraction]] = {}
        self._angles: dict[object, tuple[Tensor, Tensor]] = {}
        self._cells: dict[Fraction, Tensor] = {}
        self._open: CacheContext | None = None

    @property
    def bank_blocks(self) -> list[int]:
        """Numbers of the blocks in the bank, oldest first."""
        return sorted(self._banked)

    @property
    def backup_may_wait(self) -> bool:
        """Whether a block's compressed context outlives its own: `compressed_context` is "sinks"."""
        return self._compressed_context == "sinks"

    def needs_backup(self, i: int) -> bool:
        """Whether block i is remembered in compressed form once it leaves recent (sinks never leave)."""
        return self.layout.top_k > 0 and i not in self.layout.view(i + 1).sink

    # -- reading --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def context(self, i: int, *, selected: Tensor | None = None) -> CacheContext:
        """Prepare what block i attends: turn what has moved to another slot, choose and bring in the mids.

        With `affinity` a layer's mids follow in the first pass over the block, when its queries are known. From a bank
        that is far they follow there as well, so that a GPU is at work on the first layer while they are on their way.
        Args:
            selected: [L, K] ascending block numbers to recall instead of choosing: a recorded choice.
        Raises: ValueError if i is not the next block, or if `selected` does not fit the bank.
        """
        if i != self.blocks:
            raise ValueError(f"context({i}) asked for, the next block is {self.blocks}")
        view, slots = self.layout.view(i), self.layout.slots(i)
        if [*view.mid] != self.bank_blocks:
            raise ValueError(f"block {i - 1} has no backup: the cut at block {i} needs it in the bank")
        forced = None if selected is None else self._checked(selected, view)
        self._turn_recent(dict(zip(view.recent, slots.recent_starts, strict=True)))
        scored = self.select.startswith("affinity") and view.active > 0 and selected is None
        self._bank.forget_fetched()
        context = self._open = CacheContext(self, view, scored=scored)
        if selected is not None or not scored or self.select == "affinity-recent":
            context._choose(range(self.layers), forced=forced)
            if not self._bank.is_far:
                context._recall(range(self.layers))
        return context

    @torch.no_grad()
    def compressed_context(self, i: int) -> CompressedContext:
        """What the compressed tokens of block i attend while the model turns them into keys and values.

        "sinks":   the sinks, right before the block, and themselves. A function of sinks and block alone, so
                   it is there as long as the backup can wait, also between two passes over a later block.
        "history": all that block i attends, at its slots, and themselves; from its first pass to `commit(i)`.
        Source: docs/method.md 2.4, 10.
        """
        if not self.needs_backup(i) or i > self.blocks:
            raise ValueError(f"block {i} takes no backup yet, or never: the next block is {self.blocks}")
        slots, span = self.layout.slots(i), self.layout.grid.frames_per_block
        if self._compressed_context == "sinks":
            cells = self.layout.compressed_positions(self.layout.context_start, span)
            return CompressedContext(self, cells, self.layout.tokens(i).sink)
        if self._open is None or self._open.block != i:
            raise ValueError(f"the history of block {i} is there from context({i}) to commit({i})")
        cells = self.layout.compressed_positions(slots.current_start, span)
        return CompressedContext(self, cells, self._open)

    def _turn_recent(self, starts: dict[int, Fraction]) -> None:
        """Turn the keys of the recent blocks that are not at these slots yet, where they move from slot to slot."""
        if not self.layout.turns_again:
            return
        for block, start in starts.items():
            place = self._place(block)
            if self._turned.get(place) != (block, start):
                at = (place - self._sinks) * self._n
                self._turn(self._raw_k[:, :, at : at + self._n], place, start)
                self._turned[place] = (block, start)

    def _turn(self, k: Tensor, place: int, start: Fraction) -> None:
        """Write a block's keys [L, B, n, N, D], turned to a slot, to its place in the buffer."""
        at = self._n * (1 + place)
        into = self._k[:, :, at : at + self._n].flatten(0, 1)
        turns = self._turns(start, lambda: self._block_positions(start))
        rope.rotate_into(k.detach().flatten(0, 1), *turns, into)

    def _bank_index(self, bank: Sequence[int]) -> Tensor:
        """Number, place and whether it is pinned of each block of the bank: [3, M] int64 where the model runs.

        All that a choice needs of the host, by one copy for which nothing waits.
        """
        rows = bank, [self._place_of[block] for block in bank], [block in self.layout.pins for block in bank]
        into = self._index[: 3 * len(bank)].view(3, len(bank))
        staging.write(torch.tensor(rows, dtype=torch.int64), into)
        return into

    def _score(self, layers: slice, q_sums: Tensor | None, places: Tensor) -> Tensor:
        """[l, M] affinity of the bank's blocks in `places` [M] to the last commit's queries plus `q_sums` [l,B,N,D]."""
        # As many as are there once the last backup has come, whether it has or not: a sum's last bit may depend on it.
        key_sums = self._bank.key_sums[layers, :, : len(places) + self._backups]
        queries = self._q_sum[layers]
        scores = selection.score(queries if q_sums is None else queries + q_sums.to(queries), key_sums)
        return scores[:, places]

    def _places(self, context_tokens: int) -> tuple[object, ...]:
        """Where the buffer lies, and how much of it is context."""
        return (self._k.data_ptr(), self._v.data_ptr(), *self._k.shape, self._n, context_tokens)

    def _beside_own(self, layer: int, k: Tensor, v: Tensor, context_tokens: int) -> tuple[Tensor, Tensor]:
        """Write a forward's own keys and values right before the context; return both together."""
        start, end = self._n - k.shape[1], self._n + context_tokens
        self._k[layer, :, start : self._n].copy_(k.detach())
        self._v[layer, :, start : self._n].copy_(v.detach())
        return self._k[layer, :, start:end], self._v[layer, :, start:end]

    # -- writing --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def commit(self, i: int, kv: BlockKV) -> None:
        """Take in the clean block i; what leaves recent goes on to the bank. Closes the open context.

        Args:
            kv: k, v [L, B, n, N, D], k un-rotated; q_sum [L, B, N, D].
        Raises: ValueError if i is not the next block, a shape is wrong, or the leaving block has no backup;
            nothing has changed then.
        """
        if i != self.blocks or i >= self.num_blocks:
            raise ValueError(f"commit({i}): the next block is {self.blocks} of {self.num_blocks}")
        self._check_shape(kv, self._n)
        before, after = self.layout.view(i), self.layout.view(i + 1)
        if self.layout.top_k:
            leaving = sorted({*before.recent} - {*after.recent})
            for block in leaving:
                if block not in self._place_of:
                    raise ValueError(
                        f"block {block} leaves recent without a backup: call add_backup({block}) before"
                    )
            for block in leaving:
                self._take_in(block)
            self._q_sum.copy_(kv.q_sum)
        if i in after.sink or i in after.recent:
            slots, place = self.layout.slots(after), self._place(i)
            if i in after.sink:
                self._turn(kv.k, place, slots.sink_starts[i])
            elif not self.layout.turns_again:
                self._turn(kv.k, place, slots.recent_starts[after.recent.index(i)])
            else:
                at = (place - self._sinks) * self._n
                self._raw_k[:, :, at : at + self._n].copy_(kv.k)
            at = self._n * (1 + place)
            self._v[:, :, at : at + self._n].copy_(kv.v)
        self.blocks, self._open = i + 1, None

    @torch.no_grad()
    def add_backup(self, i: int, kv: BlockKV) -> None:
        """Keep the compressed form of block i, which is recent, or the last one before a cut.

        Args:
            kv: k, v [L, B, N_c, N, D], k un-rotated; its q_sum is not used.
        Raises: ValueError if block i is neither, takes no backup or has one, or a shape is wrong.
        """
        recent = self.layout.view(self.blocks).recent
        last_before_cut = not recent and i == self.blocks - 1
        if not self.needs_backup(i) or not (i in recent or last_before_cut) or i in self._place_of:
            backed_up = sorted({*self._place_of} - self._banked)
            raise ValueError(f"add_backup({i}): recent is {[*recent]}, with backups of {backed_up}")
        self._check_shape(kv, self.layout.grid.compressed_tokens)
        if last_before_cut:
            self._take_in(i)
        taken = {*self._place_of.values()}
        place = next(n for n in range(len(taken) + 1) if n not in taken)
        self._bank.write(place, kv.k, kv.v)
        self._place_of[i] = place

    def _take_in(self, block: int) -> None:
        """Make a block one of the bank; if that is full, its oldest that is not pinned goes."""
        if self.layout.bank is not None and len(self._banked) == self.layout.bank:
            unpinned = self._banked - self.layout.pins
            if not unpinned:
                raise ValueError(
                    f"all {len(self._banked)} blocks of the bank are pinned: nothing can make room"
                )
            self._banked.remove(min(unpinned))
            del self._place_of[min(unpinned)]
        if self._growing:
            self._bank.resize(len(self._banked) + 1 + self._backups)  # may find no memory
        self._banked.add(block)

    def close(self) -> None:
        """Let go of a block that is open: it and the memory hold each other."""
        self._open = None

    # -- keeping and showing --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Copies on the CPU of all that cannot be derived: flat, as safetensors takes it."""
        state = {name: kept.to("cpu", copy=True).contiguous() for name, kept in self._kept().items()}
        state |= {f"bank_{name}": kept for name, kept in self._bank.state(self._places_in_use).items()}
        view = self.layout.view(self.blocks)
        state["blocks"] = torch.tensor([self.blocks, len(view.sink), len(view.recent)])
        rows = [(block, place, block in self._banked) for block, place in sorted(self._place_of.items())]
        state["places"] = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from the `state_dict` of a cache of equal settings, of which `num_blocks` may differ.

        Raises: LayoutError if the state is of other settings; the cache is of no use then.
        """
        hint = "Load it with the memory settings, dtype and batch it was saved with."
        expected = {*self._kept(), *(f"bank_{name}" for name in self._bank.kinds(0)), "blocks", "places"}
        if set(state) != expected:
            raise LayoutError(
                f"not a cache's state: it differs in {sorted(expected ^ set(state))}", hint=hint
            )
        self.blocks, *kept = state["blocks"].tolist()
        view = self.layout.view(self.blocks)
        if self.blocks > self.num_blocks or kept != [len(view.sink), len(view.recent)]:
            raise LayoutError(f"the saved cache has {self.blocks} blocks, sinks and recent {kept}", hint=hint)
        self._open, rows = None, state["places"].tolist()
        self._place_of = {block: place for block, place, _ in rows}
        self._banked = {block for block, _, in_bank in rows if in_bank}
        self._turned = {}
        if self._growing:
            self._bank.resize(self._backups + len(self._banked))
        own, places = self._kept(), self._places_in_use
        kinds = {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}
        kinds |= {f"bank_{name}": kind for name, kind in self._bank.kinds(places).items()}
        for name, (shape, dtype) in kinds.items():
            found = state[name]
            if (shape, dtype) != (found.shape, found.dtype):
                shapes = f"{list(found.shape)} {found.dtype}, here it is {list(shape)} {dtype}"
                raise LayoutError(f"{name} of the saved cache is {shapes}", hint=hint)
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self._bank.load_state({name: state[f"bank_{name}"] for name in self._bank.kinds(places)}, places)

    def in_use(self) -> MemoryBytes:
        """Bytes of the part of the live tensors that holds something while the open context's block is made.

        Raises: ValueError without an open context.
        """
        if self._open is None:
            raise ValueError(f"there is no open context: ask for context({self.blocks})")
        attended = slice(self._n, self._n + self._open._num_tokens)
        kept, recent = self._kept(), self.layout.view(self.blocks).recent
        backups = sum(block in recent for block in {*self._place_of} - self._banked)
        return MemoryBytes(
            stored=self._k[:, :, attended].nbytes + self._v[:, :, attended].nbytes,
            current=self._k[:, :, : self._n].nbytes + self._v[:, :, : self._n].nbytes,
            raw_keys=kept["raw_k"].nbytes,
            backups=backups * self._bank.place_bytes,
            bank=len(self._banked) * self._bank.place_bytes + self._q_sum.nbytes,
        )

    def tensors(self) -> dict[str, Tensor]:
        """All that is allocated; each keeps its storage for good. A bank that grows adds tensors to them."""
        own = {"k": self._k, "v": self._v, "raw_k": self._raw_k, "q_sum": self._q_sum}
        return own | {f"bank_{name}": tensor for name, tensor in self._bank.tensors().items()}

    def stats(self) -> CacheStats:
        """Bytes of the live tensors, all that is allocated, and numbers of the blocks, by partition."""
        view, buffer = self.layout.view(self.blocks), self._k.nbytes + self._v.nbytes
        current, place = buffer // self._k.shape[2] * self._n, self._bank.place_bytes
        size = MemoryBytes(
            stored=buffer - current,
            current=current,
            raw_keys=self._raw_k.nbytes,
            backups=self._backups * place,
            bank=self._bank.nbytes - self._backups * place + self._q_sum.nbytes,
        )
        active = tuple(tuple(ids) for ids in self._open.selected.tolist()) if self._open else ()
        bank, pins = self.bank_blocks, self.layout.pins
        pinned = tuple(block for block in bank if block in pins)
        near = self._bank.near_bytes
        return CacheStats(size, tuple(view.sink), tuple(bank), tuple(view.recent), active, pinned, near)

    def _kept(self) -> dict[str, Tensor]:
        """Views of the valid part of all that cannot be derived, but for the bank."""
        view, n = self.layout.view(self.blocks), self._n
        sink, both = len(view.sink) * n, (len(view.sink) + len(view.recent)) * n
        again = self.layout.turns_again
        return {
            "k": self._k[:, :, n : n + (sink if again else both)],
            "raw_k": self._raw_k[:, :, : len(view.recent) * n if again else 0],
            "v": self._v[:, :, n : n + both],
            "q_sum": self._q_sum,
        }

    @property
    def _places_in_use(self) -> int:
        """How many of the bank's places have to be kept, from the first one."""
        return 1 + max(self._place_of.values(), default=-1)

    # -- pieces ---------------------------------------------------------------------------------------------

    def _place(self, block: int) -> int:
        """Where a sink or recent block lies, in blocks; recent is a ring behind the sinks, begun anew by a cut."""
        if block < self._sinks:
            return block
        return self._sinks + (block - self.layout.run_start(block)) % self._ring

    def _block_positions(self, start: Fraction) -> Tensor:
        """[n, 3] of a block of full-resolution tokens whose first frame is at slot `start`."""
        if start not in self._cells:
            grid = self.layout.grid
            shape = (grid.frames_per_block, grid.rows, grid.cols)
            _forget_oldest(self._cells)
            self._cells[start] = rope.grid_positions(float(start), *shape, device=self.device)
        return self._cells[start]

    def _positions(self, cells: Sequence[Position]) -> Tensor:
        rows = [[float(axis) for axis in cell] for cell in cells]
        there = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)
        return staging.to_device(there, self.device)

    def _turns(self, key: object, positions: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Cosines and sines [S, D/2] of positions, kept under a key: a full memory asks for the same ones every block.

        A few MB, which are not counted with the cache's bytes.
        """
        if key not in self._angles:
            cos, sin = rope.angles(positions(), self._head_dim)
            compute = rope.compute_dtype(self.dtype)
            _forget_oldest(self._angles)
            self._angles[key] = cos.to(compute), sin.to(compute)
        return self._angles[key]

    def _checked(self, selected: Tensor, view: BlockView) -> list[list[int]]:
        rows, bank = selected.tolist(), self._banked
        fits = [len(row) == view.active and row == sorted({*row}) and bank.issuperset(row) for row in rows]
        if fits != [True] * self.layers:
            raise ValueError(f"wanted {view.active} ascending of {sorted(bank)} in each layer, got {rows}")
        return rows

    def _check_shape(self, kv: BlockKV, tokens: int) -> None:
        wanted = (*self._k.shape[:2], tokens, *self._k.shape[3:])
        if kv.k.shape != wanted or kv.v.shape != wanted:
            raise ValueError(f"k {[*kv.k.shape]}, v {[*kv.v.shape]}: this cache takes {[*wanted]}")


def _forget_oldest(kept: dict[Any, Any], *, most: int = 8) -> None:
    if len(kept) >= most:
        del kept[next(iter(kept))]
