// Which inputs of a row take part: those beyond a threshold, or the k largest.
//
// NaN: an element is dropped only if the comparison says so, and a NaN never compares; among the largest it comes first.
// What is dropped is not read from the weight, so unlike 0 * W it hides a NaN or infinity there.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "isa.h"

namespace onnxcomp {

// The surviving inputs: `values[i]` is that of row `rows[i]` of the weight.
struct Kept {
  const float* values;
  const std::uint32_t* rows;
  std::size_t count;
};

// Lists the elements of x beyond the threshold, in order: |x| > t, or x > t if `one_sided`.
//
// `t` holds one threshold an element (t_step 1) or a single one (t_step 0). `values` and `rows` have room for k.
// Returns how many survive. Without a branch, since which elements survive is as good as random.
inline std::size_t keep_above(const float* x, std::size_t k, const float* t, std::size_t t_step, bool one_sided,
                              float* values, std::uint32_t* rows) {
  std::size_t kept = 0;
  for (std::size_t i = 0; i < k; ++i) {
    values[kept] = x[i];
    rows[kept] = static_cast<std::uint32_t>(i);
    kept += !((one_sided ? x[i] : std::fabs(x[i])) <= t[i * t_step]);
  }
  return kept;
}

#if defined(ONNXCOMP_X86)

ONNXCOMP_TARGET(ONNXCOMP_AVX512)
inline std::size_t keep_above_avx512(const float* x, std::size_t k, const float* t, std::size_t t_step, bool one_sided,
                                     float* values, std::uint32_t* rows) {
  std::size_t kept = 0;
  const __m512i sixteen = _mm512_set1_epi32(16);
  const __m512 same = _mm512_set1_ps(t_step == 0 ? *t : 0.0f);
  const __m512i no_sign = _mm512_set1_epi32(one_sided ? -1 : 0x7fffffff);
  __m512i row = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (std::size_t i = 0; i < k; i += 16) {
    const __mmask16 there = static_cast<__mmask16>(k - i >= 16 ? 0xffff : (1u << (k - i)) - 1);
    const __m512 value = _mm512_maskz_loadu_ps(there, x + i);
    const __m512 limit = t_step == 0 ? same : _mm512_maskz_loadu_ps(there, t + i);
    const __m512 compared = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(value), no_sign));
    const __mmask16 above = _mm512_mask_cmp_ps_mask(there, compared, limit, _CMP_NLE_UQ);
    const unsigned count = static_cast<unsigned>(__builtin_popcount(above));
    const __mmask16 first = static_cast<__mmask16>((1u << count) - 1);
    // Compressed in the register: compressing stores are slow on some processors.
    _mm512_mask_storeu_ps(values + kept, first, _mm512_maskz_compress_ps(above, value));
    _mm512_mask_storeu_epi32(rows + kept, first, _mm512_maskz_compress_epi32(above, row));
    row = _mm512_add_epi32(row, sixteen);
    kept += count;
  }
  return kept;
}

#endif

using KeepAbove = std::size_t (*)(const float* x, std::size_t k, const float* t, std::size_t t_step, bool one_sided,
                                  float* values, std::uint32_t* rows);

inline KeepAbove choose_keep_above(Isa isa) {
#if defined(ONNXCOMP_X86)
  if (isa == Isa::kAvx512 || isa == Isa::kVnni) return keep_above_avx512;
#endif
  (void)isa;
  return keep_above;
}

// The bits of |x|, which order as the magnitudes do, with NaN above infinity.
inline std::uint32_t magnitude_bits(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits & 0x7fffffffu;
}

// Lists the `count` elements of x of largest magnitude, in order; of equal ones those of lowest index.
//
// `values` and `rows` have room for k. Returns how many there are: count, or k if that is less.
inline std::size_t keep_largest(const float* x, std::size_t k, std::size_t count, float* values, std::uint32_t* rows) {
  constexpr unsigned kShift = 19;  // exponent and four bits of the mantissa: 4096 bins
  std::uint32_t bins[1u << (31 - kShift)] = {};
  if (count > k) count = k;
  if (count == 0) return 0;
  for (std::size_t i = 0; i < k; ++i) ++bins[magnitude_bits(x[i]) >> kShift];
  std::uint32_t bin = 1u << (31 - kShift);
  std::size_t above = 0;
  while (above + bins[bin - 1] < count) above += bins[--bin];
  --bin;
  // The last one kept is in `bin`: order those in it, largest first.
  std::size_t inside = 0;
  for (std::size_t i = 0; i < k; ++i) {
    rows[inside] = static_cast<std::uint32_t>(i);
    inside += magnitude_bits(x[i]) >> kShift == bin;
  }
  const auto before = [x](std::uint32_t a, std::uint32_t b) {
    const std::uint32_t ma = magnitude_bits(x[a]), mb = magnitude_bits(x[b]);
    return ma != mb ? ma > mb : a < b;
  };
  std::nth_element(rows, rows + (count - above - 1), rows + inside, before);
  const std::uint32_t last = rows[count - above - 1];
  const std::uint32_t least = magnitude_bits(x[last]);
  std::size_t kept = 0;
  for (std::size_t i = 0; i < k; ++i) {
    const std::uint32_t magnitude = magnitude_bits(x[i]);
    values[kept] = x[i];
    rows[kept] = static_cast<std::uint32_t>(i);
    kept += magnitude > least || (magnitude == least && i <= last);
  }
  return kept;
}

}  // namespace onnxcomp
