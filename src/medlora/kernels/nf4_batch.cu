// y = x W' + s (x A') B' + residual for up to 64 rows, W in NF4: the product of nf4_batch.py on sm_80 and later, in bfloat16.
//
// A warp takes 16 TALL outputs and all rows of x. Its weights are the left operand of the tensor cores: two of them come
// as one register from a table in shared memory, by their byte, from the lane's own bank (nf4.cuh), and are
// multiplied by their block's absmax in bfloat16. A fourth as many bytes pass as of dequantised weights, and what bounds
// the product instead are tensor cores and shared memory, about alike.
//
// Work is cut into units of 128 columns of one tile of outputs. Of the four lanes on a row each holds 16 bytes of codes,
// which is 32 neighbouring columns, so a lane needs 16 bytes of a row of x for every two multiplications: x is laid out
// in shared memory such that eight lanes read 16 bytes each from different banks. Copies of x run STAGES - 1 units ahead,
// codes AHEAD units, in registers that are filled again as soon as they are decoded. After the units of W come those of
// the adapters, where b takes the place of decoded weights, h = x A' that of x, and s that of absmax; in rows that take
// another adapter h counts as zero.
//
// Every program has an equal share of all units, one after the other, whatever tiles these belong to. Programs that share
// a tile write what they have of it, and the last one to be through adds it up, in the order of programs, so that it does
// not matter which one that is; then it sets the tile's counter back to zero. Nobody waits.
//
// Defined when it is compiled: WIDE (rows / 8), TALL, WARPS, STAGES, AHEAD, SCALES (absmax in 0: fp32, 1: bf16, 2: fp16, 3:
// 8 bits, quantised again), LORA, RESIDUAL (0 or 1).

#include "nf4.cuh"

constexpr int THREADS = 32 * WARPS, ROWS = 8 * WIDE, OUTPUTS = 16 * TALL * WARPS;  // of a program
constexpr int COLUMNS = 128, PIECES = COLUMNS / 8;              // of a unit; pieces of 16 bytes
constexpr int PITCH = OUTPUTS + 4;                              // of sums, so that a warp's 32 lie in 32 banks
constexpr int FOURS = ROWS * OUTPUTS / 4, EACH = FOURS / THREADS;  // sums by four; a thread's
constexpr int ACROSS = OUTPUTS / 4, DOWN = THREADS / ACROSS;    // in a row; rows that the threads take at once
constexpr int BATCH = EACH < 8 ? EACH : 8;                      // of them that are under way together

__device__ __forceinline__ u32 both(u16 x) { return x * 0x10001u; }

__device__ __forceinline__ u32 times(u32 two, u32 factors) {
  u32 product;
#if __CUDA_ARCH__ >= 900
  asm("mul.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(two), "r"(factors));
#else
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(two), "r"(factors), "r"(0x80008000));
#endif
  return product;
}

// 16 bytes on their way to shared memory, zeros where there is nothing inside.
__device__ __forceinline__ void stage(uint4* to, const u16* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(u32(__cvta_generic_to_shared(to))), "l"(from),
      "r"(inside ? 16 : 0)
      : "memory");
}

__device__ __forceinline__ void staged_unit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// All but the last PENDING units that this thread staged have landed.
template <int PENDING>
__device__ __forceinline__ void landed() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// The same number, from which nothing is worked out ahead of the loop around: registers are short there.
__device__ __forceinline__ int again(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// A block's absmax as it lies in memory, so that nothing waits for the load before it is used.
struct Scale {
#if SCALES == 0
  float stored;
#elif SCALES == 3
  u8 stored;
  float outer;
#else
  u16 stored;
#endif
};

struct Place {
  int tile, unit;
};

// x [M, D], codes [N, D / 2], absmax [N, D / 64], h [M, S G R], b [S, N, R], scaling [S, G], slots [M], residual and y
// [M, N], shares [2 programs, FOURS], counters [tiles]. R is a multiple of 8. What another kernel may still be writing
// is not __restrict__: it must not be read before the wait.
extern "C" __global__ void __launch_bounds__(THREADS) nf4_batch(
    const u16* x, const u8* __restrict__ codes, const void* __restrict__ absmax,
    const float* __restrict__ code, const float* __restrict__ outer, const float* __restrict__ offset,
    const u16* h, const u16* __restrict__ b, const float* __restrict__ scaling, const int* slots,
    const u16* residual, u16* y, float4* shares, int* counters,
    int x_row, int residual_row, int y_row, int M, int N, int D, int end0, int end1, int S, int R, int G) {
  extern __shared__ uint4 room[];
  u32* const table = (u32*)room;                              // [256][32]
  uint4* const inputs = room + ENTRIES / 4;                   // [STAGES][ROWS][PIECES]
  float* const sums = (float*)(inputs + STAGES * ROWS * PIECES);  // [ROWS][PITCH]
  int *const slot = (int*)(sums + ROWS * PITCH), *const last = slot + ROWS;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const u32 own = u32(__cvta_generic_to_shared(table)) + 4 * lane;  // the lane's bank
  const int output = 16 * TALL * (threadIdx.x / 32) + g;

  const int blocks = D / 64, chunks = (D + COLUMNS - 1) / COLUMNS, parts = LORA ? (R + COLUMNS - 1) / COLUMNS : 1;
  const int units = chunks + LORA * S * parts;  // of a tile
  auto tiles_of = [](int n) { return (n + OUTPUTS - 1) / OUTPUTS; };
  const int tiles0 = tiles_of(end0), tiles1 = tiles0 + tiles_of(end1 - end0), tiles = tiles1 + tiles_of(N - end1);
  const int work = tiles * units, programs = gridDim.x, program = blockIdx.x;
  const int from = work * program / programs, to = work * (program + 1) / programs;
  auto module_of = [&](int tile) { return (tile >= tiles0) + (tile >= tiles1); };
  auto first_of = [&](int tile) {
    return tile < tiles0 ? tile * OUTPUTS : tile < tiles1 ? end0 + (tile - tiles0) * OUTPUTS : end1 + (tile - tiles1) * OUTPUTS;
  };
  auto end_of = [&](int tile) { return tile < tiles0 ? end0 : tile < tiles1 ? end1 : N; };
  auto stop = [&](int tile) { return min(units, to - tile * units); };  // where this program leaves a tile
  const Place start = {from / units, from % units};
  const int final = (to - 1) / units;  // tile

  uint4 held[AHEAD][TALL][2];  // codes, or b
  Scale raw[AHEAD][TALL][2];
  float scaled[AHEAD];  // by s of an adapter
  Place ahead[AHEAD];   // what is asked for next
  // The lane's 16 bytes of a unit in row 0, or of its quarter w if the unit is an adapter's, and how far apart rows are.
  struct Source {
    const u8* first;
    int row;
  };
  auto source = [&](Place at, int w) -> Source {
    const int more = at.unit - chunks, rank = more % parts * COLUMNS + 32 * w + 8 * t;
    if (LORA && more >= 0) return {(const u8*)(b + size_t(more / parts * N) * R + (rank < R ? rank : 0)), 2 * R};
    return {codes + min(2 * at.unit + t / 2, blocks - 1) * 32 + 16 * (t % 2), 32 * blocks};
  };
  auto row_of = [&](int tile, int i) { return min(first_of(tile) + output + 8 * i, end_of(tile) - 1); };
  auto settle = [&](int e) {  // on to the next tile; behind the last unit the old one's neighbour is asked for
    Place& at = ahead[e];
    while (at.unit >= stop(at.tile) && at.tile < final) at.tile++, at.unit = e;
    at.unit = min(at.unit, units - 1);
  };
  auto fetch = [&](int e) {
    const Place at = ahead[e];
    const int more = at.unit - chunks;
    const Source from = source(at, 0);
    const int first = min(2 * at.unit + t / 2, blocks - 1);
#pragma unroll
    for (int i = 0; i < 2 * TALL; i++) {
      const int row = row_of(at.tile, i), block = row * blocks + first;
      held[e][i / 2][i % 2] = stream(from.first + size_t(row) * from.row);
      Scale& scale = raw[e][i / 2][i % 2];
#if SCALES == 0
      scale.stored = ((const float*)absmax)[block];
#elif SCALES == 3
      scale.stored = ((const u8*)absmax)[block], scale.outer = outer[block / 256];
#else
      scale.stored = ((const u16*)absmax)[block];
#endif
    }
    if (LORA) scaled[e] = scaling[more < 0 ? 0 : more / parts * G + module_of(at.tile)];
    ahead[e].unit += AHEAD, settle(e);
  };
  auto factor = [&](const Scale& scale, int module) {
#if SCALES == 0
    return both(narrow(scale.stored));
#elif SCALES == 1
    return both(scale.stored);
#elif SCALES == 2
    return both(narrow(half(scale.stored)));
#else
    return both(narrow(code[scale.stored] * scale.outer + offset[module]));
#endif
  };
#pragma unroll
  for (int e = 0; e < AHEAD; e++) ahead[e] = {start.tile, start.unit + e}, settle(e), fetch(e);
  fill(table, THREADS);
  early_start();
  if (LORA)
    for (int row = threadIdx.x; row < ROWS; row += THREADS) slot[row] = row < M ? __ldcg(slots + row) : -1;
  __syncthreads();

  Place coming = start;  // what is staged next
  int filled = 0, taken = 0;
  auto stage_next = [&] {
    const int more = coming.unit - chunks;
    if (coming.tile <= final) {
      const bool base = !LORA || more < 0;
      const int s = base ? 0 : more / parts, width = base ? D : R, row_to_row = base ? x_row : S * G * R;
      const int piece = threadIdx.x % PIECES ^ threadIdx.x / PIECES % 2 * 4;  // w * 4 + t, of every row it stages
      const int column = (base ? coming.unit : more % parts) * COLUMNS + 8 * (base ? piece % 4 * 4 + piece / 4 : piece);
      const u16* const rows = (base ? x : h + (s * G + module_of(coming.tile)) * R) + (column < width ? column : 0);
      uint4* const input = inputs + filled * ROWS * PIECES + threadIdx.x;
#pragma unroll
      for (int i = 0; i < ROWS * PIECES / THREADS; i++) {
        const int row = threadIdx.x / PIECES + i * (THREADS / PIECES);
        const bool inside = column < width && row < M && (base || slot[row] == s);
        stage(input + i * THREADS, rows + (inside ? row * row_to_row : 0), inside);
      }
    }
    if (coming.tile <= final && ++coming.unit >= stop(coming.tile)) coming = {coming.tile + 1, 0};
    staged_unit(), filled = filled + 1 == STAGES ? 0 : filled + 1;
  };
  for (int i = 0; i < STAGES - 1; i++) stage_next();

  for (int tile = start.tile; tile <= final; tile++) {
    const int begin = max(0, from - tile * units), end = stop(tile);
    float acc[TALL][WIDE][4] = {};
    u32 left[TALL][2][4];  // of two multiplications
    auto multiply = [&](const uint4* input, int w) {
#pragma unroll
      for (int j = 0; j < WIDE; j++) {
        const uint4 right = input[8 * j * PIECES + (w ^ g % 2) * 4];
#pragma unroll
        for (int step = 0; step < 2; step++)
#pragma unroll
          for (int i = 0; i < TALL; i++)
            mma(acc[i][j], left[i][step][0], left[i][step][1], left[i][step][2], left[i][step][3], word(right, 2 * step),
                word(right, 2 * step + 1));
      }
    };
    for (int turn = begin; turn < end; turn += AHEAD)
#pragma unroll
      for (int e = 0; e < AHEAD; e++) {
        const Place at = {tile, turn + e};
        if (at.unit >= end) continue;
        landed<STAGES - 2>(), __syncthreads(), stage_next();
        const uint4* input = inputs + (taken * ROWS + g) * PIECES + t;
        taken = taken + 1 == STAGES ? 0 : taken + 1;
        if (!LORA || at.unit < chunks) {
          u32 factors[TALL][2];
#pragma unroll
          for (int i = 0; i < 2 * TALL; i++) factors[i / 2][i % 2] = factor(raw[e][i / 2][i % 2], module_of(tile));
#pragma unroll
          for (int w = 0; w < 4; w++) {
#pragma unroll
            for (int i = 0; i < 8 * TALL; i++) {  // rows i % 2, bytes by two
              const u32 two = look_up(word(held[e][i / 8][i % 2], w), i / 2 % 4, own);
              left[i / 8][i / 4 % 2][i % 4] = times(two, factors[i / 8][i % 2]);
            }
            if (w == 3) fetch(e);
            multiply(input, w);
          }
        } else {
          const u32 s = both(narrow(scaled[e]));
          const int quarters = min(4, (R - (at.unit - chunks) % parts * COLUMNS + 31) / 32);
          for (int w = 0; w < quarters; w++) {
#pragma unroll
            for (int i = 0; i < 8 * TALL; i++)
              left[i / 8][i / 4 % 2][i % 4] = times(word(held[e][i / 8][i % 2], i / 2 % 4), s);
            const Source next = source(at, w + 1);
            if (w + 1 == quarters)
              fetch(e);
            else
#pragma unroll
              for (int i = 0; i < 2 * TALL; i++)
                held[e][i / 2][i % 2] = stream(next.first + size_t(row_of(tile, i)) * next.row);
            multiply(input, w);
          }
        }
      }

    const int thread = again(threadIdx.x);
    float* const at = sums + thread % 4 * 2 * PITCH + thread / 32 * 16 * TALL + thread % 32 / 4;
#pragma unroll
    for (int i = 0; i < TALL * WIDE * 4; i++)
      at[(i / 4 % WIDE * 8 + i % 2) * PITCH + i / 4 / WIDE * 16 + i % 4 / 2 * 8] = acc[i / 4 / WIDE][i / 4 % WIDE][i % 4];
    __syncthreads();
    auto sharing = [&](int unit) { return ((tile * units + unit + 1) * programs - 1) / work; };
    const int head = sharing(0), tail = sharing(units - 1);  // first and last program that has a part of this tile
    float4* const share = shares + thread;
    auto sums_of = [&](int row) { return *(const float4*)(sums + row * PITCH + thread % ACROSS * 4); };
    if (head < tail) {
      float4* const own = share + size_t(2 * program + (program == head)) * FOURS;
#pragma unroll
      for (int i = 0; i < EACH; i++) own[i * THREADS] = sums_of(thread / ACROSS + i * DOWN);
      __threadfence();
      __syncthreads();
      if (thread == 0) *last = atomicAdd(counters + tile, 1) == tail - head;
      __syncthreads();
      if (thread == 0 && *last) counters[tile] = 0;
      __threadfence();
    }
    if (head == tail || *last)
#pragma unroll 1
      for (int done = 0; done < EACH; done += BATCH) {
        float4 total[BATCH] = {};
        for (int p = head; p <= tail; p++)
#pragma unroll
          for (int i = 0; i < BATCH; i++) {
            const float4 more = head == tail ? sums_of(thread / ACROSS + (done + i) * DOWN)
                                             : __ldcg(share + size_t(2 * p + (p == head)) * FOURS + (done + i) * THREADS);
            total[i].x += more.x, total[i].y += more.y, total[i].z += more.z, total[i].w += more.w;
          }
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
          const int row = thread / ACROSS + (done + i) * DOWN, n = first_of(tile) + thread % ACROSS * 4;
          if (row >= M || n >= end_of(tile)) continue;
          float4 sum = total[i];
          if (RESIDUAL) {
            const ushort4 more = __ldcg((const ushort4*)(residual + size_t(row) * residual_row + n));
            sum.x += wide(more.x), sum.y += wide(more.y), sum.z += wide(more.z), sum.w += wide(more.w);
          }
          *(ushort4*)(y + size_t(row) * y_row + n) =
              make_ushort4(narrow(sum.x), narrow(sum.y), narrow(sum.z), narrow(sum.w));
        }
      }
    __syncthreads();  // `sums` and `last` are free again
  }
}
