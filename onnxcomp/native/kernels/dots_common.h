// What the forms of dots.h share, and the exact one.

#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "isa.h"
#include "quantized.h"
#include "rows_int4_common.h"
#include "select.h"

namespace onnxcomp::dots {

template <typename Element>
struct Weight;

template <>
struct Weight<float> {
  const float* data;
};

template <>
struct Weight<std::int8_t> {
  const std::int8_t* data;
  const float* scale;  // one a row
};

// Two weights share a byte, low bits first; a row is a whole number of groups of 32, each with its scale.
template <typename Scale>
struct Int4 {
  const std::uint8_t* data;
  const Scale* scale;
  const std::uint8_t* zero;  // one a group, or a single one where zero_stride is 0
  std::size_t zero_stride;
};

using F32 = Weight<float>;
using Int8 = Weight<std::int8_t>;

// ---- exact ----------------------------------------------------------------------------------------------------------

ONNXCOMP_INLINE void exact_body(const F32& w, const float* ONNXCOMP_RESTRICT x, std::size_t k, const Kept& kept,
                                float* out) {
  constexpr std::size_t kLine = 16;
  std::size_t i = 0;
  for (; i + 4 <= kept.count; i += 4) {
    const float *row[4], *next[4];
    for (std::size_t u = 0; u < 4; ++u) {
      row[u] = w.data + kept.rows[i + u] * k;
      next[u] = w.data + kept.rows[std::min(i + 4 + u, kept.count - 1)] * k;
    }
    const float *ONNXCOMP_RESTRICT ra = row[0], *ONNXCOMP_RESTRICT rb = row[1];
    const float *ONNXCOMP_RESTRICT rc = row[2], *ONNXCOMP_RESTRICT rd = row[3];
    float a[kLine] = {}, b[kLine] = {}, c[kLine] = {}, d[kLine] = {};
    std::size_t j = 0;
    for (; j + kLine <= k; j += kLine) {
      for (std::size_t u = 0; u < 4; ++u) ONNXCOMP_PREFETCH(next[u] + j);
      for (std::size_t u = 0; u < kLine; ++u) a[u] += ra[j + u] * x[j + u];
      for (std::size_t u = 0; u < kLine; ++u) b[u] += rb[j + u] * x[j + u];
      for (std::size_t u = 0; u < kLine; ++u) c[u] += rc[j + u] * x[j + u];
      for (std::size_t u = 0; u < kLine; ++u) d[u] += rd[j + u] * x[j + u];
    }
    for (std::size_t u = 0; j < k; ++u, ++j) {
      a[u] += ra[j] * x[j];
      b[u] += rb[j] * x[j];
      c[u] += rc[j] * x[j];
      d[u] += rd[j] * x[j];
    }
    float sum[4] = {};
    for (std::size_t u = 0; u < kLine; ++u) {
      sum[0] += a[u];
      sum[1] += b[u];
      sum[2] += c[u];
      sum[3] += d[u];
    }
    for (std::size_t u = 0; u < 4; ++u) out[i + u] = kept.values[i + u] * sum[u];
  }
  for (; i < kept.count; ++i) {
    const float* ONNXCOMP_RESTRICT row = w.data + kept.rows[i] * k;
    float sum = 0;
    for (std::size_t j = 0; j < k; ++j) sum += row[j] * x[j];
    out[i] = kept.values[i] * sum;
  }
}

ONNXCOMP_INLINE void exact_body(const Int8& w, const float* ONNXCOMP_RESTRICT x, std::size_t k, const Kept& kept,
                                float* out) {
  for (std::size_t i = 0; i < kept.count; ++i) {
    const std::int8_t* ONNXCOMP_RESTRICT row = w.data + kept.rows[i] * k;
    float sum = 0;
    for (std::size_t j = 0; j < k; ++j) sum += static_cast<float>(row[j]) * x[j];
    out[i] = kept.values[i] * (sum * w.scale[kept.rows[i]]);
  }
}

template <typename Scale>
ONNXCOMP_INLINE void exact_body(const Int4<Scale>& w, const float* ONNXCOMP_RESTRICT x, std::size_t k, const Kept& kept,
                                float* out) {
  constexpr std::size_t kGroup = rows_int4::kGroup;
  const std::size_t groups = k / kGroup;
  for (std::size_t i = 0; i < kept.count; ++i) {
    const std::size_t r = kept.rows[i];
    float total = 0;
    for (std::size_t g = 0; g < groups; ++g) {
      const std::uint8_t* ONNXCOMP_RESTRICT p = w.data + r * (k / 2) + g * (kGroup / 2);
      const float zero = static_cast<float>(w.zero_stride == 0 ? *w.zero : w.zero[r * w.zero_stride + g]);
      float sum = 0;
      for (std::size_t j = 0; j < kGroup / 2; ++j) {
        sum += (static_cast<float>(p[j] & 15) - zero) * x[g * kGroup + 2 * j] +
               (static_cast<float>(p[j] >> 4) - zero) * x[g * kGroup + 2 * j + 1];
      }
      total += sum * to_float(w.scale[r * groups + g]);
    }
    out[i] = kept.values[i] * total;
  }
}

template <typename W>
using Exact = void (*)(const W& w, const float* x, std::size_t k, const Kept& kept, float* out);

#define ONNXCOMP_DEFINE(name)                                                                         \
  inline void name(const W& w, const float* x, std::size_t k, const Kept& kept, float* out) {         \
    exact_body(w, x, k, kept, out);                                                                   \
  }

template <typename W>
ONNXCOMP_DEFINE(exact_portable)
#if defined(ONNXCOMP_X86)
template <typename W>
ONNXCOMP_TARGET(ONNXCOMP_AVX2) ONNXCOMP_DEFINE(exact_avx2)
template <typename W>
ONNXCOMP_TARGET(ONNXCOMP_AVX512) ONNXCOMP_DEFINE(exact_avx512)
#endif
#undef ONNXCOMP_DEFINE

// ---- rounded --------------------------------------------------------------------------------------------------------

// Rows from the one at work to the one that is fetched.
inline constexpr std::size_t kAhead = 8;

// The input in 8 bits in blocks of 32, padded with zeros to whole pairs of cache lines.
struct Input {
  const std::int8_t* data;  // 128 after 128: in order, or those of even and then those of odd index
  const float* steps;       // one a block
  const float* sums;        // of a block's integers, times its step
  float total;              // of `sums`
};

inline constexpr std::size_t kBlock = 32, kUnit = 128;

inline std::size_t padded(std::size_t k) { return (k + kUnit - 1) / kUnit * kUnit; }

// Bytes of memory that `round` needs for `k` inputs: integers, steps and sums, the latter read 16 at a time.
inline std::size_t input_bytes(std::size_t k) { return padded(k) + 2 * (padded(k) / kBlock + 16) * sizeof(float); }

// Rounds all of x; false if it holds NaN or infinity. `split` parts even from odd. `memory` is aligned to 64 bytes.
inline bool round(const float* x, std::size_t k, bool split, void* memory, Input* out) {
  const std::size_t size = padded(k), blocks = size / kBlock;
  std::int8_t* data = static_cast<std::int8_t*>(memory);
  float* steps = reinterpret_cast<float*>(data + size);
  float* sums = steps + blocks + 16;
  std::memset(memory, 0, input_bytes(k));
  float total = 0;
  for (std::size_t b = 0; b * kBlock < k; ++b) {
    const std::size_t begin = b * kBlock, end = std::min(begin + kBlock, k);
    std::uint32_t most = 0;
    for (std::size_t j = begin; j < end; ++j) most = std::max(most, magnitude_bits(x[j]));
    if (most >= 0x7f800000u) return false;
    float largest;
    std::memcpy(&largest, &most, sizeof(largest));
    const float inverse = inverse_step(largest);
    int sum = 0;
    for (std::size_t j = begin; j < end; ++j) {
      const int q = static_cast<int>(std::lrintf(x[j] * inverse));
      const std::size_t in_unit = j % kUnit;
      data[split ? j - in_unit + in_unit % 2 * (kUnit / 2) + in_unit / 2 : j] = static_cast<std::int8_t>(q);
      sum += q;
    }
    steps[b] = largest / 127.0f;
    sums[b] = static_cast<float>(sum) * steps[b];
    total += sums[b];
  }
  *out = {data, steps, sums, total};
  return true;
}

template <typename W>
using Rounded = void (*)(const W& w, const Input& x, std::size_t k, const Kept& kept, float* out);

}  // namespace onnxcomp::dots
