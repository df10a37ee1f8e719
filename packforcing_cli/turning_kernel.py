"""The Triton kernel of turning.py: one program a token and row, over all its heads. Imports Triton; see there."""

# mypy: disable-error-code="import-not-found,import-untyped,untyped-decorator,misc"
import triton
import triton.language as tl


@triton.jit
def turn_kernel(  # type: ignore[no-untyped-def]
    x,
    out,
    cos,
    sin,
    places,
    scale,
    per_place,
    heads,
    half,
    x_row,
    x_place,
    x_token,
    x_head,
    out_row,
    out_token,
    out_head,
    scale_row,
    scale_place,
    scale_token,
    TURNS: tl.constexpr,
    PICKS: tl.constexpr,
    SCALES: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64)
    within, place = token, token * 0
    if PICKS:
        within = token % per_place
        place = tl.load(places + token // per_place).to(tl.int64)
    h = tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, HALF)[None, :]
    there = (h < heads) & (i < half)
    source = x + row * x_row + place * x_place + within * x_token + h * x_head + 2 * i
    even = tl.load(source, mask=there, other=0.0).to(tl.float32)
    odd = tl.load(source + 1, mask=there, other=0.0).to(tl.float32)
    if SCALES:
        by = tl.load(
            scale + row * scale_row + place * scale_place + within * scale_token + h,
            mask=h < heads,
            other=0.0,
        )
        even = even * by
        odd = odd * by
    if TURNS:
        c = tl.load(cos + token * half + i, mask=i < half, other=0.0)
        s = tl.load(sin + token * half + i, mask=i < half, other=0.0)
        turned = even * c - odd * s
        odd = even * s + odd * c
        even = turned
    target = out + row * out_row + token * out_token + h * out_head + 2 * i
    tl.store(target, even.to(out.dtype.element_ty), mask=there)
    tl.store(target + 1, odd.to(out.dtype.element_ty), mask=there)
