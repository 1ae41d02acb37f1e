"""Pictures that look alike: a 64-bit perceptual hash, and the search for hashes that differ in few bits.

The hash is taken from the signs of low frequencies of the discrete cosine transform (the idea of pHash: Zauner 2010,
section 3.2.1). It survives another size, another JPEG quality and a touch of light; it does not survive mirroring,
rotation or a crop. Unlike pHash, the row and the column of frequency 0 are left out: they tell of a gradient of light
over the whole picture, which unrelated pictures share.

Legend: N hashes that are looked for, M hashes that are searched.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

HASH_KIND = "dct64-1"
"""Name of this way to hash; only hashes of one kind can be compared."""
NEAR_BITS = 8
"""Among the 2174 pictures of five sets (aquarium, blood cells, playing cards, everyday) every pair up to 10 bits shows
one scene twice; unrelated pictures begin at 12. Two cards that lie alike on one table are a pair too: it is the
picture that is compared, not what is labelled in it."""
SIDE = 32
FREQUENCIES = slice(1, 9)
COMPARED_AT_ONCE = 4_000_000  # pairs; bounds the memory to 32 MB

Hashes = NDArray[np.uint64]


@dataclass(frozen=True)
class Neighbours:
    """For each of N hashes the nearest of M, the first of equally near ones; 65 bits and row -1 where M is 0."""

    bits: NDArray[np.int64]  # (N,)
    row: NDArray[np.int64]  # (N,)


def perceptual_hash(image: NDArray[np.uint8]) -> int:
    """The hash of a picture, RGB (H, W, 3) or grey (H, W); 32 of its 64 bits are set unless the picture is plain.

    A bit says whether a frequency is stronger than the median of the 64 lowest ones.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if image.ndim == 3 else image
    small = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    strengths = cv2.dct(small)[FREQUENCIES, FREQUENCIES].ravel()
    bits = np.packbits(strengths > np.median(strengths))
    return int.from_bytes(bits.tobytes(), "big")


def nearest(hashes: Hashes, among: Hashes) -> Neighbours:
    """Compare every hash with every other: a million are searched for one in about 10 ms."""
    bits, row = np.full(len(hashes), 65, np.int64), np.full(len(hashes), -1, np.int64)
    if not len(among):
        return Neighbours(bits, row)
    rows_at_once = max(1, COMPARED_AT_ONCE // len(among))
    for first in range(0, len(hashes), rows_at_once):
        part = slice(first, first + rows_at_once)
        distances = np.bitwise_count(hashes[part, None] ^ among[None])  # (n, M)
        row[part] = distances.argmin(axis=1)
        bits[part] = distances.min(axis=1)
    return Neighbours(bits, row)


def hash_text(value: int) -> str:
    """A hash as 16 hexadecimal digits."""
    return f"{value:016x}"


def hashes_from_text(texts: list[str]) -> Hashes:
    """Hashes written by ``hash_text``, (N,)."""
    return np.array([int(text, 16) for text in texts], np.uint64)
