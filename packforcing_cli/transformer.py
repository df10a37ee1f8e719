"""The causal Wan transformer: one block of latents in, a velocity or the block's raw keys and values out.

Knows nothing of caches, partitions or slots: it reads a `Context`, which says where the block's tokens are and which
keys and values every layer attends. Weights only; nothing is remembered between calls.

    latents [B,C,F,h,w] -> patches [B,S,d] -> L x (self-attention in context, cross-attention to text, FFN) -> head
                                                  |
                                                  +-- un-rotated keys and values of a clean block (`commit`)

Parameter names are diffusers' (`WanTransformer3DModel`), so a diffusers checkpoint loads unchanged.
Source: Wan 2.1 (wan/modules/model.py), Self-Forcing (one timestep per latent frame), docs/method.md 1.1.

Letters: B batch, F latent frames, S tokens, N heads, D head dim, d = N*D model width, L layers, C channels,
h w latent height and width, T text tokens, G groups of tokens that share a timestep.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from packforcing_cli import compiling, rope
from packforcing_cli.attention import PACKAGES, Kernel
from packforcing_cli.errors import WeightsError
from packforcing_cli.graphs import Recorder, Recordings

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q, k, v), each [B,S,N,D], un-rotated -> attention output [B,S,N,D]."""


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the transformer; field names are those of diffusers' config.json.

    `qk_norm` and `cross_attn_norm` have one supported value each (Wan 2.1 text-to-video); others are refused.
    """

    num_layers: int = 30
    num_attention_heads: int = 12
    attention_head_dim: int = 128
    ffn_dim: int = 8960
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    qk_norm: str = "rms_norm_across_heads"
    cross_attn_norm: bool = True

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TransformerConfig:
        """Read a diffusers config.json. Raises: WeightsError if it is not a Wan 2.1 text-to-video transformer."""
        for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
            if values.get(key) is not None:
                raise WeightsError(
                    f"transformer config has {key}={values[key]}: image-conditioned Wan models are not supported",
                    hint="Use a Wan2.1 text-to-video transformer.",
                )
        known = {f.name for f in dataclasses.fields(cls)}
        chosen: dict[str, Any] = {
            k: tuple(v) if k == "patch_size" else v for k, v in values.items() if k in known
        }
        config = cls(**chosen)
        if (
            config.qk_norm != "rms_norm_across_heads"
            or not config.cross_attn_norm
            or config.patch_size[0] != 1
        ):
            raise WeightsError(
                f"unsupported transformer: qk_norm={config.qk_norm!r}, cross_attn_norm={config.cross_attn_norm}, "
                f"patch_size={config.patch_size}",
                hint="Use a Wan2.1 text-to-video transformer.",
            )
        return config

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        values["patch_size"] = list(self.patch_size)
        return {"_class_name": "WanTransformer3DModel", **values}


@dataclass(frozen=True)
class BlockKV:
    """What a clean block leaves behind, for all layers.

    k:     [L,B,S,N,D] keys after QK-norm, before RoPE.
    v:     [L,B,S,N,D] values.
    q_sum: [L,B,N,D] float32 sum of the un-rotated queries over the block's tokens.
    """

    k: Tensor
    v: Tensor
    q_sum: Tensor


@dataclass(frozen=True)
class TextKV:
    """Cross-attention keys and values of one prompt, per layer [B,T,N,D]; computed once per prompt."""

    layers: tuple[tuple[Tensor, Tensor], ...]


class Context(Protocol):
    """What one block may attend; read-only while the block is denoised.

    A context may have a property `fixed`, as `graphs.Recordings` reads it: then passes in it can be recorded.
    """

    @property
    def positions(self) -> Tensor:
        """[S,3] float64 RoPE positions (slot, row, column) of the block's own tokens."""
        ...

    def layer(self, layer: int, k: Tensor, v: Tensor, q_sum: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (rotated) and values to attend in this layer: the context's and the block's own.

        Args:
            k:     [B,S,N,D] rotated keys of the block itself.
            v:     [B,S,N,D] values of the block itself.
            q_sum: [B,N,D] float32 sum of its un-rotated queries (only `affinity` selection reads it).
        Returns: (keys, values), each [B, S_context + S, N, D].
        """
        ...


@dataclass(frozen=True)
class AloneContext:
    """A block that sees only itself: bidirectional attention over its own tokens."""

    positions: Tensor

    def layer(self, layer: int, k: Tensor, v: Tensor, q_sum: Tensor) -> tuple[Tensor, Tensor]:
        return k, v


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Unmasked scaled-dot-product attention. q [B,Sq,N,D], k and v [B,Sk,N,D] -> [B,Sq,N,D]."""
    if q.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad:
        return _attention_to_train_on_a_cpu(q, k, v)
    return _sdpa(q, k, v)


def _attention_to_train_on_a_cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Forward and backward of the fused kernel take about three times as long there; memory is no concern at sizes
    # that are trained on a CPU.
    scores = (q.transpose(1, 2) * q.shape[-1] ** -0.5) @ k.permute(0, 2, 3, 1)  # [B,N,Sq,Sk]
    weights = scores.softmax(-1, dtype=_accumulate_dtype(q.dtype)).to(v.dtype)
    return (weights @ v.transpose(1, 2)).transpose(1, 2)


@dataclass(frozen=True)
class Modulation:
    """Timestep vectors of G groups of tokens.

    head:   [B,G,d] for the output head.
    layers: [B,G,6,d] (shift, scale, gate) for self-attention, then for the FFN.
    index:  [S] group of each token, or None when the tokens are G equal runs in order.
    """

    head: Tensor
    layers: Tensor
    index: Tensor | None = None


def _affine(x: Tensor, shift: Tensor, scale: Tensor, index: Tensor | None) -> Tensor:
    """x [B,S,d] * (1 + scale) + shift, with every token's group vector; shift, scale [B,G,d]."""
    if index is not None:
        return torch.addcmul(shift[:, index], x, 1 + scale[:, index])
    runs = x.unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift[:, :, None], runs, 1 + scale[:, :, None]).flatten(1, 2)


def _gated_sum(x: Tensor, update: Tensor, gate: Tensor, index: Tensor | None) -> Tensor:
    """x + update * gate, [B,S,d], with every token's group gate [B,G,d]."""
    if index is not None:
        return torch.addcmul(x, update.to(x.dtype), gate[:, index])
    G = gate.shape[1]
    runs, update = x.unflatten(1, (G, -1)), update.to(x.dtype).unflatten(1, (G, -1))
    return torch.addcmul(runs, update, gate[:, :, None]).flatten(1, 2)


_sdpa = Kernel()


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Norms, modulation and residual gates run in float32 as in Wan 2.1 (float64 stays float64)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _token_sum(q: Tensor) -> Tensor:
    """Sum over tokens, accumulated in float32 or wider. q [B,S,N,D] -> [B,N,D]."""
    return q.sum(1, dtype=_accumulate_dtype(q.dtype))


class Attention(nn.Module):
    """Projections and QK-norm of self- or cross-attention; diffusers' `WanAttention` names.

    For inference the three projections of self-attention may be one (`fuse`): the matrices of `to_q`, `to_k` and
    `to_v` are then rows of one matrix, so that both ways of using them stay the same weights.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.num_attention_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q = nn.RMSNorm(dim, eps=config.eps)  # over all heads, before the split (docs/method.md 1.1)
        self.norm_k = nn.RMSNorm(dim, eps=config.eps)
        self._joined: tuple[Tensor, Tensor] | None = None
        self._rows: tuple[nn.Parameter, ...] = ()

    def fuse(self) -> None:
        """Make the three projections one where gradients are off. Quantized matrices that cannot be joined stay."""
        linears = (self.to_q, self.to_k, self.to_v)
        first = self.to_q.weight
        scale = getattr(first, "scale", None)  # of a quantized matrix: one a row, or one a matrix
        if scale is not None and scale.shape[:1] != first.shape[:1]:
            return
        try:
            joined = [
                torch.cat([getattr(one, name).detach() for one in linears]) for name in ("weight", "bias")
            ]
        except NotImplementedError:  # a quantized matrix without this operator
            return
        self.adopt(joined[0], joined[1])

    def adopt(self, weight: Tensor, bias: Tensor) -> None:
        """Take the three projections as one: weight [3d,d], bias [3d], the rows of q, k and v in this order."""
        linears = (self.to_q, self.to_k, self.to_v)
        rows = []
        for n, one in enumerate(linears):
            dim = weight.shape[0] // 3
            for name, whole in (("weight", weight), ("bias", bias)):
                part = nn.Parameter(whole[n * dim : (n + 1) * dim], requires_grad=False)
                setattr(one, name, part)
                rows.append(part)
        self._joined, self._rows = (weight, bias), tuple(rows)

    @property
    def joined(self) -> tuple[Tensor, Tensor] | None:
        """Weight [3d,d] and bias [3d] of the three projections, as long as they are what `fuse` made of them."""
        linears = (self.to_q, self.to_k, self.to_v)
        if self._joined is None or any(type(one) is not nn.Linear for one in linears):
            return None
        now = [getattr(one, name) for one in linears for name in ("weight", "bias")]
        return self._joined if all(a is b for a, b in zip(now, self._rows, strict=True)) else None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_joined": None, "_rows": ()}  # a copy's parameters share no memory

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Attention:
        self._joined, self._rows = None, ()  # what is moved or cast is no longer one matrix
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def own(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of self-attention, each [B,S,N,D]."""
        joined = None if torch.is_grad_enabled() else self._usable()
        if joined is None:
            return (self.queries(x), *self.keys_values(x))
        q, k, v = F.linear(x, *joined).chunk(3, -1)
        dtype, per_head = self.norm_q.weight.dtype, (self.heads, -1)
        return (
            self.norm_q(q.to(dtype)).unflatten(2, per_head),
            self.norm_k(k.to(dtype)).unflatten(2, per_head),
            v.unflatten(2, per_head),
        )

    def _usable(self) -> tuple[Tensor, Tensor] | None:
        # Compiled code was asked for after a look at `joined`; it is not looked at in every call.
        return self._joined if torch.compiler.is_compiling() else self.joined

    def queries(self, x: Tensor) -> Tensor:
        # Under autocast a projection is narrower than the weights of its norm.
        q = self.to_q(x).to(self.norm_q.weight.dtype)
        return self.norm_q(q).unflatten(2, (self.heads, -1))  # [B,S,N,D]

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k = self.norm_k(self.to_k(x).to(self.norm_k.weight.dtype)).unflatten(2, (self.heads, -1))
        return k, self.to_v(x).unflatten(2, (self.heads, -1))

    def project(self, attended: Tensor) -> Tensor:
        out: Tensor = self.to_out[0](attended.flatten(2))
        return out


class _GeluLinear(nn.Module):
    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, out)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Linear, GELU(tanh), Linear; `net.1` is diffusers' (absent) dropout."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [_GeluLinear(config.dim, config.ffn_dim), nn.Identity(), nn.Linear(config.ffn_dim, config.dim)]
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net[2](self.net[0](x))
        return out


class Layer(nn.Module):
    """One transformer layer (`blocks.N` in state dicts)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.attn1 = Attention(config)
        self.attn2 = Attention(config)
        self.norm2 = nn.LayerNorm(
            config.dim, eps=config.eps
        )  # Wan's norm3: the affine one, before cross-attention
        self.ffn = FeedForward(config)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def _modulated_norm(self, x: Tensor, shift: Tensor, scale: Tensor, index: Tensor | None) -> Tensor:
        normed = F.layer_norm(x.to(_accumulate_dtype(x.dtype)), x.shape[-1:], eps=self.eps)
        return _affine(normed, shift, scale, index).to(x.dtype)

    def vectors(self, modulation: Modulation, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The layer's six modulation vectors, each [B,G,d]."""
        acc = _accumulate_dtype(dtype)
        return (self.scale_shift_table.to(acc) + modulation.layers.to(acc)).unbind(2)

    def self_attention_inputs(self, x: Tensor, modulation: Modulation) -> tuple[Tensor, Tensor, Tensor]:
        """Un-rotated q, k and v of this layer, each [B,S,N,D]."""
        shift, scale, *_ = self.vectors(modulation, x.dtype)
        return self.attn1.own(self._modulated_norm(x, shift, scale, modulation.index))

    def inputs_alone(self, x: Tensor, modulation: Modulation) -> tuple[Tensor, Tensor, Tensor]:
        """`self_attention_inputs` of a layer of which nothing else is run.

        A call of its own, as `text_keys_values` is: where weights are shared out among processes they are gathered for
        it, which in the middle of `forward` would take them away.
        """
        return self.self_attention_inputs(x, modulation)

    def text_keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-attention keys and values [B,T,N,D] of embedded text [B,T,d]."""
        return self.attn2.keys_values(text)

    def forward(
        self,
        x: Tensor,
        modulation: Modulation,
        text: tuple[Tensor, Tensor],
        attend: Callable[..., Tensor],
        attend_text: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """x [B,S,d] -> [B,S,d]; `attend(q, k, v)` is this layer's self-attention, `attend_text` that to the text."""
        attended = attend(*self.self_attention_inputs(x, modulation))
        return self.after_attention(x, attended, modulation, text, attend_text)

    def after_attention(
        self,
        x: Tensor,
        attended: Tensor,
        modulation: Modulation,
        text: tuple[Tensor, Tensor],
        attend_text: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The rest of the layer: x [B,S,d] and what self-attention gave, [B,S,N,D] -> [B,S,d]."""
        index, acc = modulation.index, _accumulate_dtype(x.dtype)
        _, _, gate, ffn_shift, ffn_scale, ffn_gate = self.vectors(modulation, x.dtype)
        x = _gated_sum(x.to(acc), self.attn1.project(attended), gate, index).to(x.dtype)
        normed = F.layer_norm(
            x.to(acc), x.shape[-1:], self.norm2.weight.to(acc), self.norm2.bias.to(acc), self.eps
        ).to(x.dtype)
        x = x + self.attn2.project((attend_text or attention)(self.attn2.queries(normed), *text))
        out = self.ffn(self._modulated_norm(x, ffn_shift, ffn_scale, index))
        return _gated_sum(x.to(acc), out, ffn_gate, index).to(x.dtype)


def before_attention(
    layer: Layer, x: Tensor, modulation: Modulation, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A layer up to self-attention: rotated q, rotated k, v, un-rotated k [B,S,N,D] and the sum of q [B,N,D]."""
    q, k, v = layer.self_attention_inputs(x, modulation)
    return rope.rotate(q, cos, sin), rope.rotate(k, cos, sin), v, k, _token_sum(q)


def after_attention(
    layer: Layer,
    x: Tensor,
    attended: Tensor,
    modulation: Modulation,
    text: tuple[Tensor, Tensor],
    kernel: Kernel,
) -> Tensor:
    """A layer from self-attention on, [B,S,d].

    kernel: of cross-attention, active already. It is named here again since this is compiled: neither compiled code in
        memory nor that on disk is told apart by the kernels that were active around it.
    """
    with kernel.active():
        return layer.after_attention(x, attended, modulation, text)


def _keep_and(
    keep: Callable[[Tensor, Tensor, Tensor], None],
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    *tensors: Tensor,
) -> Tensor:
    """Self-attention of un-rotated q, k, v that also hands on what a clean pass keeps: k, v and the sum of q."""
    q, k, v = tensors
    keep(k, v, _token_sum(q))
    return attend(q, k, v)


class _TwoLinear(nn.Module):
    """Linear, activation, Linear with diffusers' names `linear_1`, `linear_2`."""

    def __init__(self, n_in: int, dim: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(n_in, dim)
        self.linear_2 = nn.Linear(dim, dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(self.activation(self.linear_1(x)))
        return out


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class ConditionEmbedder(nn.Module):
    """Timestep and text embedders (`condition_embedder` in state dicts)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = _TwoLinear(config.freq_dim, config.dim, F.silu)
        self.time_proj = nn.Linear(config.dim, 6 * config.dim)
        self.text_embedder = _TwoLinear(config.text_dim, config.dim, _gelu_tanh)

    def time(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """timesteps [B,G] in 0..1000 (1000*sigma, not rounded) -> ([B,G,d], [B,G,6,d])."""
        half = self.freq_dim // 2
        index = torch.arange(half, dtype=torch.float64, device=timesteps.device)
        angle = timesteps.to(torch.float64)[..., None] * 10_000.0 ** (
            -index / half
        )  # Wan 2.1 sinusoidal_embedding_1d
        waves = torch.cat((angle.cos(), angle.sin()), dim=-1)
        head = self.time_embedder(waves.to(self.time_proj.weight.dtype))
        return head, self.time_proj(F.silu(head)).unflatten(-1, (6, -1))


def _recomputed(layer: Layer, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, which runs a layer, keeping only its inputs for the backward pass.

    A layer whose weights are fixed for this pass is run again with fixed weights, whatever they are by then.
    """
    fixed = not any(p.requires_grad for p in layer.parameters())

    def again(*inputs: Any) -> Any:
        with weights_fixed(layer if fixed else None):
            return run(*inputs)

    return partial(checkpoint, again, use_reentrant=False, preserve_rng_state=False)


def _run_and_show(
    layer: Layer,
    x: Tensor,
    modulation: Modulation,
    text: tuple[Tensor, Tensor],
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [B,S,d] after a layer; its un-rotated keys, its values and query sums."""
    shown: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shown.append((k, v, _token_sum(q)))
        return attend(q, k, v)

    return (layer(x, modulation, text, keep), *shown[0])


@contextmanager
def weights_fixed(module: nn.Module | None) -> Iterator[None]:
    """Build no graph to a module's weights inside; what flows through it still does. None = nothing is fixed."""
    learning = [p for p in module.parameters() if p.requires_grad] if module is not None else []
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


_PROJECTIONS = ("attn1.to_q.", "attn1.to_k.", "attn1.to_v.")


class _Seat:
    """Room for one layer on a device; the layers take it in turn.

    The weights of the layer before are let go one by one as the next one's arrive, so one layer and one tensor are
    there at a time.
    """

    def __init__(self, config: TransformerConfig, device: torch.device) -> None:
        with torch.device("meta"):
            self._layer = Layer(config).eval().requires_grad_(False)
        self.device = device

    def take(self, layer: Layer) -> Layer:
        """A layer with copies of another's weights on the device; valid until the next one takes the seat."""
        joined = layer.attn1.joined
        if joined is not None:
            weight, bias = (self._there(tensor) for tensor in joined)
            self._layer.attn1.adopt(weight, bias)
        for name, weight in layer.state_dict().items():
            if joined is not None and name.startswith(_PROJECTIONS):
                continue
            owner, _, last = name.rpartition(".")
            part = nn.Parameter(self._there(weight), requires_grad=False)
            setattr(self._layer.get_submodule(owner), last, part)
        return self._layer

    def _there(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True, copy=True)


class WanTransformer(nn.Module):
    """Wan 2.1 text-to-video transformer, run block by block in a context."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv3d(config.in_channels, config.dim, config.patch_size, config.patch_size)
        self.condition_embedder = ConditionEmbedder(config)
        self.blocks: nn.ModuleList = nn.ModuleList([Layer(config) for _ in range(config.num_layers)])
        _, ph, pw = config.patch_size
        self.proj_out = nn.Linear(config.dim, config.out_channels * ph * pw)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)
        self._seat: _Seat | None = None
        self._recomputes = False
        self._kernel = Kernel()
        self._regions: tuple[Callable[..., Any], Callable[..., Any]] | None = None  # compiled
        self._recordings: Recordings | None = None

    def stream_layers(self, device: torch.device) -> None:
        """Leave the layers' weights where they are and copy each layer to `device` while it runs.

        Everything else must be on the device. Results are the same; every pass copies all layers.
        """
        self._seat = _Seat(self.config, device)

    def recompute_layers(self) -> None:
        """Keep only the input of each layer for the backward pass, which runs the layer again; results are the same."""
        self._recomputes = True

    def fuse_projections(self) -> None:
        """Make q, k and v of every layer one product, for inference; names and values of the weights stay."""
        pinned = self._seat is not None and self._seat.device.type == "cuda"  # as the weights were
        for layer in self.blocks:
            assert isinstance(layer, Layer)
            layer.attn1.fuse()
            if pinned and layer.attn1.joined is not None:
                weight, bias = (tensor.pin_memory() for tensor in layer.attn1.joined)
                layer.attn1.adopt(weight, bias)

    def use_attention(self, kernel: Kernel) -> None:
        """Compute attention with this kernel where gradients are off; a library's own kernel, self-attention alone."""
        self._kernel = kernel

    def compile_layers(self) -> None:
        """Compile the two regions of a layer between which self-attention lies; the first pass of a shape waits."""
        self._regions = compiling.compiled(before_attention), compiling.compiled(after_attention)

    def record_passes(self, record: Recorder) -> None:
        """Record passes once a context's length stays, and replay them; results are the same."""
        self._recordings = Recordings(record)

    def launched(self, *, compiled: bool = True) -> WanTransformer:
        """The same weights, with every pass launched and none recorded; compiled where this is, unless told not to.

        What is counted below Python (operations, bytes) shows in passes that are neither recorded nor compiled.
        """
        other = copy.copy(self)
        other._recordings = None
        other._regions = self._regions if compiled else None
        return other

    # -- pieces, shared by inference and training ---------------------------------------------------------------

    def patch(self, latents: Tensor) -> Tensor:
        """Patch embedding. latents [B,C,F,h,w] -> tokens [B, F*(h//2)*(w//2), d], order frame, row, column.

        A row or column that does not fill a patch is dropped, as the strided convolution would.
        """
        B, C, frames, h, w = latents.shape
        _, ph, pw = self.config.patch_size
        rows, cols = h // ph, w // pw
        cells = latents[..., : rows * ph, : cols * pw].reshape(B, C, frames, rows, ph, cols, pw)
        cells = cells.permute(0, 2, 3, 5, 1, 4, 6).reshape(B, frames * rows * cols, C * ph * pw)
        return F.linear(cells, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def unpatch(self, tokens: Tensor, frames: int, rows: int, cols: int) -> Tensor:
        """tokens [B, F*rows*cols, ph*pw*C] -> latents [B,C,F,h,w]; channel order (row, column, C) as in Wan 2.1."""
        B = tokens.shape[0]
        _, ph, pw = self.config.patch_size
        cells = tokens.reshape(B, frames, rows, cols, ph, pw, self.config.out_channels)
        return cells.permute(0, 6, 1, 2, 4, 3, 5).reshape(B, -1, frames, rows * ph, cols * pw)

    def modulation(self, timesteps: Tensor, index: Tensor | None = None) -> Modulation:
        """timesteps [B,G], 1000*sigma of each group of tokens -> its modulation vectors."""
        return Modulation(*self.condition_embedder.time(timesteps), index)

    def embed_text(self, embeds: Tensor) -> TextKV:
        """Text embeddings [B,T,text_dim] -> cross-attention keys and values of every layer. All T are attended."""
        text = self.condition_embedder.text_embedder(embeds)
        return TextKV(tuple(layer.text_keys_values(text) for layer in self._layers()))

    def head(self, x: Tensor, modulation: Modulation) -> Tensor:
        """Final norm, modulation and projection. x [B,S,d] -> [B,S,ph*pw*C]."""
        acc = _accumulate_dtype(x.dtype)
        shift, scale = (self.scale_shift_table.to(acc) + modulation.head.to(acc)[:, :, None]).unbind(2)
        normed = F.layer_norm(x.to(acc), x.shape[-1:], eps=self.config.eps)
        out: Tensor = self.proj_out(_affine(normed, shift, scale, modulation.index).to(x.dtype))
        return out

    def run_layers(
        self,
        x: Tensor,
        modulation: Modulation,
        text: TextKV,
        attend: Attend,
        attend_text: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """All layers over x [B,S,d]; `attend(layer, q, k, v)` receives un-rotated queries and keys."""
        for i, layer in enumerate(self._layers()):
            run: Callable[..., Tensor] = layer
            if self._recomputes and torch.is_grad_enabled():
                run = _recomputed(layer, layer)
            x = run(x, modulation, text.layers[i], partial(attend, i), attend_text)
        return x

    def _layers(self) -> Iterator[Layer]:
        """The layers in order, each on the device until the next one is asked for."""
        for layer in self.blocks:
            assert isinstance(layer, Layer)
            yield layer if self._seat is None else self._seat.take(layer)

    # -- the passes of a block in a context ---------------------------------------------------------------------

    def _angles(self, context: Context, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the block's own rotations, in the precision they are used in."""
        cos, sin = rope.angles(context.positions, self.config.attention_head_dim)
        return cos.to(_accumulate_dtype(dtype)), sin.to(_accumulate_dtype(dtype))

    def _through(
        self,
        x: Tensor,
        modulation: Modulation,
        text: tuple[Tensor, ...],
        context: Context,
        angles: tuple[Tensor, Tensor],
        *,
        batch: int,
        keep: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """All layers over x [P*batch,S,d] in a context; no name keeps x while they run.

        Args:
            text: keys and values of each layer, in turn.
            keep: of a clean pass: called with layer, un-rotated k, v and query sum. The last layer is then only
                projected: nobody reads its output (docs/method.md 7.6, own notes).
        """
        pairs = TextKV(tuple(zip(text[::2], text[1::2], strict=True)))
        attend = self._attend_in(context, angles, batch)
        if torch.is_grad_enabled() and keep is None:
            first = [x]
            del x  # as above
            return self.run_layers(first.pop(), modulation, pairs, attend)
        with self._kernel.active():
            for i, layer in enumerate(self._layers()):
                if keep is not None and i == len(self.blocks) - 1:
                    q, k, v = layer.inputs_alone(x, modulation)
                    keep(i, k, v, _token_sum(q))
                elif keep is not None and self._recomputes and torch.is_grad_enabled():
                    again = _recomputed(layer, _run_and_show)
                    x, *shown = again(layer, x, modulation, pairs.layers[i], partial(attend, i))
                    keep(i, *shown)
                elif self._regions is not None:
                    x = self._by_regions(
                        i, layer, x, modulation, pairs.layers[i], context, angles, batch, keep
                    )
                else:
                    own = partial(attend, i)
                    own = own if keep is None else partial(_keep_and, partial(keep, i), own)
                    x = layer(x, modulation, pairs.layers[i], own)
        return x

    def _by_regions(
        self,
        i: int,
        layer: Layer,
        x: Tensor,
        modulation: Modulation,
        text: tuple[Tensor, Tensor],
        context: Context,
        angles: tuple[Tensor, Tensor],
        batch: int,
        keep: Callable[[int, Tensor, Tensor, Tensor], None] | None,
    ) -> Tensor:
        """A layer in two compiled regions, self-attention between them."""
        assert self._regions is not None
        before, after = self._regions
        q, k, v, raw_k, q_sum = before(layer, x, modulation, *angles)
        if keep is not None:
            keep(i, raw_k, v, q_sum)
        del raw_k
        out = self._attend(i, context, batch, q, k, v, q_sum)
        del q, k, v
        return after(layer, x, out, modulation, text, self._kernel)

    def _attend_in(self, context: Context, angles: tuple[Tensor, Tensor], batch: int) -> Attend:
        """Self-attention in a context, of un-rotated q and k; see `run_layers`."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            turned = (rope.rotate(q, *angles), rope.rotate(k, *angles))
            return self._attend(layer, context, batch, *turned, v, _token_sum(q))

        return attend

    def _attend(self, layer: int, context: Context, batch: int, *tensors: Tensor) -> Tensor:
        """Self-attention of each prompt's rows; `tensors` are rotated q and k, v, and the query sums."""
        attend = self._kernel if self._kernel.asked in PACKAGES else attention
        out = [
            attend(q, *context.layer(layer, k, v, q_sum))
            for q, k, v, q_sum in zip(*(t.split(batch) for t in tensors), strict=True)
        ]
        return out[0] if len(out) == 1 else torch.cat(out)

    def _run(
        self,
        name: str,
        function: Callable[..., tuple[Tensor, ...]],
        inputs: tuple[Tensor, ...],
        text: TextKV,
        context: Context,
    ) -> tuple[Tensor, ...]:
        """A pass, recorded where passes are: a function of its inputs, and of the text's keys and values."""
        flat = tuple(tensor for pair in text.layers for tensor in pair)
        if self._recordings is None or torch.is_grad_enabled():
            return function(*inputs, *flat)
        return self._recordings.run(name, function, inputs, flat, context)

    def forward(self, latents: Tensor, timesteps: Tensor, text: TextKV, context: Context) -> Tensor:
        """Velocity of one noisy block.

        Args:
            latents:   [B,C,F,h,w] noisy latents of the block.
            timesteps: [B,F] 1000*sigma of each latent frame.
            text:      P*B rows (or one for all): the block under P prompts, which share the context; the first prompt
                       decides what `affinity` recalls.
        Returns: [P*B,C,F,h,w] velocity eps - x0, same dtype as latents. The context is not changed.
        """
        batch, frames, (h, w) = latents.shape[0], latents.shape[2], latents.shape[3:]
        _, ph, pw = self.config.patch_size
        prompts = max(1, text.layers[0][0].shape[0] // batch)

        def run(
            latents: Tensor, timesteps: Tensor, cos: Tensor, sin: Tensor, *text: Tensor
        ) -> tuple[Tensor, ...]:
            modulation = self.modulation(timesteps.repeat(prompts, 1))
            # Under autocast the residual stream keeps its width.
            x = self._through(
                self.patch(latents).to(latents.dtype).repeat(prompts, 1, 1),
                modulation,
                text,
                context,
                (cos, sin),
                batch=batch,
            )
            return (self.unpatch(self.head(x, modulation), frames, h // ph, w // pw),)

        inputs = (latents, timesteps, *self._angles(context, latents.dtype))
        return self._run("denoise", run, inputs, text, context)[0]

    def commit(self, latents: Tensor, text: TextKV, context: Context) -> BlockKV:
        """The clean pass: keys and values of a clean block [B,C,F,h,w] at timestep 0, all layers."""
        return self._clean("clean", self.patch(latents), text, context)

    def commit_tokens(self, tokens: Tensor, text: TextKV, context: Context) -> BlockKV:
        """Keys and values of tokens [B,S,d] in patch-embedding space at timestep 0, all layers."""
        return self._clean("compressed", tokens, text, context)

    def _clean(self, name: str, tokens: Tensor, text: TextKV, context: Context) -> BlockKV:
        batch, config = tokens.shape[0], self.config

        def run(tokens: Tensor, cos: Tensor, sin: Tensor, *text: Tensor) -> tuple[Tensor, ...]:
            still = torch.zeros(batch, 1, dtype=torch.float64, device=tokens.device)
            kept: list[Tensor] = []

            def keep(layer: int, *tensors: Tensor) -> None:
                if not kept:
                    kept.extend(t.new_empty((config.num_layers, *t.shape)) for t in tensors)
                for whole, tensor in zip(kept, tensors, strict=True):
                    whole[layer] = tensor

            angles = (cos, sin)
            # A slice is made whole, so that compiled layers meet one memory format.
            self._through(
                tokens.contiguous(), self.modulation(still), text, context, angles, batch=batch, keep=keep
            )
            return tuple(kept)

        inputs = (tokens, *self._angles(context, tokens.dtype))
        return BlockKV(*self._run(name, run, inputs, text, context))
