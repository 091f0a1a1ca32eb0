// What nf4_linear.cu, nf4_batch.cu and nf4_prepare.cu share: bfloat16 by its bits, a norm, codes by way of a table, the
// tensor cores' product.
//
// Two weights come as one register from a table in shared memory, by their byte. Every lane has a copy of it in its own
// bank, so that 32 lanes look up 32 different bytes at once: two instructions and one look-up for two weights, where
// selecting bytes with PRMT takes 2.6 instructions a weight.
//
// Defined when it is compiled: TABLE (the 16 values as bfloat16 bits).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

constexpr int ENTRIES = 256 * 32;  // [byte][lane]

__device__ __constant__ u16 values[16] = {TABLE};

__device__ __forceinline__ float wide(u16 x) { return __uint_as_float(u32(x) << 16); }

__device__ __forceinline__ u16 narrow(float x) {
  u16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ u32 times(u32 two, u32 factors) {
  u32 product;
#if __CUDA_ARCH__ >= 900
  asm("mul.bf16x2 %0, %1, %2;" : "=r"(product) : "r"(two), "r"(factors));
#else
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(two), "r"(factors), "r"(0x80008000));
#endif
  return product;
}

__device__ __forceinline__ float half(u16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

__device__ __forceinline__ u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

__device__ __forceinline__ float low(u32 two) { return __uint_as_float(two << 16); }
__device__ __forceinline__ float high(u32 two) { return __uint_as_float(two & 0xffff0000); }

__device__ __forceinline__ float dot(const uint4& p, const uint4& q) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; i++) sum += low(word(p, i)) * low(word(q, i)) + high(word(p, i)) * high(word(q, i));
  return sum;
}

// Two values over their root mean square, rounded, times the norm's weights.
__device__ __forceinline__ u32 normed(u32 two, u32 weights, float inverse) {
  const u16 first = narrow(wide(narrow(low(two) * inverse)) * low(weights));
  return first | u32(narrow(wide(narrow(high(two) * inverse)) * high(weights))) << 16;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
  return value;
}

__device__ __forceinline__ uint4 stream(const u8* at) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(at));
  return v;
}

__device__ __forceinline__ void fill(u32* table, int threads) {
  for (int i = threadIdx.x; i < ENTRIES; i += threads)
    table[i] = values[i / 32 >> 4] | u32(values[i / 32 & 15]) << 16;
}

// The two weights of one of four bytes; `own` is the address of the lane's bank.
__device__ __forceinline__ u32 look_up(u32 four, int byte, u32 own) {
  u32 two;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(two) : "r"(__byte_perm(four, 0, 0x4440 | byte) * 128 + own));
  return two;
}

__device__ __forceinline__ void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ int arrived(const int* counter) {
  int n;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(n) : "l"(counter) : "memory");
  return n;
}

// Let the next kernel start, and wait for the one ahead.
__device__ __forceinline__ void early_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
