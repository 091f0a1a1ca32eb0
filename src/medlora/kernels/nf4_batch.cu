// y = x W' + s (x A') B' + residual for up to 64 rows, W in NF4: the product of nf4_batch.py on sm_80 and later, in bfloat16.
//
// A warp takes 16 outputs of each of TALL tiles and all rows of x. Its weights are the left operand of the tensor cores:
// two of them come as one register from a table in shared memory, by their byte, from the lane's own bank (nf4.cuh), and
// are multiplied by their block's absmax in bfloat16. With WGMMA (sm_90a) four warps multiply together and the tensor
// cores read x in shared memory by themselves, while the warps decode on; elsewhere they load it with ldmatrix.
//
// Work is cut into units of 128 columns of TALL tiles. Of the four lanes on a row each holds 16 bytes of codes, which is
// 32 neighbouring columns, where a product of 16 columns wants two neighbours from each lane twice. So x comes with its
// columns in that order, a unit of it as it is to lie in shared memory: in quarters of four pieces, a piece 16 bytes of
// every row. After the units of W come those of the adapters, of 32 ranks, where b takes the place of decoded weights and
// h = s x A', zero in rows that take another adapter, that of x: one quarter.
//
// Codes are on their way to shared memory before they are decoded, each by the thread that will decode them, those of two
// units at a time, which are 128 neighbouring bytes of a row. So is x, LEAD units ahead, with WGMMA as one copy that a
// barrier of its stage counts; another counts the warps that have done with the stage, so that they need not keep step.
//
// Every program has an equal share of all units, one after the other, whatever tiles these belong to. Programs that share
// a tile write what they have of it. When all have, most of them add up a part each, in the order of programs, and write y.
// They wait for each other, so all programs must run at once: no more than there are multiprocessors.
//
// Defined when it is compiled: WIDE (rows / 8), TALL, WARPS, WGMMA (0 or 1), SCALES (absmax in 0: fp32, 1: bf16, 2: fp16, 3:
// 8 bits, quantised again), LORA, RESIDUAL (0 or 1).

#include "nf4.cuh"

typedef unsigned long long u64;

constexpr int THREADS = 32 * WARPS, ROWS = 8 * WIDE;
constexpr int TILE = 16 * WARPS, OUTPUTS = TALL * TILE;  // of a program
constexpr int COLUMNS = 128, RANKS = COLUMNS / 4;        // of a unit of W, and of an adapter
constexpr int QUARTER = 4 * ROWS;                        // [step][half][ROWS] of 16 bytes
constexpr int STAGES = 4, LEAD = 2;                      // units of x: with room, and asked for ahead
constexpr int SLOTS = 4;                                 // units of codes with room
constexpr int FOURS = TALL * WIDE;                       // sums of a thread by four

__device__ __forceinline__ u32 both(u16 x) { return x * 0x10001u; }

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

__device__ __forceinline__ u32 shared(const void* at) { return u32(__cvta_generic_to_shared(at)); }

// Pieces of eight rows each, as the right operand of two products: lane l names row l % 8 of piece l / 8.
__device__ __forceinline__ uint4 right_of(const uint4* at) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "r"(shared(at)));
  return v;
}

// 16 bytes on their way to shared memory.
__device__ __forceinline__ void stage(uint4* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared(to)), "l"(from) : "memory");
}

__device__ __forceinline__ void staged() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// All but the last PENDING groups that this thread staged have landed.
template <int PENDING>
__device__ __forceinline__ void landed() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#if WGMMA
// A barrier whose phase ends when as many have arrived, and copies that it counts have landed.
__device__ __forceinline__ void make_barrier(u64* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared(barrier)), "r"(arrivals) : "memory");
}

// Barriers that this thread made are there for copies.
__device__ __forceinline__ void made_barriers() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared(barrier)) : "memory");
}

// Bytes on their way to shared memory, and this thread has arrived.
__device__ __forceinline__ void copy(uint4* to, const uint4* from, int bytes, u64* barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared(barrier)), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared(to)),
      "l"(from), "r"(bytes), "r"(shared(barrier))
      : "memory");
}

// Until the barrier's phase of this parity has ended.
__device__ __forceinline__ void await(u64* barrier, int parity) {
  u32 over;
  do
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(over)
        : "r"(shared(barrier)), "r"(parity)
        : "memory");
  while (!over);
}

// Registers that a product is to read or add to are as this thread sees them.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// All products but those of the last PENDING groups are through.
template <int PENDING>
__device__ __forceinline__ void finished() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define FOUR(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define PRODUCT(n, sums, a, x) \
  "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" sums "}, {" a "}, " x ", 1, 1, 1, 0;"
#define EIGHT(a, b, c, d, e, f, g, h) "%" #a ", %" #b ", %" #c ", %" #d ", %" #e ", %" #f ", %" #g ", %" #h

// d += a x, of 16 columns; x is described by where it begins, how far apart its halves and its groups of eight rows are.
__device__ __forceinline__ void multiply_async(float (&d)[WIDE][4], const u32 (&a)[4], u64 x) {
#if WIDE == 8
  asm volatile(PRODUCT(64, EIGHT(0, 1, 2, 3, 4, 5, 6, 7) ", " EIGHT(8, 9, 10, 11, 12, 13, 14, 15) ", "
          EIGHT(16, 17, 18, 19, 20, 21, 22, 23) ", " EIGHT(24, 25, 26, 27, 28, 29, 30, 31), "%32, %33, %34, %35", "%36")
      : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x));
#elif WIDE == 4
  asm volatile(PRODUCT(32, EIGHT(0, 1, 2, 3, 4, 5, 6, 7) ", " EIGHT(8, 9, 10, 11, 12, 13, 14, 15),
          "%16, %17, %18, %19", "%20")
      : FOUR(0), FOUR(1), FOUR(2), FOUR(3)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x));
#else
  asm volatile(PRODUCT(16, EIGHT(0, 1, 2, 3, 4, 5, 6, 7), "%8, %9, %10, %11", "%12")
      : FOUR(0), FOUR(1)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x));
#endif
}
#else
// Products are through when they have been asked for.
template <int PENDING>
__device__ __forceinline__ void finished() {}
#endif

struct Place {
  int tile, unit;
};

// x [chunks, 4, QUARTER] of 8 columns, codes [N, D / 2], absmax [N, D / 64], h [G, S, parts, QUARTER] of 8 ranks, b [S, N, R],
// residual and y [M, N], shares [2 programs, FOURS, THREADS], counters [tiles]. R is a multiple of 8. What another kernel
// may still be writing is not __restrict__: it must not be read before the wait.
extern "C" __global__ void __launch_bounds__(THREADS, 1) nf4_batch(
    const uint4* x, const u8* __restrict__ codes, const void* __restrict__ absmax,
    const float* __restrict__ code, const float* __restrict__ outer, const float* __restrict__ offset,
    const uint4* h, const u16* __restrict__ b, const u16* residual, u16* y, float4* shares, int* counters,
    int residual_row, int y_row, int M, int N, int D, int end0, int end1, int S, int R, int G) {
  extern __shared__ uint4 room[];
  u32* const table = (u32*)room;             // [256][32]
  uint4* const inputs = room + ENTRIES / 4;  // [STAGES][4][QUARTER]
  const int thread = threadIdx.x, lane = thread % 32, g = lane / 4, t = lane % 4;
  uint4* const ring = inputs + STAGES * 4 * QUARTER;  // [SLOTS][TALL][2][THREADS]
  u64 *const full = (u64*)(ring + SLOTS * 2 * TALL * THREADS), *const empty = full + STAGES;  // [STAGES]
  const u32 own = shared(table) + 4 * lane;  // the lane's bank
  const int output = thread / 32 * 16 + g;  // and the one 8 further, of each tile

  const int blocks = D / 64, chunks = (D + COLUMNS - 1) / COLUMNS, parts = LORA ? (R + RANKS - 1) / RANKS : 1;
  const int units = chunks + LORA * S * parts;  // of TALL tiles
  auto tiles_of = [](int n) { return (n + OUTPUTS - 1) / OUTPUTS; };
  const int tiles0 = tiles_of(end0), tiles1 = tiles0 + tiles_of(end1 - end0), tiles = tiles1 + tiles_of(N - end1);
  const int work = tiles * units, programs = gridDim.x, program = blockIdx.x;
  const int from = work * program / programs, to = work * (program + 1) / programs;
  auto module_of = [&](int tile) { return (tile >= tiles0) + (tile >= tiles1); };
  auto first_of = [&](int tile) {
    return tile < tiles0 ? tile * OUTPUTS : tile < tiles1 ? end0 + (tile - tiles0) * OUTPUTS : end1 + (tile - tiles1) * OUTPUTS;
  };
  auto end_of = [&](int tile) { return tile < tiles0 ? end0 : tile < tiles1 ? end1 : N; };
  auto after = [&](Place at) { return at.unit + 1 < units ? Place{at.tile, at.unit + 1} : Place{at.tile + 1, 0}; };
  const Place start = {from / units, from % units};
  const int final = (to - 1) / units;  // tile

  auto row_of = [&](int tile, int i) { return min(first_of(tile) + i / 2 * TILE + output + i % 2 * 8, end_of(tile) - 1); };
  auto column_of = [&](int unit) { return min(2 * unit + t / 2, blocks - 1); };  // of blocks
  // Codes of a unit, or b, on their way to the next slot.
  Place place = start;
  int slot = 0;
  auto stage_next = [&] {
    if (place.tile * units + place.unit >= to) return;
    uint4* const to_slot = ring + slot * 2 * TALL * THREADS + thread;
    if (LORA && place.unit >= chunks) {
      const int s = (place.unit - chunks) / parts, rank = (place.unit - chunks - s * parts) * RANKS + 8 * t;
#pragma unroll
      for (int i = 0; i < 2 * TALL; i++)
        stage(to_slot + i * THREADS, b + size_t(s * N + row_of(place.tile, i)) * R + (rank < R ? rank : 0));
    } else {
      const u8* const from = codes + column_of(place.unit) * 32 + t % 2 * 16;
#pragma unroll
      for (int i = 0; i < 2 * TALL; i++)
        stage(to_slot + i * THREADS, from + size_t(row_of(place.tile, i) * blocks) * 32);
    }
    place = after(place), slot = slot + 1 == SLOTS ? 0 : slot + 1;
  };
  Scale raw[TALL][2];  // of the next unit
  auto fetch_scales = [&](Place at) {
#pragma unroll
    for (int i = 0; i < 2 * TALL; i++) {
      const int block = row_of(at.tile, i) * blocks + column_of(at.unit);
      Scale& scale = raw[i / 2][i % 2];
#if SCALES == 0
      scale.stored = ((const float*)absmax)[block];
#elif SCALES == 3
      scale.stored = ((const u8*)absmax)[block], scale.outer = outer[block / 256];
#else
      scale.stored = ((const u16*)absmax)[block];
#endif
    }
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
  Place coming = start;  // whose x is asked for next
  int asked = 0;
  auto ask = [&] {
    if (coming.tile * units + coming.unit >= to) return;
    const int more = coming.unit - chunks, to_stage = asked % STAGES;
    const bool base = !LORA || more < 0;
    const uint4* const from =
        base ? x + coming.unit * 4 * QUARTER : h + (module_of(coming.tile) * S * parts + more) * QUARTER;
    uint4* const input = inputs + to_stage * 4 * QUARTER;
    const int size = (base ? 4 : 1) * QUARTER;
#if WGMMA
    if (asked >= STAGES) await(empty + to_stage, asked / STAGES - 1 & 1);
    copy(input, from, size * 16, full + to_stage);
#else
    for (int i = thread; i < size; i += THREADS) stage(input + i, from + i);
#endif
    coming = after(coming), asked++;
  };
  stage_next(), stage_next(), staged();
  fetch_scales(start);
  fill(table, THREADS);
#if WGMMA
  if (thread == 0) {
    for (int i = 0; i < STAGES; i++) make_barrier(full + i, 1), make_barrier(empty + i, WARPS);
    made_barriers();
  }
#endif
  early_start();
  __syncthreads();
  for (int i = 0; i < LEAD; i++) {
    if (!WGMMA || thread == 0) ask();
    staged();
  }

  auto sharing = [&](int tile, int unit) { return ((tile * units + unit + 1) * programs - 1) / work; };  // which program
  auto share = [&](int p, int head) { return shares + size_t(2 * p + (p == head)) * FOURS * THREADS + thread; };
  auto write = [&](int tile, int i, const float4& sum) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const int row = i % WIDE * 8 + 2 * t + k % 2, n = first_of(tile) + i / WIDE * TILE + output + k / 2 * 8;
      if (row >= M || n >= end_of(tile)) continue;
      float value = k == 0 ? sum.x : k == 1 ? sum.y : k == 2 ? sum.z : sum.w;
      if (RESIDUAL) value += wide(__ldcg(residual + size_t(row) * residual_row + n));
      y[size_t(row) * y_row + n] = narrow(value);
    }
  };

  int done = 0;  // units
  for (int tile = start.tile; tile <= final; tile++) {
    float acc[TALL][WIDE][4] = {};
    u32 left[2][TALL][2][4];  // of a quarter's two products, and those of the quarter before
    auto multiply = [&](int w, int set) {
#if WGMMA
      const u32 at = shared(inputs) / 16 + (done % STAGES * 4 + w) * QUARTER;
      begin_products();
#pragma unroll
      for (int step = 0; step < 2; step++)
#pragma unroll
        for (int i = 0; i < TALL; i++)
          multiply_async(acc[i], left[set][i][step], at + step * 2 * ROWS | u32(ROWS) << 16 | 8ull << 32);
      end_products();
#else
#pragma unroll
      for (int j = 0; j < WIDE; j++) {
        const uint4 right = right_of(inputs + (done % STAGES * 4 + w) * QUARTER + lane / 8 * ROWS + 8 * j + lane % 8);
#pragma unroll
        for (int step = 0; step < 2; step++)
#pragma unroll
          for (int i = 0; i < TALL; i++) {
            const u32(&a)[4] = left[set][i][step];
            mma(acc[i][j], a[0], a[1], a[2], a[3], word(right, 2 * step), word(right, 2 * step + 1));
          }
      }
#endif
    };
    // x of this unit is there.
    auto arrived_x = [&] {
#if WGMMA
      await(full + done % STAGES, done / STAGES & 1);
#endif
    };
    // This warp has done with all units before this one.
    auto release = [&] {
#if WGMMA
      if (lane == 0 && done) arrive(empty + (done - 1) % STAGES);
#endif
    };
    const int end = min(units, to - tile * units);
    for (int unit = max(0, from - tile * units); unit < end; unit++) {
      landed<LEAD - 1>();
      if (!WGMMA) __syncthreads();
      if (!WGMMA || thread == 0) ask();
      __syncwarp();
      if (done % 2 == 0) stage_next(), stage_next();
      staged();
      uint4 four[TALL][2];
      u32 factors[TALL][2];
#pragma unroll
      for (int i = 0; i < 2 * TALL; i++) {
        four[i / 2][i % 2] = ring[(done % SLOTS * 2 * TALL + i) * THREADS + thread];
        factors[i / 2][i % 2] = factor(raw[i / 2][i % 2], module_of(tile));
      }
      if (tile * units + unit + 1 < to) fetch_scales(after({tile, unit}));
      if (!LORA || unit < chunks) {
#pragma unroll
        for (int w = 0; w < 4; w++) {
#pragma unroll
          for (int i = 0; i < 8 * TALL; i++) {  // rows i % 2, bytes by two
            const u32 two = look_up(word(four[i / 8][i % 2], w), i / 2 % 4, own);
            left[w % 2][i / 8][i / 4 % 2][i % 4] = times(two, factors[i / 8][i % 2]);
          }
          if (w == 0) arrived_x();
          multiply(w, w % 2);
          finished<1>();
          if (w == 0) release();
        }
      } else {
#pragma unroll
        for (int i = 0; i < 8 * TALL; i++) left[0][i / 8][i / 4 % 2][i % 4] = word(four[i / 8][i % 2], i / 2 % 4);
        arrived_x();
        multiply(0, 0);
        finished<0>();  // before `four` is written again
        release();
      }
      done++;
    }
    finished<0>();
    const int head = sharing(tile, 0), tail = sharing(tile, units - 1);  // first and last program with a part of the tile
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
      const float(&a)[4] = acc[i / WIDE][i % WIDE];
      const float4 sum = {a[0], a[1], a[2], a[3]};
      if (head == tail)
        write(tile, i, sum);
      else
        share(program, head)[i * THREADS] = sum;
    }
  }

  // The low half of a tile's counter says how many programs have written their share, the high half how many have read. A
  // tile is added up by all that share it but the last, so that nobody has two to wait for.
  auto written = [&](int tile) {
    if (sharing(tile, 0) < sharing(tile, units - 1)) atomicAdd(counters + tile, 1);
  };
  const int head = sharing(final, 0), tail = sharing(final, units - 1);
  __syncthreads();
  if (thread == 0) {
    __threadfence();
    written(final);
    if (start.tile < final) written(start.tile);
    if (program < tail)
      while ((arrived(counters + final) & 0xffff) <= tail - head) __nanosleep(20);
  }
  if (program == tail) return;
  __syncthreads();
  constexpr int AT_ONCE = 4;
  for (int first = program - head; first < FOURS; first += AT_ONCE * (tail - head)) {
    float4 sum[AT_ONCE] = {};
#pragma unroll 4
    for (int p = head; p <= tail; p++)
#pragma unroll
      for (int e = 0; e < AT_ONCE; e++) {
        const int i = first + e * (tail - head);
        const float4 more = i < FOURS ? __ldcg(share(p, head) + i * THREADS) : float4{0, 0, 0, 0};
        sum[e].x += more.x, sum[e].y += more.y, sum[e].z += more.z, sum[e].w += more.w;
      }
#pragma unroll
    for (int e = 0; e < AT_ONCE; e++)
      if (first + e * (tail - head) < FOURS) write(final, first + e * (tail - head), sum[e]);
  }
  __syncthreads();
  if (thread == 0 && atomicAdd(counters + final, 1 << 16) >> 16 == tail - head - 1) counters[final] = 0;
}
