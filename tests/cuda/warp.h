// What a warp does together: shuffles, votes, reductions, ldmatrix, stmatrix, mma.
#pragma once
#include "memory.h"

namespace emulator {

// Every lane of `mask` gives a value; from(lane, value) is the lane whose value it gets, or -1 for
// its own.
template <class From>
uint32_t shuffle(uint32_t mask, uint32_t v, const char* name, From from) {
  struct Swap {
    uint32_t in, out;
    int from;
  } mine{v, 0, from(lane())};
  meet_warp(mask, &mine, name, [](std::vector<void*>& all) {
    for (int i = 0; i < 32; ++i) {
      auto s = static_cast<Swap*>(all[i]);
      if (!s) continue;
      const int source = s->from < 0 ? i : s->from;
      if (source > 31 || !all[source]) fail("shuffle from a lane that takes no part");
      s->out = static_cast<Swap*>(all[source])->in;
    }
  });
  return mine.out;
}
inline uint32_t shuffle_xor(uint32_t v, int bits) {
  return shuffle(0xffffffffu, v, "shuffle", [&](int i) { return i ^ bits; });
}

// The same value for every lane of `mask`: fold(so far, next).
template <class Fold>
uint32_t reduce(uint32_t mask, uint32_t v, const char* name, Fold fold) {
  struct Mine {
    uint32_t in, out;
  } mine{v, 0};
  meet_warp(mask, &mine, name, [&](std::vector<void*>& all) {
    bool first = true;
    uint32_t total = 0;
    for (void* p : all) {
      if (!p) continue;
      const uint32_t next = static_cast<Mine*>(p)->in;
      total = first ? next : fold(total, next);
      first = false;
    }
    for (void* p : all)
      if (p) static_cast<Mine*>(p)->out = total;
  });
  return mine.out;
}

// ---- 8x8 matrices of 16 bits: lane 8 m + row gives the address of a row of matrix m ----

inline void load_matrices(uint32_t* r, int count, smem a, bool transposed) {
  struct Mine {
    uint32_t* r;
    smem address;
  } mine{r, a};
  if (lane() < 8 * count) note_read(a, 16, "ldmatrix");
  meet_warp(0xffffffffu, &mine, transposed ? "ldmatrix.trans" : "ldmatrix",
            [&](std::vector<void*>& all) {
              Launch& launch = current()->launch;
              for (int m = 0; m < count; ++m) {
                uint16_t tile[8][8];
                int banks[8] = {};
                for (int row = 0; row < 8; ++row) {
                  const smem from = static_cast<Mine*>(all[m * 8 + row])->address;
                  std::memcpy(tile[row], shared_at(from), 16);
                  ++banks[from / 16 % 8];
                }
                launch.matrix_conflicts += *std::max_element(banks, banks + 8) - 1;
                ++launch.matrix_loads;
                for (int i = 0; i < 32; ++i) {
                  const int row = i / 4, col = i % 4 * 2;
                  const uint32_t lo = transposed ? tile[col][row] : tile[row][col];
                  const uint32_t hi = transposed ? tile[col + 1][row] : tile[row][col + 1];
                  static_cast<Mine*>(all[i])->r[m] = lo | hi << 16;
                }
              }
            });
}
inline void store_matrices(const uint32_t* r, int count, smem a, bool transposed) {
  struct Mine {
    const uint32_t* r;
    smem address;
  } mine{r, a};
  // The lane that gives a row's address is held to have written it.
  meet_warp(0xffffffffu, &mine, transposed ? "stmatrix.trans" : "stmatrix",
            [&](std::vector<void*>& all) {
              Block& b = *current();
              Thread* const last = b.now;
              for (int row = 0; row < 8 * count; ++row) {
                uint16_t line[8];
                for (int col = 0; col < 8; ++col) {
                  const int i = transposed ? col * 4 + row % 8 / 2 : row % 8 * 4 + col / 2;
                  line[col] = uint16_t(static_cast<Mine*>(all[i])->r[row / 8] >>
                                       (16 * (transposed ? row % 2 : col % 2)));
                }
                const smem to = static_cast<Mine*>(all[row])->address;
                b.now = &b.threads[last->id / 32 * 32 + row];
                note_write(to, 16, "stmatrix", line);
                b.now = last;
                std::memcpy(shared_at(to), line, 16);
              }
            });
}

// ---- mma.sync m16n8k16: c += a b, 16-bit operands, sums in double rounded once ----

template <class T>
void multiply_16x8x16(float* c, const uint32_t* a, const uint32_t* b) {
  struct Mine {
    float* c;
    const uint32_t *a, *b;
  } mine{c, a, b};
  meet_warp(0xffffffffu, &mine, "mma.m16n8k16", [](std::vector<void*>& all) {
    float A[16][16], B[16][8];
    for (int i = 0; i < 32; ++i) {
      auto p = static_cast<Mine*>(all[i]);
      const int g = i / 4, q = i % 4 * 2;
      for (int h = 0; h < 2; ++h) {
        for (int part = 0; part < 4; ++part)
          A[g + part % 2 * 8][q + part / 2 * 8 + h] = half_of<T>(p->a[part], h);
        for (int part = 0; part < 2; ++part) B[q + part * 8 + h][g] = half_of<T>(p->b[part], h);
      }
    }
    for (int i = 0; i < 32; ++i) {
      auto p = static_cast<Mine*>(all[i]);
      for (int j = 0; j < 4; ++j) {
        const int row = i / 4 + j / 2 * 8, col = i % 4 * 2 + j % 2;
        double sum = p->c[j];
        for (int k = 0; k < 16; ++k) sum += double(A[row][k]) * B[k][col];
        p->c[j] = float(sum);
      }
    }
    ++current()->launch.products;
  });
}

}  // namespace emulator
