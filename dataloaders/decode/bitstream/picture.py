"""What the headers of one packet reveal about its picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, Protocol

Restart = Literal[0, 1, 2]
NOT: Final = 0
OPEN: Final = 1
CLEAN: Final = 2
"""Whether decoding can start at a picture. OPEN: it can, but pictures that follow it may refer to earlier ones and are shown
before it (HEVC's CRA). CLEAN: no later picture refers to an earlier one."""


@dataclass(frozen=True)
class Picture:
    """A packet that gives exactly one shown frame.

    restart    NOT, OPEN or CLEAN
    reference  other pictures of its temporal layer may refer to it
    leading    it follows an OPEN picture, is shown before it, and may refer to pictures before that (HEVC's RASL)
    layer      temporal layer; a picture that is no reference may be left out only in the highest one
    size       (width, height) in pixels, where the packet holds it
    hidden     why a decoder that counts decoded pictures counts others than those shown; empty where it does not
    """

    restart: Restart = NOT
    reference: bool = True
    leading: bool = False
    layer: int = 0
    size: tuple[int, int] | None = None
    hidden: str = ""


class HeaderReader(Protocol):
    """Reads the packets of one stream, in the order of decoding."""

    def read(self, data: bytes) -> Picture:
        """The picture of the next packet. Raises Irregular where its headers do not prove that it is one shown frame."""
