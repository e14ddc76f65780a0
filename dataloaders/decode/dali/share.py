"""Which videos the CPU decodes while the GPU decodes the others, and which files are compared with PyAV: by a hash.

So the choice does not depend on the order of files, the ranks, or what is stored already.
"""

from __future__ import annotations

from hashlib import blake2b

from dataloaders.records import Media

COMPARED_EVERY = 2000
"""Files of which PyAV decodes one as well, to compare its frames with those of the GPU."""


def is_for_the_cpu(media: Media, share: float) -> bool:
    """Whether a video belongs to the CPU's share."""
    return _hash(media) < share * 2**64


def is_compared(media: Media) -> bool:
    """Whether PyAV decodes a file as well."""
    return _hash(media) % COMPARED_EVERY == 0


def _hash(media: Media) -> int:
    """64 bits of a file's name and clip, which all keys of the file have."""
    name = f"{media.path.name} {media.clip}".encode(errors="surrogateescape")
    return int.from_bytes(blake2b(name, digest_size=8).digest())
