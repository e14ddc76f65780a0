"""Reasons of other libraries' exceptions: whole sentences, on one line."""

from __future__ import annotations

import errno

import pytest

from dataloaders.errors import reason, sentence

WRAPPED = """Could not load libtorchcodec. Likely causes:
          1. FFmpeg is not properly installed in your environment. We support
             versions 4, 5, 6, 7, and 8.
          2. The PyTorch version is not compatible.
"""
VALIDATOR = (
    "Class validation error for validator 'validate_architecture':\n    ValueError: The hidden size (32) is odd."
)
FIELD = (
    "Validation error for field 'hidden_size':\n    TypeError: Field 'hidden_size' expected int, got str (value: '3')"
)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            RuntimeError(WRAPPED),
            "Could not load libtorchcodec. Likely causes: 1. FFmpeg is not properly installed in your environment. We "
            "support versions 4, 5, 6, 7, and 8",
        ),
        (ValueError("Short. " + "Long " * 40 + "end.\nMore"), "Short"),
        (ValueError("You need the\n'full' version"), "You need the 'full' version"),
        (ValueError(VALIDATOR), "The hidden size (32) is odd"),
        (ValueError(FIELD), "Field 'hidden_size' expected int, got str (value: '3')"),
        (ValueError("no way to owner/a\nand more"), "no way to owner/a and more"),
        (ValueError("One thing.\nAnother"), "One thing"),
        (ValueError("It ends:"), "It ends"),
        (ValueError("\n\n"), "ValueError"),
        (KeyError("added_tokens"), "'added_tokens'"),
        (OSError(errno.ENOSPC, "No space left on device", "f"), "No space left on device"),
    ],
)
def test_a_reason_is_a_whole_sentence(error: Exception, expected: str) -> None:
    assert reason(error) == expected


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "d/f"), "d/f: No space left on device"),
        (OSError(errno.EXDEV, "Cross-device link", "a", None, "b"), "a -> b: Cross-device link"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("text"), "text"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_an_error_of_the_system_is_printed_with_its_path(error: Exception, expected: str) -> None:
    assert sentence(error) == expected
