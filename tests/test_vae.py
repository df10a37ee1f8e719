"""Codecs: streams equal whole clips, share nothing, and survive being written to a file."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from packforcing_cli import compiling
from packforcing_cli.quiet import known_import_noise_dropped
from packforcing_cli.vae import (
    Codec,
    TinyAutoencoder,
    TinyAutoencoderConfig,
    TinyCodec,
    WanCodec,
    WanStreamingDecoder,
    encode_lr,
    lr_pixels,
)

torch.set_num_threads(1)

MEAN, STD = (0.3, -0.2, 0.1, 0.5), (0.5, 1.5, 2.0, 0.8)

SMALL_FOLD = TinyAutoencoderConfig(  # the demo's form at a fraction of its widths
    latent_channels=4,
    encoder_widths=(4, 6, 8),
    encoder_depths=(1, 2),
    encoder_pools=(2, 1),
    decoder_widths=(8, 6, 4),
    decoder_depths=(2, 1),
    decoder_grows=(1, 2),
    block_convs=2,
    patch_size=2,
    patch_frames=2,
    activation="silu",
    resample="fold",
    shortcuts=True,
    latent_clamp=False,
    front_aligned=True,
    latents_mean=MEAN,
    latents_std=STD,
)
SMALL_TAEHV = dataclasses.replace(
    TinyAutoencoderConfig(),
    latent_channels=4,
    encoder_widths=(4, 4, 4, 4),
    encoder_depths=(1, 1, 1),
    decoder_widths=(8, 6, 4, 4),
    decoder_depths=(1, 1, 1),
)
BOTH = pytest.mark.parametrize("config", [SMALL_FOLD, SMALL_TAEHV], ids=["front aligned", "looks ahead"])


def random_weights(module: nn.Module, seed: int = 0) -> None:
    """Fill every parameter, the zero-initialised ones too."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
        parameter.data = torch.randn(parameter.shape, generator=generator) / fan_in**0.5


def tiny(config: TinyAutoencoderConfig) -> TinyAutoencoder:
    module = TinyAutoencoder(config)
    random_weights(module)
    return module


def wan_module(**shape: Any) -> Any:
    with known_import_noise_dropped():
        from diffusers import AutoencoderKLWan
    torch.manual_seed(0)
    given = {"dim_mult": [1, 2, 2, 2], "num_res_blocks": 1, **shape}
    return AutoencoderKLWan(
        base_dim=4, z_dim=4, latents_mean=list(MEAN), latents_std=list(STD), **given
    ).eval()


@pytest.fixture(scope="module")
def wan() -> WanCodec:
    return WanCodec(wan_module())


def video(frames: int, height: int = 16, width: int = 24, *, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(seed))


def noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def per_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values)[:, None, None, None]


def through_a_file(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    save_file(state, path)
    return load_file(path)


def encode_in_parts(codec: Codec, pixels: Tensor, parts: list[int]) -> Tensor:
    encoder = codec.encoder()
    out = [encoder.encode(part) for part in pixels.split(parts, dim=2)]
    last = encoder.flush()
    return torch.cat(out if last is None else [*out, last], dim=2)


# ---------------------------------------------------------------------------------------------------- Wan


@contextmanager
def pointwise_by_frame(wan: WanCodec) -> Iterator[None]:
    """diffusers' own code, but its 1x1x1 convolutions see one frame at a time: their last bits may depend on it."""
    with pytest.MonkeyPatch.context() as patch:
        for conv in (wan.module.quant_conv, wan.module.post_quant_conv):
            whole = conv.forward
            patch.setattr(
                conv,
                "forward",
                lambda x, whole=whole: torch.cat([whole(frame) for frame in x.split(1, dim=2)], dim=2),
            )
        yield


def test_wan_decoded_frame_by_frame_equals_one_shot_decode_bitwise(wan: WanCodec) -> None:
    latents = noise(1, 4, 5, 2, 3)
    raw = latents * per_channel(STD) + per_channel(MEAN)
    with torch.no_grad():
        untouched = wan.module.decode(raw).sample * 0.5 + 0.5
        with pointwise_by_frame(wan):
            expected = wan.module.decode(raw).sample * 0.5 + 0.5
    torch.testing.assert_close(expected, untouched, rtol=0, atol=5e-6)
    decoder = wan.decoder()
    streamed = [decoder.decode(latents[:, :, i : i + 1]) for i in range(5)]
    assert [part.shape[2] for part in streamed] == [1, 4, 4, 4, 4]
    assert torch.equal(torch.cat(streamed, dim=2), expected)
    assert torch.equal(wan.decoder().decode(latents), expected)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("latents_per_call", [1, 2, 4])
def test_wan_decoded_in_larger_calls_and_another_layout_equals_to_rounding(
    wan: WanCodec, latents_per_call: int, channels_last: bool, tmp_path: Path
) -> None:
    """Blocks of 1 + 3, 4 and 2 latent frames; a stream that goes on from a file equals one that never stopped."""
    latents, pixels = noise(1, 4, 10, 4, 6), video(13, 32, 48)
    codec = WanCodec(wan_module(), latents_per_call=latents_per_call, channels_last=channels_last)
    whole, first = codec.decoder(), codec.decoder()
    made = [whole.decode(part) for part in latents.split((4, 4, 2), dim=2)]
    assert [part.shape[2] for part in made] == [13, 16, 8]
    decoded = torch.cat(made, dim=2)
    torch.testing.assert_close(decoded, wan.decoder().decode(latents), rtol=0, atol=1e-5)
    encoded = codec.encoder().encode(pixels)
    torch.testing.assert_close(encoded, wan.encoder().encode(pixels), rtol=1e-5, atol=2e-5)
    first.decode(latents[:, :, :4])
    rest = codec.decoder()
    rest.load_state_dict(through_a_file(first.state_dict(), tmp_path / "state"))
    assert torch.equal(
        torch.cat([rest.decode(latents[:, :, at : at + n]) for at, n in ((4, 4), (8, 2))], 2),
        decoded[:, :, 13:],
    )


def test_portions_are_what_one_call_makes_of_them_however_blocks_fall(wan: WanCodec) -> None:
    """Streams of blocks of 3 and 4 in portions of 2 and 3 against one call; a shorter portion comes first."""
    latents = noise(1, 4, 12, 2, 3)
    expected = wan.decoder().decode(latents)
    for frames, portion, calls in ((3, 2, [1, 2, 1, 2, 1, 2, 1, 2]), (4, 3, [1, 3, 1, 3, 1, 3])):
        decoder = WanCodec(wan_module(), latents_per_call=portion).decoder()
        whole, given = decoder._module.decoder.forward, list[int]()

        def counted(z: Tensor, *, whole: Any = whole, given: list[int] = given, **how: Any) -> Tensor:
            given.append(z.shape[2])
            made: Tensor = whole(z, **how)
            return made

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoder._module.decoder, "forward", counted)
            made = [decoder.decode(part) for part in latents.split(frames, dim=2)]
        assert given == calls
        torch.testing.assert_close(torch.cat(made, dim=2), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when the compiler is imported
def test_a_compiled_wan_decoder_is_one_graph_for_a_whole_video_and_gives_the_eager_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A video's first calls stay eager; then no graph breaks, and nothing is compiled again for any later block."""
    compiling.require_compiler(torch.device("cpu"))
    monkeypatch.setenv(compiling.CACHE_VARIABLE, str(tmp_path / "compiled"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def decoder(*, compiled: bool) -> WanStreamingDecoder:
        module = wan_module(dim_mult=[1, 1], num_res_blocks=0, temperal_downsample=[True])
        return WanCodec(module, latents_per_call=2, channels_last=True, compiled=compiled).decoder()

    latents = noise(1, 4, 16, 2, 3).split(4, dim=2)
    eager, fast = decoder(compiled=False), decoder(compiled=True)
    expected = [eager.decode(block) for block in latents]
    made = [fast.decode(latents[0][:, :, :2])]
    assert compiling.compilations().graphs == 0
    made[0] = torch.cat((made[0], fast.decode(latents[0][:, :, 2:])), dim=2)
    once = compiling.compilations()
    assert (once.graphs, once.graph_breaks) == (1, 0)
    made += [fast.decode(block) for block in latents[1:3]]
    later = decoder(compiled=True)  # of a video that goes on from a file
    later.load_state_dict(through_a_file(fast.state_dict(), tmp_path / "state"))
    made.append(later.decode(latents[3]))
    assert compiling.compilations() == once
    for a, b in zip(made, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    assert not all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))  # it is other code
    assert torch.equal(made[3], fast.decode(latents[3]))
    assert any((tmp_path / "compiled").rglob("*.so"))


def test_a_call_of_no_latent_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        WanCodec(wan_module(), latents_per_call=0)


def test_wan_encoded_in_parts_equals_one_shot_encode_bitwise(wan: WanCodec) -> None:
    pixels = video(17)
    with torch.no_grad():
        untouched = wan.module.encode(pixels * 2 - 1).latent_dist.mode()
        with pointwise_by_frame(wan):
            raw = wan.module.encode(pixels * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(raw, untouched, rtol=0, atol=5e-6)
    expected = (raw - per_channel(MEAN)) / per_channel(STD)
    assert torch.equal(encode_in_parts(wan, pixels, [1, 4, 8, 4]), expected)
    assert torch.equal(encode_in_parts(wan, pixels, [9, 8]), expected)


def test_wan_streams_write_nothing_on_the_module(wan: WanCodec) -> None:
    def attributes() -> dict[str, dict[str, Any]]:
        return {name: dict(vars(module)) for name, module in wan.module.named_modules()}

    before = attributes()
    wan.decoder().decode(noise(1, 4, 2, 2, 3))
    wan.encoder().encode(video(5))
    after = attributes()
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert values.keys() == after[name].keys()
        assert all(value is after[name][key] or value == after[name][key] for key, value in values.items())


def test_a_wan_vae_that_folds_pixels_first_is_refused() -> None:
    class Config:
        patch_size = 2

    class Vae:
        config = Config()

    with pytest.raises(ValueError, match="folds pixels by 2"):
        WanCodec(Vae())  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------- both codecs


def codecs() -> list[Any]:
    return [
        pytest.param(lambda: WanCodec(wan_module()), id="wan"),
        pytest.param(lambda: TinyCodec(tiny(SMALL_FOLD)), id="front aligned"),
        pytest.param(lambda: TinyCodec(tiny(SMALL_TAEHV)), id="looks ahead"),
    ]


ALL = pytest.mark.parametrize("make", codecs())


@ALL
def test_interleaved_streams_are_independent(make: Callable[[], Codec]) -> None:
    codec = make()
    one, two = noise(1, 4, 4, 2, 3, seed=3), noise(2, 4, 4, 2, 2, seed=4)
    alone = [codec.decoder().decode(x) for x in (one, two)]
    decoders = codec.decoder(), codec.decoder()
    parts: list[list[Tensor]] = [[], []]
    for i in range(4):
        for which, latents in enumerate((one, two)):
            parts[which].append(decoders[which].decode(latents[:, :, i : i + 1]))
    for which in range(2):
        torch.testing.assert_close(torch.cat(parts[which], dim=2), alone[which], rtol=0, atol=1e-5)

    clips = video(9, seed=5), video(9, 8, 16, batch=2, seed=6)
    whole = [encode_in_parts(codec, clip, [9]) for clip in clips]
    encoders = codec.encoder(), codec.encoder()
    out: list[list[Tensor]] = [[], []]
    for start, stop in ((0, 1), (1, 5), (5, 9)):
        for which, clip in enumerate(clips):
            out[which].append(encoders[which].encode(clip[:, :, start:stop]))
    for which in range(2):
        last = encoders[which].flush()
        joined = torch.cat(out[which] if last is None else [*out[which], last], dim=2)
        torch.testing.assert_close(joined, whole[which], rtol=1e-4, atol=1e-5)


@ALL
@pytest.mark.parametrize("done", [0, 1, 3])
def test_a_stream_continues_from_a_file(make: Callable[[], Codec], done: int, tmp_path: Path) -> None:
    codec = make()
    latents = noise(1, 4, 5, 2, 3)
    decoder = codec.decoder()
    for i in range(done):
        decoder.decode(latents[:, :, i : i + 1])
    resumed = codec.decoder()
    resumed.decode(noise(1, 4, 2, 2, 3, seed=9))  # what it remembered is replaced
    resumed.load_state_dict(through_a_file(decoder.state_dict(), tmp_path / "decoder.safetensors"))
    for i in range(done, 5):
        part = latents[:, :, i : i + 1]
        assert torch.equal(resumed.decode(part), decoder.decode(part))

    pixels = video(1 + 4 * 4)
    starts = [0, 1, 5, 9, 13, 17]
    encoder = codec.encoder()
    for i in range(done):
        encoder.encode(pixels[:, :, starts[i] : starts[i + 1]])
    again = codec.encoder()
    again.load_state_dict(through_a_file(encoder.state_dict(), tmp_path / "encoder.safetensors"))
    for i in range(done, 5):
        part = pixels[:, :, starts[i] : starts[i + 1]]
        assert torch.equal(again.encode(part), encoder.encode(part))
    ends = again.flush(), encoder.flush()
    assert (ends[0] is None) == (ends[1] is None)
    if ends[0] is not None and ends[1] is not None:
        assert torch.equal(ends[0], ends[1])


def test_a_wan_state_holds_none_marker_and_tensors(wan: WanCodec) -> None:
    decoder = wan.decoder()
    assert set(decoder.state_dict()["kinds"].tolist()) == {0}
    decoder.decode(noise(1, 4, 1, 2, 3))
    assert set(decoder.state_dict()["kinds"].tolist()) == {0, 1, 2}  # 0: entries of the 1x1x1 convolutions
    decoder.decode(noise(1, 4, 1, 2, 3))
    assert set(decoder.state_dict()["kinds"].tolist()) == {0, 2}


@ALL
def test_the_state_of_another_kind_of_stream_is_refused(make: Callable[[], Codec]) -> None:
    codec = make()
    decoder = codec.decoder()
    decoder.decode(noise(1, 4, 1, 2, 3))
    state = decoder.state_dict()
    for wrong in ({}, {**state, "extra": torch.zeros(1)}, dict(list(state.items())[:-1])):
        with pytest.raises(ValueError, match="not the state"):
            codec.decoder().load_state_dict(wrong)


@ALL
def test_a_wrong_number_of_frames_or_channels_raises(make: Callable[[], Codec]) -> None:
    codec = make()
    encoder = codec.encoder()
    for frames in (0, 2, 4, 8):
        with pytest.raises(ValueError, match="number of frames"):
            encoder.encode(video(frames))
    encoder.encode(video(5))
    for frames in (0, 1, 5):
        with pytest.raises(ValueError, match="number of frames"):
            encoder.encode(video(frames))
    with pytest.raises(ValueError, match="multiples of 8"):
        codec.encoder().encode(video(5, 12, 16))
    with pytest.raises(ValueError, match="pixels"):
        codec.encoder().encode(noise(1, 4, 5, 16, 16))
    for shape in ((1, 5, 1, 2, 3), (1, 4, 0, 2, 3)):
        with pytest.raises(ValueError, match="latents"):
            codec.decoder().decode(noise(*shape))


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoded_pixels_are_float32_in_0_to_1(make: Callable[[], Codec], dtype: torch.dtype) -> None:
    codec = make().to("cpu", dtype)
    pixels = codec.decoder().decode(20 * noise(1, 4, 2, 2, 3))
    assert pixels.shape == (1, 3, 5, 16, 24)
    assert pixels.dtype == torch.float32
    assert 0 <= float(pixels.min()) < float(pixels.max()) <= 1
    assert encode_in_parts(codec, pixels, [5]).dtype == torch.float32


def test_facts_state_scaling_pixel_range_and_look_ahead(wan: WanCodec) -> None:
    front, ahead = TinyCodec(tiny(SMALL_FOLD)).facts, TinyCodec(tiny(SMALL_TAEHV)).facts
    strides = [(f.latent_channels, f.spatial_stride, f.temporal_stride) for f in (wan.facts, front, ahead)]
    assert strides == [(4, 8, 4)] * 3
    assert [f.latents_mean for f in (wan.facts, front, ahead)] == [MEAN, MEAN, ()]
    assert [f.pixel_range for f in (wan.facts, front, ahead)] == [(-1, 1), (0, 1), (0, 1)]
    assert [f.encode_lookahead for f in (wan.facts, front, ahead)] == [0, 0, 3]


# --------------------------------------------------------------------------------------- tiny autoencoder


@BOTH
def test_tiny_streamed_equals_one_shot(config: TinyAutoencoderConfig) -> None:
    module = tiny(config)
    codec = TinyCodec(module)
    mean, std = (per_channel(MEAN), per_channel(STD)) if config.latents_mean else (0.0, 1.0)
    pixels = video(17, batch=2)
    with torch.no_grad():
        expected = (module.encode(pixels) - mean) / std
        for parts in ([17], [1, 4, 4, 4, 4], [9, 8], [5, 4, 8]):
            streamed = encode_in_parts(codec, pixels, parts)
            torch.testing.assert_close(streamed, expected, rtol=1e-4, atol=1e-5)
        decoded = module.decode(expected * std + mean)
    assert decoded.shape == pixels.shape
    decoder = codec.decoder()
    streamed = torch.cat([decoder.decode(part) for part in expected.split([1, 2, 2], dim=2)], dim=2)
    torch.testing.assert_close(streamed, decoded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "ahead"), [(SMALL_FOLD, 0), (SMALL_TAEHV, 3)], ids=["front aligned", "looks ahead"]
)
def test_an_encoded_frame_reads_exactly_its_look_ahead(config: TinyAutoencoderConfig, ahead: int) -> None:
    module = tiny(config)
    pixels = video(13)
    changed = pixels.clone()
    with torch.no_grad():
        latents = module.encode(pixels)
        for frame in range(1, 13):
            changed.copy_(pixels)
            changed[:, :, frame:] = 1 - changed[:, :, frame:]
            difference = (module.encode(changed) - latents).abs().amax((0, 1, 3, 4))
            first = int((difference > 0).nonzero()[0])
            # latent frame j stands for frames up to 4j
            assert first == -(-(frame - ahead) // 4), (frame, first)


@BOTH
def test_a_decoded_frame_reads_no_later_latent(config: TinyAutoencoderConfig) -> None:
    module = tiny(config)
    latents = noise(1, 4, 4, 2, 2)
    changed = latents.clone()
    changed[:, :, 2:] += 1
    with torch.no_grad():
        same = (module.decode(latents) == module.decode(changed)).all(1).flatten(2).all(2)[0]
    assert same.tolist() == [True] * 5 + [False] * 8


def test_both_halves_can_be_trained_and_also_on_shrunken_frames() -> None:
    module = TinyAutoencoder(SMALL_FOLD)
    for height, width in ((64, 128), (16, 32)):
        pixels = video(5, height, width, batch=2)
        out = module.decode(module.encode(pixels), clamp=False)
        assert out.shape == pixels.shape
        module.zero_grad()
        (out - pixels).square().mean().backward()
        assert module.encoder_shortcut.weight.grad is not None
        head = module.decoder[-1].weight.grad
        assert head is not None
        assert float(head.abs().max()) > 0


def test_an_untrained_demo_form_already_keeps_the_coarse_picture() -> None:
    # As many channels as the shortcut has values: nothing is lost.
    config = dataclasses.replace(SMALL_FOLD, latent_channels=24, latents_mean=(), latents_std=())
    module = TinyAutoencoder(config)
    nn.init.zeros_(module.encoder[-1].weight)
    nn.init.zeros_(module.encoder[-1].bias)
    colour = torch.tensor([0.9, 0.2, 0.4])[None, :, None, None, None].expand(1, 3, 5, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(module.decode(module.encode(colour)), colour, rtol=0, atol=1e-5)


def test_names_and_shapes_are_those_of_taew2_1() -> None:
    """Layers of TAEHV for Wan 2.1: 3x3 convolutions, 1x1 time layers, memory blocks of three convolutions."""
    expected: dict[str, tuple[int, ...]] = {}

    def conv(name: str, inputs: int, outputs: int, *, size: int = 3, bias: bool = True) -> None:
        expected[name + ".weight"] = (outputs, inputs, size, size)
        if bias:
            expected[name + ".bias"] = (outputs,)

    def memory_blocks(half: str, indices: tuple[int, ...], width: int) -> None:
        for index in indices:
            conv(f"{half}.{index}.conv.0", 2 * width, width)
            conv(f"{half}.{index}.conv.2", width, width)
            conv(f"{half}.{index}.conv.4", width, width)

    conv("encoder.0", 3, 64)
    conv("encoder.2.conv", 128, 64, size=1, bias=False)  # two frames joined
    conv("encoder.3", 64, 64, bias=False)
    memory_blocks("encoder", (4, 5, 6), 64)
    conv("encoder.7.conv", 128, 64, size=1, bias=False)  # two frames joined
    conv("encoder.8", 64, 64, bias=False)
    memory_blocks("encoder", (9, 10, 11), 64)
    conv("encoder.12.conv", 64, 64, size=1, bias=False)
    conv("encoder.13", 64, 64, bias=False)
    memory_blocks("encoder", (14, 15, 16), 64)
    conv("encoder.17", 64, 16)
    conv("decoder.1", 16, 256)
    memory_blocks("decoder", (3, 4, 5), 256)
    conv("decoder.7.conv", 256, 256, size=1, bias=False)
    conv("decoder.8", 256, 128, bias=False)
    memory_blocks("decoder", (9, 10, 11), 128)
    conv("decoder.13.conv", 128, 256, size=1, bias=False)  # two frames made of one
    conv("decoder.14", 128, 64, bias=False)
    memory_blocks("decoder", (15, 16, 17), 64)
    conv("decoder.19.conv", 64, 128, size=1, bias=False)  # two frames made of one
    conv("decoder.20", 64, 64, bias=False)
    conv("decoder.22", 64, 3)

    with torch.device("meta"):
        module = TinyAutoencoder(TinyAutoencoderConfig())
    assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == expected
    assert TinyCodec(module).facts.encode_lookahead == 3


def test_taew2_1_form_equals_a_frame_by_frame_walk() -> None:
    """The layers applied to one frame at a time by plain loops, against the folded batch."""
    module = tiny(SMALL_TAEHV)
    relu = torch.relu

    def walk(layers: nn.Sequential, frames: list[Tensor]) -> list[Tensor]:
        for layer in layers:
            kind = type(layer).__name__
            if kind == "_MemoryBlock":
                out, past = [], torch.zeros_like(frames[0])
                for frame in frames:
                    x = torch.cat((frame, past), dim=1)
                    x = layer.conv[4](relu(layer.conv[2](relu(layer.conv[0](x)))))
                    out.append(relu(x + frame))
                    past = frame
            elif kind == "_TimePool":
                step = layer.conv.in_channels // frames[0].shape[1]
                groups = [frames[i : i + step] for i in range(0, len(frames), step)]
                out = [layer.conv(torch.cat(group, dim=1)) for group in groups]
            elif kind == "_TimeGrow":
                width = frames[0].shape[1]
                out = [part for frame in frames for part in layer.conv(frame).split(width, dim=1)]
            elif kind == "_LatentClamp":
                out = [3 * torch.tanh(frame / 3) for frame in frames]
            else:
                out = [layer(frame) for frame in frames]
            frames = out
        return frames

    pixels = video(5)
    with torch.no_grad():
        latents = module.encode(pixels)
        frames = list(pixels.unbind(2))
        torch.testing.assert_close(
            latents, torch.stack(walk(module.encoder, frames + 3 * frames[-1:]), dim=2)
        )
        decoded = torch.stack(walk(module.decoder, list(latents.unbind(2)))[3:], dim=2)
        torch.testing.assert_close(module.decode(latents, clamp=False), decoded)


def test_the_recipe_trains_the_demo_codec_and_it_is_small() -> None:
    recipe = Path(__file__).parents[1] / "recipes" / "demo-vae.toml"
    model = tomllib.loads(recipe.read_text(encoding="utf-8"))["model"]
    assert TinyAutoencoderConfig.from_dict(model) == TinyAutoencoderConfig.demo()
    with torch.device("meta"):
        module = TinyAutoencoder(TinyAutoencoderConfig.demo())
    assert sum(p.numel() for p in module.parameters()) < 1_000_000
    assert module.encode(torch.empty(2, 3, 29, 64, 128, device="meta")).shape == (2, 16, 8, 8, 16)


def test_a_config_survives_json_types_and_refuses_what_it_does_not_know() -> None:
    assert TinyAutoencoderConfig.from_dict(SMALL_FOLD.to_dict()) == SMALL_FOLD
    assert all(not isinstance(value, tuple) for value in SMALL_FOLD.to_dict().values())
    with pytest.raises(ValueError, match="did you mean 'patch_size'"):
        TinyAutoencoderConfig.from_dict({"patchsize": 2})
    with pytest.raises(ValueError, match="per stage"):
        dataclasses.replace(SMALL_FOLD, encoder_depths=(1,))
    with pytest.raises(ValueError, match="decoder makes"):
        dataclasses.replace(SMALL_FOLD, decoder_grows=(2, 2))
    with pytest.raises(ValueError, match="latents_std"):
        dataclasses.replace(SMALL_FOLD, latents_std=(1.0,))


# ---------------------------------------------------------------------------------------------- LR branch


def slow_lr_pixels(pixels: Tensor, previous: Tensor | None) -> Tensor:
    frames = []
    for frame in pixels.unbind(2):
        small = torch.zeros(*frame.shape[:2], frame.shape[2] // 4, frame.shape[3] // 4)
        for row in range(small.shape[2]):
            for column in range(small.shape[3]):
                cell = frame[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                small[:, :, row, column] = cell.mean((2, 3))
        frames.append(small)
    out = [frames.pop(0)] if previous is None else [previous[:, :, 0]]
    count = len(frames)
    for i in range(8):
        start, stop = i * count // 8, -(-(i + 1) * count // 8)
        out.append(torch.stack(frames[start:stop]).mean(0))
    return torch.stack(out, dim=2)


@pytest.mark.parametrize(("first", "later"), [(13, 16), (9, 12)], ids=["blocks of 4", "blocks of 3"])
def test_lr_pixels_equal_an_obvious_loop(first: int, later: int) -> None:
    previous: Tensor | None = None
    for index, frames in enumerate((first, later, later)):
        pixels = video(frames, 16, 8, batch=2, seed=index)
        pooled, last = lr_pixels(pixels, previous)
        assert (pooled.shape, last.shape) == ((2, 3, 9, 4, 2), (2, 3, 1, 4, 2))
        torch.testing.assert_close(pooled, slow_lr_pixels(pixels, previous))
        assert torch.equal(last, pooled[:, :, -1:])
        previous = last


def test_sixteen_frames_pool_in_exact_pairs() -> None:
    pixels = torch.arange(16.0)[None, None, :, None, None].expand(1, 3, 16, 4, 4)
    pooled, last = lr_pixels(pixels, torch.full((1, 3, 1, 1, 1), -1.0))
    assert pooled[0, 0, :, 0, 0].tolist() == [-1, 0.5, 2.5, 4.5, 6.5, 8.5, 10.5, 12.5, 14.5]
    assert float(last.max()) == 14.5


def test_lr_pixels_refuse_too_few_frames_and_another_size() -> None:
    with pytest.raises(ValueError, match="too short"):
        lr_pixels(video(1), None)
    with pytest.raises(ValueError, match="previous"):
        lr_pixels(video(16), torch.zeros(1, 3, 1, 2, 2))


@ALL
def test_lr_latents_of_832x480_are_2_by_15_by_26(make: Callable[[], Codec]) -> None:
    codec = make()
    pooled = video(9, 120, 208)
    assert encode_lr(codec, pooled).shape == (1, 4, 2, 15, 26)
    assert encode_lr(codec, pooled[..., :52, :100]).shape == (1, 4, 2, 6, 12)  # rounded down


def test_lr_latents_are_the_last_two_of_a_whole_encode(wan: WanCodec) -> None:
    pooled = video(9, 16, 32)
    for codec in (wan, TinyCodec(tiny(SMALL_FOLD)), TinyCodec(tiny(SMALL_TAEHV))):
        whole = encode_in_parts(codec, pooled, [9])
        assert whole.shape[2] == 3
        torch.testing.assert_close(encode_lr(codec, pooled), whole[:, :, 1:], rtol=1e-4, atol=1e-5)
