// The rounded form of rows_int4.h for aarch64 with dot products.

#pragma once

#include "rows_int4_common.h"

#if defined(ONNXCOMP_ARM)

namespace onnxcomp::rows_int4 {

// `kept` holds the rows of the chunk, at most kChunk. One value at a time: the compiler makes vectors of it.
template <typename Scale>
ONNXCOMP_INLINE void coefficients(const Weight<Scale>& w, const Kept& kept, std::size_t groups, Coefficients* out) {
  float inverse[kMaxGroups];
  std::memset(out, 0, sizeof(*out));
  for (std::size_t i = 0; i < kept.count; ++i) {
    const Scale* scale = w.scale + kept.rows[i] * w.groups;
    for (std::size_t g = 0; g < groups; ++g) {
      out->steps[g] = std::max(out->steps[g], std::fabs(to_float(scale[g]) * kept.values[i]));
    }
  }
  for (std::size_t g = 0; g < groups; ++g) {
    inverse[g] = inverse_step(out->steps[g]);
    out->steps[g] /= 127.0f;
  }
  for (std::size_t i = 0; i < kept.count; ++i) {
    const std::size_t row = kept.rows[i];
    const Scale* scale = w.scale + row * w.groups;
    std::int32_t* ONNXCOMP_RESTRICT words = out->words[i / 4];
    std::int32_t q[kMaxGroups];
    for (std::size_t g = 0; g < groups; ++g) {
      q[g] = nearest(to_float(scale[g]) * kept.values[i] * inverse[g]);
      words[g] |= static_cast<std::int32_t>(static_cast<std::uint32_t>(q[g] & 0xff) << (8 * (i % 4)));
    }
    if (w.zero_stride == 0) {
      for (std::size_t g = 0; g < groups; ++g) out->zeros[g] += q[g] * *w.zero;
    } else {
      for (std::size_t g = 0; g < groups; ++g) out->zeros[g] += q[g] * w.zero[row * w.zero_stride + g];
    }
  }
}

// `kept` is in order of exponent, and finite.
template <typename Scale>
ONNXCOMP_TARGET(ONNXCOMP_DOTPROD)
inline void rounded_dotprod(const Weight<Scale>& w, const Kept& kept, float* y, std::size_t groups) {
  Coefficients c;
  std::memset(y, 0, groups * kGroup * sizeof(float));
  const uint8x16_t low = vdupq_n_u8(15);
  for (std::size_t begin = 0, end; begin < kept.count; begin = end) {
    end = chunk_end(kept, begin);
    const std::size_t count = end - begin;
    const std::uint32_t* rows = kept.rows + begin;
    coefficients(w, {kept.values + begin, rows, count}, groups, &c);
    for (std::size_t g = 0; g < groups; ++g) {
      const int32x4_t start = vdupq_n_s32(-c.zeros[g]);
      int32x4_t even[4] = {start, start, start, start}, odd[4] = {start, start, start, start};
      for (std::size_t i = 0; i < count; i += 4) {
        int8x16_t row[4], mixed[4];
        for (std::size_t u = 0; u < 4; ++u) {
          const std::uint8_t* p = w.data + rows[std::min(i + u, count - 1)] * w.stride + g * (kGroup / 2);
          row[u] = vreinterpretq_s8_u8(vld1q_u8(p));
        }
        if (g % 4 == 0) {
          for (std::size_t u = i; u < i + 4; ++u) {
            const std::size_t later = std::min(end + u, kept.count - 1);
            ONNXCOMP_PREFETCH(w.data + kept.rows[later] * w.stride + g * (kGroup / 2));
          }
        }
        interleave(row[0], row[1], row[2], row[3], mixed);
        const int8x16_t factors = vreinterpretq_s8_s32(vdupq_n_s32(c.words[i / 4][g]));
        for (int t = 0; t < 4; ++t) {
          const uint8x16_t pairs = vreinterpretq_u8_s8(mixed[t]);
          even[t] = vdotq_s32(even[t], vreinterpretq_s8_u8(vandq_u8(pairs, low)), factors);
          odd[t] = vdotq_s32(odd[t], vreinterpretq_s8_u8(vshrq_n_u8(pairs, 4)), factors);
        }
      }
      for (int t = 0; t < 4; ++t) {
        float* p = y + g * kGroup + 8 * t;
        float32x4x2_t sums = vld2q_f32(p);
        sums.val[0] = vfmaq_n_f32(sums.val[0], vcvtq_f32_s32(even[t]), c.steps[g]);
        sums.val[1] = vfmaq_n_f32(sums.val[1], vcvtq_f32_s32(odd[t]), c.steps[g]);
        vst2q_f32(p, sums);
      }
    }
  }
}

}  // namespace onnxcomp::rows_int4

#endif
