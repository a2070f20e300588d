// Kernels of one block that use each word of csrc/cuda/tile/matrix.h and numerics.h; test_words.py
// runs them as g++ compiles them and from nvcc's PTX, and holds them to numbers.
#include "cuda/tile/numerics.h"

#if defined(__CUDACC__)
#define ENTRY extern "C" KERNEL(32)
#else
#define ENTRY static void
#endif

namespace mmkern {

struct Words {
  const uint8_t* in;
  float* out;
};

// in: x (16, 16), y (16, 16), of T. out: 32 rows of what each lane holds of x y^T, then of x y.
template <class T>
DEVICE void multiply(const Words& a) {
  const int lane = thread_index();
  const smem x = shared_base(), y = x + 512;
  copy_async_16(x + lane * 16, a.in + lane * 16, true);
  copy_async_commit();
  uint32_t w[4];
  load_16(w, a.in + 512 + lane * 16);
  store_shared_16(y + lane * 16, w);
  copy_async_16(x + 1024 + lane * 16, a.in, false);  // zeros
  copy_async_commit();
  copy_async_wait<1>();
  block_barrier();
  uint32_t of_x[4], of_y[4];
  load_matrices<false>(of_x, x + lane % 16 * 32 + lane / 16 * 16);
  float found[16] = {};
  // y^T: its columns are rows of y.
  load_matrices<false>(of_y, y + (lane % 8 + lane / 16 * 8) * 32 + lane / 8 % 2 * 16);
  multiply_16x8x16<T>(*reinterpret_cast<float (*)[4]>(found), of_x, of_y[0], of_y[1]);
  multiply_16x8x16<T>(*reinterpret_cast<float (*)[4]>(found + 4), of_x, of_y[2], of_y[3]);
  load_matrices<true>(of_y, y + lane % 16 * 32 + lane / 16 * 16);
  multiply_16x8x16<T>(*reinterpret_cast<float (*)[4]>(found + 8), of_x, of_y[0], of_y[1]);
  multiply_16x8x16<T>(*reinterpret_cast<float (*)[4]>(found + 12), of_x, of_y[2], of_y[3]);
  copy_async_wait<0>();
  block_barrier();
  load_shared_16(w, x + 1024 + (31 - lane) * 16);
  UNROLL for (int i = 0; i < 16; ++i)
      store_bits(a.out + lane * 16 + i, found[i] + as_float(w[i % 4]));
}
ENTRY words_f16(const Words a) { multiply<f16>(a); }
ENTRY words_bf16(const Words a) { multiply<bf16>(a); }

// in: 32 floats, then five uint32 of the generator. out: for each lane 8 floats, then 4 words.
ENTRY words_scalar(const Words a) {
  const int lane = thread_index();
  const float x = load_bits(reinterpret_cast<const float*>(a.in) + lane);
  const uint32_t* n = reinterpret_cast<const uint32_t*>(a.in) + 32;
  const uint64_t seed = load_bits(n) | uint64_t(load_bits(n + 1)) << 32;
  const PhiloxWords words =
      philox(seed, load_bits(n + 2) + lane, load_bits(n + 3), load_bits(n + 4), 7);
  const float all[8] = {hyperbolic_tangent(x),
                        square_root(x),
                        absolute(x),
                        shuffle(x, lane / 4 * 4),
                        shuffle_xor(x, 3),
                        any_lane(x > 9.0f) ? 1.0f : 0.0f,
                        any_lane(x > 1e9f) ? 1.0f : 0.0f,
                        exp2_fast(x)};
  UNROLL for (int i = 0; i < 8; ++i) store_bits(a.out + lane * 12 + i, all[i]);
  UNROLL for (int i = 0; i < 4; ++i) store_bits(a.out + lane * 12 + 8 + i, as_float(words.w[i]));
}

}  // namespace mmkern

#if defined(MMKERN_EMULATE)
#include <map>

namespace {
std::string message;
}
// As g++ compiled it; "" or what the emulator found.
extern "C" const char* words_run(const char* name, const void* in, size_t in_size, void* out,
                                 size_t out_size) {
  const std::map<std::string, void (*)(mmkern::Words)> kernels = {
      {"words_f16", mmkern::words_f16},
      {"words_bf16", mmkern::words_bf16},
      {"words_scalar", mmkern::words_scalar}};
  emulator::Launch launch;
  launch.buffers = {{static_cast<const uint8_t*>(in), in_size},
                    {static_cast<const uint8_t*>(out), out_size}};
  const mmkern::Words words{static_cast<const uint8_t*>(in), static_cast<float*>(out)};
  message.clear();
  try {
    emulator::run(launch, 32, 1536, [&] { kernels.at(name)(words); });
  } catch (const std::exception& e) {
    message = e.what();
  }
  return message.c_str();
}
#endif
