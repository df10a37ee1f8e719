"""What a file says of itself: it survives the tags, and no tag can break the reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from packforcing_cli import provenance
from packforcing_cli.config import GenerateRequest, MemoryOptions
from packforcing_cli.errors import ConfigError, PackforcingError, UsageError
from packforcing_cli.provenance import ModelRecord, Provenance
from packforcing_cli.timeline import Timeline, parse_at, parse_pins

TIMELINE = Timeline(parse_at([("0:03", "b [blend 1s]")]), parse_pins(["0:01-0:02"]))
REQUEST = GenerateRequest(
    prompt='a "quoted" café 円',
    seed=3,
    size=(64, 64),
    image=Path("first.png"),
    memory=MemoryOptions(top_k=4, bank=None),
    timeline=TIMELINE,
)
MADE = Provenance(
    version="1.2",
    request=REQUEST.to_values(),
    model=ModelRecord(name="tiny", version="0", files={"a/b": "0" * 64}),
    layout={"top_k": 4},
)


def test_a_request_survives_the_tags_whatever_case_they_come_back_in() -> None:
    tags = MADE.tags()
    assert (tags["prompt"], tags["seed"], tags["model"], tags["version"]) == (
        REQUEST.prompt,
        "3",
        "tiny",
        "1.2",
    )
    for names in (str, str.upper):
        found = provenance.from_tags({names(name): text for name, text in tags.items()}, source="x")
        assert found == MADE
        assert found.generate_request() == REQUEST
        assert found.generate_request().memory.model_fields_set == {"top_k", "bank"}


def test_changes_win_and_wrong_ones_are_refused() -> None:
    changed = MADE.generate_request({"seed": 5, "select": "fifo", "prompt": "c"})
    assert (changed.seed, changed.prompt, changed.memory.select, changed.memory.top_k) == (5, "c", "fifo", 4)
    assert changed.timeline == TIMELINE
    for wrong in ({"seed": -1}, {"selct": "fifo"}):
        with pytest.raises(ConfigError):
            MADE.generate_request(wrong)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "does not say how it was made"),
        ("{", "damaged: not JSON"),
        ("[" * 100_000, "damaged"),
        ("[]", "damaged"),
        ('{"schema": 2}', "newer packforcing"),
        ('{"schema": 1}', "damaged: field required"),
    ],
)
def test_what_cannot_be_read_is_one_message(text: str | None, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        provenance.from_tags({} if text is None else {"packforcing": text}, source="clip.mp4")
    assert "clip.mp4" in caught.value.message and caught.value.hint


def mutations() -> st.SearchStrategy[str]:
    """Anything, JSON of anything, and real metadata with one value replaced by anything."""
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
        max_leaves=8,
    )
    whole = MADE.model_dump(mode="json", by_alias=True)
    top, inner = st.sampled_from(sorted(whole)), st.sampled_from([*REQUEST.to_values(), "more"])
    other = st.builds(lambda name, value: {**whole, name: value}, top, anything)
    deep = st.builds(
        lambda name, value: {**whole, "request": {**whole["request"], name: value}}, inner, anything
    )
    return st.text(max_size=100) | (anything | other | deep).map(json.dumps)


@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mutations())
def test_any_metadata_gives_a_request_or_one_error(text: str) -> None:
    try:
        request = provenance.from_tags({"packforcing": text}, source="x").generate_request()
    except PackforcingError:
        return
    assert GenerateRequest.from_values(request.to_values()) == request
