"""Parts of work that hosts share without a connection."""

import pytest

from dataloaders.ranks import Part


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/b", "1/0", "", "1/2/3", "-1/2"])
def test_an_impossible_part_is_one_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="--part is a number and their count, such as 2/3"):
        Part.parse(text)


def test_writers_of_parts_differ() -> None:
    assert Part.parse(None) == Part.parse("1/1") == Part()
    parts = [Part.parse(f"{number}/3") for number in (1, 2, 3)]
    assert len({part.writer(rank) for part in parts for rank in range(8)}) == 24
