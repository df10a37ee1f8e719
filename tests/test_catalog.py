"""Model facts without models: shapes, sizes, names."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from fractions import Fraction

import pytest

from packforcing_cli import catalog
from packforcing_cli.errors import LayoutError, UsageError
from packforcing_cli.quiet import known_import_noise_dropped
from packforcing_cli.vae import TinyAutoencoderConfig


def test_the_families_have_wans_shapes() -> None:
    """docs/method.md 1.1; the 14B shape is that of wan_t2v_14B.py."""
    small, large = catalog.get("wan2.1-1.3b"), catalog.get("wan2.1-14b")
    assert (small.layers, small.heads, small.head_dim, small.dim, small.ffn_dim) == (30, 12, 128, 1536, 8960)
    assert (large.layers, large.heads, large.head_dim, large.dim, large.ffn_dim) == (40, 40, 128, 5120, 13824)
    for facts in (small, large):
        assert (facts.latent_channels, facts.spatial_stride, facts.temporal_stride) == (16, 8, 4)
        assert (facts.text_dim, facts.text_length, facts.default_size, facts.fps) == (
            4096,
            512,
            (832, 480),
            16,
        )
        assert (facts.kind, facts.frames_per_block) == ("family", 3)
        assert (facts.trained_for(3), facts.trained_for(4)) == (21, 20)
        assert (facts.span_for(3), facts.span_for(4)) == ("fit", Fraction(4))


def test_parameters_are_counted_from_the_shape() -> None:
    """1.419 B: docs/method.md 1.1. Others are public counts of Wan2.1-14B, UMT5-XXL's encoder and the Wan VAE."""
    assert catalog.get("wan2.1-1.3b").transformer_params == 1_418_996_800
    assert catalog.get("wan2.1-14b").transformer_params == 14_288_491_584
    assert catalog.get("wan2.1-1.3b").params == 1_418_996_800 + 5_680_910_336 + 126_892_531


def test_the_schedules_are_those_of_the_models() -> None:
    for name in ("wan2.1-1.3b", "demo"):
        student = catalog.get(name).schedule
        assert (student.kind, student.steps) == ("renoise", (1000, 750, 500, 250))
        assert (student.num_steps, student.shift, student.guidance) == (4, 5, 1)


def test_packages_come_first_and_every_default_size_has_a_grid() -> None:
    models = catalog.all_models()
    assert [facts.name for facts in models] == [
        "demo",
        "wan2.1-1.3b-self-forcing",
        "wan2.1-1.3b-causal-forcing",
        "wan2.1-1.3b-longlive",
        "wan2.1-1.3b",
        "wan2.1-14b",
    ]
    assert [facts.name for facts in catalog.all_vaes()] == ["taew2_1", "lighttaew2_1"]
    for facts in models:
        for frames_per_block in facts.block_sizes:
            grid = facts.grid(facts.default_size, frames_per_block)
            assert grid.compressed_tokens >= 1
            assert (grid.layers, grid.kv_dim, grid.heads) == (facts.layers, facts.dim, facts.heads)


def test_names_are_found_in_any_case_and_wrong_ones_name_the_nearest() -> None:
    assert catalog.get("Wan2.1-1.3B").name == "wan2.1-1.3b"
    with pytest.raises(UsageError, match=r"no model is named 'wan-1.3b'; did you mean wan2.1-1.3b") as error:
        catalog.get("wan-1.3b")
    assert "models list" in error.value.hint
    with pytest.raises(UsageError, match=r"known models: demo, wan2\.1-1\.3b, wan2\.1-14b, wan"):
        catalog.get("zzzzzz")


def test_every_released_model_has_all_its_parts_somewhere() -> None:
    released = [facts for facts in catalog.all_models() if facts.parts]
    assert len(released) == 3
    for facts in released:
        family = catalog.get("wan2.1-1.3b")
        assert (facts.schedule, facts.dim, facts.layers) == (family.schedule, family.dim, family.layers)
        assert (facts.frames_per_block, facts.trained_frames, facts.span_for(3)) == (3, 21, "fit")
        parts = {*facts.parts, *(["transformer"] if facts.pickled else [])}
        assert parts == {"transformer", "vae", "text_encoder", "tokenizer"}
        assert 28e9 < facts.download_bytes < 31e9  # the text encoder is stored in fp32
        assert facts.license
    shared = [facts.parts["text_encoder"] for facts in released]
    assert shared[0] == shared[1] == shared[2]


def test_a_repository_is_found_by_the_model_whose_transformer_it_holds() -> None:
    facts = catalog.of_repo("WLSaidhi/SFWan2.1-T2V-1.3B-Diffusers")
    assert facts is not None
    assert facts.name == "wan2.1-1.3b-self-forcing"
    assert catalog.of_repo("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") is None
    tiny = catalog.of_repo("ionden/taew2.1")
    assert tiny is not None
    assert tiny.name == "taew2_1"


def test_a_vae_stands_in_for_the_wan_vae_alone_and_tiny_is_taew2_1() -> None:
    assert [catalog.stand_in("wan", name) for name in ("tiny", "LightTAEw2_1")] == ["taew2_1", "lighttaew2_1"]
    assert [catalog.stand_in("wan", name) for name in ("wan", "demo", "some/folder")] == [None] * 3
    assert [catalog.stand_in("tiny", name) for name in ("tiny", "lighttaew2_1")] == [None] * 2
    assert catalog.vae_kind("lighttaew2_1") == "tiny"
    catalog.check_vae("wan2.1-1.3b", "wan", "lighttaew2_1")
    with pytest.raises(UsageError, match="model demo has the VAE 'tiny'; there is no 'lighttaew2_1'"):
        catalog.check_vae("demo", "tiny", "lighttaew2_1")


def test_the_second_tiny_vae_has_the_form_of_the_first_and_the_wan_vaes_statistics() -> None:
    with known_import_noise_dropped():
        from diffusers import AutoencoderKLWan
    one, other = (catalog.get(name).parts["vae"] for name in ("taew2_1", "lighttaew2_1"))
    config = TinyAutoencoderConfig.from_dict(
        {key: value for key, value in other.config.items() if not key.startswith("_")}
    )
    own = inspect.signature(AutoencoderKLWan.__init__).parameters
    assert list(config.latents_mean) == own["latents_mean"].default
    assert list(config.latents_std) == own["latents_std"].default
    assert replace(config, latents_mean=(), latents_std=()) == TinyAutoencoderConfig()
    # Twice the bytes of a number, and about the same header.
    assert 0 <= other.size_bytes - 2 * one.size_bytes + 12_000 < 1_500
    assert set(other.sha256) == set(other.files) == {"lighttaew2_1.safetensors"}


def test_unknown_block_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="demo is not known with 3 frames per block"):
        catalog.get("demo").trained_for(3)


@pytest.mark.parametrize(
    ("size", "nearest"), [((830, 480), "832x480"), ((100, 100), "96x96"), ((-16, 480), "16x480")]
)
def test_a_size_off_the_token_grid_names_the_nearest(size: tuple[int, int], nearest: str) -> None:
    with pytest.raises(UsageError, match="must be multiples of 16 pixels") as error:
        catalog.get("wan2.1-1.3b").grid(size, 4)
    assert nearest in error.value.hint
    with pytest.raises(LayoutError, match="no room for a compressed token"):
        catalog.get("wan2.1-1.3b").grid((32, 480), 4)


def test_the_demos_facts_equal_the_packaged_manifest() -> None:
    path = catalog.DEMO_FOLDER / "packforcing.json"
    facts = catalog.get("demo")
    assert catalog.is_installed(facts) == path.is_file()
    if not path.is_file():
        pytest.skip("the demo package is not there")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    transformer = json.loads(
        (catalog.DEMO_FOLDER / "transformer" / "config.json").read_text(encoding="utf-8")
    )
    cache, schedule = manifest["cache"], manifest["schedule"]
    assert tuple(manifest["size"]) == facts.default_size
    assert (manifest["fps"], manifest["license"]) == (facts.fps, facts.license)
    assert (manifest["trained_frames"], manifest["text_length"]) == (facts.trained_frames, facts.text_length)
    assert cache["frames_per_block"] == facts.frames_per_block
    span = cache["mid_span"]
    assert (span if span == "fit" else Fraction(span)) == facts.span_for(facts.frames_per_block)
    assert schedule["kind"] == facts.schedule.kind
    assert (schedule["steps"], schedule["shift"]) == (facts.schedule.num_steps, facts.schedule.shift)
    assert schedule["guidance"] == facts.schedule.guidance
    installed = catalog.of("demo")
    assert installed.cache == {name: value for name, value in cache.items() if name != "frames_per_block"}
    assert (installed.codec, facts.codec) == ("tiny", "tiny")
    assert installed.branches == facts.branches == "hr+lr"
    assert (installed.text_params, installed.vae_params) == (facts.text_params, facts.vae_params)
    assert transformer["num_layers"] == facts.layers
    assert transformer["num_attention_heads"] == facts.heads
    assert transformer["attention_head_dim"] == facts.head_dim
    assert transformer["ffn_dim"] == facts.ffn_dim
    assert transformer["in_channels"] == facts.latent_channels
    assert transformer["text_dim"] == facts.text_dim


def test_a_licence_that_is_not_known_names_the_page_to_read() -> None:
    for facts in catalog.all_models():
        repos = {source.repo for source in (*facts.parts.values(), *facts.pickled)}
        assert "looked up" not in facts.license_note
        if facts.license == "unknown" or "not stated" in facts.license_note:
            assert any(f"read https://huggingface.co/{repo}" in facts.license_note for repo in repos), (
                facts.name
            )
