// What the forms of rows_int4.h share, and the exact one.

#pragma once

#include "interleave.h"
#include "quantized.h"

namespace onnxcomp::rows_int4 {

inline constexpr std::size_t kGroup = 32;

// `Scale` is float or a half (uint16_t). All pointers are at the first of the columns; strides are from row to row.
template <typename Scale>
struct Weight {
  const std::uint8_t* data;
  std::size_t stride;
  const Scale* scale;
  const std::uint8_t* zero;  // one a group, or a single one where zero_stride is 0
  std::size_t zero_stride;
  std::size_t groups;  // from row to row of the scales
};

inline constexpr std::size_t kMaxColumns = 2048;  // of one call
inline constexpr std::size_t kMaxGroups = kMaxColumns / kGroup;

// ---- exact ----------------------------------------------------------------------------------------------------------

// Columns of a byte are summed apart, the low ones in the first half of a group, so that loads and stores are whole.
template <typename Scale>
ONNXCOMP_INLINE void exact_body(const Weight<Scale>& w, const Kept& kept, float* ONNXCOMP_RESTRICT y,
                                std::size_t groups) {
  float scratch[kMaxColumns];
  float* ONNXCOMP_RESTRICT sums = scratch;
  std::memset(sums, 0, groups * kGroup * sizeof(float));
  for (std::size_t i = 0; i < kept.count; i += 4) {
    float x[4];
    std::size_t row[4], next[4];
    const std::size_t last = kept.count - 1;
    for (std::size_t u = 0; u < 4; ++u) {
      // A row that is not there is the last one times zero.
      row[u] = kept.rows[std::min(i + u, last)];
      next[u] = kept.rows[std::min(i + 4 + u, last)];
      x[u] = i + u <= last ? kept.values[i + u] : 0.0f;
    }
    for (std::size_t g = 0; g < groups; ++g) {
      float factor[4], zero[4];
      const std::uint8_t* p[4];
      for (std::size_t u = 0; u < 4; ++u) {
        factor[u] = x[u] * to_float(w.scale[row[u] * w.groups + g]);
        zero[u] = static_cast<float>(w.zero_stride == 0 ? *w.zero : w.zero[row[u] * w.zero_stride + g]);
        p[u] = w.data + row[u] * w.stride + g * (kGroup / 2);
        if (g % 4 == 0) ONNXCOMP_PREFETCH(w.data + next[u] * w.stride + g * (kGroup / 2));
      }
      const std::uint8_t *ONNXCOMP_RESTRICT pa = p[0], *ONNXCOMP_RESTRICT pb = p[1];
      const std::uint8_t *ONNXCOMP_RESTRICT pc = p[2], *ONNXCOMP_RESTRICT pd = p[3];
      float* ONNXCOMP_RESTRICT low = sums + g * kGroup;
      float* ONNXCOMP_RESTRICT high = low + kGroup / 2;
      for (std::size_t j = 0; j < kGroup / 2; ++j) {
        low[j] += factor[0] * (static_cast<float>(pa[j] & 15) - zero[0]) +
                  factor[1] * (static_cast<float>(pb[j] & 15) - zero[1]) +
                  (factor[2] * (static_cast<float>(pc[j] & 15) - zero[2]) +
                   factor[3] * (static_cast<float>(pd[j] & 15) - zero[3]));
      }
      for (std::size_t j = 0; j < kGroup / 2; ++j) {
        high[j] += factor[0] * (static_cast<float>(pa[j] >> 4) - zero[0]) +
                   factor[1] * (static_cast<float>(pb[j] >> 4) - zero[1]) +
                   (factor[2] * (static_cast<float>(pc[j] >> 4) - zero[2]) +
                    factor[3] * (static_cast<float>(pd[j] >> 4) - zero[3]));
      }
    }
  }
  for (std::size_t g = 0; g < groups; ++g) {
    for (std::size_t j = 0; j < kGroup / 2; ++j) {
      y[g * kGroup + 2 * j] = sums[g * kGroup + j];
      y[g * kGroup + 2 * j + 1] = sums[g * kGroup + kGroup / 2 + j];
    }
  }
}

template <typename Scale>
using Kernel = void (*)(const Weight<Scale>& w, const Kept& kept, float* y, std::size_t groups);

#define ONNXCOMP_DEFINE(name)                                                                      \
  inline void name(const Weight<Scale>& w, const Kept& kept, float* y, std::size_t groups) {       \
    exact_body(w, kept, y, groups);                                                                \
  }

template <typename Scale>
ONNXCOMP_DEFINE(exact_portable)
#if defined(ONNXCOMP_X86)
template <typename Scale>
ONNXCOMP_TARGET(ONNXCOMP_AVX2) ONNXCOMP_DEFINE(exact_avx2)
template <typename Scale>
ONNXCOMP_TARGET(ONNXCOMP_AVX512) ONNXCOMP_DEFINE(exact_avx512)
#endif
#undef ONNXCOMP_DEFINE

// ---- rounded --------------------------------------------------------------------------------------------------------

// Coefficients of one chunk: for four rows at a time and every group a word of four 8-bit integers, and for every group
// the step they count in and what the zero points add up to.
struct alignas(64) Coefficients {
  std::int32_t words[kChunk / 4][kMaxGroups];
  float steps[kMaxGroups];
  std::int32_t zeros[kMaxGroups];
};

}  // namespace onnxcomp::rows_int4
