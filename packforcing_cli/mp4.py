"""The boxes of an MP4 file (ISO 14496-12), as bytes: those of a part file's blocks, its header, its owner.

Knows nothing of codecs and frames; `video` draws what a part file is made of.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator


def _boxes(
    data: bytes | bytearray, start: int = 0, end: int | None = None
) -> Iterator[tuple[bytes, int, int]]:
    """Yield (type, start, end) of the boxes in data[start:end]; a torn last one is left out."""
    stop = len(data) if end is None else end
    while start + 8 <= stop:
        size, kind = struct.unpack_from(">I4s", data, start)
        if size == 1 and start + 16 <= stop:
            (size,) = struct.unpack_from(">Q", data, start + 8)
        if size < 8 or start + size > stop:
            return
        yield kind, start, start + size
        start += size


def split(data: bytes) -> tuple[bytes, bytes]:
    """What a fragmented MP4 begins with, and its fragments."""
    header: list[bytes] = []
    fragment: list[bytes] = []
    for kind, start, end in _boxes(data):
        (fragment if kind in (b"moof", b"mdat") else header).append(data[start:end])
    return b"".join(header), b"".join(fragment)


def parameter_sets(header: bytes) -> bytes | list[bytes]:
    """What a decoder is set up with: the avcC box, or the sets in a hvcC box (ISO 14496-15).

    Muxers write the rest of a hvcC differently.
    """
    at = header.index(b"avcC" if b"avcC" in header else b"hvcC") - 4
    box = header[at : at + int.from_bytes(header[at : at + 4])]
    if box[4:8] == b"avcC":
        return box
    found, at = [], 8 + 23
    for _ in range(box[8 + 22]):
        kind, count, at = box[at] & 0x3F, int.from_bytes(box[at + 1 : at + 3]), at + 3
        for _ in range(count):
            size = int.from_bytes(box[at : at + 2])
            if kind in (32, 33, 34):  # VPS, SPS, PPS
                found.append(box[at + 2 : at + 2 + size])
            at += 2 + size
    return found


def place_fragment(fragment: bytearray, *, number: int, start: int) -> None:
    """Set the sequence number (mfhd) and the start time in ticks (tfdt, 64 bit) of a fragment, in place."""
    placed = set()
    children = [
        child
        for kind, first, last in _boxes(fragment)
        if kind == b"moof"
        for child in _boxes(fragment, first + 8, last)
    ]
    for kind, first, last in children:
        if kind == b"mfhd":
            struct.pack_into(">I", fragment, first + 12, number)
            placed.add(kind)
        if kind == b"traf":
            for leaf, position, _ in _boxes(fragment, first + 8, last):
                if leaf == b"tfdt":
                    assert fragment[position + 8] == 1  # version 1: 64 bit
                    struct.pack_into(">Q", fragment, position + 12, start)
                    placed.add(leaf)
    assert placed == {b"mfhd", b"tfdt"}, placed


def _fragment_facts(moof: bytes) -> tuple[int, int, int] | None:
    """(sequence number, start time in ticks, frames) of a moof box; None if it is not whole."""
    number, start, frames = 0, -1, 0
    for kind, first, last in _boxes(moof):
        if kind != b"moof":
            return None
        for child, at, end in _boxes(moof, first + 8, last):
            if child == b"mfhd":
                (number,) = struct.unpack_from(">I", moof, at + 12)
            for leaf, position, _ in _boxes(moof, at + 8, end) if child == b"traf" else ():
                if leaf == b"tfdt":
                    (start,) = struct.unpack_from(">Q", moof, position + 12)
                if leaf == b"trun":
                    (count,) = struct.unpack_from(">I", moof, position + 12)
                    frames += count
    return (number, start, frames) if start >= 0 and frames else None


def owner_box(owner: str) -> bytes:
    """A box that players skip, saying whose part this is; nothing without an owner."""
    text = owner.encode()
    return struct.pack(">I4s", 8 + len(text), b"free") + text if text else b""


def whole_blocks(fd: int, start: int, *, frame_ticks: int) -> Iterator[tuple[int, int]]:
    """Yield (where it ends, frames) of the whole, opened blocks of a part file, which begin at `start`."""
    size, number, frames = os.fstat(fd).st_size, 1, 0
    while True:
        os.lseek(fd, start, os.SEEK_SET)
        head = os.read(fd, 24)
        if len(head) < 24 or head[:8] != b"\0\0\0\x10free" or head[20:] != b"moof":
            return
        end = start + int.from_bytes(head[8:16])
        os.lseek(fd, start + 16, os.SEEK_SET)
        moof = os.read(fd, int.from_bytes(head[16:20]))
        found = _fragment_facts(moof)
        if end > size or not found or found[:2] != (number, frames * frame_ticks):
            return
        os.lseek(fd, start + 16 + len(moof), os.SEEK_SET)
        mdat = os.read(fd, 8)
        if mdat[4:] != b"mdat" or start + 16 + len(moof) + int.from_bytes(mdat[:4]) != end:
            return
        yield end, found[2]
        start, number, frames = end, number + 1, frames + found[2]
