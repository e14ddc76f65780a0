"""Events in captioning answers: what is read, what is left out, and what is merged."""

from __future__ import annotations

import json
import random

import pytest

from pite.evaluate.captioning.answers import Caption, Event, captions, merge, parse

RUN, JUMP = Event("A man runs.", 5, 31), Event("He jumps.", 32, 99)
LIST = json.dumps(
    [
        {"event": "A man runs.", "timestamps": "from 05 to 31"},
        {"event": "He jumps.", "timestamps": "from 32 to 99"},
    ]
)
FIRST, SECOND = LIST[1:-1].split("}, ")[0] + "}", LIST[1:-1].split("}, ")[1]


@pytest.mark.parametrize(
    ("answer", "events"),
    [
        (LIST, (RUN, JUMP)),
        (f"Here are the events:\n{LIST} I hope it helps.", (RUN, JUMP)),
        ("[]", ()),
        ("[" + FIRST + ', "x"]', (RUN,)),
        ('[{"event": "A", "timestamps": "from 5 to 150"}]', (Event("A", 5, 50),)),
        ('[{"event": "A", "timestamps": "frames 5 to 31"}]', ()),
        ('[{"event": "A", "timestamps": [5, 31]}]', ()),
        ('[{"timestamps": "from 05 to 31"}]', ()),
    ],
)
def test_published_reads_a_list_up_to_its_first_fault(answer: str, events: tuple[Event, ...]) -> None:
    found = parse(answer, "published")
    assert found.events == events and found.whole


@pytest.mark.parametrize(
    "answer", ["", "I do not know.", LIST[:-5], LIST.replace(", {", ",\n{"), f"{LIST} [see above]"]
)
def test_published_reads_nothing_else(answer: str) -> None:
    found = parse(answer, "published")
    assert not found.events and not found.whole


@pytest.mark.parametrize(
    ("answer", "whole"),
    [
        (LIST, True),
        (LIST.replace(", {", ",\n{"), True),
        (f"```json\n{LIST}\n```", True),
        (LIST[:-1], False),
        (LIST[:-1] + ', {"event": "A do', False),
        (f"{FIRST}\n{SECOND}", False),
        ('{"events": ' + LIST + "}", True),
        (f"[1] {LIST}", False),
        (f"{{{{ {FIRST}, {SECOND}", False),
    ],
)
def test_strict_reads_every_whole_event(answer: str, whole: bool) -> None:
    found = parse(answer, "strict")
    assert found.events == (RUN, JUMP) and found.whole == whole and not found.faults


@pytest.mark.parametrize(
    ("timestamps", "frames"),
    [
        ("from 05 to 31", (5, 31)),
        ("from 5 to 31", (5, 31)),
        ("from 5 to 150", (5, 150)),
        ("5-31", (5, 31)),
        ("From frame 31 to frame 5.", (31, 5)),
        ("from 05", None),
        ("", None),
        ("from 1 to 2 to 3", None),
        ("from 0.5 to 3.1", None),
        ("from 1000 to 31", None),
        (31, None),
        (None, None),
    ],
)
def test_strict_reads_one_to_three_digits(timestamps: object, frames: tuple[int, int] | None) -> None:
    found = parse(json.dumps([{"event": "A", "timestamps": timestamps}]), "strict")
    assert found.events == (() if frames is None else (Event("A", *frames),))
    assert found.faults == (frames is None)


def test_neighbours_that_repeat_and_touch_are_merged() -> None:
    one = "A man in a blue shirt runs along the beach at sunset while he talks to a friend of his."
    near, other = one.replace("beach", "beech"), one.replace("blue shirt", "red coat")
    events = [Event(one, 0, 9), Event(near, 10, 19), Event(one, 21, 29), Event(one, 28, 40), Event(other, 40, 50)]
    assert merge(events) == [Event(one, 0, 19), Event(one, 21, 40), Event(other, 40, 50)]
    assert merge([]) == []


def test_the_last_frame_ends_with_the_video() -> None:
    assert captions([RUN, JUMP], 50.0, 100) == [Caption("A man runs.", 2.5, 16.0), Caption("He jumps.", 16.0, 50.0)]
    assert captions([Event("A", 0, 7)], 24.0, 8) == [Caption("A", 0.0, 24.0)]


def test_no_answer_breaks_the_parsers() -> None:
    """Cut, repeated and shuffled pieces of answers: each event that is found stands in the answer."""
    rng = random.Random(0)
    pieces = [*LIST, FIRST, SECOND, "[", "]", "{", "}", '"', "\\", "event", "from 05 to 31", "\n", "é", "[" * 2000]
    for _ in range(2000):
        answer = "".join(rng.choices(pieces, k=rng.randrange(12)))
        for protocol in ("published", "strict"):
            for event in parse(answer, protocol).events:
                assert f"{event.start:02}" in answer and f"{event.end:02}" in answer


def test_what_is_written_is_read_again() -> None:
    pytest.importorskip("hypothesis")
    from hypothesis import given, settings
    from hypothesis import strategies as st

    frames = st.integers(0, 99)
    events = st.lists(st.builds(Event, st.text(), frames, frames), max_size=4)
    # Prose without brackets, which may begin a list or an object.
    prose = st.text(alphabet=st.characters(exclude_characters="[]{}\r\n"))

    @settings(max_examples=200, deadline=None, database=None)
    @given(events, prose, prose)
    def read_again(written: list[Event], before: str, after: str) -> None:
        items = [{"event": e.sentence, "timestamps": f"from {e.start:02} to {e.end:02}"} for e in written]
        text = f"{before}{json.dumps(items)}{after}"
        for protocol in ("published", "strict"):
            found = parse(text, protocol)
            assert found.events == tuple(written) and found.whole and not found.faults

    @settings(max_examples=200, deadline=None, database=None)
    @given(st.text())
    def any_text(text: str) -> None:
        for protocol in ("published", "strict"):
            assert len(parse(text, protocol).events) <= text.count("{")

    read_again()
    any_text()
