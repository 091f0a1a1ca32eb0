// y = f(x) W' + h B' + residual for up to 16 rows, W in NF4: the product of nf4_linear.py on sm_80 and later, in bfloat16.
//
// A program takes 16 outputs at a time. WARPS of its warps share the columns out in groups of four blocks of 64 and do
// nothing but stream codes; one warp more does all the rest, beside them: it makes h, adds what they found, the adapter's
// term and the residual, and writes. They hand over through two buffers, so that they wait for it only if it is two
// tiles behind.
//
// Of four lanes on a row, 16 bytes each, the first two hold one of the blocks and the others the block after the next.
//
// The tensor cores multiply 16 outputs by 8 columns of x', whose order is the lanes' own. Four of the columns are rows
// of x at the first block's place and zero at the second's, four the other way round: so the two blocks' sums stay apart
// and each takes its absmax in fp32. A register is filled again as soon as it is decoded, with codes further on or of the
// next tile, and those of the first tile are asked for before the kernel that makes x has ended.
//
// With ONE there is one row, and no launch comes before this one. Every program norms x for itself, into shared memory,
// while its first codes are on their way. The ranks of h = s f(x) A' are shared out among the programs, each to one, or
// to two or four where there are as many. All programs of a launch must fit on the device at once, for each waits for
// what the others make of h. The last program through sets the counters back to zero.
//
// With GATED, W is gate beside up: a program takes 16 outputs of gate, then those of up, and writes silu(gate) up.
//
// Defined when it is compiled: TILES (of 4 rows: 1, 2, 4), WARPS, RESIDENT (programs on a multiprocessor), SCALES (absmax
// in 0: fp32, 1: bf16, 2: fp16, 3: 8 bits, quantised again), ONE, NORM (only with ONE), LORA, RESIDUAL, GATED (0 or 1).

#include "nf4.cuh"

constexpr int THREADS = 32 * (WARPS + 1), ROWS = 4 * TILES, OUTPUTS = ROWS * 16 / 32;  // of a lane
constexpr int STEPS = 4, AT_ONCE = 8;  // of 16 ranks, and of 32, whose loads are under way together
constexpr int QUARTERS = TILES == 2 ? 2 : 4;  // of a lane's columns that it loads x of at once: registers

// Two neighbours' absmax; 16 bits stay as they came until they are used, so that nothing waits for the load.
struct Scales {
#if SCALES == 1 || SCALES == 2
  u32 two;
#else
  float2 two;
#endif
  __device__ __forceinline__ float of(int e) const {
#if SCALES == 1
    return e ? high(two) : low(two);
#elif SCALES == 2
    return half(e ? two >> 16 : two);
#else
    return e ? two.y : two.x;
#endif
  }
};

// Barriers of all threads but number 0: `reach` does not wait for the others.
__device__ __forceinline__ void meet(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}

__device__ __forceinline__ void reach(int barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}

// Two neighbouring ranks of a row, zeros beyond R.
__device__ __forceinline__ u32 ranks(const u16* row, int k, int R) { return k < R ? *(const u32*)(row + k) : 0; }

// x [M, D], codes [N, D / 2], absmax [N, D / 64], h [M, G R], b [S, N, R], residual and y [M, N], or y [M, N / 2] if
// GATED; R is a multiple of 8. Read only with ONE: norm [D], a [S, G R, D], scaling [S, G], counters [2]; h is then room
// for its shares, fp32 [G R, 4]. What another kernel may still be writing is not __restrict__: it must not be read before
// the wait.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) nf4_product(
    const u16* x, const u8* __restrict__ codes, const void* __restrict__ absmax,
    const float* __restrict__ code, const float* __restrict__ outer, const float* __restrict__ offset,
    u16* h, const u16* __restrict__ b, const int* slots, const u16* residual, u16* y,
    const u16* __restrict__ norm, const u16* __restrict__ a, const float* __restrict__ scaling, int* counters,
    int x_row, int residual_row, int y_row, int M, int N, int D, int end0, int end1, int S, int R, int G, float eps) {
  __shared__ u32 table[ENTRIES];
  __shared__ float sums[2][WARPS][ROWS][16], squares_of[WARPS + 1];
  extern __shared__ uint4 staged[];  // f(x), if NORM; then h, if ONE
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, second = t / 2;
  const u32 own = u32(__cvta_generic_to_shared(table)) + 4 * lane;

  const int tiles = N / 16 / (1 + GATED), blocks = D / 64, groups = D / 256;
  const int turns = (1 + GATED) * ((tiles - 1 - int(blockIdx.x)) / int(gridDim.x) + 1);
  auto tile_of = [&](int turn) {
    return GATED ? int(blockIdx.x) + turn / 2 * int(gridDim.x) + turn % 2 * tiles
                 : int(blockIdx.x) + turn * int(gridDim.x);
  };
  const int first = groups * warp / WARPS, last = groups * (warp + 1) / WARPS;
  const int from = g % 4;              // row of x, of four, whose column of x' this lane feeds
  const bool feeds = g / 4 == second;  // else it feeds zeros
  auto module_of = [&](int n) { return (n >= end0) + (n >= end1); };

  uint4 held[2][2];  // [block of the lane][row]
  Scales factor[2];  // of both blocks
  int ahead_turn = 0, ahead_tile = blockIdx.x, ahead = first;  // what is asked for next
  auto fetch_codes = [&](int e) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int block = (16 * ahead_tile + g + 8 * r) * blocks + 4 * ahead + 2 * second + e;
      held[e][r] = stream(codes + size_t(block) * 32 + 16 * (t % 2));
    }
  };
  auto fetch_scales = [&] {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int at = (16 * ahead_tile + g + 8 * r) * blocks + 4 * ahead + 2 * second;
#if SCALES == 3
      const uchar2 inner = *(const uchar2*)((const u8*)absmax + at);
      const float times = outer[at / 256], plus = offset[module_of(16 * ahead_tile)];
      factor[r].two = make_float2(code[inner.x] * times + plus, code[inner.y] * times + plus);
#elif SCALES
      factor[r].two = *(const u32*)((const u16*)absmax + at);
#else
      factor[r].two = *(const float2*)((const float*)absmax + at);
#endif
    }
  };
  auto advance = [&] {  // after the last tile to the start of the same: a branch would hold the loads back
    if (++ahead == last) ahead = first, ahead_turn += ahead_turn + 1 < turns, ahead_tile = tile_of(ahead_turn);
  };
  if (warp < WARPS && first < last) fetch_codes(0), fetch_codes(1), fetch_scales(), advance();
  fill(table, THREADS);
  if (NORM)  // each thread takes the same places again below
    for (int i = threadIdx.x; i < D / 8; i += THREADS) staged[i] = ((const uint4*)norm)[i];
  const int shares = gridDim.x >= 4 * G * R ? 4 : gridDim.x >= 2 * G * R ? 2 : 1;  // of a rank of h, one a program
  auto edge = [&](int part) { return D / 8 * part / shares; };
  const int own_rank = blockIdx.x / shares, own_part = blockIdx.x % shares;
  if (ONE && LORA && warp == WARPS && S == 1 && own_rank < G * R && scaling[own_rank / R] != 0.f)
    for (int i = edge(own_part) + 8 * lane; i < edge(own_part + 1); i += 8 * 32)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(a + size_t(own_rank) * D + 8 * i));
  __syncthreads();
  early_start();

  const u16* const input = NORM ? (const u16*)staged : x;
  if (NORM) {
    float squares = 0.f;
    for (int i = threadIdx.x; i < D / 8; i += THREADS) {
      const uint4 v = ((const uint4*)x)[i];
      squares += dot(v, v);
    }
    squares = warp_sum(squares);
    if (lane == 0) squares_of[warp] = squares;
    __syncthreads();
    squares = 0.f;
#pragma unroll
    for (int w = 0; w <= WARPS; w++) squares += squares_of[w];
    const float inverse = rsqrtf(squares / D + eps);
    for (int i = threadIdx.x; i < D / 8; i += THREADS) {
      const uint4 v = ((const uint4*)x)[i], w = staged[i];
      staged[i] = make_uint4(normed(v.x, w.x, inverse), normed(v.y, w.y, inverse), normed(v.z, w.z, inverse),
                             normed(v.w, w.w, inverse));
    }
    __syncthreads();
  }

  if (warp < WARPS) {
    float acc[TILES][4] = {};
    uint4 in[QUARTERS][TILES];  // a lane that feeds zeros never writes them
#pragma unroll
    for (int i = 0; i < QUARTERS * TILES; i++) in[i % QUARTERS][i / QUARTERS] = make_uint4(0, 0, 0, 0);
    for (int turn = 0; turn < turns; turn++) {
      for (int group = first; group < last; group++) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float part[TILES][4] = {};
          const u16* column = input + 256 * group + 128 * second + 64 * e + 32 * (t % 2);
#pragma unroll
          for (int q = 0; q < 4; q++) {  // 8 columns of each lane
            if (q % QUARTERS == 0)
#pragma unroll
              for (int j = 0; j < TILES; j++)
                if (feeds && 4 * j + from < M)
#pragma unroll
                  for (int i = 0; i < QUARTERS; i++)
                    in[i][j] = *(const uint4*)(column + size_t(4 * j + from) * x_row + 8 * (q + i));
            const u32 upper = word(held[e][0], q), lower = word(held[e][1], q);
#pragma unroll
            for (int step = 0; step < 2; step++) {
              const u32 a0 = look_up(upper, 2 * step, own), a1 = look_up(lower, 2 * step, own);
              const u32 a2 = look_up(upper, 2 * step + 1, own), a3 = look_up(lower, 2 * step + 1, own);
#pragma unroll
              for (int j = 0; j < TILES; j++) {
                const uint4& x8 = in[q % QUARTERS][j];
                mma(part[j], a0, a1, a2, a3, word(x8, 2 * step), word(x8, 2 * step + 1));
              }
            }
          }
          fetch_codes(e);
#pragma unroll
          for (int j = 0; j < TILES; j++)
#pragma unroll
            for (int k = 0; k < 4; k++) acc[j][k] += part[j][k] * factor[k / 2].of(e);
        }
        fetch_scales(), advance();
      }
      if (turn >= 2) meet(3 + turn % 2);
#pragma unroll
      for (int j = 0; j < TILES; j++)  // columns 2 t and 2 t + 1 of both blocks
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const float sum = acc[j][k] + __shfl_xor_sync(~0u, acc[j][k], 2);
          if (!second) sums[turn % 2][warp][4 * j + 2 * t + k % 2][g + 8 * (k / 2)] = sum;
          acc[j][k] = 0.f;
        }
      reach(1 + turn % 2);
    }
    return;
  }

  const int only = ONE && LORA ? slots[0] : -1;  // the row's adapter
  int adapted = 0, awaited = 0;  // modules that it is on, a bit each; shares of h that they need
  for (int m = 0; ONE && LORA && m < G; m++)
    if (only >= 0 && scaling[only * G + m] != 0.f) adapted |= 1 << m, awaited += R * shares;
  const int begin = ONE ? only : 0, end = ONE ? only + 1 : S;
  auto adds = [&](int module) { return LORA && (!ONE || adapted >> module & 1); };
  u32 in_b[STEPS][4];  // of 64 ranks
  auto fetch_b = [&](int n, int s, int k) {
    const u16 *row = b + (size_t(s) * N + n + g) * R, *next = row + 8 * R;
#pragma unroll
    for (int i = 0; i < STEPS; i++) {
      in_b[i][0] = ranks(row, k + 16 * i, R), in_b[i][1] = ranks(next, k + 16 * i, R);
      in_b[i][2] = ranks(row, k + 16 * i + 8, R), in_b[i][3] = ranks(next, k + 16 * i + 8, R);
    }
  };
  if (adds(module_of(16 * tile_of(0)))) fetch_b(16 * tile_of(0), begin, 2 * t);
  for (int i = blockIdx.x; ONE && LORA && i < G * R * shares; i += gridDim.x) {
    const int rank = i / shares, part = i % shares;
    if (!(adapted >> rank / R & 1)) continue;
    const uint4* row = (const uint4*)(a + (size_t(only) * G * R + rank) * D);
    float sum = 0.f;
#pragma unroll 8
    for (int c = edge(part) + lane; c < edge(part + 1); c += 32) sum += dot(row[c], ((const uint4*)input)[c]);
    sum = warp_sum(sum);
    if (lane == 0) {
      ((float*)h)[4 * rank + part] = sum * scaling[only * G + rank / R];
      __threadfence();
      atomicAdd(counters, 1);
    }
  }
  u16* const made = (u16*)(staged + NORM * D / 8);
  int before = 0;  // programs that were through before this one
  if (ONE && LORA && awaited) {
    while (arrived(counters) < awaited) __nanosleep(20);
    // The answer is looked at in the end, so that nothing waits for it here.
    if (lane == 0) before = atomicAdd(counters + 1, 1);
    for (int begin = lane; begin < G * R; begin += 32 * AT_ONCE) {
      float4 found[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) found[i] = ((const float4*)h)[min(begin + 32 * i, G * R - 1)];
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const float two = shares > 1 ? found[i].x + found[i].y : found[i].x;
        if (begin + 32 * i < G * R) made[begin + 32 * i] = narrow(shares > 2 ? two + (found[i].z + found[i].w) : two);
      }
    }
    __syncwarp();
  }

  int slot[TILES];  // of the rows of x whose h this lane feeds, -1 for none
#pragma unroll
  for (int j = 0; j < TILES; j++) slot[j] = LORA && g < 4 && 4 * j + from < M ? slots[4 * j + from] : -1;
  float gate[OUTPUTS];
  for (int turn = 0; turn < turns; turn++) {
    const int n = 16 * tile_of(turn), module = module_of(n);
    float acc[TILES][4] = {}, more[OUTPUTS];
#pragma unroll
    for (int i = 0; i < OUTPUTS; i++) {
      const int written = lane % 16, to = lane / 16 + 2 * i;
      more[i] = RESIDUAL && to < M ? wide(residual[to * residual_row + n + written]) : 0.f;
    }
    if (adds(module))
      for (int s = begin; s < end; s++)
        for (int k = 2 * t; k - 2 * t < R; k += 16 * STEPS) {
          if (s > begin || k > 2 * t) fetch_b(n, s, k);
#pragma unroll
          for (int j = 0; j < TILES; j++) {
            const u16* row = (ONE ? made : h) + ((4 * j + from) * G + module) * R;
            u32 in_h[STEPS][2];
#pragma unroll
            for (int i = 0; i < STEPS; i++) {
              in_h[i][0] = slot[j] == s ? ranks(row, k + 16 * i, R) : 0;
              in_h[i][1] = slot[j] == s ? ranks(row, k + 16 * i + 8, R) : 0;
            }
#pragma unroll
            for (int i = 0; i < STEPS; i++)
              mma(acc[j], in_b[i][0], in_b[i][1], in_b[i][2], in_b[i][3], in_h[i][0], in_h[i][1]);
          }
        }
    const int next = 16 * tile_of(min(turn + 1, turns - 1));
    if (adds(module_of(next))) fetch_b(next, begin, 2 * t);
    meet(1 + turn % 2);
    if (adds(module)) {
#pragma unroll
      for (int i = 0; i < 4 * TILES; i++)
        if (!second) sums[turn % 2][0][i / 4 * 4 + 2 * t + i % 2][g + i % 4 / 2 * 8] += acc[i / 4][i % 4];
      __syncwarp();
    }
#pragma unroll
    for (int i = 0; i < OUTPUTS; i++) {
      const int written = lane % 16, to = lane / 16 + 2 * i;
#pragma unroll
      for (int w = 0; w < WARPS; w++) more[i] += sums[turn % 2][w][to][written];
      const float found = wide(narrow(more[i]));
      if (GATED && turn % 2 == 0)
        gate[i] = found;
      else if (to < M)
        y[to * y_row + n - GATED * N / 2 + written] =
            GATED ? narrow(gate[i] / (1.f + __expf(-gate[i])) * found) : narrow(more[i]);
    }
    if (turn + 2 < turns) reach(3 + turn % 2);
  }
  if (ONE && LORA && awaited && lane == 0 && before == gridDim.x - 1) counters[0] = counters[1] = 0;
}
