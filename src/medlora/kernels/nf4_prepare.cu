// What nf4_batch.cu reads of x, in bfloat16: f(x) with its columns in the order of tensor cores, and h = s f(x) A'.
//
// A product of 16 columns has two neighbours of each of four lanes in its first half, and in its second. Where a lane holds
// 32 neighbouring columns of a weight (or 8 ranks of b), x therefore goes as pieces of 16 bytes: two columns of each lane.
// A thread loads 16 bytes for each of the four lanes and stores four pieces.
//
// The first ROWS programs take a row each of f(x), zeros below M. The others take 16 ranks each and a share of the columns:
// a warp 32 columns at a time, a the left operand and x the right, both as they lie in memory, since with the same order of
// columns on both sides a product is the same. What a norm multiplies a whole row by comes last. Of the programs that share
// 16 ranks the last one to be through adds up, in the order of shares, and sets their counter back to zero.
//
// Defined when it is compiled: WIDE (rows / 8), NORM, LORA (0 or 1).

#include "nf4.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS, ROWS = 8 * WIDE;
constexpr int RANKS = 16;                             // of a program
constexpr int LINES = RANKS + 1;                      // of a share: sums, and squares of x
constexpr int PITCH = ROWS + 4;                       // of lines in shared memory, against bank conflicts
constexpr int FOURS = (LINES * ROWS / 4 + THREADS - 1) / THREADS;  // of a share, a thread's

__device__ __forceinline__ float4 sum(const float4& a, const float4& b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// x [M, D], norm [D], image [chunks, 4, 4, ROWS] of 8 columns, a [S, G R, D], scaling [S, G], slots [M], h [G, S, parts, 4,
// ROWS] of 8 ranks, shares [tiles, split, LINES, ROWS], counters [tiles].
extern "C" __global__ void __launch_bounds__(THREADS, 2) nf4_prepare(
    const u16* x, const u16* __restrict__ norm, uint4* image, const u16* __restrict__ a, const float* __restrict__ scaling,
    const int* slots, u16* h, float4* shares, int* counters, int x_row, int M, int D, int S, int R, int G, int split,
    float eps) {
  extern __shared__ uint4 room[];
  float* const sums = (float*)room;  // [WARPS][LINES][PITCH]
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  early_start();
  if (int(blockIdx.x) < ROWS) {
    const int row = blockIdx.x, chunks = (D + 127) / 128;
    const u16* const source = x + size_t(row < M ? row : 0) * x_row;
    float factor = 1;
    if (NORM) {
      float part = 0;
      for (int i = thread * 8; i < D; i += THREADS * 8) {
        const uint4 v = __ldcg((const uint4*)(source + i));
        part += dot(v, v);
      }
      part = warp_sum(part);
      if (lane == 0) sums[warp] = part;
      __syncthreads();
      part = 0;
      for (int i = 0; i < WARPS; i++) part += sums[i];
      factor = rsqrtf(part / D + eps);
    }
    for (int i = thread; i < 4 * chunks; i += THREADS) {
      uint4 moved[4];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const int column = i / 4 * 128 + 32 * k + i % 4 * 8;
        const bool inside = row < M && column < D;
        uint4 v = inside ? __ldcg((const uint4*)(source + column)) : uint4{0, 0, 0, 0};
        if (NORM && inside) {
          const uint4 w = *(const uint4*)(norm + column);
          v = {normed(v.x, w.x, factor), normed(v.y, w.y, factor), normed(v.z, w.z, factor), normed(v.w, w.w, factor)};
        }
        moved[k] = v;
      }
#pragma unroll
      for (int piece = 0; piece < 4; piece++)
        image[(i * 4 + piece) * ROWS + row] = {word(moved[0], piece), word(moved[1], piece), word(moved[2], piece),
            word(moved[3], piece)};
    }
    return;
  }
#if LORA
  const int parts = (R + 31) / 32, tile = (blockIdx.x - ROWS) / split, part = (blockIdx.x - ROWS) % split;
  const int module = tile / (2 * parts), first = tile % (2 * parts) * RANKS;  // of S G, and of R
  const int steps = (D + 32 * WARPS - 1) / (32 * WARPS);
  float acc[WIDE][4] = {}, square_of[WIDE] = {};
  for (int step = steps * part / split; step < steps * (part + 1) / split; step++) {
    const int column = (step * WARPS + warp) * 32 + 8 * t;
    if (column >= D) break;  // a whole warp's
    uint4 left[2], right[WIDE], weights = {};
#pragma unroll
    for (int e = 0; e < 2; e++) {
      const int rank = first + g + 8 * e;
      left[e] = rank < R ? *(const uint4*)(a + size_t(module * R + rank) * D + column) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int j = 0; j < WIDE; j++)
      right[j] = 8 * j + g < M ? __ldcg((const uint4*)(x + size_t(8 * j + g) * x_row + column)) : uint4{0, 0, 0, 0};
    if (NORM) weights = *(const uint4*)(norm + column);
#pragma unroll
    for (int j = 0; j < WIDE; j++) {
      if (NORM) {
        square_of[j] += dot(right[j], right[j]);
        right[j] = {times(right[j].x, weights.x), times(right[j].y, weights.y), times(right[j].z, weights.z),
            times(right[j].w, weights.w)};
      }
#pragma unroll
      for (int i = 0; i < 2; i++)
        mma(acc[j], word(left[0], 2 * i), word(left[1], 2 * i), word(left[0], 2 * i + 1), word(left[1], 2 * i + 1),
            word(right[j], 2 * i), word(right[j], 2 * i + 1));
    }
  }
  float* const own = sums + warp * LINES * PITCH;
#pragma unroll
  for (int j = 0; j < WIDE; j++) {
#pragma unroll
    for (int i = 0; i < 4; i++) own[(g + i / 2 * 8) * PITCH + 8 * j + 2 * t + i % 2] = acc[j][i];
    square_of[j] += __shfl_xor_sync(~0u, square_of[j], 1);
    square_of[j] += __shfl_xor_sync(~0u, square_of[j], 2);
    if (t == 0) own[RANKS * PITCH + 8 * j + g] = square_of[j];
  }
  __syncthreads();

  constexpr int ALL = LINES * ROWS / 4;
  auto sum_of = [&](int w, int at) -> float4& {
    return ((float4*)(sums + (w * LINES + at / (ROWS / 4)) * PITCH))[at % (ROWS / 4)];
  };
  float4* const share = shares + size_t(tile) * split * ALL;
  float4 total[FOURS];
#pragma unroll
  for (int i = 0; i < FOURS; i++) {
    const int at = min(thread + i * THREADS, ALL - 1);
    total[i] = sum_of(0, at);
    for (int w = 1; w < WARPS; w++) total[i] = sum(total[i], sum_of(w, at));
    if (split > 1) share[part * ALL + at] = total[i];
  }
  __syncthreads();  // `sums` are free again
  if (split > 1) {
    int* const last = (int*)room;
    if (thread == 0) __threadfence(), *last = atomicAdd(counters + tile, 1) == split - 1;
    __syncthreads();
    if (!*last) return;
    __syncthreads();
    __threadfence();
    if (thread == 0) counters[tile] = 0;
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
      const int at = min(thread + i * THREADS, ALL - 1);
      total[i] = {};
#pragma unroll 8
      for (int p = 0; p < split; p++) total[i] = sum(total[i], __ldcg(share + p * ALL + at));
    }
  }
#pragma unroll
  for (int i = 0; i < FOURS; i++) sum_of(0, min(thread + i * THREADS, ALL - 1)) = total[i];
  __syncthreads();
  for (int i = thread; i < 4 * ROWS; i += THREADS) {  // lane and half of the pieces' four ranks, and row
    const int row = i / 4, rank = first + i % 4 * 4, quarter = rank % 32;
    const int adapter = row < M ? __ldcg(slots + row) : -1;
    float factor = adapter == module / G ? scaling[module] : 0;
    if (NORM) factor *= rsqrtf(sums[RANKS * PITCH + row] / D + eps);
    const int piece = ((module % G * S + module / G) * parts + rank / 32) * 4 + quarter / 2 % 4;
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
      u32* const to = (u32*)(h + (size_t(piece + k / 2) * ROWS + row) * 8 + quarter / 8 * 2);
      *to = narrow(sums[(i % 4 * 4 + k) * PITCH + row] * factor) |
            u32(narrow(sums[(i % 4 * 4 + k + 1) * PITCH + row] * factor)) << 16;
    }
  }
#endif
}
