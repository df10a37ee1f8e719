"""Pixels to latents and back, block by block: two codecs behind one interface.

- `WanCodec`: the Wan 2.1 VAE (diffusers' `AutoencoderKLWan`).
- `TinyCodec`: a small autoencoder in the manner of TAEHV; the demo's codec and, with the public taew2_1
  weights, a fast approximation of the Wan VAE.

Weights live in modules; everything a stream remembers lives in a `StreamingEncoder` or `StreamingDecoder`,
so several videos share one module. Outside a codec pixels are [0, 1] and latents are normalised as the
transformer wants them.

    video      f0 | f1 f2 f3 f4 | f5 f6 f7 f8 | ...        1 + 4 (F - 1) frames
    latents    l0 |     l1      |     l2      | ...        F latent frames

Letters: B batch, C channels, T frames, F latent frames, H W pixels, h w latent.
This file knows nothing of blocks, prompts or caches.
Sources: madebyollin/taehv (layers and parameter names of the tiny autoencoder), autoencoder_kl_wan.py of
diffusers (the inner encoder and decoder), docs/method.md 1.3, 3.2 and 10.9.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from math import prod
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from packforcing_cli import compiling, staging

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

LR_SPATIAL_STRIDE = 4  # of the LR branch's pooling; PackForcing (arXiv 2603.25730) 3.3
LR_FRAMES = 8  # pooled frames of a block: two latent frames after the warm start

# ------------------------------------------------------------------------------------------- tiny autoencoder


@dataclass(frozen=True)
class TinyAutoencoderConfig:
    """Shape of a `TinyAutoencoder`; the defaults are those of the public taew2_1 weights.

    A stage is a resolution. The encoder halves the frame size before each of its stages, the decoder doubles
    it after each; `patch_size` and `patch_frames` fold further pixels and frames into channels before all
    stages of the encoder and after all of the decoder.

    latent_channels: channels of a latent.
    encoder_widths:  channels of the stem, then of each encoder stage (fine to coarse).
    encoder_depths:  memory blocks of each encoder stage.
    encoder_pools:   frames joined (1 or 2) before each encoder stage.
    decoder_widths:  channels of each decoder stage (coarse to fine), then of the head.
    decoder_depths:  memory blocks of each decoder stage.
    decoder_grows:   frames made of one (1 or 2) after each decoder stage.
    block_convs:     3x3 convolutions in a memory block.
    patch_size:      side of the pixel squares folded into channels.
    patch_frames:    consecutive frames folded into channels.
    activation:      "relu" or "silu".
    resample:        "conv" = strided and nearest-neighbour 3x3 convolutions as in TAEHV; "fold" = fold into
                     channels and mix by a 1x1 convolution at the coarser resolution, a fraction of the work.
    shortcuts:       linear paths around both halves: pixels pooled to 2 x 2 per latent cell and 2 time halves
                     -> z, and z -> coarse RGB, added to the output.
    latent_clamp:    bound latents softly to +-3 before decoding (3 tanh(z/3)).
    front_aligned:   True: the encoder repeats the first frame in front and looks at no later frame than the
                     latent stands for; False: it repeats the last frame at the end and looks 3 frames ahead.
    latents_mean, latents_std: per-channel statistics of raw latents; empty when those are normalised already.
    """

    latent_channels: int = 16
    encoder_widths: tuple[int, ...] = (64, 64, 64, 64)
    encoder_depths: tuple[int, ...] = (3, 3, 3)
    encoder_pools: tuple[int, ...] = (2, 2, 1)
    decoder_widths: tuple[int, ...] = (256, 128, 64, 64)
    decoder_depths: tuple[int, ...] = (3, 3, 3)
    decoder_grows: tuple[int, ...] = (1, 2, 2)
    block_convs: int = 3
    patch_size: int = 1
    patch_frames: int = 1
    activation: Literal["relu", "silu"] = "relu"
    resample: Literal["conv", "fold"] = "conv"
    shortcuts: bool = False
    latent_clamp: bool = True
    front_aligned: bool = False
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        stages = len(self.encoder_depths)
        if not (
            len(self.encoder_pools) == stages
            and len(self.encoder_widths) == stages + 1
            and len(self.decoder_depths) == len(self.decoder_grows) == stages
            and len(self.decoder_widths) == stages + 1
        ):
            raise ValueError(
                "encoder_depths, encoder_pools, decoder_depths and decoder_grows need one entry per stage,"
                f" the widths one more; got {self}"
            )
        if self.patch_frames * prod(self.encoder_pools) != self.temporal_stride:
            raise ValueError(
                f"encoder joins {self.patch_frames * prod(self.encoder_pools)} frames into a latent,"
                f" decoder makes {self.temporal_stride} of one"
            )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) not in (0, self.latent_channels):
                raise ValueError(
                    f"{name} needs {self.latent_channels} values, got {len(getattr(self, name))}"
                )
        if len(self.latents_mean) != len(self.latents_std):
            raise ValueError("latents_mean and latents_std must be given together")

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent cell and axis."""
        return int(self.patch_size * 2 ** len(self.encoder_depths))

    @property
    def temporal_stride(self) -> int:
        """Frames per latent frame after the first."""
        return int(self.patch_frames * prod(self.decoder_grows))

    @classmethod
    def demo(cls) -> TinyAutoencoderConfig:
        """Configuration of the packaged demo codec: 64x128 pixels, 8x8x4, 16 channels, causal."""
        return cls(
            encoder_widths=(32, 64, 96),
            encoder_depths=(1, 1),
            encoder_pools=(1, 2),
            decoder_widths=(96, 64, 32),
            decoder_depths=(1, 1),
            decoder_grows=(2, 1),
            block_convs=2,
            patch_size=2,
            patch_frames=2,
            activation="silu",
            resample="fold",
            shortcuts=True,
            latent_clamp=False,
            front_aligned=True,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values (tuples become lists); `from_dict` is the inverse."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TinyAutoencoderConfig:
        """Configuration from `to_dict` values.

        Raises: ValueError for an unknown key, naming the nearest known one.
        """
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                raise ValueError(f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**given)


def _activation(name: str) -> nn.Module:
    return nn.ReLU() if name == "relu" else nn.SiLU()


def _conv3(inputs: int, outputs: int, *, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)


class _LatentClamp(nn.Module):
    """Soft bound to +-3, [*] -> [*]."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z / 3) * 3


class _MemoryBlock(nn.Module):
    """Residual convolutions over a frame and the one before it."""

    def __init__(self, width: int, convs: int, activation: str) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv3(2 * width, width)]
        for _ in range(convs - 1):
            layers += [_activation(activation), _conv3(width, width)]
        self.conv = nn.Sequential(*layers)
        self.act = _activation(activation)

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """x: [B*T, C, h, w]; past: the same, each frame's predecessor. Returns the shape of x."""
        out: Tensor = self.act(self.conv(torch.cat((x, past), dim=1)) + x)
        return out


class _TimePool(nn.Module):
    """Join `stride` consecutive frames: [B*T, C, h, w] -> [B*T/stride, C, h, w]."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width * stride, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x.reshape(-1, self.stride * x.shape[1], *x.shape[2:]))
        return out


class _TimeGrow(nn.Module):
    """Make `stride` consecutive frames of each: [B*T, C, h, w] -> [B*T*stride, C, h, w]."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out.reshape(-1, *x.shape[1:])


class _Fold(nn.Module):
    """Halve height and width and join `frames` frames: fold into channels, then mix by 1x1."""

    def __init__(self, inputs: int, outputs: int, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.conv = nn.Conv2d(inputs * frames * 4, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, self.frames * x.shape[1], *x.shape[2:])
        out: Tensor = self.conv(F.pixel_unshuffle(x, 2))
        return out


class _Unfold(nn.Module):
    """Double height and width and make `frames` frames of each: mix by 1x1, then unfold the channels."""

    def __init__(self, inputs: int, outputs: int, frames: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.conv = nn.Conv2d(inputs, outputs * frames * 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_shuffle(self.conv(x), 2)
        return x.reshape(-1, self.outputs, *x.shape[2:])


Memory = dict[int, Tensor]
"""What half of a `TinyAutoencoder` remembers: index of a memory block -> its last input [B, C, h, w]."""


def _run(layers: nn.Sequential, x: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
    """Apply layers to [B, T, C, h, w], all frames at once.

    An empty memory stands for zeros before the first frame. T must be a multiple of the frames joined.
    Returns: the output in the same layout and the new memory.
    """
    batch = x.shape[0]
    x = x.flatten(0, 1)
    after: Memory = {}
    for index, layer in enumerate(layers):
        if isinstance(layer, _MemoryBlock):
            frames = x.unflatten(0, (batch, -1))
            first = memory[index] if index in memory else torch.zeros_like(frames[:, 0])
            past = torch.cat((first[:, None], frames[:, :-1]), dim=1)
            after[index] = frames[:, -1]
            x = layer(x, past.flatten(0, 1))
        else:
            x = layer(x)
    return x.unflatten(0, (batch, -1)), after


class TinyAutoencoder(nn.Module):
    """A small video autoencoder whose only temporal operations are one-frame memories and frame folding.

    Layers and parameter names follow TAEHV (`encoder.N`, `decoder.N`); with the default configuration the
    public taew2_1 state dict loads by name. Source: github.com/madebyollin/taehv.
    """

    def __init__(self, config: TinyAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        patch_channels = 3 * config.patch_frames * config.patch_size**2
        activation, convs = config.activation, config.block_convs

        width = config.encoder_widths[0]
        layers: list[nn.Module] = [_conv3(patch_channels, width), _activation(activation)]
        for stage, depth in enumerate(config.encoder_depths):
            outputs, frames = config.encoder_widths[stage + 1], config.encoder_pools[stage]
            if config.resample == "conv":
                layers += [_TimePool(width, frames), _conv3(width, outputs, stride=2, bias=False)]
            else:
                layers += [_Fold(width, outputs, frames)]
            width = outputs
            layers += [_MemoryBlock(width, convs, activation) for _ in range(depth)]
        layers += [_conv3(width, config.latent_channels)]
        self.encoder = nn.Sequential(*layers)

        width = config.decoder_widths[0]
        layers = [_LatentClamp() if config.latent_clamp else nn.Identity()]
        layers += [_conv3(config.latent_channels, width), _activation(activation)]
        for stage, depth in enumerate(config.decoder_depths):
            outputs, frames = config.decoder_widths[stage + 1], config.decoder_grows[stage]
            layers += [_MemoryBlock(width, convs, activation) for _ in range(depth)]
            if config.resample == "conv":
                layers += [
                    nn.Upsample(scale_factor=2),
                    _TimeGrow(width, frames),
                    _conv3(width, outputs, bias=False),
                ]
            else:
                layers += [_Unfold(width, outputs, frames)]
            width = outputs
        head = _conv3(width, patch_channels)
        layers += [_activation(activation), head]
        self.decoder = nn.Sequential(*layers)

        if config.shortcuts:
            # Two time halves of 2 x 2 RGB values stand for a latent cell. Both maps start as an orthogonal
            # pair, so an untrained model already reproduces a projection of the coarse video.
            self.encoder_shortcut = nn.Conv2d(3 * 2 * 4, config.latent_channels, 1)
            self.decoder_shortcut = nn.Conv2d(config.latent_channels, 3 * 2 * 4, 1)
            weight = nn.init.orthogonal_(torch.empty(config.latent_channels, 3 * 2 * 4))
            with torch.no_grad():
                self.encoder_shortcut.weight.copy_(2 * weight[:, :, None, None])
                self.encoder_shortcut.bias.copy_(-weight.sum(1))  # type: ignore[union-attr]
                self.decoder_shortcut.weight.copy_(weight.t()[:, :, None, None] / 2)
            nn.init.constant_(self.decoder_shortcut.bias, 0.5)  # type: ignore[arg-type]
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]

    # -------------------------------------------------------------------------------------------- whole clips

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode a whole clip; differentiable.

        Args:
            pixels: [B, 3, T, H, W] in [0, 1], T = 1 + 4k, H and W multiples of the spatial stride.
        Returns: [B, C, F, h, w] raw latents, F = 1 + k.
        Raises: ValueError for another T, H or W.
        """
        stride = self.config.temporal_stride
        if pixels.ndim != 5 or pixels.shape[1] != 3 or pixels.shape[2] % stride != 1:
            raise ValueError(f"expected pixels [B, 3, 1 + {stride}k, H, W], got {tuple(pixels.shape)}")
        if self.config.front_aligned:
            padding = pixels[:, :, :1].expand(-1, -1, stride - 1, -1, -1)
            pixels = torch.cat((padding, pixels), dim=2)
        else:
            padding = pixels[:, :, -1:].expand(-1, -1, stride - 1, -1, -1)
            pixels = torch.cat((pixels, padding), dim=2)
        return self.encode_groups(pixels, {})[0]

    def decode(self, latents: Tensor, *, clamp: bool = True) -> Tensor:
        """Decode a whole clip; differentiable.

        Args:
            latents: [B, C, F, h, w] raw latents.
            clamp:   bound the result to [0, 1]; training losses want the unbounded values.
        Returns: [B, 3, 1 + 4 (F - 1), H, W].
        """
        pixels, _ = self.decode_groups(latents, {})
        pixels = pixels[:, :, self.config.temporal_stride - 1 :]
        return pixels.clamp(0, 1) if clamp else pixels

    # ----------------------------------------------------------------------------------- with explicit memory

    def encode_groups(self, pixels: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Encode whole groups of `temporal_stride` frames, continuing from `memory` (empty at the start).

        Args:
            pixels: [B, 3, 4F, H, W] in [0, 1].
        Returns: [B, C, F, h, w] raw latents and the memory after them; `memory` itself is left as it was.
        """
        config = self.config
        size, stride = config.patch_size, config.spatial_stride
        if pixels.shape[2] % config.temporal_stride or pixels.shape[3] % stride or pixels.shape[4] % stride:
            raise ValueError(
                f"frames must be a multiple of {config.temporal_stride}, height and width of {stride};"
                f" got {tuple(pixels.shape)}"
            )
        video = pixels.transpose(1, 2)  # [B, T, 3, H, W]
        x = video.unflatten(1, (-1, config.patch_frames)).flatten(2, 3)
        if size > 1:
            x = F.pixel_unshuffle(x, size)
        latents, memory = _run(self.encoder, x, memory)  # [B, F, C, h, w]
        if config.shortcuts:
            halves = video.unflatten(1, (-1, config.temporal_stride // 2)).mean(2)  # [B, 2F, 3, H, W]
            coarse = F.avg_pool2d(halves.flatten(0, 1), stride // 2)
            coarse = F.pixel_unshuffle(coarse.unflatten(0, (-1, 2)).flatten(1, 2), 2)  # [B*F, 24, h, w]
            latents = latents + self.encoder_shortcut(coarse).view_as(latents)
        return latents.transpose(1, 2), memory

    def decode_groups(self, latents: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Decode latents to whole groups of frames, continuing from `memory` (empty at the start).

        Args:
            latents: [B, C, F, h, w] raw latents.
        Returns: [B, 3, 4F, H, W] unbounded pixels and the memory after them; `memory` is left as it was. The
            first `temporal_stride - 1` frames of a video's first group are not part of the video.
        """
        config = self.config
        if latents.ndim != 5 or latents.shape[1] != config.latent_channels:
            raise ValueError(
                f"expected latents [B, {config.latent_channels}, F, h, w], got {tuple(latents.shape)}"
            )
        z = latents.transpose(1, 2)  # [B, F, C, h, w]
        x, memory = _run(self.decoder, z, memory)
        if config.patch_size > 1:
            x = F.pixel_shuffle(x, config.patch_size)
        video = x.unflatten(2, (config.patch_frames, 3)).flatten(1, 2)  # [B, 4F, 3, H, W]
        if config.shortcuts:
            coarse = F.pixel_shuffle(self.decoder_shortcut(z.flatten(0, 1)), 2)  # [B*F, 6, 2h, 2w]
            coarse = coarse.unflatten(1, (2, 3)).flatten(0, 1)
            coarse = F.interpolate(coarse, scale_factor=config.spatial_stride / 2, mode="bilinear")
            halves = coarse.unflatten(0, (video.shape[0], -1))[:, :, None]  # [B, 2F, 1, 3, H, W]
            video = (video.unflatten(1, (-1, config.temporal_stride // 2)) + halves).flatten(1, 2)
        return video.transpose(1, 2), memory


# ---------------------------------------------------------------------------------------------- the interface


@dataclass(frozen=True)
class CodecFacts:
    """What the latents of a codec are.

    kind:             which of the two codecs.
    latent_channels:  channels of a latent.
    spatial_stride:   pixels per latent cell and axis.
    temporal_stride:  frames per latent frame after the first.
    pixel_range:      values the wrapped module works with; outside the codec pixels are always [0, 1].
    encode_lookahead: frames after its own that the encoder needs before it can give a latent frame.
    latents_mean, latents_std: per channel, of the module's raw latents; normalised = (raw - mean) / std.
                      Empty when raw latents are normalised already.
    """

    kind: Literal["tiny", "wan"]
    latent_channels: int
    spatial_stride: int
    temporal_stride: int
    pixel_range: tuple[float, float]
    encode_lookahead: int
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()


class StreamingEncoder(Protocol):
    """One video on its way into latents. The first call takes 1 + 4k frames, later calls 4k."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode the next frames.

        Args:
            pixels: [B, 3, T, H, W] in [0, 1].
        Returns: [B, C, F, h, w] normalised float32 latents. Without look-ahead F = 1 + k on the first call
            and k later. With look-ahead the last latent frame is still missing: F = k on every call.
        Raises: ValueError for another T, H or W.
        """

    def flush(self) -> Tensor | None:
        """The latent frame still missing at the end of the video [B, C, 1, h, w]; None without look-ahead."""

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the stream remembers, as flat tensors for safetensors."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state_dict`. Raises: ValueError when it is not one of this kind of stream."""


class StreamingDecoder(Protocol):
    """One video on its way out of latents, any number of latent frames at a time."""

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next latent frames.

        Args:
            latents: [B, C, F, h, w] normalised.
        Returns: [B, 3, T, H, W] float32 in [0, 1]; T = 1 + 4 (F - 1) on the first call, 4F later.
        Raises: ValueError for another number of channels or no frame.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Everything the stream remembers, as flat tensors for safetensors."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from a `state_dict`. Raises: ValueError when it is not one of this kind of stream."""


class Codec(Protocol):
    """Weights of a video autoencoder, shared by any number of streams."""

    @property
    def facts(self) -> CodecFacts:
        """What the latents are."""

    def encoder(self) -> StreamingEncoder:
        """A stream at the start of a video."""

    def decoder(self) -> StreamingDecoder:
        """A stream at the start of a video."""

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Self:
        """Move the weights; open streams must not be continued. Returns the codec itself."""


def lr_pixels(pixels: Tensor, previous: Tensor | None) -> tuple[Tensor, Tensor]:
    """Pool the pixels of a block for the LR branch, 4x in space and to 9 frames (8 and a warm start).

    Frame 0 is the last pooled frame of the block before; for the first block it is the video's first frame.
    The others are averaged in time to 8. The nine encode to three latents; the last two cover the block.

    Args:
        pixels:   [B, 3, T, H, W] of one block; T = 1 + 4 (B_f - 1) for the first block, 4 B_f later.
        previous: second result for the block before, [B, 3, 1, H/4, W/4]; None for the first block.
    Returns: [B, 3, 9, H/4, W/4] and its last frame [B, 3, 1, H/4, W/4], same dtype.
    Raises: ValueError when there are no frames to average or `previous` has another shape.
    Source: PackForcing (arXiv 2603.25730) 3.3 for the pooling; docs/method.md 10.9 for the warm start.
    """
    batch, _, num_frames = pixels.shape[:3]
    if num_frames < (2 if previous is None else 1):
        raise ValueError(f"a block of {num_frames} frame(s) is too short for the LR branch")
    pooled = F.avg_pool2d(pixels.transpose(1, 2).flatten(0, 1), LR_SPATIAL_STRIDE)
    pooled = pooled.unflatten(0, (batch, num_frames)).transpose(1, 2)  # [B, 3, T, H/4, W/4]
    if previous is None:
        previous, pooled = pooled[:, :, :1], pooled[:, :, 1:]
    elif previous.shape != pooled[:, :, :1].shape:
        raise ValueError(
            f"previous has shape {tuple(previous.shape)}, expected {tuple(pooled[:, :, :1].shape)}"
        )
    pooled = F.adaptive_avg_pool3d(pooled, (LR_FRAMES, *pooled.shape[3:]))
    return torch.cat((previous, pooled), dim=2), pooled[:, :, -1:].clone()


def encode_lr(codec: Codec, pixels: Tensor) -> Tensor:
    """Encode the pooled pixels of a block to its two LR latents.

    Args:
        pixels: [B, 3, 9, H/4, W/4] from `lr_pixels`; rows and columns beyond a multiple of the spatial stride
                are left out.
    Returns: [B, C, 2, h/4, w/4] normalised latents, h/4 and w/4 rounded down.
    """
    stride = codec.facts.spatial_stride
    height, width = (size // stride * stride for size in pixels.shape[3:])
    encoder = codec.encoder()
    latents = encoder.encode(pixels[..., :height, :width])
    last = encoder.flush()
    return (latents if last is None else torch.cat((latents, last), dim=2))[:, :, 1:]


# ------------------------------------------------------------------------------------------------- tiny codec


class TinyCodec:
    """A `TinyAutoencoder` as a codec. The module stays as given, dtype and device included."""

    def __init__(self, module: TinyAutoencoder) -> None:
        config = module.config
        self.module = module.eval().requires_grad_(False)
        self._facts = CodecFacts(
            kind="tiny",
            latent_channels=config.latent_channels,
            spatial_stride=config.spatial_stride,
            temporal_stride=config.temporal_stride,
            pixel_range=(0.0, 1.0),
            encode_lookahead=0 if config.front_aligned else config.temporal_stride - 1,
            latents_mean=config.latents_mean,
            latents_std=config.latents_std,
        )

    @property
    def facts(self) -> CodecFacts:
        return self._facts

    def encoder(self) -> TinyStreamingEncoder:
        return TinyStreamingEncoder(self.module, self._facts)

    def decoder(self) -> TinyStreamingDecoder:
        return TinyStreamingDecoder(self.module, self._facts)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Self:
        self.module.to(device=device, dtype=dtype)
        return self


class TinyStreamingEncoder:
    """`StreamingEncoder` of a `TinyCodec`. State: memories and, with look-ahead, the frame held back."""

    def __init__(self, module: TinyAutoencoder, facts: CodecFacts) -> None:
        self._module, self._facts = module, facts
        self._memory: Memory = {}
        self._held: Tensor | None = None  # [B, 3, 1, H, W]
        self._started = False

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        facts, stride = self._facts, self._facts.temporal_stride
        _check_pixels(pixels, facts, started=self._started)
        pixels, held = pixels.to(next(self._module.parameters())), None
        if facts.encode_lookahead:
            if self._held is not None:
                pixels = torch.cat((self._held, pixels), dim=2)
            pixels, held = pixels[:, :, :-1], pixels[:, :, -1:].clone()
        elif not self._started:
            pixels = torch.cat((pixels[:, :, :1].expand(-1, -1, stride - 1, -1, -1), pixels), dim=2)
        if pixels.shape[2]:
            latents = self._encode_groups(pixels)
        else:
            batch, _, _, height, width = pixels.shape
            size = (height // facts.spatial_stride, width // facts.spatial_stride)
            latents = torch.zeros(batch, facts.latent_channels, 0, *size, device=pixels.device)
        self._held, self._started = held, True
        return latents

    @torch.no_grad()
    def flush(self) -> Tensor | None:
        if self._held is None:
            return None
        held, self._held = self._held, None
        return self._encode_groups(held.expand(-1, -1, self._facts.temporal_stride, -1, -1))

    def _encode_groups(self, pixels: Tensor) -> Tensor:
        latents, memory = self._module.encode_groups(pixels, self._memory)
        self._memory = {
            index: frame.clone() for index, frame in memory.items()
        }  # a view would keep all frames
        return _normalised(latents, self._facts)

    def state_dict(self) -> dict[str, Tensor]:
        state = {"started": torch.tensor([self._started])} | _memory_state(self._memory)
        return state if self._held is None else state | {"held": self._held}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        memory = _memory_from(state, self._module.encoder, also=("started", "held"))
        weight = next(self._module.parameters())
        self._memory = {index: frame.to(weight) for index, frame in memory.items()}
        self._held = state["held"].to(weight) if "held" in state else None
        self._started = bool(state["started"].item())


class TinyStreamingDecoder:
    """`StreamingDecoder` of a `TinyCodec`. State: block memories."""

    def __init__(self, module: TinyAutoencoder, facts: CodecFacts) -> None:
        self._module, self._facts = module, facts
        self._memory: Memory = {}
        self._started = False

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        _check_latents(latents, self._facts)
        raw = _raw(latents, self._facts).to(next(self._module.parameters()))
        pixels, memory = self._module.decode_groups(raw, self._memory)
        self._memory = {index: frame.clone() for index, frame in memory.items()}
        if not self._started:
            pixels = pixels[:, :, self._facts.temporal_stride - 1 :]
        self._started = True
        return pixels.float().clamp(0, 1)

    def state_dict(self) -> dict[str, Tensor]:
        return {"started": torch.tensor([self._started])} | _memory_state(self._memory)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        memory = _memory_from(state, self._module.decoder, also=("started",))
        weight = next(self._module.parameters())
        self._memory = {index: frame.to(weight) for index, frame in memory.items()}
        self._started = bool(state["started"].item())


def _memory_state(memory: Memory) -> dict[str, Tensor]:
    return {f"memory.{index}": frame for index, frame in memory.items()}


def _memory_from(state: Mapping[str, Tensor], layers: nn.Sequential, *, also: tuple[str, ...]) -> Memory:
    """Block memories in a state. Raises: ValueError when it is not one of a stream through these layers."""
    known = {f"memory.{i}": i for i, layer in enumerate(layers) if isinstance(layer, _MemoryBlock)}
    memory = {index: state[name] for name, index in known.items() if name in state}
    if (
        "started" not in state
        or len(memory) not in (0, len(known))
        or not state.keys() <= known.keys() | {*also}
    ):
        raise ValueError(f"not the state of this kind of stream: {sorted(state)}")
    return memory


def _check_pixels(pixels: Tensor, facts: CodecFacts, *, started: bool) -> None:
    first, stride = (0, facts.temporal_stride) if started else (1, facts.temporal_stride)
    spatial = facts.spatial_stride
    shape = tuple(pixels.shape)
    if pixels.ndim != 5 or shape[1] != 3:
        raise ValueError(f"expected pixels [B, 3, T, H, W], got {shape}")
    if shape[2] < 1 or shape[2] % stride != first:
        wanted = (
            f"a multiple of {stride}" if started else f"1 plus a multiple of {stride} at the start of a video"
        )
        raise ValueError(f"the number of frames must be {wanted}, got {shape[2]}")
    if shape[3] % spatial or shape[4] % spatial:
        raise ValueError(f"height and width must be multiples of {spatial}, got {shape[3]}x{shape[4]}")


def _check_latents(latents: Tensor, facts: CodecFacts) -> None:
    if latents.ndim != 5 or latents.shape[1] != facts.latent_channels or latents.shape[2] < 1:
        raise ValueError(
            f"expected latents [B, {facts.latent_channels}, F >= 1, h, w], got {tuple(latents.shape)}"
        )


def _statistics(facts: CodecFacts, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, each [C, 1, 1, 1] float32."""
    both = torch.tensor((facts.latents_mean, facts.latents_std), dtype=torch.float32)
    mean, std = staging.to_device(both, like.device)[..., None, None, None]
    return mean, std


def _normalised(raw: Tensor, facts: CodecFacts) -> Tensor:
    """Latents of the transformer from latents of the module, float32."""
    if not facts.latents_mean:
        return raw.float()
    mean, std = _statistics(facts, raw)
    return (raw.float() - mean) / std


def _raw(latents: Tensor, facts: CodecFacts) -> Tensor:
    """Latents of the module from latents of the transformer, float32."""
    if not facts.latents_mean:
        return latents.float()
    mean, std = _statistics(facts, latents)
    return latents.float() * std + mean


# -------------------------------------------------------------------------------------------------- Wan codec

FeatureCache = list[Tensor | str | None]
"""An entry per causal convolution: None before the first frame, then the last input frames; the temporal
upsamplers hold `REPEAT` after the first frame. Layers replace entries and never write into them."""

Step = Callable[[Any, Tensor, FeatureCache], tuple[Tensor, FeatureCache]]
"""`_steady_step`, as it is or compiled."""

REPEAT = "Rep"  # diffusers' marker, WanResample.forward
PAST_FRAMES = 2  # that a causal convolution of three frames remembers; diffusers' CACHE_T


class WanCodec:
    """The Wan 2.1 VAE of diffusers as a codec.

    diffusers keeps the caches of a running video on the module and clears them at both ends of `encode` and
    `decode`. Here its inner encoder and decoder are called latent frame by latent frame with a stream's own
    caches.
    """

    def __init__(
        self,
        module: AutoencoderKLWan,
        *,
        latents_per_call: int = 1,
        channels_last: bool = False,
        compiled: bool = False,
    ) -> None:
        """Wrap a module.

        Args:
            latents_per_call: latent frames the decoder is given at a time after a video's first, which is decoded
                              alone. One at a time equals diffusers' own `decode` bit for bit; more differ by rounding
                              (5e-6 in float32) and take that many times the working memory.
            channels_last:    keep channels innermost, as cuDNN's convolutions of 16-bit numbers want them; results
                              differ by rounding.
            compiled:         compile the decoder for the calls whose shapes come again: all but a video's first two.
                              Results differ by rounding.
        Raises: ValueError for a VAE that folds pixels first (Wan 2.2 5B), or no latent frame a call.
        """
        if latents_per_call < 1:
            raise ValueError(f"latents_per_call must be at least 1, got {latents_per_call}")
        untyped: Any = module  # diffusers gives its models no types
        config = untyped.config
        if config.patch_size is not None:
            raise ValueError(
                f"this VAE folds pixels by {config.patch_size}; only the Wan 2.1 form is supported"
            )
        self.module = untyped.eval().requires_grad_(False)
        self._latents_per_call, self._layout = latents_per_call, torch.contiguous_format
        self._step = compiling.compiled(_steady_step) if compiled else None
        if channels_last:
            self._layout = torch.channels_last_3d
            put_channels_last(self.module)
        self._facts = CodecFacts(
            kind="wan",
            latent_channels=config.z_dim,
            spatial_stride=2 ** (len(config.dim_mult) - 1),
            temporal_stride=2 ** sum(config.temperal_downsample),
            pixel_range=(-1.0, 1.0),
            encode_lookahead=0,
            latents_mean=tuple(config.latents_mean),
            latents_std=tuple(config.latents_std),
        )

    @property
    def facts(self) -> CodecFacts:
        return self._facts

    @property
    def latents_per_call(self) -> int:
        """Latent frames the decoder is given at a time."""
        return self._latents_per_call

    @property
    def compiled(self) -> bool:
        """Whether the decoder's steady calls are."""
        return self._step is not None

    def encoder(self) -> WanStreamingEncoder:
        return WanStreamingEncoder(self.module, self._facts, self._layout)

    def decoder(self) -> WanStreamingDecoder:
        return WanStreamingDecoder(self.module, self._facts, self._layout, self._latents_per_call, self._step)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Self:
        self.module.to(device=device, dtype=dtype)
        return self


def _by_frame(pointwise: Any, x: Tensor) -> Tensor:
    """A 1x1x1 convolution, frame by frame: on some CPUs its last bits depend on how many frames it is given."""
    return torch.cat([pointwise(frame) for frame in x.split(1, dim=2)], dim=2)


class WanStreamingEncoder:
    """`StreamingEncoder` of a `WanCodec`. State: the encoder's feature cache."""

    def __init__(self, module: AutoencoderKLWan, facts: CodecFacts, layout: torch.memory_format) -> None:
        self._module: Any = module  # diffusers gives its models no types
        self._facts, self._layout = facts, layout
        self._features = _empty_features(self._module.encoder)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        started = _started(self._features)
        _check_pixels(pixels, self._facts, started=started)
        pixels = pixels.to(next(self._module.parameters())) * 2 - 1
        first = 0 if started else 1
        groups = ([pixels[:, :, :1]] if first else []) + list(
            pixels[:, :, first:].split(self._facts.temporal_stride, dim=2) if pixels.shape[2] > first else []
        )
        features = list(self._features)
        moments = torch.cat(
            [
                self._module.encoder(
                    g.contiguous(memory_format=self._layout), feat_cache=features, feat_idx=[0]
                )
                for g in groups
            ],
            dim=2,
        )
        self._features = features
        moments = _by_frame(self._module.quant_conv, moments)
        mean = moments[:, : self._facts.latent_channels]
        return _normalised(mean, self._facts)

    def flush(self) -> Tensor | None:
        return None

    def state_dict(self) -> dict[str, Tensor]:
        return _features_state(self._features)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._features = _features_from(state, self._module.encoder, self._layout)


class WanStreamingDecoder:
    """`StreamingDecoder` of a `WanCodec`. State: the decoder's feature cache."""

    def __init__(
        self,
        module: AutoencoderKLWan,
        facts: CodecFacts,
        layout: torch.memory_format,
        latents_per_call: int,
        step: Step | None,
    ) -> None:
        """step: makes the calls whose shapes come again; None = the module does, as it does the others."""
        self._module: Any = module  # diffusers gives its models no types
        self._facts, self._layout, self._latents_per_call = facts, layout, latents_per_call
        self._step = step
        self._features = _empty_features(self._module.decoder)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        _check_latents(latents, self._facts)
        raw = _raw(latents, self._facts).to(next(self._module.parameters()))
        raw = _by_frame(self._module.post_quant_conv, raw)
        features, calls = list(self._features), self._calls(raw.shape[2])
        frames = [self._call(z, features) for z in raw.split(calls, dim=2)]
        self._features = features
        return torch.cat(frames, dim=2).float().clamp(-1, 1) * 0.5 + 0.5

    def _calls(self, frames: int) -> list[int]:
        """Latent frames of each call.

        The first one of a video stands for one frame instead of four and goes alone. A shorter call comes before the
        full ones: in a video's first block it is then among the calls that are never compiled.
        """
        first = 0 if _started(self._features) else 1
        full, short = divmod(frames - first, self._latents_per_call)
        return [1] * first + [short] * (short > 0) + [self._latents_per_call] * full

    def _call(self, z: Tensor, features: FeatureCache) -> Tensor:
        """Decode some latent frames; the features become those after them, entry by entry, and no entry is written."""
        if self._step is not None and _is_steady(features):
            for i, feature in enumerate(features):
                if isinstance(feature, Tensor):
                    features[i] = _laid_out(feature, self._layout)
            pixels, features[:] = self._step(self._module.decoder, _laid_out(z, self._layout), features)
            return pixels
        first, z = not _started(features), z.contiguous(memory_format=self._layout)
        out: Tensor = self._module.decoder(z, feat_cache=features, feat_idx=[0], first_chunk=first)
        return out

    def state_dict(self) -> dict[str, Tensor]:
        return _features_state(self._features)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._features = _features_from(state, self._module.decoder, self._layout)


def _steady_step(decoder: Any, z: Tensor, features: FeatureCache) -> tuple[Tensor, FeatureCache]:
    """A call of the decoder as a function: what is given stays as it is. Features are those of `_is_steady`."""
    after = list(features)
    pixels: Tensor = decoder(z, feat_cache=after, feat_idx=[0], first_chunk=False)
    return pixels, after


def _laid_out(x: Tensor, layout: torch.memory_format) -> Tensor:
    """[B, C, T, H, W] in exactly this layout: compiled code is made for strides, also those of sides of length 1."""
    _, C, T, H, W = x.shape
    strides = (C * T * H * W, T * H * W, H * W, W, 1)
    if layout == torch.channels_last_3d:
        strides = (T * H * W * C, 1, H * W * C, W * C, C)
    return x if x.stride() == strides else x.clone(memory_format=layout)


def put_channels_last(module: nn.Module) -> None:
    """Lay the weights of all convolutions out with the channels innermost; their values stay."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv3d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)


def _empty_features(half: nn.Module) -> FeatureCache:
    """A cache with an entry per causal convolution; those of 1x1 convolutions stay None, as in diffusers."""
    return [None] * sum(isinstance(layer, nn.Conv3d) for layer in half.modules())


def _started(features: FeatureCache) -> bool:
    return any(feature is not None for feature in features)


def _is_steady(features: FeatureCache) -> bool:
    """Whether every convolution remembers as much as it ever will, so that the next call's shapes will come again."""
    past = [feature for feature in features if feature is not None]
    return bool(past) and all(isinstance(f, Tensor) and f.shape[2] == PAST_FRAMES for f in past)


_KINDS: tuple[str | None, ...] = (None, REPEAT)  # codes 0 and 1; code 2 is a tensor


def _features_state(features: FeatureCache) -> dict[str, Tensor]:
    codes = [2 if isinstance(feature, Tensor) else _KINDS.index(feature) for feature in features]
    tensors = {f"feature.{i}": f.contiguous() for i, f in enumerate(features) if isinstance(f, Tensor)}
    return {"kinds": torch.tensor(codes, dtype=torch.uint8)} | tensors


def _features_from(state: Mapping[str, Tensor], half: nn.Module, layout: torch.memory_format) -> FeatureCache:
    weight = next(half.parameters())
    codes = state["kinds"].tolist() if "kinds" in state else []
    tensors = {f"feature.{i}" for i, code in enumerate(codes) if code == 2}
    if len(codes) != len(_empty_features(half)) or state.keys() != tensors | {"kinds"}:
        raise ValueError(f"not the state of this kind of stream: {len(codes)} entries, {len(state)} tensors")

    def feature(i: int) -> Tensor:
        # Laid out as the stream had it: a convolution's last bits may depend on that.
        return state[f"feature.{i}"].to(weight).contiguous(memory_format=layout)

    return [feature(i) if code == 2 else _KINDS[code] for i, code in enumerate(codes)]
