"""The student's rollout with gradients, and DMD's losses, against formulas and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from packforcing_cli import resolve
from packforcing_cli import rollout as inference
from packforcing_cli.config import MemoryOptions
from packforcing_cli.layout import Layout
from packforcing_cli.prompts import Prompt
from packforcing_cli.registry import VideoModel
from packforcing_cli.sampler import Schedule, block_noise
from packforcing_cli.training import dmd
from packforcing_cli.training.student_rollout import Rollout, Student, rollout
from packforcing_cli.transformer import TextKV

SCHEDULE = Schedule.build("renoise", steps=[1000, 500], shift=5.0)
RENOISE = {"kind": "renoise", "steps": 2, "timesteps": [1000, 500], "shift": 5.0}
SEED = 3


def layout_of(model: VideoModel, num_blocks: int, **options: Any) -> Layout:
    grid = resolve.grid_for(model, model.manifest.size)
    memory = MemoryOptions(sink_blocks=1, recent_blocks=1, **options)
    return resolve.layout_for(model, memory, grid, num_blocks=num_blocks)


def noises(model: VideoModel, layout: Layout, num_blocks: int) -> list[list[Tensor]]:
    shape = resolve.latent_shape(model, layout)
    steps = range(len(SCHEDULE.sigmas))
    return [[block_noise(SEED, i, s, shape).double() for s in steps] for i in range(num_blocks)]


def run(
    model: VideoModel,
    num_blocks: int,
    *,
    exit_step: int,
    graded: int,
    select: str = "affinity-recent",
    **more: Any,
) -> Rollout:
    layout = layout_of(model, num_blocks)
    assert model.compressor is not None
    student = Student(model.transformer, model.compressor, model.codec)
    return rollout(
        student,
        model.transformer.embed_text(tiny.embeds(0)),
        layout,
        noise=noises(model, layout, num_blocks),
        sigmas=SCHEDULE.sigmas,
        exit_step=exit_step,
        graded=graded,
        select=select,
        **more,
    )


@pytest.mark.parametrize("select", ["affinity-recent", "affinity"])
def test_with_the_last_step_as_exit_it_is_the_rollout_of_inference(select: str) -> None:
    model = tiny.video_model(schedule=RENOISE)
    blocks = inference.stream_generate(
        model,
        Prompt("a", tiny.embeds(0)),
        num_blocks=7,
        seed=SEED,
        schedule=SCHEDULE,
        memory=MemoryOptions(sink_blocks=1, recent_blocks=1, select=select),
    )
    wanted = torch.cat([block.latents for block in blocks], 2)
    made = run(model, 7, exit_step=1, graded=7, select=select)
    torch.testing.assert_close(made.latents.detach(), wanted, rtol=0, atol=1e-10)
    assert (made.prefix, made.mids) == (0, 4)
    later = run(model, 7, exit_step=1, graded=2, select=select)
    torch.testing.assert_close(later.latents.detach(), wanted[:, :, -8:], rtol=0, atol=1e-10)


def loss_of(model: VideoModel, **options: Any) -> Tensor:
    """Of block 3 of 4, the first that sees a mid; no block before it depends on the compressor."""
    made = run(model, 4, exit_step=0, graded=1, **options)
    weight = torch.linspace(-1, 1, made.latents.numel(), dtype=torch.float64).view_as(made.latents)
    return (made.latents * weight).sum()


def difference(
    parameter: Tensor, at: tuple[int, ...], value: Callable[[], Tensor], step: float = 1e-5
) -> float:
    """Central finite difference of `value` in one entry of a parameter."""
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter[at] += sign * step
            sides.append(float(value()))
            parameter[at] -= sign * step
    return (sides[0] - sides[1]) / (2 * step)


@pytest.mark.parametrize("select", ["affinity-recent", "affinity"])
def test_the_gradient_reaches_the_compressor_through_the_attention_of_a_later_block(select: str) -> None:
    model = tiny.video_model(schedule=RENOISE)
    assert model.compressor is not None
    model.compressor.requires_grad_(True)
    loss_of(model, select=select).backward()
    for name, at in (
        ("hr.project.weight", (3, 1, 0, 0, 0)),
        ("hr.space.0.weight", (2, 1, 0, 1, 2)),
        ("hr.time.bias", (1,)),
    ):
        parameter = model.compressor.get_parameter(name)
        assert parameter.grad is not None
        found = float(parameter.grad[at])
        assert found == pytest.approx(
            difference(parameter, at, lambda: loss_of(model, select=select)), rel=1e-4
        )
        assert found != 0


def test_no_gradient_reaches_what_was_seen() -> None:
    model = tiny.video_model(schedule=RENOISE)
    assert model.compressor is not None
    model.compressor.requires_grad_(True)
    layout = layout_of(model, 4)
    noise = noises(model, layout, 4)
    for block in noise:
        for step in block:
            step.requires_grad_(True)
    text = model.transformer.embed_text(tiny.embeds(0))
    student = Student(model.transformer, model.compressor, model.codec)
    made = rollout(student, text, layout, noise=noise, sigmas=SCHEDULE.sigmas, exit_step=1, graded=1)
    made.latents.sum().backward()
    assert all(step.grad is None for block in noise[:3] for step in block)
    assert noise[3][0].grad is None  # a step before the exit


@pytest.mark.parametrize(
    ("gradient", "compressor", "only_mids"),
    [("all", True, True), ("compressor", True, False), ("none", False, False)],
)
def test_the_gradient_through_the_mids_goes_where_it_is_wanted(
    gradient: str, compressor: bool, only_mids: bool
) -> None:
    model = tiny.video_model(schedule=RENOISE)
    assert model.compressor is not None
    model.compressor.requires_grad_(True)
    model.transformer.requires_grad_(True)
    loss_of(model, gradient=gradient).backward()
    assert (model.compressor.get_parameter("hr.time.bias").grad is not None) is compressor
    # The direct path alone, as if the mids stood still.
    found = model.transformer.get_parameter("blocks.0.attn1.to_k.weight").grad
    assert found is not None
    model.transformer.zero_grad()
    loss_of(model, gradient="none").backward()
    direct = model.transformer.get_parameter("blocks.0.attn1.to_k.weight").grad
    assert direct is not None
    # The mids are made again for a graph, by another attention kernel: equal to its rounding.
    assert torch.allclose(found, direct, rtol=1e-9, atol=1e-9) is not only_mids


@pytest.mark.parametrize("gradient", ["all", "compressor"])
def test_checkpointing_changes_no_gradient(gradient: str) -> None:
    """The backward pass runs after the cache has moved on: it must read what the forward pass read."""
    grads = []
    for checkpointing in (False, True):
        model = tiny.video_model(schedule=RENOISE)
        assert model.compressor is not None
        model.compressor.requires_grad_(True)
        model.transformer.requires_grad_(True)
        if checkpointing:
            model.transformer.recompute_layers()
        made = run(model, 6, exit_step=0, graded=3, gradient=gradient)
        weight = torch.linspace(-1, 1, made.latents.numel(), dtype=torch.float64).view_as(made.latents)
        (made.latents * weight).sum().backward()
        parameters = [*model.transformer.parameters(), *model.compressor.parameters()]
        grads.append([p.grad for p in parameters])
    for plain, again in zip(*grads, strict=True):
        assert (plain is None) == (again is None)
        if plain is not None and again is not None:
            torch.testing.assert_close(plain, again, rtol=0, atol=1e-12)


# -- the losses -------------------------------------------------------------------------------------------------


def test_the_gradient_of_the_student_loss_is_the_dmd_gradient_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    x, noise, a, b, c = (
        torch.randn(2, 3, 2, 2, 2, generator=generator, dtype=torch.float64) for _ in range(5)
    )
    sigma = 0.7
    leaf = x.clone().requires_grad_(True)
    loss, _ = dmd.student_loss(
        leaf,
        noise,
        sigma,
        teacher=lambda x_t, s: a,
        teacher_unconditional=lambda x_t, s: b,
        critic=lambda x_t, s: c,
    )
    loss.backward()
    x_t = (1 - sigma) * x + sigma * noise
    real_c, real_u, fake = x_t - sigma * a, x_t - sigma * b, x_t - sigma * c
    real = real_c + 3 * (real_c - real_u)
    for sample in range(2):
        wanted = (fake[sample] - real[sample]) / (x[sample] - real[sample]).abs().mean()
        torch.testing.assert_close(leaf.grad[sample], wanted / x.numel(), rtol=1e-12, atol=0)  # type: ignore[index]


def test_where_student_and_teacher_agree_the_gradient_is_zero() -> None:
    x = torch.ones(1, 1, 1, 2, 2, dtype=torch.float64)
    assert torch.equal(dmd.gradient(x, x, x), torch.zeros_like(x))
    assert not dmd.gradient(x, x, x + 1).isnan().any()


def test_masked_latents_get_no_gradient() -> None:
    x = torch.randn(1, 2, 4, 1, 1, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([0.0, 1, 1, 1]).view(1, 1, 4, 1, 1)
    zero = torch.zeros_like(x)
    loss, _ = dmd.student_loss(
        x,
        torch.randn_like(x),
        0.5,
        teacher=lambda x_t, s: zero,
        teacher_unconditional=lambda x_t, s: zero,
        critic=lambda x_t, s: zero + 1,
        mask=mask,
    )
    loss.backward()
    assert x.grad is not None
    assert not x.grad[:, :, 0].any()
    assert x.grad[:, :, 1:].all()


def test_the_critic_learns_flow_matching_on_the_clip() -> None:
    x, noise = torch.randn(2, 1, 2, 1, 1, 1, dtype=torch.float64)
    assert float(dmd.critic_loss(x, noise, 0.3, lambda x_t, s: noise - x)) == 0
    off = dmd.critic_loss(x, noise, 0.3, lambda x_t, s: noise - x + 2)
    assert float(off) == pytest.approx(4)


def test_noise_levels_are_shifted_and_stay_off_the_ends() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([dmd.draw_sigma(generator, shift=5.0) for _ in range(4000)], dtype=torch.float64)
    assert float(drawn.min()) >= 0.02
    assert float(drawn.max()) == pytest.approx(0.98)
    # Half of the uniform timesteps lie above 0.5, which shift 5 takes to 5/6.
    assert float((drawn > 5 / 6).double().mean()) == pytest.approx(0.5, abs=0.03)


def test_text_with_a_graph_learns() -> None:
    model = tiny.video_model(schedule=RENOISE)
    assert model.compressor is not None
    model.transformer.requires_grad_(True)
    layout = layout_of(model, 2)
    embeds = tiny.embeds(0).requires_grad_(True)
    text: TextKV = model.transformer.embed_text(embeds)
    student = Student(model.transformer, model.compressor, model.codec)
    made = rollout(
        student, text, layout, noise=noises(model, layout, 2), sigmas=SCHEDULE.sigmas, exit_step=0, graded=1
    )
    made.latents.sum().backward()
    assert embeds.grad is not None
    assert embeds.grad.abs().sum() > 0
