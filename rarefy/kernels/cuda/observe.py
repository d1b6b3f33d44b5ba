"""Extremes, moments and histogram in one pass over a tensor, as fast as it is read.

A block takes a fixed number of neighbouring numbers of a channel and counts into its own copies of the histogram in
shared memory, which one atomic a bin then adds to the whole: whole numbers, so that any order gives the same.
Neighbouring threads, whose numbers are alike in pictures, count into different copies. A warp whose numbers all fall
into one bin, as in the flat parts of pictures, adds once. Sums of a block are float64 over
float32 of few numbers, and the blocks' are added in order by a second kernel: the same inputs give the same bits on
every GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.kernels import nvrtc

CHUNK = 2**17  # numbers a block takes
THREADS = 256
MOST_BINS = 4096

SOURCE = r"""
typedef unsigned int u32; typedef unsigned short u16; typedef long long i64;
struct Partial { double sum, squares; float least, most; };
#define INF __int_as_float(0x7f800000)

__device__ __forceinline__ float number(u16 h) {
  float f;
#if KIND == 2
  f = __uint_as_float((u32)h << 16);
#else
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
#endif
  return f;
}
#if KIND == 0
typedef float item; typedef float4 pack;
#define PACK 4
__device__ __forceinline__ void spread(const pack &p, float *v) { v[0] = p.x; v[1] = p.y; v[2] = p.z; v[3] = p.w; }
__device__ __forceinline__ float single(item i) { return i; }
#else
typedef u16 item; typedef uint4 pack;
#define PACK 8
__device__ __forceinline__ void spread(const pack &p, float *v) {
  u32 w[4] = {p.x, p.y, p.z, p.w};
  #pragma unroll
  for (int i = 0; i < 4; i++) { v[2 * i] = number(w[i] & 0xffff); v[2 * i + 1] = number(w[i] >> 16); }
}
__device__ __forceinline__ float single(item i) { return number(i); }
#endif

struct State { float least, most, sum, squares; double sums, squared; };

#if BINS
__device__ __forceinline__ int bin(float v, float low, float scale) {
  float at = __fmul_rn(__fsub_rn(v, low), scale);
  at = fminf(fmaxf(at, 0.0f), (float)(BINS - 1));           // NaN becomes 0, and is left out by the caller
  return __float_as_int(__fadd_rz(at, 8388608.0f)) & 0x7fffff;  // cut to a whole number
}
#endif
__device__ __forceinline__ void take(State &s, float v) {
  s.least = fminf(s.least, v); s.most = fmaxf(s.most, v);
  s.sum += v; s.squares += v * v;
}
__device__ __forceinline__ void flush(State &s) {
  s.sums += s.sum; s.squared += s.squares; s.sum = s.squares = 0;
}

extern "C" __global__ void __launch_bounds__(THREADS)
observe(const item *x, Partial *partials, int *counts, float low, float scale,
        int outer, int channels, u32 inner_low, u32 inner_high, int chunks) {
#if BINS
  __shared__ int bins[BINS * COPIES];  // neighbours count into copies beside each other, in other banks
  for (int i = threadIdx.x; i < COPIES * BINS; i += THREADS) bins[i] = 0;
  int *mine = bins + threadIdx.x % COPIES;
  __syncthreads();
#endif
  const i64 inner = ((i64)inner_high << 32) | inner_low, length = inner * outer;
  const int channel = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  i64 at = (i64)chunk * CHUNK;
  const i64 end = at + CHUNK < length ? at + CHUNK : length;
  State s = {INF, -INF, 0, 0, 0, 0};
  while (at < end) {
    const i64 o = at / inner, stop = (o + 1) * inner < end ? (o + 1) * inner : end;
    const item *from = x + (o * channels + channel) * inner + (at - o * inner);
    const int count = (int)(stop - at);
    int head = (int)(((16 - ((size_t)from & 15)) & 15) / sizeof(item));
    if (head > count) head = count;
    const int packs = (count - head) / PACK, tail = count - head - packs * PACK;
    const pack *body = (const pack *)(from + head);
    int since = 0;
    for (int p0 = 0; p0 < packs; p0 += THREADS * UNROLL) {
      pack v[UNROLL];
      #pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        const int p = p0 + u * THREADS + threadIdx.x;
        if (p < packs) v[u] = body[p];
      }
      #pragma unroll
      for (int u = 0; u < UNROLL; u++) {
        if (p0 + u * THREADS + threadIdx.x >= packs) break;
        float f[PACK];
        spread(v[u], f);
        #pragma unroll
        for (int i = 0; i < PACK; i++) take(s, f[i]);
#if BINS
        int b[PACK];
        bool same = true;
        #pragma unroll
        for (int i = 0; i < PACK; i++) { b[i] = bin(f[i], low, scale); same = same && b[i] == b[0] && f[i] == f[i]; }
        if (same) {
          const u32 here = __activemask();
          int whole;
          __match_all_sync(here, b[0], &whole);
          if (!whole) atomicAdd(mine + b[0] * COPIES, PACK);
          else if ((int)(threadIdx.x & 31) == __ffs(here) - 1) atomicAdd(mine + b[0] * COPIES, PACK * __popc(here));
        } else {
          #pragma unroll
          for (int i = 0; i < PACK; i++) if (f[i] == f[i]) atomicAdd(mine + b[i] * COPIES, 1);
        }
#endif
      }
      if (++since == 16) { flush(s); since = 0; }
    }
    for (int i = threadIdx.x; i < head + tail; i += THREADS) {
      const float f = single(from[i < head ? i : packs * PACK + i]);
      take(s, f);
#if BINS
      if (f == f) atomicAdd(mine + bin(f, low, scale) * COPIES, 1);
#endif
    }
    flush(s);
    at = stop;
  }
  __shared__ Partial all[THREADS / 32];
  #pragma unroll
  for (int d = 16; d; d >>= 1) {
    s.least = fminf(s.least, __shfl_down_sync(~0u, s.least, d));
    s.most = fmaxf(s.most, __shfl_down_sync(~0u, s.most, d));
    s.sums += __shfl_down_sync(~0u, s.sums, d); s.squared += __shfl_down_sync(~0u, s.squared, d);
  }
  if (!(threadIdx.x & 31)) all[threadIdx.x >> 5] = {s.sums, s.squared, s.least, s.most};
  __syncthreads();
  if (!threadIdx.x) {
    Partial p = all[0];
    for (int w = 1; w < THREADS / 32; w++) {
      p.sum += all[w].sum; p.squares += all[w].squares;
      p.least = fminf(p.least, all[w].least); p.most = fmaxf(p.most, all[w].most);
    }
    partials[blockIdx.x] = p;
  }
#if BINS
  for (int i = threadIdx.x; i < BINS; i += THREADS) {
    int n = 0;
    #pragma unroll
    for (int c = 0; c < COPIES; c++) n += bins[i * COPIES + (c + threadIdx.x) % COPIES];
    if (n) atomicAdd(counts + (i64)channel * BINS + i, n);
  }
#endif
}

extern "C" __global__ void __launch_bounds__(256)
finish(const Partial *partials, double *statistics, int chunks, u32 length_low, u32 length_high) {
  __shared__ Partial all[256];
  Partial p = {0, 0, INF, -INF};
  for (int i = threadIdx.x; i < chunks; i += 256) {
    const Partial q = partials[(i64)blockIdx.x * chunks + i];
    p.sum += q.sum; p.squares += q.squares; p.least = fminf(p.least, q.least); p.most = fmaxf(p.most, q.most);
  }
  all[threadIdx.x] = p;
  for (int half = 128; half; half >>= 1) {
    __syncthreads();
    if (threadIdx.x < half) {
      const Partial q = all[threadIdx.x + half];
      Partial *m = all + threadIdx.x;
      m->sum += q.sum; m->squares += q.squares; m->least = fminf(m->least, q.least); m->most = fmaxf(m->most, q.most);
    }
  }
  if (threadIdx.x) return;
  const double length = (double)(((i64)length_high << 32) | length_low);
  double *to = statistics + 5 * (i64)blockIdx.x;
  p = all[0];
  to[0] = p.least; to[1] = p.most; to[2] = p.least > p.most ? 0 : fmaxf(fabsf(p.least), fabsf(p.most));
  to[3] = p.sum / length; to[4] = p.squares / length;
}
"""
_KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def observe(
    x: Tensor, axis: int | None, low: float, high: float, bins: int, copies: int = 0, unroll: int = 4,
    chunk: int = CHUNK, threads: int = THREADS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``rarefy.kernels.observe.observe``. copies: of a block's histogram; unroll: reads of 16 bytes on the way.

    chunk, threads: of a block; each choice gives its own bits, the same in every run.
    """
    if x.dtype not in _KINDS or bins > MOST_BINS or not x.numel():
        from rarefy.kernels.observe import observe as reference

        return reference(x, axis, low, high, bins)
    x = x if axis is None and _is_dense(x) else x.contiguous()
    axis = None if axis is None else axis % x.dim()
    channels = 1 if axis is None else x.shape[axis]
    outer = 1 if axis is None else x.shape[:axis].numel()
    length = x.numel() // channels
    inner, chunks = length // outer, -(-length // chunk)
    copies = copies or max(1, min(32, 1 << (8192 // max(bins, 1)).bit_length() - 1))
    defines = {
        "KIND": _KINDS[x.dtype],
        "BINS": bins,
        "COPIES": copies,
        "CHUNK": chunk,
        "THREADS": threads,
        "UNROLL": unroll,
    }
    partials = torch.empty(channels * chunks * 24, dtype=torch.uint8, device=x.device)
    statistics = torch.empty(channels, 5, dtype=torch.float64, device=x.device)
    counts = torch.zeros(channels, bins, dtype=torch.int32, device=x.device)
    function = nvrtc.kernel(SOURCE, "observe", tuple(defines.items()))
    scale = bins / (high - low) if bins else 0.0
    function(
        (channels * chunks, 1, 1), threads, x, partials, counts, float(low), float(scale), outer, channels,
        *_halves(inner), chunks,
    )  # fmt: skip
    nvrtc.kernel(SOURCE, "finish", tuple(defines.items()))(
        (channels, 1, 1), 256, partials, statistics, chunks, *_halves(length)
    )
    return statistics, counts


def _halves(number: int) -> tuple[int, int]:
    return number & 0xFFFFFFFF, number >> 32


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
