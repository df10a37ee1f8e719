"""A model is loaded while its prompts are encoded: in which order, with which errors, and to the same numbers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from packforcing_cli import jobs, registry, rollout, weights
from packforcing_cli.ahead import Ahead
from packforcing_cli.config import GenerateRequest
from packforcing_cli.embeddings import EmbeddingCache
from packforcing_cli.errors import WeightsError
from packforcing_cli.planner import Machine, plan
from packforcing_cli.prompts import encode_script
from packforcing_cli.registry import ModelSource
from packforcing_cli.weights import weight_files

GB = 10**9
LONG = 60.0  # seconds after which a test that waits for another thread has failed


@pytest.fixture(autouse=True)
def cold_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No prompt is known."""
    monkeypatch.setattr(EmbeddingCache, "of_user", lambda: EmbeddingCache(tmp_path / "embeddings"))


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return registry.open_model("demo", device="cpu")


@pytest.fixture
def job(tmp_path: Path) -> jobs.Job:
    request = GenerateRequest(
        prompt="a red circle", model="demo", device="cpu", seconds=1, output=tmp_path / "a.mp4", seed=0
    )
    return jobs.prepare(request)


class Recorder:
    """A source that notes when its parts begin and end; `during` runs as the model is loaded, `text` as the encoder."""

    def __init__(self, source: ModelSource) -> None:
        self.events: list[str] = []
        self.loading = threading.Event()
        self.during: Callable[[Callable[[], None]], None] = lambda _: None
        self.text: Callable[[], None] = lambda: None
        self._source = source

    def made(self) -> ModelSource:
        def load(*, check: Callable[[], None] = lambda: None) -> Any:
            self.events.append("load")
            self.loading.set()
            self.during(check)
            model = self._source.load(check=check)
            self.events.append("loaded")
            return model

        def load_text_encoder() -> Any:
            self.events.append("text")
            self.text()
            encoder = self._source.load_text_encoder()
            self.events.append("encoded")
            return encoder

        def read_ahead(check: Callable[[], None]) -> None:
            self._source.read_ahead(check)
            self.events.append("read")
            self.loading.set()

        return replace(self._source, load=load, load_text_encoder=load_text_encoder, read_ahead=read_ahead)


# -- the plan -----------------------------------------------------------------------------------------------------


def test_a_model_is_loaded_beside_the_text_encoder_only_where_that_takes_no_more_than_the_video() -> None:
    """UMT5-XXL has 11.4 GB in bf16, the transformer of 1.3B with its VAE 3.1; files may be of fp32. Five seconds take
    14 GB, a minute 16.6 GB."""
    request = GenerateRequest(prompt="a", model="wan2.1-1.3b", seconds=60)
    large = Machine(80 * GB, device="cuda:0", host_bytes=64 * GB)

    def loading(machine: Machine | None, **changes: Any) -> str:
        return plan(request.changed(**changes), machine).loading

    assert loading(large) == "beside"
    assert loading(large, seconds=5) == "read"
    assert loading(large, seconds=5, quantize_text="int8") == "beside"
    assert (
        loading(replace(large, memory_bytes=15 * GB)) == "read"
    )  # it does not fit at all, which is said elsewhere
    assert loading(replace(large, host_bytes=5 * GB), seconds=5) == "after"
    assert loading(large, offload="all") == "after"
    assert loading(large, seconds=5, offload="text") == "beside"  # the encoder is in host memory
    assert loading(Machine(64 * GB)) == "beside"
    assert loading(Machine(64 * GB), seconds=5) == "after"  # without a GPU there is no other memory
    assert loading(None) == "after"
    assert loading(large, embeddings=Path("p.safetensors")) == "after"


# -- the order ----------------------------------------------------------------------------------------------------


def test_the_text_encoder_works_while_the_model_is_loaded_and_the_video_is_the_same(
    source: ModelSource, job: jobs.Job
) -> None:
    """Neither could end if it began after the end of the other."""
    text = threading.Event()
    found = Recorder(source)

    def begun() -> None:
        text.set()
        check_set(found.loading)

    found.during, found.text = lambda _: check_set(text), begun
    assert job.plan.loading == "beside"
    with jobs.Loading(job, found.made()) as loading:
        story, model = loading.story(), loading.model()
    assert sorted(found.events[:2]) == ["load", "text"]
    plain = source.load()
    expected = encode_script(
        source,
        job.plan.script,
        guided=jobs.schedule_of(job, source).guidance != 1,
        cache=EmbeddingCache(job.path.parent / "2"),
    )
    blocks = [
        [block.latents for block in rollout.stream_generate(m, s, num_blocks=2, seed=0)]
        for m, s in ((model, story), (plain, expected))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*blocks, strict=True))
    assert len(blocks[0]) == 2


def check_set(event: threading.Event) -> None:
    assert event.wait(LONG)


@pytest.mark.parametrize(
    ("how", "events"),
    [
        ("after", ["text", "encoded", "load", "loaded"]),
        ("read", ["text", "read", "encoded", "load", "loaded"]),
    ],
)
def test_without_room_the_model_is_loaded_when_the_encoder_is_gone(
    how: str, events: list[str], source: ModelSource, job: jobs.Job
) -> None:
    found = Recorder(source)
    made = found.made()
    if how == "read":  # the files are read meanwhile
        begun = threading.Event()

        def text() -> None:
            begun.set()
            check_set(found.loading)

        def read_ahead(check: Callable[[], None], read: Any = made.read_ahead) -> None:
            check_set(begun)
            read(check)

        found.text, made = text, replace(made, read_ahead=read_ahead)
    with jobs.Loading(job, made, how=how) as loading:
        loading.story()
        assert "load" not in found.events
        loading.model()
    assert found.events == events


def test_reading_ahead_reads_every_file_of_the_parts_and_can_be_ended(
    source: ModelSource, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "AHEAD_BYTES", 1000)
        checks: list[int] = []
        source.read_ahead(lambda: checks.append(1))
        parts = ("transformer", "vae")
        sizes = [file.stat().st_size for part in parts for file in weight_files(source.folder / part)]
        assert len(checks) == sum(-(-size // 1000) for size in sizes)

        def enough() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            source.read_ahead(enough)
    with pytest.raises(WeightsError, match="holds no"):
        weights.read_ahead(tmp_path, lambda: None)


# -- errors -------------------------------------------------------------------------------------------------------


def test_an_error_of_the_loading_is_raised_as_it_is_when_the_model_is_asked_for(
    source: ModelSource, job: jobs.Job
) -> None:
    found = Recorder(source)

    def damaged(_: Callable[[], None]) -> None:
        raise WeightsError("the file is torn", hint="Download it again.")

    found.during = damaged
    with jobs.Loading(job, found.made()) as loading:
        assert loading.story().prompts[0].text == "a red circle"
        with pytest.raises(WeightsError, match="the file is torn") as caught:
            loading.model()
    assert (caught.value.exit_code, caught.value.hint) == (7, "Download it again.")


@pytest.mark.parametrize("error", [WeightsError("no such words"), KeyboardInterrupt()])
def test_when_the_prompts_fail_or_somebody_stops_the_loading_ends_too(
    error: BaseException, source: ModelSource, job: jobs.Job
) -> None:
    found = Recorder(source)

    def until_told(check: Callable[[], None]) -> None:
        for _ in range(int(LONG * 1000)):
            check()
            threading.Event().wait(0.001)

    def fail() -> None:
        check_set(found.loading)
        raise error

    found.during, found.text = until_told, fail
    with pytest.raises(type(error)), jobs.Loading(job, found.made()) as loading:
        loading.story()
    assert found.events[-1] != "loaded"


@pytest.mark.parametrize("where", ["during", "text"])
def test_where_memory_runs_out_all_the_same_it_is_done_one_after_the_other(
    where: str, source: ModelSource, job: jobs.Job, caplog: pytest.LogCaptureFixture
) -> None:
    found = Recorder(source)

    def full(*_: object) -> None:
        setattr(found, where, lambda *_: None)
        check_set(found.loading)
        raise torch.OutOfMemoryError("out of memory")

    setattr(found, where, full)
    with jobs.Loading(job, found.made()) as loading:
        loading.story()
        assert loading.model().name == "demo"
    assert "memory ran out with the model beside the text encoder" in caplog.text
    assert found.events.count("encoded") == 1
    assert found.events[-1] == "loaded"


def test_a_call_gives_its_result_once_and_its_error_to_who_asks() -> None:
    with Ahead(lambda _: 7, name="seven") as ahead:
        assert ahead.result() == 7

    def fails(_: Callable[[], None]) -> int:
        raise ValueError("no")

    with Ahead(fails, name="fails") as ahead, pytest.raises(ValueError, match="no"):
        ahead.result()
    with Ahead(fails, name="nobody asks"):
        pass
