"""What a batch decides before any model is loaded: names, seeds, identities, what goes on with what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packforcing_cli import batch_plan, manifest
from packforcing_cli.batch import Folder
from packforcing_cli.batch_plan import Template
from packforcing_cli.errors import UsageError
from packforcing_cli.ledger import Entry


def planned(jobs: list[Any], **options: Any) -> list[Entry]:
    lines = manifest.of_values(jobs, defaults={"model": "demo"})
    return batch_plan.plan_jobs(lines, **options)[0]


def names(jobs: list[Any], **options: Any) -> list[str]:
    return [entry.output for entry in planned(jobs, **options)]


def seeds(entries: list[Entry]) -> list[int]:
    return [entry.spec["request"]["seed"] for entry in entries]


def test_files_are_called_after_number_prompt_and_seed() -> None:
    assert names(
        [{"prompt": "A red circle!", "seed": 7}, {"prompt": "b", "seed": 8, "title": "Take two"}]
    ) == [
        "0001-A-red-circle-7.mp4",
        "0002-Take-two-8.mp4",
    ]


def test_a_template_may_make_folders_and_other_endings() -> None:
    template = Template("{seed:03d}/{slug}.mkv")
    assert names([{"prompt": "a b", "seed": 5}], template=template) == ["005/a-b.mkv"]


def test_names_that_are_one_file_on_some_system_get_numbers() -> None:
    jobs = [{"prompt": text, "seed": n} for n, text in enumerate(["é", "e\u0301", "É", "x" * 300, "X" * 299])]
    found = names(jobs, template=Template("{slug}"))
    assert found[:3] == ["é.mp4", "é-2.mp4", "É-3.mp4"]
    assert len({batch_plan.same_name(name) for name in found}) == 5
    assert found[3].startswith("x" * 150) and found[4].endswith("-2.mp4")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text(min_size=1).filter(lambda text: text.strip()), min_size=1, max_size=8),
    st.sampled_from(
        ["{slug}", "{slug}-{slug}", "{index}/{slug}", "ü{slug}", "{index:04d}-{slug}-{seed}.mov"]
    ),
)
def test_names_are_short_different_and_stay_inside(prompts: list[str], text: str) -> None:
    found = names(
        [{"prompt": prompt, "seed": n} for n, prompt in enumerate(prompts)], template=Template(text)
    )
    assert len({batch_plan.same_name(name) for name in found}) == len(prompts)
    for name in found:
        assert batch_plan.inside(name) == ""
        assert all(0 < len(part.encode()) <= 200 for part in name.split("/"))
        assert Path(name).suffix in batch_plan.CONTAINERS


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{slog}", "the nearest is {slug}"),
        ("{", "cannot be read"),
        ("../{slug}", "leads out"),
        ("/x/{slug}", "leads out"),
        ("~/{slug}", "leads out"),
        ("{index:s}", "format"),
        ("{slug:04d}", "not possible"),
        ("{seed!r}", "not possible"),
        (".packforcing/{slug}", "not for videos"),
        (" ", "empty"),
        ("{slug}.avi", "must end in .mp4, .mkv or .mov"),
        ("{slug}.WebM", "must end in"),
    ],
)
def test_a_template_that_is_not_possible_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Template(text)
    assert said in caught.value.message


@pytest.mark.parametrize(
    "output",
    ["../x.mp4", "/x.mp4", "a/../../x.mp4", "C:/x.mp4", "a\\..\\x.mp4", "x.avi", "x" * 250 + ".mp4"],
)
def test_an_output_that_leaves_the_folder_is_refused(output: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="line 1, column 1: output"):
        planned([{"prompt": "a", "output": output}], root=tmp_path)


def test_an_output_through_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/link").symlink_to(tmp_path)
    (tmp_path / "videos/file.mp4").symlink_to(tmp_path / "elsewhere.mp4")
    for output in ("link/x.mp4", "file.mp4"):
        with pytest.raises(UsageError, match="symbolic link"):
            planned([{"prompt": "a", "output": output}], root=tmp_path / "videos")


def test_two_jobs_for_one_file_are_refused() -> None:
    with pytest.raises(UsageError, match=r"output 'A\.mp4' is that of line 1, too"):
        planned([{"prompt": "a", "output": "a.mp4"}, {"prompt": "b", "output": "A.mp4"}])


@pytest.mark.parametrize(
    ("one", "other"), [("a.mp4", "./a.mp4"), ("q/b.mp4", "q//b.mp4"), ("q/b.mp4", "q/./B"), ("a", ".//a.mp4")]
)
def test_one_file_written_in_two_ways_is_one_file(one: str, other: str) -> None:
    with pytest.raises(UsageError, match="is that of line 1, too"):
        planned([{"prompt": "a", "output": one}, {"prompt": "b", "output": other}])
    assert names([{"prompt": "a", "output": ".//q//a.mp4"}]) == ["q/a.mp4"]


def test_a_template_with_needless_slashes_makes_the_same_names(tmp_path: Path) -> None:
    jobs = [{"prompt": "a", "output": "q/a.mp4"}, {"prompt": "a", "seed": 2}]
    assert names(jobs, template=Template("q//./{slug}")) == ["q/a.mp4", "q/a-2.mp4"]


@pytest.mark.parametrize(
    "job",
    [
        {"image": "~nobody-of-that-name/x.png"},
        {"image": "x" * 5000},
        {"model": "x" * 5000},
        {"frames": "~nobody-of-that-name/x"},
        {"lora": "~nobody-of-that-name/x:0.5"},
        {"timeline": "~nobody-of-that-name/x"},
    ],
)
def test_a_line_that_cannot_be_planned_fails_alone(job: dict[str, Any], tmp_path: Path) -> None:
    bad, good = planned([{"prompt": "a", **job}, "b"], root=tmp_path)
    assert bad.problem is not None and bad.problem.message
    assert (bad.output, good.problem) == ("0001-a-0.mp4" if not bad.load_key else bad.output, None)
    folder = Folder.open(tmp_path / "v")
    with folder.ledger as base:
        folder.add([bad, good], source="x")
        assert [row.status for row in base.rows()] == ["failed", "queued"]
        mended, good = planned([{"prompt": "a"}, "b"], there=base.rows())
        folder.add([mended, good], source="x", add=bool(bad.load_key))


def test_adapters_are_part_of_the_model_and_of_the_identity(tmp_path: Path) -> None:
    for part, text in zip(batch_plan.ADAPTERS, ("{}", "weights")):
        (tmp_path / part).write_text(text, encoding="utf-8")
    job = {"prompt": "a", "seed": 1}
    plain, added, weaker = planned(
        [job, {**job, "lora": str(tmp_path)}, {**job, "lora": [f"{tmp_path}:0.5"]}]
    )
    assert added.problem is None and weaker.problem is None
    assert added.spec["request"]["loras"] == [f"{tmp_path}:1.0"]
    assert len({plain.id, added.id, weaker.id}) == len({plain.load_key, added.load_key, weaker.load_key}) == 3
    (tmp_path / batch_plan.ADAPTERS[1]).write_text("others", encoding="utf-8")
    (other,) = planned([{**job, "lora": str(tmp_path)}])
    assert other.key == added.key and other.id != added.id and other.load_key != added.load_key
    (missing,) = planned([{**job, "lora": str(tmp_path / "none")}])
    assert missing.problem is not None and "there is no file" in missing.problem.message


def test_the_same_job_twice_is_made_once_and_said() -> None:
    job = {"prompt": "a", "seed": 1}
    lines = manifest.of_values([job, job], defaults={"model": "demo"})
    entries, notes = batch_plan.plan_jobs(lines)
    assert len(entries) == 1
    assert notes == ["line 2 asks for the same video as line 1: made once"]
    with pytest.raises(UsageError, match="in another file; give it another seed"):
        planned([job | {"output": "a"}, job | {"output": "b"}])


def test_seeds_that_nobody_gave_stay_when_the_manifest_changes() -> None:
    first = planned(["a", "b", "a"])
    assert len(set(seeds(first))) == 3
    assert seeds(planned(["new", "b", "a", "a"]))[1:] == [seeds(first)[n] for n in (1, 0, 2)]
    assert not set(seeds(planned(["a", "b", "a"], seed=1))) & set(seeds(first))


def test_an_identity_is_of_what_is_done_and_not_of_where_it_goes(tmp_path: Path) -> None:
    job: dict[str, Any] = {"prompt": "a", "seed": 1}
    (one,) = planned([job])
    for same in ({"output": "x.mp4"}, {"title": "t"}, {"frames": str(tmp_path)}, {"keep_run": False}):
        assert planned([job | same])[0].id == one.id, same
    for other in ({"seed": 2}, {"seconds": 3}, {"prompt": "b"}, {"top_k": 3}, {"crf": 3}, {"at": "0:05 x"}):
        assert planned([job | other])[0].id != one.id, other


def test_an_identity_has_the_contents_of_its_inputs_in_it(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    job = {"prompt": "a", "seed": 1, "image": str(image)}
    (missing,) = planned([job])
    assert missing.problem is not None and "there is no file" in missing.problem.message
    image.write_bytes(b"1")
    (first,) = planned([job])
    image.write_bytes(b"2")
    (second,) = planned([job])
    assert first.problem is None
    assert len({missing.id, first.id, second.id}) == 3
    assert missing.key == first.key == second.key


def test_a_job_whose_model_is_not_here_fails_alone() -> None:
    bad, good = planned([{"prompt": "a", "model": "nothing-like-it"}, "b"])
    assert bad.problem is not None and "no model is named" in bad.problem.message
    assert good.problem is None


def test_jobs_that_share_a_model_have_one_load_key(tmp_path: Path) -> None:
    plain, small, other = planned(["a", {"prompt": "b", "size": "64x64"}, {"prompt": "c", "dtype": "bf16"}])
    assert plain.load_key == small.load_key != other.load_key
    assert plain.layout_key != small.layout_key


def test_jobs_keep_their_names_when_the_manifest_grows(tmp_path: Path) -> None:
    folder = Folder.open(tmp_path / "videos")
    with folder.ledger as base:
        folder.add(planned([{"prompt": "a", "seed": 1}]), source="x")
        more = [{"prompt": "b", "seed": 2}, {"prompt": "a", "seed": 1}]
        assert names(more, there=base.rows()) == ["0001-b-2.mp4", "0001-a-1.mp4"]


def chain(**more: Any) -> list[dict[str, Any]]:
    """Three jobs, each with the video of the one before."""
    return [
        {"prompt": "a", "seed": 1, "output": "one.mp4", **more},
        {"source": "one.mp4", "seconds": 2, "output": "sub/two"},
        {"source": "sub/two.mp4", "seconds": 2, "seed": 3, "prompt": "c"},
    ]


def test_a_job_may_go_on_with_the_video_of_an_earlier_line(tmp_path: Path) -> None:
    first, second, third = planned(chain(), root=tmp_path)
    assert [entry.problem for entry in (first, second, third)] == [None] * 3
    assert [entry.after for entry in (first, second, third)] == ["", first.id, second.id]
    assert first.load_key == second.load_key == third.load_key
    written = chain()
    written[1]["source"] = str(tmp_path / "one.mp4")
    assert [entry.id for entry in planned(written, root=tmp_path)] == [first.id, second.id, third.id]
    (tmp_path / "one.mp4").write_bytes(b"made")  # as when the batch goes on
    assert planned(written, root=tmp_path)[1].id == second.id


def test_the_identity_of_a_job_has_that_of_the_one_it_goes_on_with_in_it(tmp_path: Path) -> None:
    plain, other = planned(chain(), root=tmp_path), planned(chain(crf=30), root=tmp_path)
    assert not {entry.id for entry in plain} & {entry.id for entry in other}
    image = tmp_path / "a.png"
    image.write_bytes(b"1")
    before = planned(chain(image=str(image)))
    image.write_bytes(b"2")
    after = planned(chain(image=str(image)))
    for one, changed in zip(before, after):
        assert one.key == changed.key and one.id != changed.id
    folder = Folder.open(tmp_path / "v")
    with folder.ledger as base:
        folder.add(before, source="x")
        folder.add(after, source="x")
        assert [row.after for row in base.rows()] == ["", after[0].id, after[1].id]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({0: {"output": "other.mp4"}, 2: {"output": "one.mp4"}}, "the output of line 3, which comes later"),
        ({1: {"output": "one.mp4"}, 0: {"output": "x.mp4"}}, "line 2, column 1: source 'one.mp4' is its own output"),
        ({2: {"source": "here.mp4"}, 0: {"output": "here.mp4"}}, r"write \./here.mp4 for the file, .*v/here.mp4"),
    ],
)  # fmt: skip
def test_sources_that_are_not_possible_are_told_before_anything_begins(
    change: dict[int, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here.mp4").write_bytes(b"mine")
    jobs = [job | change.get(number, {}) for number, job in enumerate(chain())]
    with pytest.raises(UsageError, match=said):
        planned(jobs, root=tmp_path / "v")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({0: {"image": "none.png"}}, "line 1, whose video it goes on with: there is no file"),
        ({0: {"keep_run": False}}, "line 1, whose video it goes on with, keeps no run folder"),
        ({1: {"from-time": "0:01"}}, "from_time is for videos made elsewhere; one.mp4 goes on from its run"),
    ],
)
def test_a_job_fails_with_the_reason_of_the_one_it_goes_on_with(
    change: dict[int, Any], said: str, tmp_path: Path
) -> None:
    _, second, third = planned([job | change.get(n, {}) for n, job in enumerate(chain())], root=tmp_path)
    assert second.problem is not None and said in second.problem.message
    assert third.problem is not None and third.problem.message.startswith("line 2, whose video it goes on")


def test_of_a_chain_only_the_line_that_is_to_blame_is_told(tmp_path: Path) -> None:
    jobs: list[dict[str, Any]] = [{"prompt": "a", "seed": 1, "output": "1.mp4", "image": "none.png"}]
    jobs += [{"source": f"{n}.mp4", "seconds": 2, "output": f"{n + 1}.mp4"} for n in range(1, 6)]
    problems = [entry.problem for entry in planned(jobs, root=tmp_path)]
    assert problems[0] is not None and problems[-1] is not None
    said = f"line 5, whose video it goes on with, comes after line 1: {problems[0].message}"
    assert problems[-1].message == said
