"""Where the compressed blocks of all layers are kept: keys before RoPE and values, each block in a place of its own.

    write(place, k, v)          a block comes in, as the model made it or quantized
    recall(layer, ...)          the chosen ones of a layer go out: dequantized, keys turned, one pass over them
    fetch(layer, places)        a bank that is far (in host memory): copies them near ahead of `recall`

A block is kept as the model computes ("auto"), in bf16, or in fp8 (e4m3) or int8 with one float32 scale a token and
head, so that the largest of a head's numbers is exact. What attention reads is always of the model's dtype: quantizing
saves memory where most of it is, in the blocks that are not read, and changes no shape.

A far bank stays in host memory; where the model runs there is room for the chosen blocks of two layers. On a GPU the
memory is page-locked and the copies run on a stream of their own: `fetch` of layer l + 2 beside the work of l + 1.
On a CPU the same copies are made in order. Either way the same bits come out as from a near bank.

Which block is in which place, and what is recalled, is decided by `cache.py`.
Letters: L layers, B batch, P places, K recalled, N_c tokens of a compressed block, N heads, D head dim.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from packforcing_cli import rope, turning
from packforcing_cli.errors import MemoryFitError
from packforcing_cli.layout import NEAR_LAYERS

DEPTH = NEAR_LAYERS
PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every GPU, not only the first
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

    k, v:             [L, B, P, N_c, N, D] of the kept dtype.
    k_scale, v_scale: [L, B, P, N_c, N] float32 of fp8 and int8, else None.
    key_sums:         [L, B, P, N, D] float32, where the model runs: of the keys as they came.
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
    ) -> None:
        """Allocate all places.

        Args:
            dtype:    of the model.
            far:      where keys and values are kept; None = on `device`.
            recalled: the most blocks a layer recalls, for which a far bank has room near.
        """
        self.device, self.is_far = device, far is not None
        kept = kept_dtype(kv_dtype, dtype)
        has_scale, where = kept in _LARGEST, far or device
        shape = (layers, batch, places, tokens, heads, head_dim)

        def zeros(*size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self.k, self.v = (zeros(*shape, dtype=kept, device=where) for _ in range(2))
        self.k_scale: Tensor | None = None
        self.v_scale: Tensor | None = None
        if has_scale:
            self.k_scale, self.v_scale = (
                zeros(*shape[:-1], dtype=torch.float32, device=where) for _ in range(2)
            )
        self.key_sums = zeros(*shape[:3], *shape[4:], dtype=torch.float32, device=device)
        self._near: dict[str, Tensor] = {}
        if self.is_far:
            near = (DEPTH, batch, recalled, *shape[3:])
            for name, of in self._parts().items():
                self._near[name] = zeros(*near[: of.ndim], dtype=of.dtype, device=device)
        self._fetched: list[int | None] = [None] * DEPTH
        self._stream: torch.cuda.Stream | None = None
        self._unlock: weakref.finalize[..., Bank] | None = None
        if device.type == "cuda" and self.is_far:
            self._stream = torch.cuda.Stream(device)
            self._ready = [torch.cuda.Event() for _ in range(DEPTH)]
            self._used = [torch.cuda.Event() for _ in range(DEPTH)]
            self._written = torch.cuda.Event()
            self._lock_pages()

    @property
    def places(self) -> int:
        return self.k.shape[2]

    @property
    def place_bytes(self) -> int:
        """Of one place: keys, values, scales and key sum."""
        size = sum(tensor.nbytes for tensor in (*self._parts().values(), self.key_sums))
        return size // self.places if self.places else 0

    def tensors(self) -> dict[str, Tensor]:
        """All that is allocated; the names of what a far bank has near end in `near`."""
        parts = {**self._parts(), "key_sums": self.key_sums}
        return parts | {f"{name}_near": tensor for name, tensor in self._near.items()}

    def kept(self, places: int) -> dict[str, Tensor]:
        """Views of the first places, to be saved and loaded; fp8 as bytes."""
        self._wait_for_writes()
        parts = {**self._parts(), "key_sums": self.key_sums}
        views = {name: tensor[:, :, :places] for name, tensor in parts.items()}
        return {name: _as_bytes(view) for name, view in views.items()}

    def write(self, place: int, k: Tensor, v: Tensor) -> None:
        """Keep a block's un-rotated keys and values [L, B, N_c, N, D] in a place."""
        for x, into, scale_into in ((k, self.k, self.k_scale), (v, self.v, self.v_scale)):
            to, scale_to = into[:, :, place], None if scale_into is None else scale_into[:, :, place]
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
        """Write x [L, B, N_c, N, D] to a place of a far bank, layer by layer: of one a batch of one lies together."""
        here, scale = x.to(to.dtype) if scale_to is None else torch.empty_like(x, dtype=to.dtype), None
        if scale_to is not None:
            scale = torch.empty(scale_to.shape, dtype=scale_to.dtype, device=x.device)
            torch.ops.packforcing.quantize_into(x, here, scale)
        for layer in range(len(to)):
            _as_bytes(to[layer]).copy_(_as_bytes(here[layer]), non_blocking=True)
            if scale is not None and scale_to is not None:
                scale_to[layer].copy_(scale[layer], non_blocking=True)

    def fetch(self, layer: int, places: Sequence[int]) -> None:
        """Begin to bring these places of a layer near; `recall` of it comes before the fetch of layer + DEPTH."""
        at = layer % DEPTH
        if self._stream is None:
            self._copy_near(layer, at, places)
        else:
            current = torch.cuda.current_stream(self.device)
            # What was written before, and the recall that last read this part.
            self._used[at].record(current)
            self._stream.wait_event(self._used[at])
            with torch.cuda.stream(self._stream):
                self._copy_near(layer, at, places)
                self._ready[at].record(self._stream)
        self._fetched[at] = layer

    def has_near(self, layer: int) -> bool:
        """Whether what was fetched last into this layer's room is of this layer."""
        return self._fetched[layer % DEPTH] == layer

    def _copy_near(self, layer: int, at: int, places: Sequence[int]) -> None:
        for name, of in self._parts().items():
            near = _as_bytes(self._near[name])[at]
            for n, place in enumerate(places):
                near[:, n].copy_(_as_bytes(of)[layer, :, place], non_blocking=True)

    def recall(
        self, layers: range, places: Tensor, turns: tuple[Tensor, Tensor], k: Tensor, v: Tensor
    ) -> None:
        """Write the blocks in places [l, K] of layers, one after the other, into k (turned) and v [l, B, K*N_c, N, D].

        turns: cosines and sines [K*N_c, D/2], in `rope.compute_dtype`.
        A far bank gives one layer at a time, what was fetched of it, in that order.
        """
        part = slice(layers.start, layers.stop)
        parts = {name: tensor[part] for name, tensor in self._parts().items()}
        if self.is_far:
            (layer,), at = layers, layers.start % DEPTH
            assert self.has_near(layer), "fetch comes before recall"
            self._fetched[at] = None
            parts = {name: tensor[at : at + 1] for name, tensor in self._near.items()}
            places = torch.arange(places.shape[1], device=self.device)[None]
            if self._stream is not None:
                torch.cuda.current_stream(self.device).wait_event(self._ready[at])
        recall = torch.ops.packforcing.recall_into
        recall(parts["k"], parts.get("k_scale"), places, *turns, k)
        recall(parts["v"], parts.get("v_scale"), places, None, None, v)

    def resize(self, places: int) -> None:
        """Have more places, or fewer; what is in those that remain stays."""
        if self._stream is not None:
            torch.cuda.synchronize(
                self.device
            )  # the CPU copies what it still writes, and reads, in host memory
            self._release_pages()
        for name in (*self._parts(), "key_sums"):
            old: Tensor = getattr(self, name)
            new = old.new_zeros((*old.shape[:2], places, *old.shape[3:]))
            _as_bytes(new)[:, :, : old.shape[2]].copy_(_as_bytes(old)[:, :, :places])
            setattr(self, name, new)
        if self._stream is not None:
            self._lock_pages()

    def _lock_pages(self) -> None:
        """Page-lock what is far, exactly its size: PyTorch's own pinned allocations take the next power of two.

        Raises: MemoryFitError if the system refuses.
        """
        runtime = torch.cuda.cudart()
        self._release_pages()
        locked: list[int] = []
        self._unlock = weakref.finalize(self, _unlock_pages, locked)
        self._unlock.atexit = False
        for tensor in self._parts().values():
            if not tensor.nbytes:
                continue
            if int(runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, PORTABLE)) != 0:
                raise MemoryFitError(
                    f"the system does not page-lock {tensor.nbytes / 1e9:.1f} GB of host memory for the bank",
                    hint="Use a smaller --bank-memory.",
                )
            locked.append(tensor.data_ptr())

    def _release_pages(self) -> None:
        """Undo `_lock_pages`; once done it does nothing."""
        if self._unlock is not None:
            self._unlock()

    def _parts(self) -> dict[str, Tensor]:
        """What is far when the bank is."""
        parts = {"k": self.k, "v": self.v, "k_scale": self.k_scale, "v_scale": self.v_scale}
        return {name: tensor for name, tensor in parts.items() if tensor is not None}

    def _wait_for_writes(self) -> None:
        if self._stream is not None:
            self._written.synchronize()


def _as_bytes(x: Tensor) -> Tensor:
    """fp8 as bytes, which every operator takes."""
    return x.view(torch.uint8) if x.dtype is torch.float8_e4m3fn else x


def _unlock_pages(addresses: list[int]) -> None:
    for address in addresses:
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
