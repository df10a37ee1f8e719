"""What a file says of itself: it survives the tags, and no tag can break the reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def again(made: Provenance = MADE, request: GenerateRequest = REQUEST, **values: Any) -> Provenance:
    """The same video made again, with other values."""
    return made.model_copy(update={"request": request.to_values(), **values})


def test_what_is_no_longer_as_it_was_is_named_and_what_was_asked_for_is_not() -> None:
    hashes = {"start image": "1", "pinned picture 1": "2", "pinned picture 2": "3", "embeddings": "4"}
    layout = {"top_k": 4, "mid_span": "1"}
    request = REQUEST.changed(pin_images=("a.png", "b.png"), embeddings="texts")
    made = again(request=request, files_sha256=hashes, libraries={"torch": "2.9"}, layout=layout)
    assert provenance.changes(made, made) == []
    now = again(
        made,
        request,
        version="1.3",
        model=made.model.model_copy(update={"files": {"a/b": "1" * 64}}),
        files_sha256={**hashes, "pinned picture 2": "5", "embeddings": "6"},
        libraries={"torch": "2.10", "diffusers": "1"},
        layout={"top_k": 4, "mid_span": "1/2", "more": 1},
    )
    named = [
        "the weights of tiny 0",
        "the pinned picture 2",
        "the embeddings",
        "the memory's mid_span: 1 then, 1/2 here",
        "packforcing 1.2, here 1.3",
        "torch 2.9, here 2.10",
    ]
    assert provenance.changes(made, now) == named
    asked = again(
        now, request.changed(embeddings="other", memory=MemoryOptions(top_k=4, bank=None, mid_span="1/2"))
    )
    assert provenance.changes(made, asked) == [named[0], named[1], *named[4:]]
    other_model = again(now, request, model=ModelRecord(name="large", version="1"))
    assert provenance.changes(made, other_model) == [*named[1:3], *named[4:]]


def test_a_file_of_an_older_version_says_less_and_is_read() -> None:
    values = MADE.model_dump(mode="json", by_alias=True)
    for name in ("files_sha256", "libraries"):
        del values[name]
    old = provenance.from_tags({"packforcing": json.dumps({**values, "image_sha256": "1"})}, source="x")
    now = again(files_sha256={"start image": "2", "pinned picture 1": "3"}, libraries={"torch": "2"})
    assert provenance.changes(old, now) == ["the start image"]


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
