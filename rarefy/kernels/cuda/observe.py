"""Extremes, moments and histogram in one pass over a tensor, as fast as it is read.

A block takes neighbouring chunks of a channel and counts into its own histogram in shared memory, which one atomic a
bin then adds to the whole: whole numbers, so that any order gives the same. A warp whose numbers all fall into one bin,
as in the flat parts of pictures, adds once. Sums of a chunk are float64 over float32 of few numbers, and the chunks'
are added in order by a second kernel: the same inputs give the same bits on every GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.kernels import nvrtc

CHUNK = 2**15  # numbers whose sums are taken together
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
__device__ __forceinline__ u32 place(float v, u32 mine, float low, float scale) {  // of the counter, in shared memory
  float at = __fmul_rn(__fsub_rn(v, low), scale);
  at = fminf(fmaxf(at, 0.0f), (float)(BINS - 1));           // NaN becomes 0, and is left out by the caller
  at = __fadd_rz(at, 8388608.0f);                           // cut to a whole number, in the last bits
  return mine + (u32)(__float_as_int(at) - 0x4b000000) * (4 * COPIES);
}
__device__ __forceinline__ void count(u32 at, int n) {
  asm volatile("red.shared.add.u32 [%0], %1;" :: "r"(at), "r"(n) : "memory");
}
#endif
__device__ __forceinline__ void take(State &s, float v) { s.least = fminf(s.least, v); s.most = fmaxf(s.most, v); }
// Numbers of one chunk, UNROLL times 16 bytes on the way.
__device__ __forceinline__ void chunk(const item *from, int length, State &s, u32 mine, float low, float scale) {
  int head = (int)(((16 - ((size_t)from & 15)) & 15) / sizeof(item));
  if (head > length) head = length;
  const int packs = (length - head) / PACK, tail = length - head - packs * PACK;
  const pack *body = (const pack *)(from + head);
  for (int p0 = threadIdx.x; p0 < packs; p0 += THREADS * UNROLL) {
    pack v[UNROLL];
    #pragma unroll
    for (int u = 0; u < UNROLL; u++) if (p0 + u * THREADS < packs) v[u] = body[p0 + u * THREADS];
    #pragma unroll
    for (int u = 0; u < UNROLL; u++) {
      if (p0 + u * THREADS >= packs) break;
      float f[PACK], sum = 0, squares = 0;
      spread(v[u], f);
      #pragma unroll
      for (int i = 0; i < PACK; i++) { take(s, f[i]); sum += f[i]; squares += f[i] * f[i]; }
      s.sum += sum; s.squares += squares;
#if BINS
      u32 at[PACK], other = 0;
      #pragma unroll
      for (int i = 0; i < PACK; i++) { at[i] = place(f[i], mine, low, scale); other |= at[i] ^ at[0]; }
      if (sum != sum) {  // NaN, which counts nowhere, or infinities
        #pragma unroll
        for (int i = 0; i < PACK; i++) if (f[i] == f[i]) count(at[i], 1);
      } else if (!other) {
        const u32 here = __activemask();
        int whole;
        __match_all_sync(here, at[0] - mine, &whole);
        if (!whole) count(at[0], PACK);
        else if ((int)(threadIdx.x & 31) == __ffs(here) - 1) count(at[0], PACK * __popc(here));
      } else {
        #pragma unroll
        for (int i = 0; i < PACK; i++) count(at[i], 1);
      }
#endif
    }
  }
  for (int i = threadIdx.x; i < head + tail; i += THREADS) {
    const float f = single(from[i < head ? i : packs * PACK + i]);
    take(s, f); s.sum += f; s.squares += f * f;
#if BINS
    if (f == f) count(place(f, mine, low, scale), 1);
#endif
  }
  s.sums += s.sum; s.squared += s.squares;
  s.sum = s.squares = 0;
}

#define TOGETHER 32  // chunks whose sums wait for those of the block's other warps
__device__ __forceinline__ void reduce(State s, Partial *to) {  // a warp's
  #pragma unroll
  for (int d = 16; d; d >>= 1) {
    s.least = fminf(s.least, __shfl_down_sync(~0u, s.least, d));
    s.most = fmaxf(s.most, __shfl_down_sync(~0u, s.most, d));
    s.sums += __shfl_down_sync(~0u, s.sums, d); s.squared += __shfl_down_sync(~0u, s.squared, d);
  }
  if (!(threadIdx.x & 31)) *to = {s.sums, s.squared, s.least, s.most};
}
__device__ __forceinline__ void write(const Partial (*all)[THREADS / 32], Partial *to, int count) {
  __syncthreads();
  if (threadIdx.x < count) {
    Partial p = all[threadIdx.x][0];
    for (int w = 1; w < THREADS / 32; w++) {
      const Partial q = all[threadIdx.x][w];
      p.sum += q.sum; p.squares += q.squares; p.least = fminf(p.least, q.least); p.most = fmaxf(p.most, q.most);
    }
    to[threadIdx.x] = p;
  }
  __syncthreads();
}

// A block takes ``each`` chunks that follow each other; ``chunks`` of a channel.
extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS + 1)
observe(const item *x, Partial *partials, int *counts, float low, float scale,
        int outer, int channels, u32 inner_low, u32 inner_high, int chunks, int each) {
  __shared__ Partial all[TOGETHER][THREADS / 32];
  u32 mine = 0;
#if BINS
  __shared__ int bins[BINS * COPIES];  // neighbours count into copies beside each other, in other banks
  for (int i = threadIdx.x; i < COPIES * BINS; i += THREADS) bins[i] = 0;
  mine = (u32)__cvta_generic_to_shared(bins + threadIdx.x % COPIES);
  __syncthreads();
#endif
  const i64 inner = ((i64)inner_high << 32) | inner_low, length = inner * outer;
  const int first = blockIdx.x * each, after = min(first + each, channels * chunks);
  int channel = first / chunks, place = first % chunks, waiting = 0;
  for (int piece = first; piece < after; piece++) {
    i64 at = (i64)place * CHUNK;
    const i64 end = at + CHUNK < length ? at + CHUNK : length;
    State s = {INF, -INF, 0, 0, 0, 0};
    while (at < end) {
      const i64 o = outer == 1 ? 0 : at / inner, stop = (o + 1) * inner < end ? (o + 1) * inner : end;
      chunk(x + (o * channels + channel) * inner + (at - o * inner), (int)(stop - at), s, mine, low, scale);
      at = stop;
    }
    reduce(s, &all[waiting++][threadIdx.x >> 5]);
    const bool ends = piece + 1 == after || place + 1 == chunks;  // the channel's last one here
    if (ends || waiting == TOGETHER) {
      write(all, partials + piece + 1 - waiting, waiting);
      waiting = 0;
    }
#if BINS
    if (ends) {
      for (int i = threadIdx.x; i < BINS; i += THREADS) {
        int n = 0;
        #pragma unroll
        for (int c = 0; c < COPIES; c++) {
          int *one = bins + i * COPIES + (c + threadIdx.x) % COPIES;
          n += *one; *one = 0;
        }
        if (n) atomicAdd(counts + (i64)channel * BINS + i, n);
      }
      __syncthreads();
    }
#endif
    if (++place == chunks) { place = 0; channel++; }
  }
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
    x: Tensor, axis: int | None, low: float, high: float, bins: int, copies: int = 1, unroll: int = 0,
    chunk: int = CHUNK, threads: int = THREADS,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``rarefy.kernels.observe.observe``.

    copies: of a block's histogram, for neighbouring threads. unroll: reads of 16 bytes on the way; 0: as many
    as registers allow that leave room for other blocks (measured on an H200).

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
    unroll = unroll or (2 if bins else 4)
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
    fit = torch.cuda.get_device_properties(x.device).multi_processor_count * (1024 // threads + 1)
    each = -(-channels * chunks // fit)
    function(
        (-(-channels * chunks // each), 1, 1), threads, x, partials, counts, float(low), float(scale), outer, channels,
        *_halves(inner), chunks, each,
    )  # fmt: skip
    nvrtc.kernel(SOURCE, "finish", tuple(defines.items()))(
        (channels, 1, 1), 256, partials, statistics, chunks, *_halves(length)
    )
    return statistics, counts


def _halves(number: int) -> tuple[int, int]:
    return number & 0xFFFFFFFF, number >> 32


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
