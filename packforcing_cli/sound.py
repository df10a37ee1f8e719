"""The sound of a file between two times, as packets for another file: copied where that can hold it, else AAC.

Knows nothing of pictures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
from av.container import InputContainer, OutputContainer

from packforcing_cli.ffmpeg import file_url

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.packet import Packet

_COPIED_SOUND = ("aac", "mp3", "ac3", "eac3", "alac")  # what all of video.CONTAINERS can hold


@dataclass(frozen=True)
class Sound:
    """The sound of a file between two times, in seconds of its own clock; it begins with the picture."""

    path: Path
    start: Fraction
    end: Fraction


@contextlib.contextmanager
def sound_packets(sound: Sound, writer: OutputContainer) -> Iterator[Iterator[Packet[AudioStream]]]:
    """Packets of the sound for a file that is not begun yet, their times counted from its start."""
    with av.open(file_url(sound.path)) as reader:
        stream = reader.streams.audio[0]
        if stream.codec_context.name in _COPIED_SOUND:
            yield _copied_sound(sound, reader, stream, writer.add_stream_from_template(stream))
        else:
            rate = stream.codec_context.sample_rate
            rate = rate if rate in (32000, 44100, 48000) else 48000
            layout = "mono" if stream.codec_context.channels == 1 else "stereo"
            encoder = writer.add_stream("aac", rate=rate, layout=layout)
            yield _encoded_sound(sound, reader, stream, encoder, av.AudioResampler("fltp", layout, rate))


def _copied_sound(
    sound: Sound, reader: InputContainer, stream: AudioStream, copy: AudioStream
) -> Iterator[Packet[AudioStream]]:
    with contextlib.suppress(av.FFmpegError):  # a damaged file: the sound ends there, as the picture does
        for packet in reader.demux(stream):
            if packet.pts is None or packet.time_base is None:
                continue
            time = packet.pts * packet.time_base
            if time >= sound.end:
                return
            if time >= sound.start:
                packet.pts = packet.dts = round((time - sound.start) / packet.time_base)
                packet.stream = copy
                yield packet


def _encoded_sound(
    sound: Sound,
    reader: InputContainer,
    stream: AudioStream,
    encoder: AudioStream,
    resampler: av.AudioResampler,
) -> Iterator[Packet[AudioStream]]:
    samples = 0
    with contextlib.suppress(av.FFmpegError):
        for frame in reader.decode(stream):
            if frame.time is None or not sound.start <= frame.time < sound.end:
                continue
            for piece in resampler.resample(frame):
                piece.pts, piece.time_base = samples, Fraction(1, piece.sample_rate)
                samples += piece.samples
                yield from encoder.encode(piece)
    yield from encoder.encode(None)
