"""packforcing doctor: a machine that works, and one made-up machine for each thing that can be broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from packforcing_cli import attention as attention_kernels
from packforcing_cli import catalog, config, registry
from packforcing_cli.cli import doctor
from packforcing_cli.cli.doctor import Finding
from packforcing_cli.errors import REINSTALL, WeightsError

INDEX = "https://download.pytorch.org/whl/"
UPDATE = "update the NVIDIA driver"
FINDING = {"name": str, "status": str, "text": str, "fix": str}


def test_this_machine_works_and_the_json_is_frozen(run_command: Any, tmp_path: Path) -> None:
    result = run_command("doctor", "--json")
    assert (result.code, result.err) == (0, "")
    values = json.loads(result.out)
    assert list(values) == ["schema", "ok", "checks"]
    assert (values["schema"], values["ok"]) == (1, True)
    for finding in values["checks"]:
        assert {name: type(value) for name, value in finding.items()} == FINDING
    said = {finding["name"]: finding for finding in values["checks"]}
    for name in ("packforcing", "PyTorch", "host memory", "codecs", "Hub cache", "model demo"):
        assert said[name]["status"] == "ok", said[name]
    assert "; --attention can be auto, " in said["attention"]["text"]
    assert said["self-test"]["text"].startswith("29 frames of the demo in ")
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def some(findings: list[Finding], monkeypatch: pytest.MonkeyPatch) -> None:
    def _check_something() -> Any:
        yield from findings

    monkeypatch.setattr(doctor, "CHECKS", (_check_something,))


def test_the_table_is_for_reading_and_broken_is_exit_four(
    run_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Finding("codecs", "ok", "PyAV reads [brackets]")
    some([good], monkeypatch)
    result = run_command("doctor")
    assert result.code == 0
    assert "✓  codecs  PyAV reads [brackets]" in result.out
    assert result.out.rstrip().endswith("All is well.")
    some([good, Finding("GPU", "warning", "old", "buy one")], monkeypatch)
    result = run_command("doctor")
    assert (result.code, "It works; 1 to know about" in result.out) == (0, True)
    some([good, Finding("models", "broken", "gone", "packforcing models pull x")], monkeypatch)
    result = run_command("doctor")
    assert result.code == 4
    assert "✗  models  gone" in result.out
    assert "→ packforcing models pull x" in result.out
    assert "1 of 2 broken" in result.out
    values = json.loads(run_command("doctor", "--json").out)
    assert (values["ok"], values["checks"][1]["fix"]) == (False, "packforcing models pull x")


def test_a_library_that_cannot_be_loaded_is_a_finding(
    run_command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def _check_video() -> Any:
        raise ImportError("libx264.so: cannot open shared object file")

    monkeypatch.setattr(doctor, "CHECKS", (_check_video,))
    result = run_command("doctor")
    assert result.code == 4
    assert "✗  video  libx264.so: cannot open" in result.out
    assert f"→ {REINSTALL}" in result.out


def torch_finding(**changes: Any) -> Finding:
    values: dict[str, Any] = {"built_for": "12.8", "driver": (12, 9), "has_driver": True, "sees_gpu": True}
    return doctor.torch_finding("2.9.0", **{**values, **changes})


def test_torch_cuda_and_driver_must_agree() -> None:
    assert torch_finding().status == "ok"
    assert "the driver knows CUDA up to 12.9" in torch_finding().text
    no_gpu = torch_finding(has_driver=False, driver=None, sees_gpu=False, built_for=None)
    assert (no_gpu.status, "models run on the CPU" in no_gpu.text) == ("ok", True)
    cpu_build = torch_finding(built_for=None, sees_gpu=False)
    assert (cpu_build.status, "there is an NVIDIA driver" in cpu_build.text) == ("broken", True)
    assert cpu_build.fix == (
        "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu129"
    )
    old = torch_finding(driver=(12, 8), built_for="13.0", sees_gpu=False)
    assert (old.status, "too old for this PyTorch" in old.text) == ("broken", True)
    assert "update the NVIDIA driver, or pip install" in old.fix
    hidden = torch_finding(sees_gpu=False)
    assert (hidden.status, "CUDA_VISIBLE_DEVICES" in hidden.fix) == ("broken", True)
    assert torch_finding(driver=None).status == "ok"


@pytest.mark.parametrize(
    ("driver", "index"),
    [
        ((12, 2), None),
        ((12, 6), "cu126"),
        ((12, 7), "cu126"),
        ((13, 1), "cu130"),
        ((14, 0), "cu132"),
        (None, "cu126"),
    ],
)
def test_the_fix_names_an_index_that_exists(driver: tuple[int, int] | None, index: str | None) -> None:
    fix = torch_finding(driver=driver, built_for=None, sees_gpu=False).fix
    assert fix == (f"pip install --force-reinstall torch --index-url {INDEX}{index}" if index else UPDATE)
    old = torch_finding(driver=driver, built_for="15.0", sees_gpu=False).fix
    if driver is not None:
        assert old == (f"{UPDATE}, or {fix}" if index else UPDATE)


def test_a_gpu_that_does_not_answer_is_a_finding(run_command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU whose memory another process filled, or that fell off its bus: PyTorch raises RuntimeErrors."""

    def out_of_memory(*_: object, **__: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 MiB")

    def broken(*_: object, **__: object) -> Any:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", out_of_memory)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", broken)
    monkeypatch.setattr(torch, "zeros", broken)
    monkeypatch.setattr(doctor, "CHECKS", (doctor._check_gpu, doctor._check_attention, doctor._check_memory))
    result = run_command("doctor", "--json")
    assert (result.code, result.err) == (4, "")
    gpu, attention, memory = json.loads(result.out)["checks"]
    assert (gpu["name"], gpu["status"]) == ("gpu", "broken")
    assert gpu["text"] == "CUDA out of memory. Tried to allocate 20 MiB"
    assert "nvidia-smi" in gpu["fix"]
    assert (attention["name"], attention["text"]) == ("attention", "CUDA error: unspecified launch failure")
    assert (memory["name"], memory["status"]) == ("host memory", "ok")


def test_an_error_of_a_check_keeps_its_hint(run_command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def _check_folders() -> Any:
        raise WeightsError("the cache is odd", hint="Set HF_HOME.")
        yield

    monkeypatch.setattr(doctor, "CHECKS", (_check_folders,))
    found = json.loads(run_command("doctor", "--json").out)["checks"]
    assert found == [
        {"name": "folders", "status": "broken", "text": "the cache is odd", "fix": "Set HF_HOME."}
    ]


@pytest.mark.parametrize(
    ("kernels", "kind"),
    [
        (["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7"], "cuDNN"),
        (
            ["void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128>>"],
            "FlashAttention 2",
        ),
        (["void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>"], "FlashAttention 3"),
        (["fmha_cutlassF_bf16_aligned_64x128_rf_sm80"], "memory-efficient attention"),
        (["aten::_scaled_dot_product_flash_attention_for_cpu"], "PyTorch's CPU kernel"),
        (["sm80_xmma_gemm_bf16", "softmax_warp_forward"], "plain matrix products"),
        ([], "unknown"),
    ],
)
def test_kernels_are_told_apart_by_name(kernels: list[str], kind: str) -> None:
    assert attention_kernels.kind(kernels) == kind


def test_flash_attention_2_on_a_hopper_gpu_is_warned_about() -> None:
    flash = ["pytorch_flash::flash_fwd_kernel"]
    assert doctor.attention_finding(flash, (9, 0)).status == "warning"
    assert "half as fast on a Hopper GPU" in doctor.attention_finding(flash, (9, 0)).text
    assert doctor.attention_finding(flash, (8, 6)).status == "ok"
    assert doctor.attention_finding(["cudnn_sdpa"], (9, 0)).status == "ok"
    assert doctor.attention_finding(["gemm"], (8, 0)).status == "warning"


def kernels_on(device: str) -> list[str]:
    return attention_kernels.profiled(attention_kernels.Kernel(), torch.device(device))


def test_the_profiled_call_is_attention_and_the_profiler_says_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert attention_kernels.kind(kernels_on("cpu")) == "PyTorch's CPU kernel"
    assert capfd.readouterr().err == ""


@pytest.mark.gpu
def test_the_kernel_of_this_gpu_is_known() -> None:
    assert attention_kernels.kind(kernels_on("cuda")) not in ("unknown", "plain matrix products")


def test_a_pyav_without_h264_is_broken() -> None:
    finding = doctor.codec_finding("17", writes=False, reads=["h264"])
    assert (finding.status, "cannot write H.264" in finding.text) == ("broken", True)
    assert finding.fix.startswith("pip install")


def test_a_folder_where_nothing_can_be_written_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor.folder_finding("models", tmp_path / "not" / "yet", "x").status == "ok"

    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    finding = doctor.folder_finding("models", tmp_path, "set XDG_CACHE_HOME")
    assert (finding.status, finding.fix) == ("broken", "set XDG_CACHE_HOME")
    assert "nothing can be written there (Permission denied)" in finding.text


def test_a_nearly_full_disk_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packforcing_cli.machine.free_disk", lambda _: 10**9)
    assert doctor.folder_finding("models", tmp_path, "").status == "warning"


def test_a_damaged_model_is_broken_and_says_how_to_get_it_again(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(catalog.DEMO_FOLDER, tmp_path / "models" / "mine"))
    assert doctor.model_finding("mine", folder).status == "ok"
    weights = next((folder / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    finding = doctor.model_finding("mine", folder)
    assert (finding.status, finding.fix) == ("broken", "packforcing models pull mine")
    assert "is truncated" in finding.text


def test_a_self_test_that_fails_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise WeightsError("the demo is damaged", hint="Install it again.")

    monkeypatch.setattr(registry, "load_model", fail)
    (finding,) = doctor._check_self_test()
    said = "the demo made no video: the demo is damaged"
    assert finding == Finding("self-test", "broken", said, "Install it again.")


def test_config_shows_every_setting_with_its_origin(
    run_command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "packforcing.toml").write_text("crf = 20\n[memory]\ntop_k = 3\n", encoding="utf-8")
    monkeypatch.setenv("PACKFORCING_SIZE", "832x480")
    monkeypatch.setenv("PACKFORCING_CRF", "21")
    values = json.loads(run_command("doctor", "--config", "--json").out)
    rows = {row["name"]: (row["value"], row["origin"]) for row in values["settings"]}
    assert list(rows) == list(config.SETTINGS)
    assert rows["crf"] == (21, "PACKFORCING_CRF")
    assert rows["size"] == ("832x480", "PACKFORCING_SIZE")
    assert rows["top_k"] == (3, "packforcing.toml")
    assert rows["seconds"] == (10.0, "default")
    assert rows["bank"] == (256, "default, unless the model has its own")
    table = run_command("doctor", "--config")
    assert "PACKFORCING_CRF" in table.out
    assert "Flags come first" in table.err
    monkeypatch.setenv("PACKFORCING_CRF", "99")
    wrong = run_command("doctor", "--config")
    assert (wrong.code, "--crf 99" in wrong.err) == (2, True)
