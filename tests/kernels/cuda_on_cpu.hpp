// What nf4_linear.cu and nf4_batch.cu ask of CUDA, on a CPU: a thread for every thread, barriers for what a program or a warp does together.
#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstring>
#include <deque>
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
};
struct Program {
  explicit Program(int threads) : warps(threads / 32) {
    for (int i = 0; i < 5; i++) barriers.emplace_back(threads);
  }
  std::deque<std::barrier<>> barriers;
  std::vector<Warp> warps;
  unsigned table[256 * 32];
  float sums[2 * 16 * 16 * 16], squares_of[16];
  alignas(16) char staged[1 << 18];
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
int again(int x) { return x; }
void early_start() {}

// Copies land when a thread waits for them, no sooner.
struct Copy { uint4* to; const unsigned short* from; bool inside; };
thread_local std::deque<std::vector<Copy>> copies{1};
void stage(uint4* to, const unsigned short* from, bool inside) { copies.back().push_back({to, from, inside}); }
void staged_unit() { copies.emplace_back(); }
template <int PENDING> void landed() {
  for (; copies.size() > PENDING + 1; copies.pop_front())
    for (const Copy& copy : copies.front())
      copy.inside ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
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

template <class Kernel, class... Arguments>
void launch(int programs, int threads, Kernel kernel, Arguments... arguments) {
  std::vector<std::unique_ptr<Program>> all;
  std::vector<std::thread> running;
  for (int p = 0; p < programs; p++) all.push_back(std::make_unique<Program>(threads));
  for (int p = 0; p < programs; p++)
    for (int i = 0; i < threads; i++)
      running.emplace_back([=, &all] {
        program = all[p].get(), own_warp = &program->warps[i / 32];
        threadIdx.x = i, blockIdx.x = p, gridDim.x = programs;
        kernel(arguments...);
      });
  for (std::thread& each : running) each.join();
}
