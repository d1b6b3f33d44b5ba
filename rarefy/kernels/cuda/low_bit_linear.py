"""Linear layers of few-bit weights on tensor cores, for few rows of activations: as fast as the weights are read.

One warp multiplies 16 rows of weights by 512 inputs at a time. What a thread reads, 16 bytes a row, is what it holds of
``mma.m16n8k16``'s first operand: codes become numbers by two instructions a pair (a code put into the mantissa of 1024,
or of 128 in bfloat16, and 1024 + zero taken off, both exact), no number passes through shared memory, and the order of
the inputs is the packing's (``low_bit.linear``). Products of a group are summed in float32 and scaled once. A block's
warps share its rows and split the inputs; their sums are added in the order of the warps, so that the same inputs give
the same bits. Weights and scales are read before the kernel in front has ended, activations after.

Above ``MOST`` rows weights are decoded into a buffer at the speed of the memory, and cuBLAS multiplies: a Triton kernel
that shifted a block's words into the registers of ``wgmma`` took as long as both at 64 rows, and two to four times as
long from 256 on (H200, 4096 x 4096).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rarefy.kernels import nvrtc
from rarefy.kernels.cuda import packing
from rarefy.kernels.low_bit.linear import TILE

MOST = 32  # rows of activations; above, decoding first is faster


SOURCE = r"""
typedef unsigned int u32; typedef unsigned short u16;
#if BF16
#define MAGIC 0x43004300u
#define KIND "bf16"
#else
#define MAGIC 0x64006400u
#define KIND "f16"
#endif
#define CHUNKS (BITS == 4 ? 4 : 2)     // of 16 words: of a row's 512 inputs in one plane
#define PARTS (BITS == 4 ? 4 : 8)      // pairs of slices that a word holds
#define HALF (BITS == 4 ? 64 : 32)     // inputs from one slice to the next
#define SHARE (CHUNKS / SPLIT)         // chunks that one of SPLIT warps multiplies
#define WIDTH (HALF / SPLIT)           // of HALF inputs, those of its chunks
#define LOADS (SHARE + (BITS == 3))    // of 16 bytes: of a row in one block, a thread's
#define FIELD (BITS == 4 ? 4 : 2)      // bits from one code of a word to the next
#define MASK ((BITS == 4 ? 15u : 3u) * 0x00010001u)
#if BF16                               // codes that a mantissa holds where they lie, before words are shifted
#define HELD (BITS == 4 ? 1 : 3)
#else
#define HELD (BITS == 4 ? 2 : 4)
#endif

__device__ __forceinline__ void fetch(void *to, const u32 *from) {
  u32 at = (u32)__cvta_generic_to_shared(to);
  asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" :: "r"(at), "l"(from) : "memory");
}
__device__ __forceinline__ u32 less(u32 a, u32 b) {   // a - b, two numbers each
  u32 d;
#if BF16
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3f803f80u), "r"(b ^ 0x80008000u));
#else
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
#endif
  return d;
}
__device__ __forceinline__ float number(u16 h) {
  float f;
#if BF16
  u32 w = (u32)h << 16; f = __uint_as_float(w);
#else
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
#endif
  return f;
}
__device__ __forceinline__ u16 half_of(float f) {
  u16 h;
  asm("cvt.rn." KIND ".f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
__device__ __forceinline__ float f16(u16 h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f; }
__device__ __forceinline__ u32 word(const uint4 &v, int q) { return q == 0 ? v.x : q == 1 ? v.y : q == 2 ? v.z : v.w; }

__device__ __forceinline__ u32 choose(u32 a, u32 mask, u32 more) {   // (a & mask) | more, in one instruction
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(more));
  return d;
}
// two codes of a word, times 2^offset, as numbers that are MAGIC's too large; high: the third bits, where they belong
__device__ __forceinline__ u32 codes(u32 word, u32 high, int offset) {
#if BITS == 3
  return choose(word, MASK << offset, choose(high, 0x00040004u << offset, MAGIC));
#else
  return choose(word, MASK << offset, MAGIC);
#endif
}
__device__ __forceinline__ void mma(float *c, const u32 *a, const u32 *b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." KIND "." KIND ".f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// four numbers beside those that lie HALF further on
__device__ __forceinline__ uint4 pairs(uint2 a, uint2 b) {
  return {__byte_perm(a.x, b.x, 0x5410), __byte_perm(a.x, b.x, 0x7632),
          __byte_perm(a.y, b.y, 0x5410), __byte_perm(a.y, b.y, 0x7632)};
}
struct Scales { float scale[4]; u32 zero; };

// Each thread copies what it will multiply: nobody else reads it.
__device__ __forceinline__ void order(uint4 *slot, const u32 *words, int r, int kb, int blocks, int t, int share) {
  const u32 *base = words + (long long)r * blocks * (16 * BITS) + 4 * t;
  #pragma unroll
  for (int c = 0; c < SHARE; c++) fetch(slot + 32 * c, base + (kb * CHUNKS + share * SHARE + c) * 16);
#if BITS == 3
  fetch(slot + 32 * SHARE, base + blocks * 32 + kb * 16);
#endif
}
__device__ __forceinline__ Scales scales_of(const void *scales, const u32 *zeros, int r, int kb, int blocks) {
  Scales row;
  long long g = (long long)r * blocks + kb;
#if WIDE
  float4 s = ((const float4 *)scales)[g];
  row.scale[0] = s.x; row.scale[1] = s.y; row.scale[2] = s.z; row.scale[3] = s.w;
#else
  uint2 s = ((const uint2 *)scales)[g];
  row.scale[0] = f16(s.x & 0xffff); row.scale[1] = f16(s.x >> 16);
  row.scale[2] = f16(s.y & 0xffff); row.scale[3] = f16(s.y >> 16);
#endif
#if AFFINE
  row.zero = zeros[g];
#else
  row.zero = 0x01010101u << (BITS - 1);
#endif
  return row;
}

#define PITCH (256 / SPLIT + 16)  // pairs from one row of activations to the next: 16 put rows into other banks
#define SLOT (TILES * 2 * LOADS * 32)
extern __shared__ uint4 memory[];

extern "C" __global__ void __launch_bounds__(32 * WARPS, OCCUPANCY)
low_bit_linear(const u16 *x, const u32 *words, const void *scales, const u32 *zeros, const u16 *bias, u16 *out,
               int rows, int outputs, int inputs, int blocks, int stride) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int along = warp / SPLIT, share = warp % SPLIT, across = WARPS / SPLIT;
  const int first = blockIdx.x * (16 * TILES);
  uint4 *ring = memory + warp * (DEPTH * SLOT) + lane;
#if STAGED
  u32 *mine = (u32 *)(memory + WARPS * DEPTH * SLOT) + warp * (STAGED * PITCH);
#endif
  float total[TILES][NB][4] = {};
#if EARLY
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  #pragma unroll
  for (int d = 0; d < DEPTH; d++) {
    const int kb = along + d * across;
    if (kb < blocks) {
      #pragma unroll
      for (int i = 0; i < 2 * TILES; i++)
        order(ring + d * SLOT + i * LOADS * 32, words, first + 8 * i + g, kb, blocks, t, share);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  Scales row[TILES][2];
  if (along < blocks) {
    #pragma unroll
    for (int i = 0; i < 2 * TILES; i++)
      row[i >> 1][i & 1] = scales_of(scales, zeros, first + 8 * i + g, along, blocks);
  }
#if EARLY
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  int slot = 0;
  for (int kb = along; kb < blocks; kb += across) {
#if STAGED
    __syncwarp();
    #pragma unroll (STAGED > 4 ? 4 : STAGED)
    for (int n = 0; n < STAGED; n++) {  // in the order that the second operand has in registers
      #pragma unroll
      for (int m = 4 * lane; m < 256 / SPLIT; m += 128) {
        const int k = kb * 512 + m / WIDTH * (2 * HALF) + m % WIDTH + share * WIDTH;
        const u16 *from = x + (long long)n * stride + k;
        uint2 lo = {0, 0}, hi = {0, 0};
        if (n < rows && k < inputs) lo = *(const uint2 *)from;
        if (n < rows && k + HALF < inputs) hi = *(const uint2 *)(from + HALF);
        *(uint4 *)(mine + n * PITCH + m) = pairs(lo, hi);
      }
    }
    __syncwarp();
#endif
    asm volatile("cp.async.wait_group %0;" :: "n"(DEPTH - 1) : "memory");
    uint4 *held = ring + slot * SLOT;
    #pragma unroll
    for (int i = 0; i < TILES; i++) {
      float acc[PARTS][NB][4] = {};
      #pragma unroll
      for (int c = 0; c < SHARE; c++) {
        const int chunk = share * SHARE + c;
        u32 w[2][4], high[2][4] = {};
        #pragma unroll
        for (int h = 0; h < 2; h++) {
          const uint4 v = held[((2 * i + h) * LOADS + c) * 32];
          w[h][0] = v.x; w[h][1] = v.y; w[h][2] = v.z; w[h][3] = v.w;
        }
        #pragma unroll
        for (int part = 0; part < PARTS; part++) {
          const int group = part * 4 / PARTS, offset = FIELD * (part % HELD), moved = FIELD * (part - part % HELD);
          if (part % HELD == 0) {  // what comes next moves into the mantissas' place
            #pragma unroll
            for (int h = 0; h < 2; h++) {
#if BITS == 3
              const uint4 top = held[((2 * i + h) * LOADS + SHARE) * 32];
#endif
              #pragma unroll
              for (int q = 0; q < 4; q++) {
                if (part) w[h][q] >>= FIELD * HELD;
#if BITS == 3
                high[h][q] = moved ? word(top, q) >> (moved - 2 + chunk) : word(top, q) << (2 - chunk);
#endif
              }
            }
          }
          u32 zero[2];
          #pragma unroll
          for (int h = 0; h < 2; h++) {
            const u32 z = (row[i][h].zero >> (8 * group)) & 0xffu;
            zero[h] = MAGIC | ((z | (z << 16)) << offset);
          }
          u32 b[NB][4];
          #pragma unroll
          for (int n = 0; n < NB; n++) {
            uint4 v;
#if STAGED
            const int column = (8 * n + g) % STAGED;  // what is beyond the rows is not written
            v = *(const uint4 *)(mine + column * PITCH + (part * SHARE + c) * 16 + 4 * t);
#else
            const int column = 8 * n + g, k = kb * 512 + part * 2 * HALF + 16 * chunk + 4 * t;
            uint2 lo = {0, 0}, hi = {0, 0};
            const u16 *at = x + (long long)column * stride + k;
            if (column < rows && k < inputs) lo = *(const uint2 *)at;
            if (column < rows && k + HALF < inputs) hi = *(const uint2 *)(at + HALF);
            v = pairs(lo, hi);
#endif
            b[n][0] = v.x; b[n][1] = v.y; b[n][2] = v.z; b[n][3] = v.w;
          }
          #pragma unroll
          for (int q = 0; q < 4; q += 2) {
            u32 a[4];
            #pragma unroll
            for (int e = 0; e < 4; e++) {
              const int h = e & 1, at = q + (e >> 1);
              a[e] = less(codes(w[h][at], high[h][at], offset), zero[h]);
            }
            #pragma unroll
            for (int n = 0; n < NB; n++) mma(acc[part][n], a, b[n] + q);
          }
        }
      }
      #pragma unroll
      for (int part = 0; part < PARTS; part++)
        #pragma unroll
        for (int n = 0; n < NB; n++)
          #pragma unroll
          for (int j = 0; j < 4; j++)
            total[i][n][j] += acc[part][n][j] *
              (row[i][j >> 1].scale[part * 4 / PARTS] / (1 << FIELD * (part % HELD)));
    }
    const int next = kb + DEPTH * across;
    if (next < blocks) {
      #pragma unroll
      for (int i = 0; i < 2 * TILES; i++) order(held + i * LOADS * 32, words, first + 8 * i + g, next, blocks, t, share);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    if (kb + across < blocks) {
      #pragma unroll
      for (int i = 0; i < 2 * TILES; i++)
        row[i >> 1][i & 1] = scales_of(scales, zeros, first + 8 * i + g, kb + across, blocks);
    }
    slot = slot + 1 == DEPTH ? 0 : slot + 1;
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();  // the ring holds the sums now
  float *sums = (float *)memory;
  const int width = NB * 8 + 1;
  #pragma unroll
  for (int i = 0; i < TILES; i++)
    #pragma unroll
    for (int n = 0; n < NB; n++)
      #pragma unroll
      for (int j = 0; j < 4; j++)
        sums[(warp * TILES * 16 + 16 * i + g + 8 * (j >> 1)) * width + 8 * n + 2 * t + (j & 1)] = total[i][n][j];
  __syncthreads();
  for (int at = threadIdx.x; at < TILES * 16 * rows; at += 32 * WARPS) {
    const int r = at % (TILES * 16), column = at / (TILES * 16), o = first + r;
    if (o >= outputs) continue;
    float sum = 0;
    #pragma unroll
    for (int w = 0; w < WARPS; w++) sum += sums[(w * TILES * 16 + r) * width + column];
#if BIAS
    sum += number(bias[o]);
#endif
    out[(long long)column * outputs + o] = half_of(sum);
  }
}
"""


def few_rows(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    outputs: int,
    warps: int = 0,
    split: int = 1,
    tiles: int = 0,
    occupancy: int = 0,
    depth: int = 0,
    stage: int = 16,
    early: bool = True,
) -> Tensor:
    """x: (n, inputs) float16 or bfloat16, n at most ``MOST``. The rest: as ``low_bit.linear.Packed``.

    warps, tiles, ...: how the work is cut, for measurements; each choice gives its own bits, the same in every run.
    """
    rows, inputs = x.shape
    blocks, columns = scales.shape[1] // 4, 1 << (-(-rows // 8) - 1).bit_length()
    tiles = tiles or (2 if 8 < rows <= 16 else 1)
    warps = warps or split * min(8, blocks)
    depth = depth or (1 if blocks * split <= warps or rows > 8 else 2)
    staged = 1 << (rows - 1).bit_length() if rows <= stage else 0
    defines = {
        "BITS": bits,
        "NB": columns,
        "TILES": tiles,
        "WARPS": warps,
        "SPLIT": split,
        "DEPTH": depth,
        "STAGED": staged,
        "OCCUPANCY": occupancy
        or (1 if tiles == 2 or columns > 2 else 3 if columns == 1 and (bits == 4 or outputs > 8192) else 2),
        "BF16": int(x.dtype == torch.bfloat16),
        "WIDE": int(scales.dtype == torch.float32),
        "AFFINE": int(zeros is not None),
        "BIAS": int(bias is not None),
        "EARLY": int(early and torch.cuda.get_device_capability(x.device) >= (9, 0)),
    }
    function = nvrtc.kernel(SOURCE, "low_bit_linear", tuple(defines.items()))
    out = x.new_empty(rows, outputs)
    loads = (4 if bits == 4 else 2) // split + (bits == 3)
    held = warps * (depth * tiles * 2 * loads * 512 + staged * (1024 // split + 64))
    shared = max(held, warps * tiles * 16 * (columns * 8 + 1) * 4)
    function(
        (-(-outputs // (TILE * tiles)), 1, 1), 32 * warps, x, words, scales, words if zeros is None else zeros,
        x if bias is None else bias, out, rows, outputs, inputs, blocks, x.stride(0), shared=shared,
    )  # fmt: skip
    return out


def linear(
    x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, outputs: int
) -> Tensor:
    """``low_bit.linear.low_bit_linear`` on a GPU."""
    inputs = x.shape[-1]
    flat = x.reshape(-1, inputs)
    narrow = flat.dtype in (torch.float16, torch.bfloat16)
    if not 0 < len(flat) <= MOST or inputs % 4 or not narrow:
        return F.linear(x, packing.decoded(words, scales, zeros, bits, outputs, inputs, x.dtype), bias)
    if flat.stride(1) != 1 or flat.stride(0) % 4 or flat.data_ptr() % 8:
        flat = flat.clone(memory_format=torch.contiguous_format)
    answer = few_rows(flat, words, scales, zeros, bias, bits, outputs)
    return answer.view(*x.shape[:-1], outputs)
