"""The plan: the paper's figures through a request, what fits, and what would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import recorded
import torch
from live_memory import LiveBytes, on_meta

from packforcing_cli import bench, catalog, planner, registry, rollout, transformer
from packforcing_cli.config import GenerateRequest, MemoryOptions, PlanRequest
from packforcing_cli.errors import DiskFullError, LayoutError, MemoryFitError, UsageError
from packforcing_cli.planner import Machine, Plan, host_machine, plan
from packforcing_cli.prompts import Prompt
from packforcing_cli.quiet import known_import_noise_dropped
from packforcing_cli.transformer import AloneContext, TransformerConfig, WanTransformer
from packforcing_cli.vae import Codec, TinyAutoencoder, TinyAutoencoderConfig, TinyCodec, WanCodec

GB = 10**9


def paper(**values: Any) -> PlanRequest:
    given: dict[str, Any] = {"model": "wan2.1-1.3b", "frames_per_block": 4, "size": "832x480", "seconds": 120}
    return PlanRequest(**{**given, **values})


def test_the_papers_figures_come_out() -> None:
    made = plan(paper())
    values = made.to_json()
    assert values["tokens"] == {
        "block": 6240,
        "compressed_block": 182,
        "sink": 12480,
        "mid": 2912,
        "recent": 6240,
        "current": 6240,
        "active": 27872,
    }
    assert values["bytes_per_token"] == 184320
    assert values["full_history_bytes"] == 138018816000
    assert values["stored_bytes"] == 3987210240
    assert (made.blocks, made.frames, made.latent_frames) == (120, 1917, 480)


def test_the_plans_figures_are_the_layouts() -> None:
    made = plan(paper(seconds=33, memory=MemoryOptions(top_k=3, bank=7, mid_span="1")))
    assert made.tokens == made.layout.tokens(made.blocks - 1)
    assert made.memory == made.layout.bytes(made.blocks - 1)
    assert made.capacity == made.layout.capacity_bytes(made.blocks)
    assert made.layout.bank == 7
    assert made.slots.total == made.layout.slots(made.blocks - 1).total


def test_size_and_block_come_from_the_model_unless_given() -> None:
    made = plan(PlanRequest(model="wan2.1-1.3b"))
    assert (made.size, made.frames_per_block) == ((832, 480), 3)
    assert made.layout.mid_span == "fit"
    assert made.slots.within_trained_range
    demo = plan(PlanRequest())
    assert (demo.size, demo.frames_per_block, demo.layout.mid_span) == ((128, 64), 4, 1)
    assert (demo.blocks, demo.frames) == (10, 157)


def test_a_generate_request_is_planned_as_it_is() -> None:
    request = GenerateRequest(prompt="a red circle", seconds=10)
    assert plan(request).blocks == 10


def test_fp32_doubles_the_cache() -> None:
    assert plan(paper(dtype="fp32")).memory.live > 1.9 * plan(paper()).memory.live
    assert plan(paper(dtype="fp32")).memory.stored == 2 * plan(paper()).memory.stored


def test_growth_shows_a_full_cache_growing_and_this_one_flat() -> None:
    points = plan(paper(seconds=600, memory=MemoryOptions(bank=64))).growth
    assert [point.seconds for point in points] == [5, 10, 30, 60, 120, 300, 600]
    last, before = points[-1], points[-2]
    assert last.full_bytes > 1.9 * before.full_bytes
    assert (last.stored_bytes, last.bank_bytes, last.window_bytes) == (
        before.stored_bytes,
        before.bank_bytes,
        before.window_bytes,
    )
    assert points[4].full_bytes == 138018816000


# ------------------------------------------------------------------------------------------------------------- fits


def followed(made: Plan, request: PlanRequest, machine: Machine) -> Plan:
    """The plan after doing what the suggestion says."""
    words = made.suggestion.split()
    given = zip(words[::2], words[1::2], strict=True)
    options = {option.removeprefix("--").replace("-", "_"): value for option, value in given}
    memory = {name: options.pop(name) for name in tuple(options) if name in MemoryOptions.model_fields}
    return plan(
        PlanRequest(
            **{
                **request.model_dump(exclude={"memory"}),
                **options,
                "memory": MemoryOptions(**{**request.memory.model_dump(exclude_unset=True), **memory}),
            }
        ),
        machine,
    )


@pytest.mark.parametrize(
    ("request_", "memory_gb", "option"),
    [
        (paper(memory=MemoryOptions(policy="full")), 80, "--policy packforcing"),
        (paper(seconds=1200, memory=MemoryOptions(bank=None)), 24, "--bank "),
        (paper(), 14, "--size "),
        (paper(seconds=1200), 23, "--bank "),
        (paper(seconds=5, dtype="fp32"), 24, "--dtype bf16"),
        (paper(seconds=5, size="416x240"), 11, "--quantize-text int8"),
        (paper(seconds=10), 10, "--quantize-text int8 --quantize int8 --size "),
    ],
)
def test_a_plan_that_does_not_fit_names_an_option_that_does(
    request_: PlanRequest, memory_gb: int, option: str
) -> None:
    machine = Machine(memory_bytes=memory_gb * GB, device="cuda:0")
    made = plan(request_, machine)
    assert not made.fits
    assert made.suggestion.startswith(option)
    assert followed(made, request_, machine).fits
    with pytest.raises(MemoryFitError, match=f"cuda:0 has {memory_gb}.0 GB free") as error:
        made.require_fit()
    assert made.suggestion in error.value.hint


@pytest.mark.parametrize(
    ("request_", "memory_gb", "change"),
    [
        (paper(seconds=5, size="416x240"), 8, {"offload": "text"}),
        (paper(size="416x240", memory=MemoryOptions(bank=16)), 6.5, {"offload": "all"}),
        (paper(size="416x240", offload="text", memory=MemoryOptions(bank=16)), 6, {"quantize": "int8"}),
        (paper(), 5, {"offload": "all", "size": (416, 240)}),
    ],
)
def test_beside_a_gpu_the_host_takes_weights_first(
    request_: PlanRequest, memory_gb: float, change: dict[str, Any]
) -> None:
    machine = Machine(int(memory_gb * GB), device="cuda:0", host_bytes=64 * GB)
    made = plan(request_, machine)
    assert (made.fits, made.change) == (False, change)
    assert followed(made, request_, machine).fits


def test_recorded_passes_are_planned_with_the_memory_they_hold() -> None:
    """The recordings of a guided video of the demo, taken by a stand-in for the graph that keeps the same tensors."""
    request = GenerateRequest(prompt="a", model="demo", dtype="fp32", seconds=20)
    facts, made = catalog.of("demo"), plan(request)
    more = {
        name: stage.device_bytes - before.device_bytes
        for name, stage, before in zip(
            ("text", "denoise", "decode"),
            plan(request.changed(cuda_graphs=True)).stages,
            made.stages,
            strict=True,
        )
    }
    assert more["text"] == 0
    assert more["denoise"] == more["decode"]  # it stays theirs while a block is decoded
    model = registry.load_model("demo", dtype="fp32")
    model.transformer.record_passes(recorded.record)
    recordings = model.transformer._recordings
    assert recordings is not None
    text = torch.zeros(1, facts.text_length, facts.text_dim)
    stage = bench.prepare(model, Prompt("a", text, text), block=20, extra_blocks=2)
    for block in (20, 21):  # of a full memory: the second one is recorded
        context = stage.cache.context(block)
        with torch.no_grad():
            rollout.velocity(model, stage.guided, context, stage.noisy(), 0.5)
            kv = model.transformer.commit(stage.noisy(), stage.text, context)
            tokens = model.transformer.patch(stage.noisy())[:, : stage.grid.compressed_tokens]
            small = model.transformer.commit_tokens(tokens, stage.text, stage.cache.compressed_context(block))
        stage.cache.commit(block, kv)
        stage.cache.add_backup(block, small)
    kept = recordings._kept
    assert set(kept) == {"denoise", "clean", "compressed"}
    held = sum(
        tensor.nbytes for one in kept.values() for tensor in (*one.inputs, *one.constants, *one.outputs)
    )
    grid = made.layout.grid
    layer = grid.block_tokens * (planner.LAYER_WIDTHS * facts.dim + facts.ffn_dim) * 4
    assert 0 <= more["denoise"] - held <= 2 * layer  # what passes work in is not kept by the stand-in
    short = plan(request.changed(cuda_graphs=True, seconds=2))
    assert short.stages == plan(request.changed(seconds=2)).stages  # it ends before anything is recorded


def test_a_plan_that_does_not_fit_goes_without_the_compiled_decoder() -> None:
    request = GenerateRequest(prompt="a", model="wan2.1-1.3b", seconds=5, offload="text", compile=True)
    plain = plan(request.changed(compile=False))
    assert plan(request).peak_bytes > plain.peak_bytes
    machine = Machine(int(plain.peak_bytes / 0.94), device="cuda:0", host_bytes=64 * GB)
    made = plan(request, machine)
    assert (made.fits, made.suggestion) == (False, "--no-compile")
    assert plan(request.changed(**made.change), machine).fits


def test_a_plan_that_does_not_fit_goes_without_recording_first() -> None:
    request = GenerateRequest(
        prompt="a",
        model="wan2.1-1.3b",
        seconds=20,
        offload="text",
        cuda_graphs=True,
        memory=MemoryOptions(policy="window"),
    )
    plain = plan(request.changed(cuda_graphs=False))
    clean_kv = plain.layout.grid.block_tokens * plain.layout.grid.bytes_per_token
    assert plan(request).peak_bytes > plain.peak_bytes + clean_kv
    machine = Machine(int(plain.peak_bytes / 0.94), device="cuda:0", host_bytes=64 * GB)
    made = plan(request, machine)
    assert (made.fits, made.suggestion) == (False, "--no-cuda-graphs")
    assert plan(request.changed(**made.change), machine).fits
    # Layers that come and go cannot be recorded: both at once are never asked for, and never proposed.
    small = replace(machine, memory_bytes=4 * GB)
    made = plan(request, small)
    assert made.change["offload"] == "all"
    assert made.change["cuda_graphs"] is False
    assert "--no-cuda-graphs" in made.suggestion
    assert plan(request.changed(**made.change), small).fits


def test_a_host_that_is_too_small_is_refused() -> None:
    made = plan(paper(offload="text"), Machine(80 * GB, device="cuda:0", host_bytes=8 * GB))
    with pytest.raises(
        MemoryFitError, match=r"host memory are needed and 8\.0 GB are free; the most is"
    ) as error:
        made.require_fit()
    assert error.value.hint == "Try --offload none."


def test_the_process_beside_a_gpu_takes_host_memory_whatever_is_offloaded() -> None:
    made = plan(paper(), Machine(140 * GB, device="cuda:0", host_bytes=64 * GB))
    assert [stage.host_bytes for stage in made.stages] == [planner.HOST_BYTES] * 3
    assert [stage.device_bytes for stage in made.stages] == [s.device_bytes for s in plan(paper()).stages]
    small = plan(paper(), Machine(140 * GB, device="cuda:0", host_bytes=GB))
    with pytest.raises(MemoryFitError, match=r"about 2\.0 GB of host memory are needed and 1\.0 GB are free"):
        small.require_fit()
    assert [stage.host_bytes for stage in plan(paper(), Machine(140 * GB)).stages] == [0, 0, 0]


def test_stages_tell_where_weights_are() -> None:
    facts = catalog.get("wan2.1-1.3b")
    layers = 2 * facts.layers * facts.layer_params
    text, denoise, decode = plan(paper()).stages
    assert [text.name, denoise.name, decode.name] == ["text", "denoise", "decode"]
    assert (text.host_bytes, denoise.host_bytes, decode.host_bytes) == (0, 0, 0)
    assert text.device_bytes > 2 * facts.text_params
    assert plan(paper()).peak_bytes == max(s.device_bytes for s in (text, denoise, decode))
    away = plan(paper(offload="text")).stages
    assert (away[0].device_bytes, away[1].device_bytes) == (0, denoise.device_bytes)
    assert away[0].host_bytes > 2 * facts.text_params
    streamed = plan(paper(offload="all")).stages
    assert streamed[1].host_bytes - planner.HOST_BYTES == layers
    assert denoise.device_bytes - layers < streamed[1].device_bytes < denoise.device_bytes - layers * 0.9
    small = plan(paper(quantize="int8", quantize_text="int8"))
    assert 0.5 < small.weights.transformer / plan(paper()).weights.transformer < 0.53
    assert 0.55 < small.weights.text_encoder / plan(paper()).weights.text_encoder < 0.6
    assert plan(paper(vae="tiny")).stages[2].device_bytes < decode.device_bytes - 3 * GB


def test_given_embeddings_need_no_text_encoder() -> None:
    values = {"prompt": "a fox", "model": "wan2.1-1.3b", "size": "416x240"}
    assert plan(GenerateRequest(**values, embeddings=Path("p.safetensors"))).stages[0].device_bytes == 0
    assert plan(GenerateRequest(**values)).stages[0].device_bytes > 11 * GB


@pytest.mark.parametrize("mode", ["int8", "fp8-weight"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_planned_weights_are_the_bytes_of_the_loaded_ones(mode: str, dtype: str) -> None:
    size = plan(PlanRequest(model="demo", quantize=mode, dtype=dtype)).weights
    model = registry.load_model("demo", device="cpu", dtype=dtype, quantize=mode)
    loaded = sum(tensor_bytes(value) for value in model.transformer.state_dict().values())
    assert loaded == pytest.approx(size.transformer, rel=0.01)
    assert model.compressor is not None
    assert sum(p.nbytes for p in model.compressor.parameters()) == size.compressor
    encoder = registry.load_model("demo", device="cpu", dtype=dtype, quantize_text="int8").load_text_encoder()
    small = plan(PlanRequest(model="demo", quantize_text="int8", dtype=dtype)).weights.text_encoder
    made = sum(
        tensor_bytes(value)
        for name, value in encoder.model.state_dict().items()
        if "embed_tokens" not in name
    )
    assert made == pytest.approx(small, rel=0.1)


def tensor_bytes(tensor: Any) -> int:
    """Bytes of a tensor, or of the two parts of a quantized one."""
    if hasattr(tensor, "qdata"):
        return int(tensor.qdata.nbytes + tensor.scale.nbytes)
    return int(tensor.nbytes)


# ------------------------------------------------------------------------------- estimates against counted runs


def peaks_of_a_pass() -> dict[str, int]:
    """Bytes of two layers at Wan's width over a block of 832x480, on the meta device: denoising and clean pass."""
    vars(transformer)["attention"] = lambda q, k, v: torch.empty_like(q)  # as a fused kernel
    with torch.device("meta"):
        network = WanTransformer(TransformerConfig(num_layers=2)).to(torch.bfloat16).requires_grad_(False)
    tokens = plan(paper()).layout.grid.block_tokens
    positions = on_meta((tokens, 3), torch.float64)
    text = network.embed_text(on_meta((1, 512, 4096)))
    latents, times = on_meta((1, 16, 4, 60, 104)), on_meta((1, 4), torch.float64)
    with LiveBytes() as forward:
        network(latents, times, text, AloneContext(positions))
    with LiveBytes() as clean:
        network.commit(latents, text, AloneContext(positions))
    return {"tokens": tokens, "forward": forward.peak, "clean": clean.peak}


def test_the_working_memory_of_a_layer_is_what_a_full_size_pass_takes() -> None:
    """In a process of its own: where something was compiled before, callers may keep what they handed on."""
    code = "import json, test_planner; print(json.dumps(test_planner.peaks_of_a_pass()))"
    places = [str(Path(__file__).parent), str(Path(planner.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
        check=True,
    )
    found, facts = json.loads(done.stdout), catalog.get("wan2.1-1.3b")
    estimate = found["tokens"] * (planner.LAYER_WIDTHS * facts.dim + facts.ffn_dim) * 2
    assert 0.8 * estimate < found["forward"] < estimate
    kv = found["tokens"] * 2 * 2 * facts.dim * 2  # two layers, keys and values, two bytes
    assert found["clean"] < estimate + 2 * kv


def test_the_wan_decoders_memory_is_what_a_full_width_decoder_takes() -> None:
    with known_import_noise_dropped():
        from diffusers import AutoencoderKLWan
    with torch.device("meta"):
        module = AutoencoderKLWan.from_config(AutoencoderKLWan().config)
    codec = WanCodec(module)
    assert sum(p.numel() for p in module.parameters()) == catalog.get("wan2.1-1.3b").vae_params
    check_decoder(codec, "wan")
    for portion in (2, 3, 4):
        check_decoder(WanCodec(module, latents_per_call=portion), "wan", portion=portion)


def test_a_plan_counts_latents_that_are_decoded_at_a_time_and_gives_them_up_first() -> None:
    values = {"prompt": "a", "model": "wan2.1-1.3b", "seconds": 5, "offload": "text"}
    one, three, many = (plan(GenerateRequest(**values, vae_latents=n)) for n in (1, 3, 64))
    pixels = 832 * 480
    assert three.stages[2].device_bytes - one.stages[2].device_bytes == 2 * 2 * planner.DECODER_MORE * pixels
    assert three.stages == many.stages  # a block has three latent frames
    assert three.stages[:2] == one.stages[:2]
    compiled = plan(GenerateRequest(**values, compile=True))
    more = compiled.stages[2].device_bytes - one.stages[2].device_bytes
    assert more == 2 * planner.DECODER_STATE["wan"] * pixels
    machine = Machine(int(one.peak_bytes / 0.94), device="cuda:0", host_bytes=64 * GB)
    small = plan(GenerateRequest(**values, vae_latents=3), machine)
    assert (small.fits, small.suggestion) == (False, "--vae-latents 1")
    with pytest.raises(UsageError, match="only the Wan VAE decodes in portions; the tiny VAE"):
        plan(GenerateRequest(**values, vae_latents=2, vae="tiny"))


def test_the_tiny_decoders_memory_is_what_it_takes() -> None:
    with torch.device("meta"):
        module = TinyAutoencoder(TinyAutoencoderConfig())
    assert sum(p.numel() for p in module.parameters()) == planner.TINY_VAE_PARAMS
    check_decoder(TinyCodec(module), "tiny")


def check_decoder(codec: Codec, kind: str, *, portion: int = 1) -> None:
    """Two blocks of four latents at 208x128, so many of them decoded at a time."""
    decoder, latents, pixels = codec.decoder(), on_meta((1, 16, 4, 16, 26), torch.float32), 208 * 128
    with LiveBytes() as live:
        decoder.decode(latents)
        assert live.now == pytest.approx(pixels * 4 * planner.DECODER_STATE[kind], rel=0.02)
        live.peak = 0
        decoder.decode(latents)
    numbers = planner.DECODER_PEAK[kind] + planner.DECODER_MORE * (portion - 1)
    assert live.peak == pytest.approx(pixels * 4 * numbers, rel=0.05)


def test_what_fits_is_not_refused() -> None:
    for machine in (None, Machine(80 * GB), Machine(80 * GB, disk_free_bytes=GB)):
        made = plan(paper(), machine)
        assert made.fits
        assert made.suggestion == ""
        made.require_fit()


def test_a_full_disk_is_refused_before_anything_is_made() -> None:
    made = plan(paper(), Machine(80 * GB, disk_free_bytes=1000))
    assert not made.fits
    with pytest.raises(DiskFullError, match="of disk are needed"):
        made.require_fit()


def test_the_run_folder_is_counted_where_one_is_kept() -> None:
    """16 x 60 x 104 numbers of 2 bytes are a latent frame; a snapshot is as large as the memory."""
    asked = GenerateRequest(prompt="a", model="wan2.1-1.3b", seconds=60)
    none = plan(asked.changed(keep_run=False))
    kept, often = plan(asked), plan(asked.changed(snapshot_every=5))
    assert (none.run_bytes, none.disk_bytes) == (
        0,
        plan(PlanRequest(model="wan2.1-1.3b", seconds=60)).disk_bytes,
    )
    assert kept.disk_bytes == none.disk_bytes + kept.run_bytes
    latents = kept.latent_frames * 16 * 60 * 104 * 2
    assert latents < kept.run_bytes < 1.5 * latents
    assert often.run_bytes - kept.run_bytes > 2 * kept.capacity.live
    free = Machine(80 * GB, disk_free_bytes=2 * none.disk_bytes)
    with pytest.raises(DiskFullError, match="of disk are needed") as caught:
        plan(asked, free).require_fit()
    assert "are the run folder: --no-run keeps none." in caught.value.hint
    plan(asked.changed(keep_run=False), free).require_fit()
    with pytest.raises(DiskFullError) as caught:
        plan(asked, Machine(80 * GB, disk_free_bytes=1000)).require_fit()
    assert "--no-run" not in caught.value.hint


def test_nothing_fits_a_machine_without_memory() -> None:
    made = plan(paper(), Machine(1))
    assert (made.fits, made.suggestion) == (False, "")
    with pytest.raises(MemoryFitError):
        made.require_fit()


def test_the_peak_contains_weights_and_cache() -> None:
    made = plan(paper())
    assert made.weights.transformer == 2 * catalog.get("wan2.1-1.3b").transformer_params
    assert (
        made.peak_bytes
        == made.weights.transformer + made.weights.vae + made.capacity.live + made.working_bytes
    )


def test_this_machine_has_memory_and_disk(tmp_path: Path) -> None:
    machine = host_machine(tmp_path / "not" / "yet")
    assert machine.memory_bytes > 0
    assert machine.disk_free_bytes
    assert machine.disk_free_bytes > 0


# --------------------------------------------------------------------------------------------------- odd requests


def test_slots_beyond_the_trained_range_are_warned_about() -> None:
    assert any("80 slots and the model was trained on 20" in text for text in plan(paper()).warnings)
    assert plan(paper(memory=MemoryOptions(mid_span="fit"))).warnings == ()


def test_a_bank_that_leaves_nothing_to_select_is_warned_about() -> None:
    memory = MemoryOptions(top_k=16, bank=16, mid_span="fit")
    assert any("nothing to select from" in text for text in plan(paper(memory=memory)).warnings)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"model": "wan3"}, UsageError),
        ({"size": "830x480"}, UsageError),
        ({"size": "16x16"}, LayoutError),
        ({"frames_per_block": 5}, UsageError),
        ({"memory": MemoryOptions(mid_span="fit", sink_blocks=9)}, LayoutError),
        ({"memory": MemoryOptions(mid_span="7")}, LayoutError),
    ],
)
def test_impossible_requests_are_usage_errors_with_a_next_step(
    values: dict[str, Any], kind: type[UsageError]
) -> None:
    with pytest.raises(kind) as error:
        plan(paper(**values))
    assert error.value.exit_code == 2
    assert error.value.hint


def test_a_day_of_video_is_planned_at_once() -> None:
    made = plan(paper(seconds=86400, memory=MemoryOptions(bank=None)))
    assert made.blocks == 86400
    assert made.fits


def test_embeddings_from_a_file_need_no_room_for_a_text_encoder() -> None:
    values: dict[str, Any] = {"prompt": "a", "model": "wan2.1-1.3b", "size": "416x240", "seconds": 2}
    encoded, given = (
        plan(GenerateRequest(**values, embeddings=path)) for path in (None, Path("prompts.safetensors"))
    )
    assert encoded.weights.text_encoder > 10 * GB
    assert given.weights.text_encoder == 0
    text = [next(s for s in made.stages if s.name == "text").device_bytes for made in (encoded, given)]
    assert text[0] > 10 * GB and text[1] == 0
    small = Machine(memory_bytes=encoded.peak_bytes - GB)
    assert not plan(GenerateRequest(**values), small).fits
    assert plan(GenerateRequest(**values, embeddings=Path("prompts.safetensors")), small).fits


# ------------------------------------------------------------------------------------------- a bank in host memory


def test_a_bank_that_does_not_fit_beside_the_model_is_in_host_memory() -> None:
    request = paper(seconds=600, offload="text", memory=MemoryOptions(mid_span="fit"))
    large, small = (Machine(size * GB, device="cuda:0", host_bytes=64 * GB) for size in (80, 18))
    there, here = plan(request, large), plan(request, small)
    assert (there.bank_device, here.bank_device, here.fits) == ("device", "host", True)
    far, near = here.layout.far_bytes(here.blocks)
    assert far == 257 * 182 * 184_320 and near == 2 * 16 * 182 * 184_320 // 30
    for before, after in zip(there.stages[1:], here.stages[1:], strict=True):
        assert before.device_bytes - after.device_bytes == far - near
        assert after.host_bytes - before.host_bytes == far
    assert here.memory == there.memory  # what is kept is the same, wherever it is
    asked = plan(request.changed(bank_device="device"), small)
    assert (asked.fits, asked.change) == (False, {"bank_device": "host"})
    assert followed(asked, request.changed(bank_device="device"), small).fits
    little = Machine(18 * GB, device="cuda:0", host_bytes=8 * GB)
    assert plan(request, little).bank_device == "device"  # there is no room for it in host memory, either
    on_cpu = plan(request.changed(offload="none", bank_device="host"), Machine(256 * GB))
    same = plan(request.changed(offload="none"), Machine(256 * GB))
    assert on_cpu.stages[1].device_bytes - same.stages[1].device_bytes == near


@pytest.mark.parametrize(("kv_dtype", "a_token"), [("bf16", 184_320), ("int8", 95_040), ("fp8", 95_040)])
def test_a_bank_of_smaller_numbers_takes_less_and_a_cap_keeps_fewer_blocks(
    kv_dtype: str, a_token: int
) -> None:
    made = plan(paper(seconds=600, memory=MemoryOptions(kv_dtype=kv_dtype)))
    sums = 30 * 1536 * 4
    assert made.memory.bank == 256 * (182 * a_token + sums) + sums
    assert made.memory.stored == 3_987_210_240
    capped = plan(paper(seconds=600, memory=MemoryOptions(kv_dtype=kv_dtype, bank_memory=2 * GB)))
    blocks = capped.layout.bank
    assert blocks == (2 * GB - sums) // (182 * a_token + sums) == capped.to_json()["memory"]["bank"]
    assert capped.memory.bank <= 2 * GB < capped.memory.bank + 182 * a_token + sums
    assert plan(paper(memory=MemoryOptions(bank=8, bank_memory=2 * GB))).layout.bank == 8
    small = plan(paper(memory=MemoryOptions(kv_dtype=kv_dtype, bank_memory=GB // 5)))
    assert any("nothing to select from; use a larger --bank-memory" in said for said in small.warnings)
    unlimited = plan(
        paper(seconds=600, memory=MemoryOptions(bank=None, kv_dtype=kv_dtype, bank_memory=2 * GB))
    )
    assert unlimited.layout.bank == blocks


def test_a_cap_without_room_for_a_block_is_refused_with_one_that_has() -> None:
    with pytest.raises(LayoutError, match="no room for a compressed block") as error:
        plan(paper(memory=MemoryOptions(bank_memory="10MB")))
    size = error.value.hint.split()[2]
    assert plan(paper(memory=MemoryOptions(bank_memory=size))).layout.bank == 1
    assert plan(paper(memory=MemoryOptions(bank_memory="10MB", policy="sink"))).memory.bank == 0
