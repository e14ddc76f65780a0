"""Bits of headers, most significant first."""

from __future__ import annotations


class Irregular(Exception):
    """Packets of which their headers do not prove that each is one shown frame. The message is the reason, in some words."""


class Bits:
    """Reads a header bit by bit. Raises Irregular at its end, as headers of damaged files end early."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data), 8 * len(data)

    def u(self, count: int) -> int:
        """The next `count` bits as a number."""
        self._left -= count
        if self._left < 0:
            raise Irregular("a header that ends early")
        return (self._value >> self._left) & ((1 << count) - 1)

    def flag(self) -> bool:
        """The next bit."""
        return bool(self.u(1))

    def ue(self) -> int:
        """The next number as an unsigned Exp-Golomb code (ITU-T H.264, 9.1)."""
        zeros = 0
        while not self.u(1):
            zeros += 1
        return (1 << zeros) - 1 + self.u(zeros)

    def se(self) -> int:
        """The next number as a signed Exp-Golomb code."""
        code = self.ue()
        return (code + 1) // 2 if code % 2 else -(code // 2)
