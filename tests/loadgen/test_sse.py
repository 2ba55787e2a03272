"""Events are the same however their bytes are cut."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loadgen.sse import EventSplitter

LINES = st.sampled_from(
    ["data: {}", "data:{}", "data: a b", "data:", ": a comment", "event: x", "id: 3", ""]
)


def reference(text: str) -> list[bytes]:
    """Line by line, as the HTML standard has it, but that an event without a `data` is none."""
    events, lines = [], []
    for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")[:-1]:
        if line:
            lines.append(line)
            continue
        data = [part[5:].removeprefix(" ") for part in lines if part.startswith("data:")]
        if data:
            events.append("\n".join(data).encode())
        lines = []
    return events


@given(st.lists(LINES), st.sampled_from(["\n", "\r\n", "\r"]), st.data())
def test_events_are_the_same_however_their_bytes_are_cut(lines, newline, data):
    text = "".join(line + newline for line in [*lines, "", "data: end", "", "data: half"])
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    splitter, found = EventSplitter(), []
    for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True):
        found += splitter.feed(raw[start:end])
    assert found == reference(text)
