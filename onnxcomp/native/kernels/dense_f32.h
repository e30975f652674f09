// Dense fp32 product of several inputs at once, for batches that together need most of the weight anyway:
// y[b, j] = sum over k of x[b, k] * w[k * row_step + j * column_step], for j < columns.
//
// A block of the weight is put in order once and used by all inputs, four at a time, with their sums in registers.

#pragma once

#include <algorithm>

#include "isa.h"

#if defined(__GNUC__) || defined(__clang__)
#define ONNXCOMP_DENSE 1
#endif

namespace onnxcomp::dense_f32 {

struct Weight {
  const float* data;  // at the first of the columns
  std::size_t row_step, column_step;
};

// Whether to compute all of it: otherwise the rows of `kept` inputs, of all `batch` together, are read one by one. Putting
// a row in order takes as long as reading three, and multiplying it with one input an eighth of that.
inline bool pays(std::size_t kept, std::size_t batch, std::size_t k) {
#if defined(ONNXCOMP_DENSE)
  return batch > 1 && kept > 3 * k + batch * k / 8;
#else
  (void)kept, (void)batch, (void)k;
  return false;
#endif
}

inline constexpr std::size_t kDepth = 256;    // rows of a block
inline constexpr std::size_t kColumns = 64;   // of a block; a task may have fewer
inline constexpr std::size_t kTogether = 4;   // inputs

using Kernel = void (*)(const Weight& w, const float* x, std::size_t k, std::size_t batch, std::size_t columns,
                        float* y, std::size_t y_step);

#if defined(ONNXCOMP_DENSE)

// `kLanes` floats a vector, `kVectors` vectors of sums for each input.
template <std::size_t kLanes, std::size_t kVectors>
ONNXCOMP_INLINE void multiply(const float* block, std::size_t depth, const float* const x[kTogether],
                              float sums[kTogether][kColumns]) {
  typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
  for (std::size_t j = 0; j < kColumns; j += kLanes * kVectors) {
    Vector total[kTogether][kVectors];
    for (std::size_t b = 0; b < kTogether; ++b) {
      for (std::size_t v = 0; v < kVectors; ++v) {
        total[b][v] = *reinterpret_cast<const Vector*>(&sums[b][j + v * kLanes]);
      }
    }
    for (std::size_t i = 0; i < depth; ++i) {
      const Vector* row = reinterpret_cast<const Vector*>(block + i * kColumns + j);
      for (std::size_t b = 0; b < kTogether; ++b) {
        for (std::size_t v = 0; v < kVectors; ++v) total[b][v] += row[v] * x[b][i];
      }
    }
    for (std::size_t b = 0; b < kTogether; ++b) {
      for (std::size_t v = 0; v < kVectors; ++v) {
        *reinterpret_cast<Vector*>(&sums[b][j + v * kLanes]) = total[b][v];
      }
    }
  }
}

template <std::size_t kLanes, std::size_t kVectors>
ONNXCOMP_INLINE void body(const Weight& w, const float* x, std::size_t k, std::size_t batch, std::size_t columns,
                          float* y, std::size_t y_step) {
  alignas(64) float block[kDepth * kColumns];
  for (std::size_t begin = 0; begin < k; begin += kDepth) {
    const std::size_t depth = std::min(kDepth, k - begin);
    const float* from = w.data + begin * w.row_step;
    if (columns < kColumns) std::memset(block, 0, sizeof(block));
    if (w.column_step == 1) {
      for (std::size_t i = 0; i < depth; ++i) {
        std::memcpy(block + i * kColumns, from + i * w.row_step, columns * sizeof(float));
      }
    } else {
      for (std::size_t j = 0; j < columns; ++j) {
        for (std::size_t i = 0; i < depth; ++i) block[i * kColumns + j] = from[i * w.row_step + j * w.column_step];
      }
    }
    for (std::size_t b = 0; b < batch; b += kTogether) {
      alignas(64) float sums[kTogether][kColumns] = {};
      const float* inputs[kTogether];
      const std::size_t real = std::min(kTogether, batch - b);
      for (std::size_t u = 0; u < kTogether; ++u) {
        inputs[u] = x + (b + std::min(u, real - 1)) * k + begin;
        if (begin > 0 && u < real) std::memcpy(sums[u], y + (b + u) * y_step, columns * sizeof(float));
      }
      multiply<kLanes, kVectors>(block, depth, inputs, sums);
      for (std::size_t u = 0; u < real; ++u) std::memcpy(y + (b + u) * y_step, sums[u], columns * sizeof(float));
    }
  }
}

#define ONNXCOMP_DEFINE(name, lanes, vectors)                                                                       \
  inline void name(const Weight& w, const float* x, std::size_t k, std::size_t batch, std::size_t columns, float* y, \
                   std::size_t y_step) {                                                                            \
    body<lanes, vectors>(w, x, k, batch, columns, y, y_step);                                                       \
  }

ONNXCOMP_DEFINE(portable, 4, 2)
#if defined(ONNXCOMP_X86)
ONNXCOMP_TARGET(ONNXCOMP_AVX2) ONNXCOMP_DEFINE(avx2, 8, 2)
ONNXCOMP_TARGET(ONNXCOMP_AVX512) ONNXCOMP_DEFINE(avx512, 16, 4)
#endif
#undef ONNXCOMP_DEFINE

#endif

// Null where the compiler has no vectors.
inline Kernel choose(Isa isa) {
#if defined(ONNXCOMP_DENSE)
#if defined(ONNXCOMP_X86)
  if (isa == Isa::kAvx512 || isa == Isa::kVnni) return avx512;
  if (isa == Isa::kAvx2) return avx2;
#endif
  (void)isa;
  return portable;
#else
  (void)isa;
  return nullptr;
#endif
}

}  // namespace onnxcomp::dense_f32
