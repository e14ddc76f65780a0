"""The tokenizers for all prompt tests."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from tests.text import llama_like


@pytest.fixture(scope="session", params=["first", "always"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return llama_like(request.param)
