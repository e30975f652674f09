// Sum of some rows of an fp32 matrix: y[0, columns) = sum of values[i] * w[rows[i] * stride + (0, columns)].
//
// A product with batch 1 is bound by memory, so what counts is that a row which is not needed is not read, and that those
// which are needed arrive as long runs.

#pragma once

#include <algorithm>

#include "isa.h"
#include "select.h"

namespace onnxcomp::rows_f32 {

// Four rows a pass, so that y is loaded and stored once for four rows read; y (`columns` floats) is meant to stay in the
// first-level cache. The next four rows are fetched ahead, into the second-level cache so as not to push y out of the
// first: each row lies on pages of its own, where the hardware's prefetcher has to start anew every time.
ONNXCOMP_INLINE void body(const float* w, std::size_t stride, const Kept& kept, float* ONNXCOMP_RESTRICT y,
                          std::size_t columns) {
  constexpr std::size_t kLine = 16;  // floats in a cache line
  const float* values = kept.values;
  const std::uint32_t* rows = kept.rows;
  std::memset(y, 0, columns * sizeof(float));
  std::size_t i = 0;
  for (; i + 4 <= kept.count; i += 4) {
    const float a = values[i], b = values[i + 1], c = values[i + 2], d = values[i + 3];
    const float* ONNXCOMP_RESTRICT wa = w + rows[i] * stride;
    const float* ONNXCOMP_RESTRICT wb = w + rows[i + 1] * stride;
    const float* ONNXCOMP_RESTRICT wc = w + rows[i + 2] * stride;
    const float* ONNXCOMP_RESTRICT wd = w + rows[i + 3] * stride;
    const std::size_t last = kept.count - 1;
    const float* na = w + rows[std::min(i + 4, last)] * stride;
    const float* nb = w + rows[std::min(i + 5, last)] * stride;
    const float* nc = w + rows[std::min(i + 6, last)] * stride;
    const float* nd = w + rows[std::min(i + 7, last)] * stride;
    std::size_t j = 0;
    for (; j + kLine <= columns; j += kLine) {
      ONNXCOMP_PREFETCH(na + j);
      ONNXCOMP_PREFETCH(nb + j);
      ONNXCOMP_PREFETCH(nc + j);
      ONNXCOMP_PREFETCH(nd + j);
      for (std::size_t u = j; u < j + kLine; ++u) {
        y[u] += a * wa[u] + b * wb[u] + (c * wc[u] + d * wd[u]);
      }
    }
    for (; j < columns; ++j) {
      y[j] += a * wa[j] + b * wb[j] + (c * wc[j] + d * wd[j]);
    }
  }
  for (; i < kept.count; ++i) {
    const float a = values[i];
    const float* ONNXCOMP_RESTRICT wa = w + rows[i] * stride;
    for (std::size_t j = 0; j < columns; ++j) {
      y[j] += a * wa[j];
    }
  }
}

using Kernel = void (*)(const float* w, std::size_t stride, const Kept& kept, float* y, std::size_t columns);

// The body once for every instruction set; the compiler vectorises it (SSE2 or NEON without a target).
#define ONNXCOMP_DEFINE(name)                                                                                \
  inline void name(const float* w, std::size_t stride, const Kept& kept, float* y, std::size_t columns) {    \
    body(w, stride, kept, y, columns);                                                                       \
  }

ONNXCOMP_DEFINE(portable)
#if defined(ONNXCOMP_X86)
ONNXCOMP_TARGET(ONNXCOMP_AVX2) ONNXCOMP_DEFINE(avx2)
ONNXCOMP_TARGET(ONNXCOMP_AVX512) ONNXCOMP_DEFINE(avx512)
#endif
#undef ONNXCOMP_DEFINE

inline Kernel choose(Isa isa) {
#if defined(ONNXCOMP_X86)
  if (isa == Isa::kAvx512 || isa == Isa::kVnni) return avx512;
  if (isa == Isa::kAvx2) return avx2;
#endif
  (void)isa;
  return portable;
}

}  // namespace onnxcomp::rows_f32
