"""What a user may set: defaults, checks with a next step, and where values come from."""

from __future__ import annotations

import ast
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from packforcing_cli import config, selection
from packforcing_cli.config import GenerateRequest, MemoryOptions, PlanRequest
from packforcing_cli.errors import ConfigError
from packforcing_cli.layout import Grid

DEMO = Grid(4, rows=4, cols=8, layers=6, kv_dim=192, heads=3)


def test_the_defaults_are_those_of_the_design() -> None:
    memory = MemoryOptions()
    assert (memory.policy, memory.select) == ("packforcing", "affinity-recent")
    assert (memory.sink_blocks, memory.recent_blocks, memory.top_k, memory.bank) == (2, 1, 16, 256)
    assert (memory.mid_span, memory.compressor, memory.compressed_context) == (None, "auto", "sinks")
    request = GenerateRequest(prompt="a red circle")
    assert (request.model, request.crf, request.device, request.overwrite) == ("auto", 18, "auto", False)
    assert PlanRequest().model == "demo"
    assert (request.seed, request.steps, request.guidance, request.size) == (None, None, None, None)


def test_the_selections_are_those_of_the_selection_module() -> None:
    assert config.SELECTIONS == selection.MODES


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"seconds": -1}, "--seconds -1: must be above 0 and at most 86400"),
        ({"seconds": 0}, "must be above 0"),
        ({"seconds": float("nan")}, "--seconds nan: must be above 0"),
        ({"seconds": float("inf")}, "must be above 0"),
        ({"seconds": 1e12}, "at most 86400"),
        ({"seconds": "soon"}, "--seconds soon: input should be a valid number"),
        ({"size": "832"}, "--size 832: is not WIDTHxHEIGHT"),
        ({"size": "-16x480"}, "is not WIDTHxHEIGHT"),
        ({"size": "99999x480"}, "width and height must be 1 to 8192 pixels"),
        ({"seed": -1}, "--seed -1: "),
        ({"seed": 2**63}, "--seed"),
        ({"steps": 0}, "--steps 0: "),
        ({"guidance": float("nan")}, "--guidance nan: "),
        ({"crf": 52}, "--crf 52: "),
        ({"device": "gpu"}, "--device gpu: is unknown"),
        ({"device": "cpu:1"}, "--device cpu:1: is unknown"),
        ({"dtype": "bf61"}, "--dtype bf61: must be one of .*did you mean bf16"),
        ({"prompt": "  \n"}, "PROMPT: is empty"),
        ({"model": ""}, "--model : is empty"),
        ({"frames_per_block": 0}, "--frames-per-block 0: "),
        ({"secnds": 3}, "unknown setting 'secnds'; the nearest known one is 'seconds'"),
    ],
)
def test_a_wrong_request_is_one_message_with_the_value(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        GenerateRequest(**{"prompt": "a red circle", **values})
    assert "\n" not in error.value.message
    assert error.value.hint or "nearest known" in error.value.message


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"policy": "windw"}, "--policy windw: must be one of .*did you mean window"),
        ({"select": "affinty"}, "--select affinty: must be one of .*did you mean affinity"),
        ({"compressor": "zip"}, "--compressor zip: must be one of"),
        ({"compressed_context": "all"}, "--compressed-context all"),
        ({"top_k": -1}, "--top-k -1"),
        ({"top_k": 2.5}, "--top-k 2.5"),
        ({"bank": 0}, "--bank 0"),
        ({"bank": "many"}, "--bank many"),
        ({"mid_span": "0"}, "--mid-span 0: must be a number above 0, block or fit"),
        ({"mid_span": "1/0"}, "--mid-span 1/0"),
        ({"mid_span": "nan"}, "--mid-span nan"),
        ({"kv_dtype": "int4"}, "--kv-dtype int4: must be one of auto, bf16, fp8, int8"),
        ({"bank_memory": "much"}, "--bank-memory much: must be a size such as 8GB"),
        ({"bank_memory": "8iB"}, "--bank-memory 8iB"),
        ({"bank_memory": "0"}, "--bank-memory 0"),
        ({"bank_memory": "-1GB"}, "--bank-memory -1GB"),
        ({"bank_device": "disk"}, "--bank-device disk: must be one of auto, device, host"),
        ({"tpo_k": 1}, "unknown setting 'tpo_k'; the nearest known one is 'top_k'"),
    ],
)
def test_a_wrong_memory_option_is_one_message_with_the_value(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        MemoryOptions(**values)
    with pytest.raises(ConfigError, match=said):
        PlanRequest(memory=values)  # type: ignore[arg-type]


def test_requests_are_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        PlanRequest().seconds = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "span"),
    [
        (None, Fraction(1)),
        ("fit", "fit"),
        ("block", Fraction(4)),
        ("9/16", Fraction(9, 16)),
        ("0.5", Fraction(1, 2)),
    ],
)
def test_mid_span_is_a_number_a_word_or_the_models_own(text: str | None, span: Any) -> None:
    assert MemoryOptions(mid_span=text).span(4, default=Fraction(1)) == span


def test_bank_may_be_unlimited() -> None:
    assert MemoryOptions(bank="unlimited").bank is None  # type: ignore[arg-type]
    assert MemoryOptions(bank="32").bank == 32  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 << 29), ("2T", 2 * 10**12), ("4096", 4096)],
)
def test_a_size_of_memory_has_a_unit(text: str, size: int) -> None:
    assert MemoryOptions(bank_memory=text).bank_memory == size  # type: ignore[arg-type]


def layout_of(**values: Any) -> Any:
    options = MemoryOptions(**values)
    return options.layout(DEMO, num_blocks=50, trained_frames=28, default_span=Fraction(1))


def test_options_become_a_layout() -> None:
    layout = layout_of(sink_blocks=1, recent_blocks=2, top_k=3, bank=8, mid_span="2")
    assert (layout.sink_blocks, layout.recent_blocks, layout.top_k, layout.bank) == (1, 2, 3, 8)
    assert (layout.mid_span, layout.trained_frames) == (2, 28)
    assert layout_of(select="none").top_k == 0
    assert layout_of(compressor="identity").grid.compressed_tokens == DEMO.block_tokens
    assert layout_of(policy="full").sink_blocks == 50


def test_a_packages_values_fill_only_what_was_not_set() -> None:
    package = {"top_k": 8, "bank": 64, "mid_span": "2", "frames_per_block": 4}
    memory = MemoryOptions(bank=256).with_defaults(package)
    assert (memory.top_k, memory.bank, memory.mid_span) == (8, 256, "2")


def test_paper_parity_sets_selection_and_span_but_not_over_a_flag() -> None:
    memory = MemoryOptions().paper_parity()
    assert (memory.select, memory.mid_span) == ("affinity", "block")
    assert MemoryOptions(mid_span="fit").paper_parity().mid_span == "fit"


# ---------------------------------------------------------------------------------------------------------- sources


def test_a_compressor_may_be_none_or_weights_by_name_or_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert layout_of(compressor="none").top_k == 0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain").mkdir()
    for name in ("./here", "a/b", "~/a", "hf:owner/repo", "plain", "demo"):
        assert MemoryOptions(compressor=name).compressor == name
    with pytest.raises(ConfigError, match="--compressor lrr: must be one of"):
        MemoryOptions(compressor="lrr")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_flags_beat_variables_beat_the_project_file_beats_the_users_file(tmp_path: Path) -> None:
    user = write(tmp_path / "user.toml", "seconds = 1\ncrf = 1\ntop_k = 1\nseed = 1\n")
    project = write(tmp_path / "project.toml", "seconds = 2\ncrf = 2\n[memory]\ntop_k = 2\n")
    env = {"PACKFORCING_SECONDS": "3", "PACKFORCING_CRF": "3", "PACKFORCING_DEBUG": "1", "OTHER": "x"}
    settings = config.resolve({"seconds": 4.0, "size": None}, env=env, files=(project, user))
    assert dict(settings.values) == {"seconds": 4.0, "crf": "3", "top_k": 2, "seed": 1}
    assert dict(settings.sources) == {
        "seconds": "flag",
        "crf": "PACKFORCING_CRF",
        "top_k": str(project),
        "seed": str(user),
    }
    request = settings.generate_request("a red circle", None)
    assert (request.seconds, request.crf, request.memory.top_k, request.seed) == (4.0, 3, 2, 1)
    assert request.memory.model_fields_set == {"top_k"}
    plan = settings.plan_request()
    assert type(plan) is PlanRequest
    assert (plan.seconds, plan.memory.top_k) == (4.0, 2)


def test_an_unknown_variable_names_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown variable PACKFORCING_TOPK; .* is PACKFORCING_TOP_K"):
        config.resolve({}, env={"PACKFORCING_TOPK": "3"})


def test_a_changed_request_knows_what_was_set() -> None:
    changed = GenerateRequest(prompt="a", crf=20).changed(model="demo", top_k=3)
    assert changed.model_fields_set == {"prompt", "crf", "model", "memory"}
    assert (changed.crf, changed.memory.top_k) == (20, 3)


def test_files_that_are_not_there_are_skipped(tmp_path: Path) -> None:
    assert config.resolve({}, env={}, files=(tmp_path / "none.toml",)).values == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("topk = 3\n", "unknown setting 'topk'; the nearest known one is 'top_k'"),
        ("[memory]\nseconds = 3\n", "unknown setting 'seconds'"),
        ("memory = 3\n", "memory must be a table"),
        ("seconds = \n", "cannot be read"),
    ],
)
def test_a_wrong_file_is_named(text: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "packforcing.toml", text)
    with pytest.raises(ConfigError, match=said) as error:
        config.resolve({}, env={}, files=(path,))
    assert str(path) in error.value.message


def test_toml_out_is_toml_in(tmp_path: Path) -> None:
    values = {
        "model": 'a "quoted" \\ näme',
        "seconds": 2.5,
        "size": [832, 480],
        "overwrite": True,
        "top_k": 3,
        "mid_span": "9/16",
    }
    path = write(tmp_path / "p.toml", config.to_toml({**values, "bank": None, "seed": None}))
    assert config.read_file(path) == {**values, "bank": "unlimited"}


def test_every_setting_can_be_set_from_a_file_and_no_name_is_used_twice() -> None:
    assert len(set(config.SETTINGS)) == len(config.SETTINGS)
    assert set(PlanRequest.model_fields) - {"memory", "timeline", "source"} <= set(config.SETTINGS)


def test_defaults_stand_in_one_place() -> None:
    """The command line says None for "not given"; a second default there would win silently."""
    folder = Path(config.__file__).parent / "cli"
    for path in (folder / "inspect_cache.py",):
        functions = [n for n in ast.parse(path.read_text("utf-8")).body if isinstance(n, ast.FunctionDef)]
        for default in functions[0].args.defaults:
            assert isinstance(default, ast.Constant)
            assert default.value in (None, False)
