"""The int8 product on an NVIDIA card, in Triton: exact sums, then the scales, in one kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILES = (  # rows, columns and depth of a tile, stages of its loads, warps
    *((128, 128, 64, 4, 8), (128, 128, 128, 3, 8), (128, 256, 64, 3, 8), (256, 128, 64, 3, 8)),
    *((64, 128, 128, 3, 4), (128, 64, 128, 3, 4)),
)
CONFIGS = [
    triton.Config({"ROWS": r, "COLUMNS": c, "DEPTH": d}, num_stages=stages, num_warps=warps)
    for r, c, d, stages, warps in TILES
]
GROUP = 8  # tiles below each other that are made together: they share their columns in the cache


@triton.autotune(configs=CONFIGS, key=["N", "K"])  # type: ignore[untyped-decorator]
@triton.jit  # type: ignore[untyped-decorator]
def kernel(  # type: ignore[no-untyped-def]  # Triton would read types, too
    a,
    b,
    a_scale,
    b_scale,
    out,
    M,
    N,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of out. A tile that a card has no room for is passed over by autotune."""
    tile, across = tl.program_id(0), tl.cdiv(N, COLUMNS)
    first = tile // (GROUP * across) * GROUP
    high = min(tl.cdiv(M, ROWS) - first, GROUP)
    inside = tile % (GROUP * across)
    row, column = (first + inside % high) * ROWS, inside // high * COLUMNS  # of the tile's corner
    m, n, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    # beyond the end the last row is read again, and what becomes of it is not kept
    a_at = a + row.to(tl.int64) * K + tl.minimum(m, M - 1 - row)[:, None] * K + k[None, :]
    b_at = b + column.to(tl.int64) * K + tl.minimum(n, N - 1 - column)[None, :] * K + k[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, K, DEPTH):
        if K % DEPTH:
            x = tl.load(a_at + start, mask=k[None, :] < K - start, other=0)
            y = tl.load(b_at + start, mask=k[:, None] < K - start, other=0)
        else:
            x, y = tl.load(a_at + start), tl.load(b_at + start)
        total = tl.dot(x, y, total, out_dtype=tl.int32)
    scaled = total.to(tl.float32) * tl.load(a_scale + row + m, m < M - row, 0.0)[:, None]
    scaled = scaled * tl.load(b_scale + column + n, n < N - column, 0.0)[None, :]
    out_at = out + row.to(tl.int64) * N + column + m[:, None] * N + n[None, :]
    there = (m < M - row)[:, None] & (n < N - column)[None, :]
    tl.store(out_at, scaled.to(out.dtype.element_ty), there)


def product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As int8.int8_product."""
    a, b, a_scale, b_scale = (t.contiguous() for t in (a, b, a_scale, b_scale))
    (M, K), N = a.shape, b.size(0)
    out = a.new_empty(M, N, dtype=dtype)

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (triton.cdiv(M, meta["ROWS"]) * triton.cdiv(N, meta["COLUMNS"]),)

    kernel[grid](a, b, a_scale, b_scale, out, M, N, K, GROUP)
    return out
