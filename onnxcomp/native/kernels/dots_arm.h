// The rounded form of dots.h for aarch64 with dot products.

#pragma once

#include "dots_common.h"

#if defined(ONNXCOMP_ARM)

namespace onnxcomp::dots {

ONNXCOMP_TARGET(ONNXCOMP_DOTPROD)
inline void rounded_dotprod(const Int8& w, const Input& x, std::size_t k, const Kept& kept, float* out) {
  for (std::size_t i = 0; i < kept.count; ++i) {
    const std::int8_t* row = w.data + kept.rows[i] * k;
    const std::int8_t* next = w.data + kept.rows[std::min(i + kAhead, kept.count - 1)] * k;
    float32x4_t sums = vdupq_n_f32(0);
    std::size_t j = 0;
    for (; j + kBlock <= k; j += kBlock) {
      ONNXCOMP_PREFETCH(next + j);
      int32x4_t product = vdotq_s32(vdupq_n_s32(0), vld1q_s8(row + j), vld1q_s8(x.data + j));
      product = vdotq_s32(product, vld1q_s8(row + j + 16), vld1q_s8(x.data + j + 16));
      sums = vfmaq_n_f32(sums, vcvtq_f32_s32(product), x.steps[j / kBlock]);
    }
    std::int32_t rest = 0;
    for (; j < k; ++j) rest += row[j] * x.data[j];
    const float sum = vaddvq_f32(sums) + static_cast<float>(rest) * x.steps[k / kBlock];
    out[i] = kept.values[i] * (sum * w.scale[kept.rows[i]]);
  }
}

template <typename Scale>
ONNXCOMP_TARGET(ONNXCOMP_DOTPROD)
inline void rounded_dotprod(const Int4<Scale>& w, const Input& x, std::size_t k, const Kept& kept, float* out) {
  const std::size_t groups = k / kBlock;
  const uint8x16_t low = vdupq_n_u8(15);
  for (std::size_t i = 0; i < kept.count; ++i) {
    const std::size_t r = kept.rows[i];
    const std::uint8_t* row = w.data + r * (k / 2);
    const std::size_t later = kept.rows[std::min(i + kAhead, kept.count - 1)];
    const std::uint8_t* next = w.data + later * (k / 2);
    float32x4_t sums = vdupq_n_f32(0);
    float zeros = 0;
    for (std::size_t g = 0; g < groups; ++g) {
      const std::size_t at = g * (kBlock / 2);
      if (g % 4 == 0) ONNXCOMP_PREFETCH(next + at);
      if (g % 16 == 0) ONNXCOMP_PREFETCH(w.scale + later * groups + g);
      const uint8x16_t pairs = vld1q_u8(row + at);
      const std::int8_t* even = x.data + g / 4 * kUnit + g % 4 * (kBlock / 2);
      int32x4_t product = vdotq_s32(vdupq_n_s32(0), vreinterpretq_s8_u8(vandq_u8(pairs, low)), vld1q_s8(even));
      product = vdotq_s32(product, vreinterpretq_s8_u8(vshrq_n_u8(pairs, 4)), vld1q_s8(even + kUnit / 2));
      const float scale = to_float(w.scale[r * groups + g]);
      sums = vfmaq_n_f32(sums, vcvtq_f32_s32(product), scale * x.steps[g]);
      zeros += scale * static_cast<float>(w.zero_stride == 0 ? *w.zero : w.zero[r * w.zero_stride + g]) * x.sums[g];
    }
    out[i] = kept.values[i] * (vaddvq_f32(sums) - zeros);
  }
}

}  // namespace onnxcomp::dots

#endif
