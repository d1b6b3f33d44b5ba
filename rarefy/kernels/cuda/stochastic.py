"""Quantise and pack with random rounding in CUDA C++, where Triton takes half as many instructions again: rounding down
is one addition here, three times eight bits go together between neighbours, and nothing passes through shared memory.

A thread has eight neighbouring numbers at a time: one block of random bits, whole bytes at every width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.kernels import nvrtc
from rarefy.kernels.low_bit.packing import ROUNDS

THREADS, UNROLL = 256, 2  # of eight numbers, a thread's on the way

SOURCE = r"""
typedef unsigned int u32; typedef unsigned long long u64; typedef long long i64;
#define KEEP ((1u << BITS) - 1)

__device__ __forceinline__ void random_bits(u32 *r, i64 block, u32 k0, u32 k1) {   // Philox4x32
  r[0] = (u32)block; r[1] = (u32)(block >> 32); r[2] = r[3] = 0;
  #pragma unroll
  for (int i = 0; i < ROUNDS; i++) {
    const u64 a = (u64)r[0] * 0xD2511F53u, b = (u64)r[2] * 0xCD9E8D57u;
    r[0] = (u32)(b >> 32) ^ r[1] ^ k0; r[1] = (u32)b; r[2] = (u32)(a >> 32) ^ r[3] ^ k1; r[3] = (u32)a;
    k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
  }
}
__device__ __forceinline__ float noise(u32 r, int half) {   // (16 bits + 1/2) / 65536, by the mantissa of 1 + it
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(half ? r >> 9 : r << 7), "r"(0x7fff80u), "r"(0x3f800040u));
  return __fadd_rn(__uint_as_float(d), -1.0f);
}
// x / scale, rounded right (Markstein 1990), of an inverse that is; what is far beyond any code stays so.
__device__ __forceinline__ float quotient(float x, float scale, float inverse) {
  const float about = __fmul_rn(x, inverse), better = __fmaf_rn(__fmaf_rn(-about, scale, x), inverse, about);
  return fabsf(about) < 4194304.0f ? better : about;
}

extern "C" __global__ void __launch_bounds__(THREADS)
quantize_pack(const float *x, const float *scales, const int *zeros, void *out, u32 count_low, u32 count_high,
              u32 inner_low, u32 inner_high, int channels, int qmin, int qmax, u32 k0, u32 k1) {
  const i64 count = ((i64)count_high << 32) | count_low, inner = ((i64)inner_high << 32) | inner_low;
  const i64 first = (i64)blockIdx.x * (THREADS * UNROLL) + threadIdx.x;
  float v[UNROLL][8];
  #pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    const i64 lane = first + u * THREADS;
    if (lane * 8 + 8 <= count) {
      const float4 a = __ldcs((const float4 *)x + 2 * lane), b = __ldcs((const float4 *)x + 2 * lane + 1);
      v[u][0] = a.x; v[u][1] = a.y; v[u][2] = a.z; v[u][3] = a.w;
      v[u][4] = b.x; v[u][5] = b.y; v[u][6] = b.z; v[u][7] = b.w;
    } else {
      #pragma unroll
      for (int i = 0; i < 8; i++) v[u][i] = lane * 8 + i < count ? x[lane * 8 + i] : 0.0f;
    }
  }
  #pragma unroll
  for (int u = 0; u < UNROLL; u++) {
    const i64 lane = first + u * THREADS, at = lane * 8 < count ? lane * 8 : 0;
    const int channel = channels > 1 ? (int)(at / inner % channels) : 0, zero = zeros[channel];
    const float scale = scales[channel], inverse = __frcp_rn(scale);
    const float low = (float)(qmin - zero), high = (float)(qmax - zero), large = 12582912.0f + (float)zero;  // 1.5 2^23
    u32 r[4], words[2] = {0, 0};
    random_bits(r, lane, k0, k1);
    #pragma unroll
    for (int i = 0; i < 8; i++) {
      const float y = __fadd_rn(quotient(v[u][i], scale, inverse), noise(r[i / 2], i % 2));
      u32 code = __float_as_uint(__fadd_rd(fminf(fmaxf(y, low), high), large)) & KEEP;  // cut down; the code is last
      words[BITS * i / 32] |= code << (BITS * i % 32);
    }
    const int left = (int)(count - lane * 8 < 8 ? count - lane * 8 : 8);
    if (left < 8) {
      #pragma unroll
      for (int w = 0; w < 2; w++) {
        const int kept = left * BITS - 32 * w;
        words[w] = kept <= 0 ? 0 : kept >= 32 ? words[w] : words[w] & ((1u << kept) - 1);
      }
    }
#if BITS == 3
    const u32 next = __shfl_down_sync(~0u, words[0], 1);
    const int j = threadIdx.x & 3;
    const i64 stored = (count * 3 + 63) / 64 * 2, to = lane / 4 * 3 + j;  // words of 32 bits
    if (j < 3 && to < stored) ((u32 *)out)[to] = words[0] >> (8 * j) | next << (24 - 8 * j);
#else
    if (left <= 0) continue;
#if BITS == 8
    ((uint2 *)out)[lane] = {words[0], words[1]};
#elif BITS == 4
    ((u32 *)out)[lane] = words[0];
#else
    ((unsigned short *)out)[lane] = (unsigned short)words[0];
#endif
#endif
  }
}
"""


def fits(x: Tensor, inner: int, channels: int) -> bool:
    """Is it float32 that lies as the kernel reads it, eight numbers of one scale?"""
    aligned = x.dtype == torch.float32 and x.data_ptr() % 16 == 0
    return aligned and (channels == 1 or inner % 8 == 0)


def quantize_pack(
    x: Tensor, scales: Tensor, zeros: Tensor, words: Tensor, inner: int, channels: int, qmin: int, qmax: int,
    bits: int, seed: int,
) -> None:  # fmt: skip
    """Fills ``words``, whose last is zero. x: contiguous float32. scales: float32; zeros: int32."""
    count = x.numel()
    defines = (("BITS", bits), ("ROUNDS", ROUNDS), ("THREADS", THREADS), ("UNROLL", UNROLL))
    blocks = -(-count // (8 * THREADS * UNROLL))
    nvrtc.kernel(SOURCE, "quantize_pack", defines)(
        (blocks, 1, 1), THREADS, x, scales, zeros, words, *_halves(count), *_halves(inner), channels, qmin, qmax,
        *_halves(seed),
    )  # fmt: skip


def _halves(number: int) -> tuple[int, int]:
    return number & 0xFFFFFFFF, (number >> 32) & 0xFFFFFFFF
