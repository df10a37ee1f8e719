"""Imports that talk on machines where nothing is wrong: their known noise is dropped, everything else is heard."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from packforcing_cli.quiet import known_import_noise_dropped

NOISE = (
    ("torchao", "Failed to load /site-packages/torchao/_C_cutlass_90a.abi3.so: undefined symbol"),
    ("torchao", "Skipping import of cpp extensions due to incompatible torch version 2.13.0"),
    ("torchao.kernel.intmm", "Warning: Detected no triton, on systems without Triton certain kernels ..."),
    (
        "diffusers.quantizers.torchao.torchao_quantizer",
        "Unable to import `torchao` Tensor objects. This may affect loading checkpoints serialized with `torchao`",
    ),
)


@pytest.mark.parametrize(("name", "text"), NOISE)
def test_known_noise_is_dropped_and_only_inside(
    name: str, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger(name)
    logger.propagate = True
    with known_import_noise_dropped():
        logger.warning(text)
        assert caplog.messages == []
        logger.warning("the GPU is on fire")
    logger.warning(text)
    assert caplog.messages == ["the GPU is on fire", text]


def test_a_real_warning_gets_through() -> None:
    with pytest.warns(UserWarning, match="this is real"), known_import_noise_dropped():
        warnings.warn("this is real", UserWarning, stacklevel=1)


def test_loading_and_quantizing_a_model_says_nothing(tmp_path: Path) -> None:
    """A fresh interpreter with every warning shown, as on a machine of one who has just installed it."""
    code = (
        "from packforcing_cli import registry\n"
        "model = registry.load_model('demo', device='cpu', quantize='int8-dynamic', quantize_text='int8')\n"
        "model.load_text_encoder().encode('a red circle')\n"
        "from packforcing_cli.quiet import known_import_noise_dropped\n"
        "with known_import_noise_dropped():\n"
        "    from diffusers import AutoencoderKLWan\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_nobody_is_told_that_this_program_runs(tmp_path: Path) -> None:
    code = (
        "import os\n"
        "from packforcing_cli.cli import main\n"
        "try:\n    main(['models', 'list', '--json'])\n"
        "except SystemExit:\n    pass\n"
        "from huggingface_hub import constants\n"
        "assert constants.HF_HUB_DISABLE_TELEMETRY\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_HUB_DISABLE")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
