"""Which videos the CPU decodes while the GPU decodes the others, so that neither waits."""

from __future__ import annotations

from hashlib import blake2b

from dataloaders.records import Media


def is_for_the_cpu(media: Media, share: float) -> bool:
    """Whether a video belongs to the CPU's share, by a hash of its file name and clip, which all keys of a file have.

    So the choice does not depend on the order of files, the ranks, or what is stored already.
    """
    digest = blake2b(f"{media.path.name} {media.clip}".encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64
