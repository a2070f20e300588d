// Words for kernels that multiply matrices on tensor cores of sm_80 and later: copies that run
// beside the arithmetic, 8x8 matrices out of shared memory, and products.
#pragma once

#include "cuda/tile/device.h"

#if defined(__CUDACC__)

namespace mmkern {

// 16 bytes from global to shared memory, both at multiples of 16, without passing registers; zeros,
// and nothing read, where not `inside`. It has arrived once its group has been waited for.
DEVICE void copy_async_16(smem to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kLeft of this thread's groups are under way.
template <int kLeft>
DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

DEVICE void store_shared_16(smem a, const uint32_t (&w)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(a), "r"(w[0]), "r"(w[1]), "r"(w[2]),
               "r"(w[3])
               : "memory");
}
DEVICE void load_shared_16(uint32_t (&w)[4], smem a) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "r"(a)
               : "memory");
}

// Four 8x8 matrices of 16-bit elements: lane 8 m + r gives the address of row r of matrix m, and
// gets of each matrix the elements (lane / 4, 2 (lane % 4)) and the next; transposed, those of the
// transposed matrix.
template <bool kTransposed>
DEVICE void load_matrices(uint32_t (&r)[4], smem a) {
  if (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(a)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(a)
                 : "memory");
}

// c (16x8, float32) += a (16x16) b (16x8). With g = lane / 4 and q = 2 (lane % 4), a lane holds
// c: (g, q), (g, q + 1), (g + 8, q), (g + 8, q + 1);
// a: pairs from (g, q), (g + 8, q), (g, q + 8), (g + 8, q + 8); b: pairs down from (q, g), (q + 8,
// g).
template <class T>
DEVICE void multiply_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#define MMKERN_MULTIPLY(T, name)                                                        \
  template <>                                                                           \
  DEVICE void multiply_16x8x16<T>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,   \
                                  uint32_t b1) {                                        \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                 \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));       \
  }
MMKERN_MULTIPLY(f16, "f16")
MMKERN_MULTIPLY(bf16, "bf16")
#undef MMKERN_MULTIPLY

// The value of another lane.
DEVICE float shuffle(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
DEVICE bool any_lane(bool mine) { return __any_sync(0xffffffffu, mine); }
DEVICE float square_root(float x) { return __fsqrt_rn(x); }
DEVICE float absolute(float x) { return fabsf(x); }

}  // namespace mmkern

#else
#include "emulate_matrix.h"
#endif
