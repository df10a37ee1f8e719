"""Where the compressed blocks of all layers are kept: keys before RoPE and values, each block in a place of its own.

    write(place, k, v)          a block comes in, as the model made it or quantized
    recall(layer, ...)          the chosen ones of a layer go out: dequantized, keys turned, one pass over them
    fetch(layer, places)        a bank that is far (in host memory): copies them near ahead of `recall`

A block is kept as the model computes ("auto"), in bf16, or in fp8 (e4m3) or int8 with one float32 scale a token and
head, so that the largest of a head's numbers is exact. What attention reads is always of the model's dtype: quantizing
saves memory where most of it is, in the blocks that are not read, and changes no shape.

A bank that may hold every block there is grows a place at a time. Each place is memory of its own, so that growing
copies nothing and what is there never moves; recalled places are found by the host, which has to know them.

A far bank stays in host memory; where the model runs there is room for the chosen blocks of two layers. On a GPU the
memory is page-locked and the copies run on a stream of their own: `fetch` of layer l + 2 beside the work of l + 1.
On a CPU the same copies are made in order. Either way the same bits come out as from a near bank.

Which block is in which place, and what is recalled, is decided by `cache.py`.
Letters: L layers, B batch, P places, K recalled, N_c tokens of a compressed block, N heads, D head dim.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from packforcing_cli import rope, turning
from packforcing_cli.errors import MemoryFitError
from packforcing_cli.layout import NEAR_LAYERS

DEPTH = NEAR_LAYERS
PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every GPU, not only the first
PAGE = mmap.PAGESIZE
_KINDS = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def kept_dtype(kv_dtype: str, dtype: torch.dtype) -> torch.dtype:
    """What numbers of a dtype are kept in. "auto" = as they are."""
    return dtype if kv_dtype == "auto" else _KINDS[kv_dtype]


def quantize(x: Tensor, kept: torch.dtype) -> tuple[Tensor, Tensor]:
    """Numbers in fp8 (e4m3) or int8, and what to multiply them with.

    Args:
        x: [..., D].
    Returns: [..., D] of dtype `kept`, and [...] float32: largest magnitude over the largest that `kept` has.
    """
    x, largest = x.to(torch.float32), _LARGEST[kept]
    scale = x.abs().amax(-1) / largest
    scale = torch.where(scale > 0, scale, 1.0)
    x = x / scale[..., None]
    if kept is torch.int8:
        x = x.round()
    return x.clamp(-largest, largest).to(kept), scale


def dequantize(x: Tensor, scale: Tensor) -> Tensor:
    """The inverse of `quantize`, in float32."""
    return x.to(torch.float32) * scale[..., None]


class Bank:
    """Places for the compressed blocks of one video, all layers.

    Keys and values lie in slabs, of some places each: k, v [L, B, p, N_c, N, D] of the kept dtype; of fp8 and int8 also
    k_scale, v_scale [L, B, p, N_c, N] float32. A bank that does not grow is one slab; of one that grows each place is.

    key_sums: [L, B, P, N, D] float32, where the model runs: of the keys as they came. Of a bank that grows it has all
              the places there will ever be: 0.5 % of their keys and values, which every score reads in one piece.
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        places: int,
        tokens: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        kv_dtype: str,
        device: torch.device,
        far: torch.device | None,
        recalled: int,
        grows_to: int | None = None,
    ) -> None:
        """Allocate the places.

        Args:
            dtype:    of the model.
            far:      where keys and values are kept; None = on `device`.
            recalled: the most blocks a layer recalls, for which a far bank has room near.
            grows_to: the most places `resize` will ask for; None = it has all its places now.
        """
        self.device, self.is_far = device, far is not None
        self._layers, self._batch, self._where = layers, batch, far or device
        self._grows, self._slab_places = grows_to is not None, max(1, places) if grows_to is None else 1
        kept = kept_dtype(kv_dtype, dtype)
        numbers, scales = (tokens, heads, head_dim), (tokens, heads)
        self._kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]]
        self._kinds = {"k": (kept, numbers), "v": (kept, numbers)}
        if kept in _LARGEST:
            self._kinds |= {"k_scale": (torch.float32, scales), "v_scale": (torch.float32, scales)}
        self._stream: torch.cuda.Stream | None = None
        self._locked: dict[int, int] = {}  # page-locked slabs: address and bytes
        if device.type == "cuda" and self.is_far:
            self._stream = torch.cuda.Stream(device)
            self._ready, self._used = ([torch.cuda.Event() for _ in range(DEPTH)] for _ in range(2))
            self._written = torch.cuda.Event()
            self._unlock = weakref.finalize(self, _unlock_pages, self._locked, device)
            self._unlock.atexit = False
        self.key_sums = torch.zeros(
            (layers, batch, max(places, grows_to or 0), heads, head_dim), dtype=torch.float32, device=device
        )
        self._slabs: list[dict[str, Tensor]] = []
        if grows_to is None:
            self._add_slab(places)
        else:
            self.resize(places)
        self._near: dict[str, Tensor] = {}
        if self.is_far:
            for name, (kind, shape) in self._kinds.items():
                near = (DEPTH, batch, recalled, *shape)
                self._near[name] = torch.zeros(near, dtype=kind, device=device)
        self._fetched: list[int | None]
        self.forget_fetched()

    @property
    def asks_host(self) -> bool:
        """Whether `recall` and `fetch` need to be told on the host what is recalled: it finds or copies the places."""
        return self.is_far or self._grows

    @property
    def places(self) -> int:
        return sum(slab["k"].shape[2] for slab in self._slabs)

    @property
    def place_bytes(self) -> int:
        """Of one place: keys, values, scales and key sum."""
        kept = sum(kind.itemsize * math.prod(shape) for kind, shape in self._kinds.values())
        return self._layers * self._batch * (kept + 4 * math.prod(self.key_sums.shape[3:]))

    @property
    def nbytes(self) -> int:
        """Of all places, and the key sums of those to come; without what a far bank has near."""
        unused = self.key_sums[:, :, self.places :].nbytes
        return self.places * self.place_bytes + unused

    @property
    def near_bytes(self) -> int:
        """Of what a far bank has room for near."""
        return sum(tensor.nbytes for tensor in self._near.values())

    def tensors(self) -> dict[str, Tensor]:
        """All that is allocated, and stays where it is; of a bank that grows a place at a time: `k.0`, `k.1`, ...

        The names of what a far bank has near end in `near`.
        """
        parts = {
            f"{name}.{n}" if self._grows else name: tensor
            for n, slab in enumerate(self._slabs)
            for name, tensor in slab.items()
        }
        return {
            **parts,
            "key_sums": self.key_sums,
            **{f"{name}_near": near for name, near in self._near.items()},
        }

    def kinds(self, places: int) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of each tensor of `state`, of no more places than there are."""
        places = min(places, self.places)
        of = {**self._kinds, "key_sums": (torch.float32, tuple(self.key_sums.shape[3:]))}
        return {
            name: (
                torch.Size((self._layers, self._batch, places, *shape)),
                torch.uint8 if kind is torch.float8_e4m3fn else kind,
            )
            for name, (kind, shape) in of.items()
        }

    def state(self, places: int) -> dict[str, Tensor]:
        """Copies on the CPU of the first places, to be saved: [L, B, places, ...]; fp8 as bytes."""
        self._wait_for_writes()
        whole = {
            name: torch.empty(*shaped[:1], dtype=shaped[1]) for name, shaped in self.kinds(places).items()
        }
        for name, part, own in self._pieces(places):
            whole[name][:, :, part].copy_(own)
        return whole

    def load_state(self, state: Mapping[str, Tensor], places: int) -> None:
        """Take the first places from a `state` of the same kinds; there have to be as many."""
        self._wait_for_writes()
        for name, part, own in self._pieces(places):
            own.copy_(state[name][:, :, part])

    def _pieces(self, places: int) -> Iterator[tuple[str, slice, Tensor]]:
        """Views of the first places: name, which places, and [L, B, places, ...]; fp8 as bytes."""
        yield "key_sums", slice(0, places), self.key_sums[:, :, :places]
        for n, slab in enumerate(self._slabs):
            part = slice(n * self._slab_places, min(places, (n + 1) * self._slab_places))
            if part.start >= part.stop:
                break
            for name, tensor in slab.items():
                yield name, part, _as_bytes(tensor)[:, :, : part.stop - part.start]

    def write(self, place: int, k: Tensor, v: Tensor) -> None:
        """Keep a block's un-rotated keys and values [L, B, N_c, N, D] in a place."""
        slab, at = self._at(place)
        for x, name in ((k, "k"), (v, "v")):
            to, scales = slab[name][:, :, at], slab.get(f"{name}_scale")
            scale_to = None if scales is None else scales[:, :, at]
            if self.is_far:
                self._send(x, to, scale_to)
            elif scale_to is None:
                to.copy_(x)
            else:
                torch.ops.packforcing.quantize_into(x, to, scale_to)
        self.key_sums[:, :, place].copy_(k.sum(2, dtype=torch.float32))
        if self._stream is not None:
            self._written.record(torch.cuda.current_stream(self.device))

    def _send(self, x: Tensor, to: Tensor, scale_to: Tensor | None) -> None:
        """Write x [L, B, N_c, N, D] to a place of a far bank: what lies together by one copy."""
        here, scale = x.to(to.dtype) if scale_to is None else torch.empty_like(x, dtype=to.dtype), None
        if scale_to is not None:
            scale = torch.empty(scale_to.shape, dtype=scale_to.dtype, device=x.device)
            torch.ops.packforcing.quantize_into(x, here, scale)
        _send_together(_as_bytes(here), _as_bytes(to))
        if scale is not None and scale_to is not None:
            _send_together(scale, scale_to)

    def fetch(self, layer: int, places: Sequence[int]) -> None:
        """Begin to bring these places of a layer near; `recall` of it comes before the fetch of layer + DEPTH.

        It begins when what was written before is there, and the recall is done that last read this part; not after
        all that the model was given since.
        """
        at = layer % DEPTH
        if self._stream is None:
            self._copy_near(layer, at, places)
        else:
            self._stream.wait_event(self._written)
            self._stream.wait_event(self._used[at])
            with torch.cuda.stream(self._stream):
                self._copy_near(layer, at, places)
                self._ready[at].record(self._stream)
        self._fetched[at] = layer

    def forget_fetched(self) -> None:
        """Take what was fetched and not recalled for outdated, as it is once another block is made."""
        self._fetched = [None] * DEPTH

    def has_near(self, layer: int) -> bool:
        """Whether what was fetched last into this layer's room is of this layer."""
        return self._fetched[layer % DEPTH] == layer

    def _copy_near(self, layer: int, at: int, places: Sequence[int]) -> None:
        for n, place in enumerate(places):
            slab, row = self._at(place)
            for name, tensor in slab.items():
                near, of = _as_bytes(self._near[name])[at], _as_bytes(tensor)[layer]
                near[:, n].copy_(of[:, row], non_blocking=True)

    def recall(
        self,
        layers: range,
        places: Tensor,
        turns: tuple[Tensor, Tensor],
        k: Tensor,
        v: Tensor,
        *,
        on_host: Sequence[int] = (),
    ) -> None:
        """Write the blocks in places [l, K] of layers, one after the other, into k (turned) and v [l, B, K*N_c, N, D].

        turns: cosines and sines [K*N_c, D/2], in `rope.compute_dtype`.
        on_host: the same places, if `asks_host`; then it is one layer.
        A far bank gives one layer at a time, what was fetched of it, in that order.
        """
        part = slice(layers.start, layers.stop)
        if self.asks_host:
            (layer,) = layers
            parts = self._taken_near(layer) if self.is_far else self._together(layer, on_host)
            places = torch.arange(places.shape[1], device=self.device)[None]
        else:
            parts = {name: tensor[part] for name, tensor in self._slabs[0].items()}
        recall = torch.ops.packforcing.recall_into
        recall(parts["k"], parts.get("k_scale"), places, *turns, k)
        recall(parts["v"], parts.get("v_scale"), places, None, None, v)
        if self._stream is not None:
            self._used[layers.start % DEPTH].record(torch.cuda.current_stream(self.device))

    def _taken_near(self, layer: int) -> dict[str, Tensor]:
        """What was fetched of a layer, [1, B, K, ...], once it is there."""
        at = layer % DEPTH
        assert self.has_near(layer), "fetch comes before recall"
        self._fetched[at] = None
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_event(self._ready[at])
        return {name: tensor[at : at + 1] for name, tensor in self._near.items()}

    def _together(self, layer: int, places: Sequence[int]) -> dict[str, Tensor]:
        """These places of a layer of a bank that grows, [1, B, K, ...], copied from where each of them is."""
        slabs = [self._at(place) for place in places]
        return {
            name: torch.stack([_as_bytes(slab[name])[layer, :, row] for slab, row in slabs], 1).view(kind)[
                None
            ]
            for name, (kind, _) in self._kinds.items()
        }

    def resize(self, places: int) -> None:
        """Have more places, or fewer; those that remain stay where they are, and nothing is copied.

        Raises: MemoryFitError if there is no memory for them.
        """
        assert self._grows, "this bank has all its places"
        assert places <= self.key_sums.shape[2], "more than it was said to grow to"
        while len(self._slabs) < places:
            self._add_slab(1)
        dropped = [slab["k"].data_ptr() for slab in self._slabs[places:]]
        _unlock_pages({at: self._locked.pop(at) for at in dropped if at in self._locked}, self.device)
        del self._slabs[places:]

    def _at(self, place: int) -> tuple[dict[str, Tensor], int]:
        """The slab that has a place, and which of its places it is."""
        slab, row = divmod(place, self._slab_places)
        return self._slabs[slab], row

    def _add_slab(self, places: int) -> None:
        """Allocate the next places: each kind in one piece, [L, B, places, ...]."""
        kinds = {
            name: ((self._layers, self._batch, places, *shape), kind)
            for name, (kind, shape) in self._kinds.items()
        }
        if self._stream is not None:
            self._slabs.append(self._page_locked(kinds))
            return
        self._slabs.append(
            {
                name: torch.zeros(shape, dtype=kind, device=self._where)
                for name, (shape, kind) in kinds.items()
            }
        )

    def _page_locked(self, kinds: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
        """Zeros in host memory that the GPU copies from and to beside its work.

        Page-locked to the size, where PyTorch's own allocations take the next power of two; and in pages that hold
        nothing else, since none can be locked twice.
        Raises: MemoryFitError if the system refuses.
        """
        sizes = {name: kind.itemsize * math.prod(shape) for name, (shape, kind) in kinds.items()}
        starts = [0, *accumulate(-(-size // PAGE) * PAGE for size in sizes.values())]
        if not starts[-1]:
            return {name: torch.zeros(shape, dtype=kind) for name, (shape, kind) in kinds.items()}
        try:
            memory = torch.zeros(starts[-1] + PAGE, dtype=torch.uint8)
        except RuntimeError as error:  # the allocator has no class of its own for it
            raise _does_not_fit("give", starts[-1]) from error
        memory = memory[-memory.data_ptr() % PAGE :][: starts[-1]]
        address = memory.data_ptr()
        if int(torch.cuda.cudart().cudaHostRegister(address, starts[-1], PORTABLE)) != 0:
            raise _does_not_fit("page-lock", starts[-1])
        self._locked[address] = starts[-1]
        return {
            name: memory[start : start + sizes[name]].view(kind).view(shape)
            for start, (name, (shape, kind)) in zip(starts, kinds.items(), strict=False)
        }

    def _wait_for_writes(self) -> None:
        if self._stream is not None:
            self._written.synchronize()


def _does_not_fit(verb: str, size: int) -> MemoryFitError:
    return MemoryFitError(
        f"the system does not {verb} {size / 1e9:.1f} GB of host memory for the bank",
        hint="Use a smaller --bank-memory.",
    )


def _send_together(x: Tensor, to: Tensor) -> None:
    """Copy x [L, B, ...] to the host, layer by layer unless all lies together there: of one a batch of one does."""
    if to.is_contiguous():
        to.copy_(x, non_blocking=True)
        return
    for layer in range(len(to)):
        to[layer].copy_(x[layer], non_blocking=True)


def _as_bytes(x: Tensor) -> Tensor:
    """fp8 as bytes, which every operator takes."""
    return x.view(torch.uint8) if x.dtype is torch.float8_e4m3fn else x


def _unlock_pages(locked: Mapping[int, int], device: torch.device) -> None:
    """Let pages go once the GPU neither writes nor reads in them."""
    if not locked:
        return
    try:
        torch.cuda.synchronize(device)
    finally:
        for address in locked:
            torch.cuda.cudart().cudaHostUnregister(address)


def _quantize_into(x: Tensor, kept: Tensor, scale: Tensor) -> None:
    """x [L,B,N_c,N,D] -> kept, of the same shape, and scale [L,B,N_c,N]."""
    piece = rope.PIECE.get(x.device.type, rope.PIECE_OF_OTHERS)
    some = max(1, piece // max(1, x[0].numel()))
    for first in range(0, len(x), some):
        part = slice(first, first + some)
        numbers, scales = quantize(x[part], kept.dtype)
        _as_bytes(kept)[part].copy_(_as_bytes(numbers))
        scale[part].copy_(scales)


def _recall_into(
    kept: Tensor, scale: Tensor | None, places: Tensor, cos: Tensor | None, sin: Tensor | None, out: Tensor
) -> None:
    """kept [l,B,P,N_c,N,D], scale [l,B,P,N_c,N], places [l,K], cos and sin [K*N_c, D/2] -> out [l, B, K*N_c, N, D]."""
    layers, batch, all_places, tokens = kept.shape[:4]
    piece = rope.PIECE.get(kept.device.type, rope.PIECE_OF_OTHERS)
    by_kernel = turning.can_turn(kept, out)
    if batch == 1 and layers > 1 and out.numel() <= piece and not by_kernel and kept.is_contiguous():
        # Small: the places of all layers at once.
        first = torch.arange(layers, device=places.device)[:, None] * all_places
        flat = None if scale is None else scale.flatten(0, 2)[None]
        x = _picked(kept.flatten(0, 2)[None], flat, (places + first).flatten())
        out.copy_(_turned(x.view(out.shape), cos, sin))
        return
    some = max(1, piece // max(1, kept[0, :, 0].numel()))
    for layer in range(layers):
        of_layer = None if scale is None else scale[layer]
        if by_kernel:
            turning.turn(kept[layer], out[layer], cos=cos, sin=sin, places=places[layer], scale=of_layer)
            continue
        for first_place in range(0, places.shape[1], some):
            part = places[layer, first_place : first_place + some]
            to = slice(first_place * tokens, (first_place + len(part)) * tokens)
            turns = (None, None) if cos is None or sin is None else (cos[to], sin[to])
            out[layer, :, to].copy_(_turned(_picked(kept[layer], of_layer, part), *turns))


def _picked(kept: Tensor, scale: Tensor | None, places: Tensor) -> Tensor:
    """kept [B,P,N_c,N,D], scale [B,P,N_c,N], places [K] -> [B, K*N_c, N, D]."""
    x = _as_bytes(kept).index_select(1, places).view(kept.dtype).flatten(1, 2)
    return x if scale is None else dequantize(x, scale.index_select(1, places).flatten(1, 2))


def _turned(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    if cos is None or sin is None:
        return x
    return rope.turned(x.to(cos.dtype), cos.unsqueeze(-2), sin.unsqueeze(-2))


_OPERATORS = torch.library.Library("packforcing", "FRAGMENT")
_OPERATORS.define(
    "recall_into(Tensor kept, Tensor? scale, Tensor places, Tensor? cos, Tensor? sin, Tensor(a!) out) -> ()"
)
_OPERATORS.impl("recall_into", _recall_into, "CompositeExplicitAutograd")
_OPERATORS.impl("recall_into", lambda kept, scale, places, cos, sin, out: None, "Meta")
_OPERATORS.define("quantize_into(Tensor x, Tensor(a!) kept, Tensor(b!) scale) -> ()")
_OPERATORS.impl("quantize_into", _quantize_into, "CompositeExplicitAutograd")
_OPERATORS.impl("quantize_into", lambda x, kept, scale: None, "Meta")
