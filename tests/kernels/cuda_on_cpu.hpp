// What nf4_linear.cu and nf4_batch.cu ask of CUDA, on a CPU: a thread for every thread, barriers for what a program or a warp does together.
#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
using std::max, std::min;

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) ushort4 { unsigned short x, y, z, w; };
struct alignas(2) uchar2 { unsigned char x, y; };
struct { unsigned x; } thread_local threadIdx, blockIdx, gridDim;

struct Warp {
  std::barrier<> together{32};
  float value[32];
  unsigned a[32][4], b[32][2];
  const uint4* rows[32];
};
struct Program {  // `staged` comes first: descriptors have 18 bits for an address
  alignas(1024) char staged[1 << 18];
  explicit Program(int threads) : warps(threads / 32) {
    for (int i = 0; i < 5; i++) barriers.emplace_back(threads);
  }
  std::deque<std::barrier<>> barriers;
  std::vector<Warp> warps;
  unsigned table[256 * 32];
  float sums[2 * 16 * 16 * 16], squares_of[16];
};
thread_local Program* program;
thread_local Warp* own_warp;

ushort4 make_ushort4(unsigned short x, unsigned short y, unsigned short z, unsigned short w) { return {x, y, z, w}; }
float2 make_float2(float x, float y) { return {x, y}; }
uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
float reciprocal_root(float x) { return 1 / std::sqrt(x); }
float exponential(float x) { return std::exp(x); }
#define rsqrtf reciprocal_root
#define __expf exponential
void meet(int barrier) { program->barriers[barrier].arrive_and_wait(); }
void reach(int barrier) { (void)program->barriers[barrier].arrive(); }
void __syncthreads() { meet(0); }
void __syncwarp() { own_warp->together.arrive_and_wait(); }
void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
void __nanosleep(int) { std::this_thread::yield(); }
int atomicAdd(int* at, int more) { return __atomic_fetch_add(at, more, __ATOMIC_RELAXED); }
int arrived(const int* counter) { return __atomic_load_n(counter, __ATOMIC_ACQUIRE); }

template <class T> T __ldcg(const T* at) { return *at; }
size_t __cvta_generic_to_shared(const void* at) { return (const char*)at - (const char*)program; }
unsigned look_up(unsigned four, int byte, unsigned own) {
  return *(const unsigned*)((const char*)program + (four >> 8 * byte & 255) * 128 + own);
}
void early_start() {}

// Copies of cp.async land when a thread waits for them, no sooner.
struct Copy { uint4* to; const void* from; };
thread_local std::deque<std::vector<Copy>> copies{1};
void stage(uint4* to, const void* from) { copies.back().push_back({to, from}); }
void staged() { copies.emplace_back(); }
template <int PENDING> void landed() {
  for (; copies.size() > PENDING + 1; copies.pop_front())
    for (const Copy& copy : copies.front()) std::memcpy(copy.to, copy.from, 16);
}

// mbarrier: the phase in the top bit, arrivals of a phase, those still awaited. A copy lands at once.
void make_barrier(unsigned long long* barrier, int arrivals) { *barrier = (unsigned long long)arrivals << 32 | arrivals; }
void made_barriers() {}
void arrive(unsigned long long* barrier) {
  std::atomic_ref<unsigned long long> state(*barrier);
  auto before = state.load(), after = before;
  do
    after = (unsigned)before > 1 ? before - 1 : (before ^ 1ull << 63) & ~0xffffffffull | before >> 32 & 0x7fffffff;
  while (!state.compare_exchange_weak(before, after));
}
void copy(uint4* to, const uint4* from, int bytes, unsigned long long* barrier) {
  std::memcpy(to, from, bytes), arrive(barrier);
}
void await(unsigned long long* barrier, int parity) {
  while (int(std::atomic_ref<unsigned long long>(*barrier).load() >> 63) == parity) std::this_thread::yield();
}

float __shfl_xor_sync(unsigned, float value, int mask) {
  const int lane = threadIdx.x % 32;
  own_warp->value[lane] = value;
  own_warp->together.arrive_and_wait();
  value = own_warp->value[lane ^ mask];
  own_warp->together.arrive_and_wait();
  return value;
}

uint4 stream(const unsigned char* at) { return *(const uint4*)at; }

unsigned short narrow(float x) {
  const unsigned bits = std::bit_cast<unsigned>(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

unsigned times(unsigned two, unsigned factors) {
  auto product = [](unsigned x, unsigned y) { return narrow(__uint_as_float(x << 16) * __uint_as_float(y << 16)); };
  return product(two & 0xffff, factors & 0xffff) | product(two >> 16, factors >> 16) << 16;
}

float half(unsigned short bits) { return std::bit_cast<_Float16>(bits); }

// mma.m16n8k16: lane 4 g + t holds rows g and g + 8, columns 2 t and 2 t + 1 of each half of a and of c.
void mma(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  const int lane = threadIdx.x % 32;
  Warp& w = *own_warp;
  const unsigned a[] = {a0, a1, a2, a3}, b[] = {b0, b1};
  std::copy(a, a + 4, w.a[lane]), std::copy(b, b + 2, w.b[lane]);
  w.together.arrive_and_wait();
  auto part = [](unsigned two, int k) { return __uint_as_float(k % 2 ? two & 0xffff0000 : two << 16); };
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; k++)
      d[i] += part(w.a[4 * (row % 8) + k % 8 / 2][row / 8 + 2 * (k / 8)], k) * part(w.b[4 * column + k % 8 / 2][k / 8], k);
  }
  w.together.arrive_and_wait();
}

// ldmatrix.x4: lane 4 g + t gets word t of the row that lane 8 i + g names, of each of four matrices i.
uint4 right_of(const uint4* row) {
  const int lane = threadIdx.x % 32;
  own_warp->rows[lane] = row;
  own_warp->together.arrive_and_wait();
  auto found = [&](int i) { return ((const unsigned*)own_warp->rows[8 * i + lane / 4])[lane % 4]; };
  const uint4 v = {found(0), found(1), found(2), found(3)};
  own_warp->together.arrive_and_wait();
  return v;
}

// wgmma.m64nNk16, a warp's 16 rows of it. It reads registers and shared memory as late as it may: when it is waited for.
thread_local std::deque<std::vector<std::function<void()>>> products{1};
void begin_products() {}
void end_products() { products.emplace_back(); }
template <int PENDING> void finished() {
  for (; products.size() > PENDING + 1; products.pop_front())
    for (const auto& product : products.front()) product();
}
template <size_t EIGHTS> void multiply_async(float (&d)[EIGHTS][4], const unsigned (&a)[4], unsigned long long x) {
  products.back().push_back([&d, &a, x] {
    const int lane = threadIdx.x % 32;
    auto bytes = [x](int shift) { return (x >> shift & 0x3fff) * 16; };
    for (size_t j = 0; j < EIGHTS; j++) {
      auto row = [&](int half) {
        return (const unsigned*)((const char*)program + bytes(0) + half * bytes(16) + j * bytes(32) + lane / 4 * 16);
      };
      mma(d[j], a[0], a[1], a[2], a[3], row(0)[lane % 4], row(1)[lane % 4]);
    }
  });
}

// All programs at once, or as many as `together`, whose threads go on with the others.
template <class Kernel, class... Arguments>
void launch(int programs, int together, int threads, Kernel kernel, Arguments... arguments) {
  std::vector<std::unique_ptr<Program>> all;
  std::vector<std::thread> running;
  together = min(together, programs);
  for (int p = 0; p < together; p++) all.push_back(std::make_unique<Program>(threads));
  for (int p = 0; p < together; p++)
    for (int i = 0; i < threads; i++)
      running.emplace_back([=, &all] {
        program = all[p].get(), own_warp = &program->warps[i / 32];
        for (int next = p; next < programs; next += together) {
          threadIdx.x = i, blockIdx.x = next, gridDim.x = programs;
          kernel(arguments...);
          meet(0);
        }
      });
  for (std::thread& each : running) each.join();
}
