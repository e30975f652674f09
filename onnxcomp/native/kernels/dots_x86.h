// The rounded form of dots.h for x86.

#pragma once

#include "dots_common.h"
#include "rows_int4_x86.h"

#if defined(ONNXCOMP_X86)

namespace onnxcomp::dots {

// 32 bytes, or 16 and zeros.
ONNXCOMP_TARGET(ONNXCOMP_AVX2)
ONNXCOMP_INLINE __m256i load_blocks(const void* p, bool pair) {
  return pair ? _mm256_loadu_si256(static_cast<const __m256i*>(p))
              : _mm256_zextsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}

// Without VNNI: products of 4-bit integers fit in 16 bits. Two blocks at a time, one a lane of 128 bits.
template <typename Scale>
ONNXCOMP_TARGET(ONNXCOMP_AVX2)
inline void rounded_avx2(const Int4<Scale>& w, const Input& x, std::size_t k, const Kept& kept, float* out) {
  const std::size_t groups = k / kBlock;
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  for (std::size_t i = 0; i < kept.count; ++i) {
    const std::size_t r = kept.rows[i], later = kept.rows[std::min(i + kAhead, kept.count - 1)];
    const std::uint8_t* row = w.data + r * (k / 2);
    const std::uint8_t* next = w.data + later * (k / 2);
    __m256 sums = _mm256_setzero_ps();
    float zeros = 0;
    for (std::size_t g = 0; g < groups; g += 2) {
      const bool pair = g + 1 < groups;
      const std::size_t at = g * (kBlock / 2);
      if (g % 4 == 0) ONNXCOMP_PREFETCH(next + at);
      if (g % 16 == 0) ONNXCOMP_PREFETCH(w.scale + later * groups + g);
      float factor[2] = {0, 0};
      for (std::size_t u = 0; u < 1 + std::size_t{pair}; ++u) {
        const float scale = to_float(w.scale[r * groups + g + u]);
        const std::uint8_t zero = w.zero_stride == 0 ? *w.zero : w.zero[r * w.zero_stride + g + u];
        factor[u] = scale * x.steps[g + u];
        zeros += scale * static_cast<float>(zero) * x.sums[g + u];
      }
      const __m256i pairs = load_blocks(row + at, pair), upper = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), low);
      const std::int8_t* even = x.data + g / 4 * kUnit + g % 4 * (kBlock / 2);
      const __m256i product = _mm256_madd_epi16(
          _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_and_si256(pairs, low), load_blocks(even, pair)),
                           _mm256_maddubs_epi16(upper, load_blocks(even + kUnit / 2, pair))),
          ones);
      const __m256 factors = _mm256_set_m128(_mm_set1_ps(factor[1]), _mm_set1_ps(factor[0]));
      sums = _mm256_fmadd_ps(_mm256_cvtepi32_ps(product), factors, sums);
    }
    float parts[8];
    _mm256_storeu_ps(parts, sums);
    float sum = -zeros;
    for (const float part : parts) sum += part;
    out[i] = kept.values[i] * sum;
  }
}

ONNXCOMP_TARGET(ONNXCOMP_VNNI)
inline void rounded_vnni(const Int8& w, const Input& x, std::size_t k, const Kept& kept, float* out) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));  // s8 to u8: adds 128 to each weight
  for (std::size_t i = 0; i < kept.count; ++i) {
    const std::int8_t* row = w.data + kept.rows[i] * k;
    const std::int8_t* next = w.data + kept.rows[std::min(i + kAhead, kept.count - 1)] * k;
    __m512 sums = _mm512_setzero_ps();
    for (std::size_t j = 0; j < k; j += 64) {
      const __mmask64 mask = k - j >= 64 ? ~0ull : ~0ull >> (64 - (k - j));
      ONNXCOMP_PREFETCH(next + j);
      const __m512i weights = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, row + j), flip);
      const __m512i product = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights, _mm512_load_si512(x.data + j));
      // Words 0 to 7 belong to one block, 8 to 15 to the next.
      const __m512 step = _mm512_mask_broadcastss_ps(_mm512_set1_ps(x.steps[j / kBlock]), 0xff00,
                                                     _mm_load_ss(x.steps + j / kBlock + 1));
      sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), step, sums);
    }
    const float sum = _mm512_reduce_add_ps(sums) - 128.0f * x.total;
    out[i] = kept.values[i] * (sum * w.scale[kept.rows[i]]);
  }
}

// Steps of 16 blocks: four units of 64 bytes.
template <typename Scale>
ONNXCOMP_TARGET(ONNXCOMP_VNNI)
inline void rounded_vnni(const Int4<Scale>& w, const Input& x, std::size_t k, const Kept& kept, float* out) {
  const std::size_t groups = k / kBlock;
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);  // lane l gets word l
  for (std::size_t i = 0; i < kept.count; ++i) {
    const std::size_t r = kept.rows[i];
    const std::uint8_t* row = w.data + r * (k / 2);
    const std::size_t later = kept.rows[std::min(i + kAhead, kept.count - 1)];
    const std::uint8_t* next = w.data + later * (k / 2);
    __m512 sums = _mm512_setzero_ps(), zeros = _mm512_setzero_ps();
    for (std::size_t g = 0; g < groups; g += 16) {
      const std::size_t rest = groups - g;
      const __mmask16 mask = static_cast<__mmask16>(rest >= 16 ? 0xffff : (1u << rest) - 1);
      const __m512 scale = rows_int4::load_scales(w.scale + r * groups + g, mask);
      ONNXCOMP_PREFETCH(w.scale + later * groups + g);
      const __m512 factors = _mm512_mul_ps(scale, _mm512_loadu_ps(x.steps + g));
      __m512 zero = _mm512_set1_ps(static_cast<float>(*w.zero));
      if (w.zero_stride != 0) {
        const __m128i bytes = _mm_maskz_loadu_epi8(mask, w.zero + r * w.zero_stride + g);
        zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
      }
      zeros = _mm512_fmadd_ps(_mm512_mul_ps(scale, zero), _mm512_loadu_ps(x.sums + g), zeros);
      for (std::size_t u = 0; u < 4 && g + 4 * u < groups; ++u) {
        const std::size_t at = (g + 4 * u) * (kBlock / 2), bytes = (groups - g - 4 * u) * (kBlock / 2);
        const __mmask64 part = bytes >= 64 ? ~0ull : ~0ull >> (64 - bytes);
        ONNXCOMP_PREFETCH(next + at);
        const __m512i pairs = _mm512_maskz_loadu_epi8(part, row + at);
        const __m512i upper = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), low);
        const std::int8_t* inputs = x.data + 2 * at;
        __m512i product = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_and_si512(pairs, low),
                                              _mm512_load_si512(inputs));
        product = _mm512_dpbusd_epi32(product, upper, _mm512_load_si512(inputs + 64));
        const __m512i index = _mm512_add_epi32(spread, _mm512_set1_epi32(static_cast<int>(4 * u)));
        sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), _mm512_permutexvar_ps(index, factors), sums);
      }
    }
    out[i] = kept.values[i] * _mm512_reduce_add_ps(_mm512_sub_ps(sums, zeros));
  }
}

}  // namespace onnxcomp::dots

#endif
