"""Stop strings: the same on any chunking as on the whole text, and nothing held back in vain."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pagedserve.text.stops import StopMatcher
from tests.text.counting import lines_run

letters = st.text("ab\n", max_size=40)
stops = st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=4)


def expected(text: str, wanted: list[str], include: bool) -> tuple[str, str | None]:
    """The rule, on the whole text: the stop that is complete first; of those, the longest."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in wanted if text.endswith(stop, 0, end)]
        if ended:
            found = max(ended, key=len)
            return text[:end] if include else text[: end - len(found)], found
    return text, None


def chunks(text: str, cuts: list[int]) -> list[str]:
    edges = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]


@given(letters, stops, st.lists(st.integers(0, 50)), st.booleans())
def test_any_chunking_gives_what_the_whole_text_gives(
    text: str, wanted: list[str], cuts: list[int], include: bool
) -> None:
    matcher = StopMatcher(wanted, include=include)
    shown = "".join(map(matcher.push, chunks(text, cuts)))
    if matcher.matched is None:
        shown += matcher.finish()
    assert (shown, matcher.matched) == expected(text, wanted, include)


@given(letters, stops)
def test_only_a_true_beginning_of_a_stop_is_held_back(text: str, wanted: list[str]) -> None:
    matcher, shown = StopMatcher(wanted), ""
    for at, char in enumerate(text):
        shown += matcher.push(char)
        if matcher.matched is not None:
            return
        held = text[len(shown) : at + 1]
        assert not held or any(stop.startswith(held) for stop in wanted)
        assert shown + held == text[: at + 1]


def test_a_stop_across_tokens_hides_everything_from_its_beginning() -> None:
    matcher = StopMatcher(["END"])
    assert [matcher.push(piece) for piece in ["so E", "N", "Demo"]] == ["so ", "", ""]
    assert matcher.matched == "END"
    assert matcher.push("more") == ""


def test_a_false_beginning_is_shown_as_soon_as_it_is_known_to_be_one() -> None:
    matcher = StopMatcher(["\n\n"])
    assert [matcher.push(piece) for piece in ["a\n", "b", "\n"]] == ["a", "\nb", ""]
    assert matcher.finish() == "\n"


def test_the_included_stop_is_the_last_thing_shown() -> None:
    matcher = StopMatcher(["."], include=True)
    assert matcher.push("One. Two.") == "One."


def test_the_worst_stops_cost_little() -> None:
    matcher = StopMatcher(["a" * 255 + chr(98 + at) for at in range(16)])
    matcher.push("a" * 300)

    def push(times: int) -> None:
        for _ in range(times):
            matcher.push("aaaa")

    # A character costs each stop the same few steps, however much was matched and thrown away.
    assert lines_run(lambda: push(400)) < 400 * 4 * 16 * 12
