"""Linear layers of few-bit weights on tensor cores, for few rows of activations: as fast as the weights are read.

One warp multiplies 16 rows of weights by 512 inputs at a time. What a thread reads, 16 bytes a row, is what it holds of
``mma.m16n8k16``'s first operand: codes become numbers by two instructions a pair (codes are put into the mantissa of
1024, or of 128 in bfloat16, where they lie in the word, and 1024 + zero taken off, both exact), no weight passes from
thread to thread, and the order of the inputs is the packing's (``low_bit.linear``), in which activations are laid into
shared memory once. Products of a group are summed in float32 and scaled once. A block's warps split the inputs, and
take tile after tile of 16 rows, the next one's words being on the way; their sums are added in the order of the warps,
so that the same inputs give the same bits. The first weights are read before the kernel in front has ended,
activations after.

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
STAGED = 16  # rows of activations that shared memory holds
_LOADS = {2: 2, 3: 3, 4: 4}  # of 16 bytes: of a row's 512 inputs, a thread's


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
#define LOADS (CHUNKS + (BITS == 3))   // of 16 bytes: of a row in one block, a thread's
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

// Each thread copies what it will multiply, of rows r and r + 8: nobody else reads it.
__device__ __forceinline__ void order(uint4 *slot, const u32 *words, int r, int last, int kb, int blocks, int t) {
  #pragma unroll
  for (int h = 0; h < 2; h++) {
    const u32 *base = words + (long long)min(r + 8 * h, last) * blocks * (16 * BITS) + 4 * t;
    #pragma unroll
    for (int c = 0; c < CHUNKS; c++) fetch(slot + 32 * (h * LOADS + c), base + (kb * CHUNKS + c) * 16);
#if BITS == 3
    fetch(slot + 32 * (h * LOADS + CHUNKS), base + blocks * 32 + kb * 16);
#endif
  }
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

#define PITCH 272   // pairs from one row of activations to the next: 256, and 16 so that rows lie in other banks
#define SLOT (2 * LOADS * 32)
#define ACROSS (NB * 8 + 1)
extern __shared__ uint4 memory[];

// 512 inputs of the activations, in the order that the second operand has in registers
__device__ __forceinline__ void stage(u32 *mine, const u16 *x, int kb, int n, int rows, int inputs, int stride,
                                      int lane) {
  #pragma unroll
  for (int m = 4 * lane; m < 256; m += 128) {
    const int k = kb * 512 + m / HALF * (2 * HALF) + m % HALF;
    const u16 *from = x + (long long)n * stride + k;
    uint2 lo = {0, 0}, hi = {0, 0};
    if (n < rows && k < inputs) lo = *(const uint2 *)from;
    if (n < rows && k + HALF < inputs) hi = *(const uint2 *)(from + HALF);
    *(uint4 *)(mine + n * PITCH + m) = pairs(lo, hi);
  }
}

extern "C" __global__ void __launch_bounds__(32 * ALONG * ABREAST, OCCUPANCY)
low_bit_linear(const u16 *x, const u32 *words, const void *scales, const u32 *zeros, const u16 *bias, u16 *out,
               int rows, int outputs, int inputs, int blocks, int stride, int tiles, int last) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int along = warp % ALONG, beside = warp / ALONG;
  uint4 *ring = memory + warp * (DEPTH * SLOT) + lane;
  float *sums = (float *)(memory + ALONG * ABREAST * DEPTH * SLOT);
#if STAGED
  u32 *mine = (u32 *)(sums + ALONG * ABREAST * 16 * ACROSS) + along * (STAGED * PITCH);
#endif
  // this warp's steps: its blocks of a tile's rows, tile by tile
  const int each = ONCE ? 1 : (blocks - along + ALONG - 1) / ALONG, first = (blockIdx.x * ABREAST + beside) * 16 + g;
  const int steps = ALONE ? 1 : each * ((tiles - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x);
  const int further = gridDim.x * ABREAST * 16;
#if EARLY
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  #pragma unroll
  for (int d = 0; d < DEPTH; d++) {
    if (d < steps) order(ring + d * SLOT, words, first + d / each * further, last, along + d % each * ALONG, blocks, t);
    asm volatile("cp.async.commit_group;" ::: "memory");
  }
  Scales row[2];
  #pragma unroll
  for (int h = 0; h < 2; h++) row[h] = scales_of(scales, zeros, min(first + 8 * h, last), along, blocks);
#if EARLY
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
#if STAGED && ONCE
  for (int n = beside; n < STAGED; n += ABREAST) stage(mine, x, along, n, rows, inputs, stride, lane);
  __syncthreads();
#endif
  int slot = 0, step = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += ALONE ? tiles : gridDim.x) {
    float total[NB][4] = {};
    for (int turn = 0; turn < each; turn++, step++) {
      const int kb = along + turn * ALONG;
#if STAGED && !ONCE
      __syncwarp();
      #pragma unroll 1
      for (int n = 0; n < STAGED; n++) stage(mine, x, kb, n, rows, inputs, stride, lane);
      __syncwarp();
#endif
      asm volatile("cp.async.wait_group %0;" :: "n"(DEPTH - 1) : "memory");
      uint4 *held = ring + slot * SLOT;
      float acc[PARTS][NB][4] = {};
      #pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        u32 w[2][4], high[2][4] = {};
        #pragma unroll
        for (int h = 0; h < 2; h++) {
          const uint4 v = held[(h * LOADS + c) * 32];
          w[h][0] = v.x; w[h][1] = v.y; w[h][2] = v.z; w[h][3] = v.w;
        }
        #pragma unroll
        for (int part = 0; part < PARTS; part++) {
          const int group = part * 4 / PARTS, offset = FIELD * (part % HELD), moved = FIELD * (part - part % HELD);
          if (part % HELD == 0) {  // what comes next moves into the mantissas' place
            #pragma unroll
            for (int h = 0; h < 2; h++) {
#if BITS == 3
              const uint4 top = held[(h * LOADS + CHUNKS) * 32];
#endif
              #pragma unroll
              for (int q = 0; q < 4; q++) {
                if (part) w[h][q] >>= FIELD * HELD;
#if BITS == 3
                high[h][q] = moved ? word(top, q) >> (moved - 2 + c) : word(top, q) << (2 - c);
#endif
              }
            }
          }
          u32 zero[2];
          #pragma unroll
          for (int h = 0; h < 2; h++) {
            const u32 z = (row[h].zero >> (8 * group)) & 0xffu;
            zero[h] = MAGIC | ((z | (z << 16)) << offset);
          }
          u32 b[NB][4];
          #pragma unroll
          for (int n = 0; n < NB; n++) {
            uint4 v;
#if STAGED
            const int column = (8 * n + g) % STAGED;  // what is beyond the rows is not written
            v = *(const uint4 *)(mine + column * PITCH + (part * CHUNKS + c) * 16 + 4 * t);
#else
            const int column = 8 * n + g, k = kb * 512 + part * 2 * HALF + 16 * c + 4 * t;
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
            total[n][j] += acc[part][n][j] * (row[j >> 1].scale[part * 4 / PARTS] / (1 << FIELD * (part % HELD)));
      const int later = step + DEPTH, after = step + 1;
      if (later < steps)
        order(held, words, first + later / each * further, last, along + later % each * ALONG, blocks, t);
      asm volatile("cp.async.commit_group;" ::: "memory");
      if (after < steps) {
        #pragma unroll
        for (int h = 0; h < 2; h++)
          row[h] = scales_of(scales, zeros, min(first + after / each * further + 8 * h, last),
                             along + after % each * ALONG, blocks);
      }
      slot = slot + 1 == DEPTH ? 0 : slot + 1;
    }
    if (!ALONE) __syncthreads();  // the sums of the tile in front have been read
    #pragma unroll
    for (int n = 0; n < NB; n++)
      #pragma unroll
      for (int j = 0; j < 4; j++)
        sums[(warp * 16 + g + 8 * (j >> 1)) * ACROSS + 8 * n + 2 * t + (j & 1)] = total[n][j];
    __syncthreads();
    for (int at = threadIdx.x; at < ABREAST * 16 * rows; at += 32 * ALONG * ABREAST) {
      const int r = at % (ABREAST * 16), column = at / (ABREAST * 16), o = tile * ABREAST * 16 + r;
      if (o >= outputs) continue;
      float sum = 0;
      #pragma unroll
      for (int w = 0; w < ALONG; w++) sum += sums[((r / 16 * ALONG + w) * 16 + r % 16) * ACROSS + column];
#if BIAS
      sum += number(bias[o]);
#endif
      out[(long long)column * outputs + o] = half_of(sum);
    }
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
    along: int = 0,
    abreast: int = 0,
    occupancy: int = 0,
    depth: int = 0,
    early: bool = True,
) -> Tensor:
    """x: (n, inputs) float16 or bfloat16, n at most ``MOST``. The rest: as ``low_bit.linear.Packed``.

    along, abreast, ...: how the work is cut, for measurements; each choice gives its own bits, the same in every run.
    """
    rows, inputs = x.shape
    blocks, columns = scales.shape[1] // 4, 1 << (-(-rows // 8) - 1).bit_length()
    along = along or min(8, blocks)
    abreast = abreast or (2 if columns == 2 and blocks <= along else 1)
    occupancy = occupancy or (
        1 if columns > 1 else 3 if rows <= 4 and bits != 3 and (bits == 4 or outputs > 8192) else 2
    )
    tiles = -(-outputs // (TILE * abreast))
    grid = min(tiles, occupancy * torch.cuda.get_device_properties(x.device).multi_processor_count)
    depth = depth or (2 if blocks > along and rows <= 8 else 1)
    staged = 1 << (rows - 1).bit_length() if rows <= STAGED else 0
    defines = {
        "BITS": bits,
        "NB": columns,
        "ALONG": along,
        "ABREAST": abreast,
        "ONCE": int(blocks <= along),  # each warp has one block of the inputs
        "ALONE": int(blocks <= along and tiles <= grid),  # and one tile
        "DEPTH": depth,
        "STAGED": staged,
        "OCCUPANCY": occupancy,
        "BF16": int(x.dtype == torch.bfloat16),
        "WIDE": int(scales.dtype == torch.float32),
        "AFFINE": int(zeros is not None),
        "BIAS": int(bias is not None),
        "EARLY": int(early and torch.cuda.get_device_capability(x.device) >= (9, 0)),
    }
    function = nvrtc.kernel(SOURCE, "low_bit_linear", tuple(defines.items()))
    out = x.new_empty(rows, outputs)
    ring = along * abreast * depth * _LOADS[bits] * 1024
    shared = ring + along * abreast * TILE * (columns * 8 + 1) * 4 + along * staged * 1088
    function(
        (grid, 1, 1), 32 * along * abreast, x, words, scales, words if zeros is None else zeros,
        x if bias is None else bias, out, rows, outputs, inputs, blocks, x.stride(0), tiles, len(words) - 1,
        shared=shared,
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
