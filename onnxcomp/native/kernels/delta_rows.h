// Which elements of a row have changed since they were last sent, for products that are accumulated from changes.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "isa.h"
#include "select.h"

namespace onnxcomp::delta_rows {

// What `select` lists: `count` changes, of which none is NaN or infinite if `finite`.
struct Changes {
  std::size_t count;
  bool finite;
};

inline constexpr std::uint32_t kInfinity = 0x7f800000u;  // magnitude_bits from here on are not finite

// Lists the changes d = x - last with !(|d| <= t), in order, and makes last_out x where there is one, else last.
//
// `t` holds one threshold an element (t_step 1) or a single one (t_step 0). `values` and `rows` have room for k.
// `last_out` may be `last`. Where d is finite so are x and last, so d alone tells whether all is.
inline Changes select(const float* x, const float* last, std::size_t k, const float* t, std::size_t t_step,
                      float* last_out, float* values, std::uint32_t* rows) {
  std::size_t count = 0;
  std::uint32_t largest = 0;
  for (std::size_t i = 0; i < k; ++i) {
    const float d = x[i] - last[i];
    const bool sent = !(std::fabs(d) <= t[i * t_step]);
    const std::uint32_t bits = magnitude_bits(d);
    largest = bits > largest ? bits : largest;
    last_out[i] = sent ? x[i] : last[i];
    values[count] = d;
    rows[count] = static_cast<std::uint32_t>(i);
    count += sent;
  }
  return {count, largest < kInfinity};
}

#if defined(ONNXCOMP_X86)

ONNXCOMP_TARGET(ONNXCOMP_AVX512)
inline Changes select_avx512(const float* x, const float* last, std::size_t k, const float* t, std::size_t t_step,
                             float* last_out, float* values, std::uint32_t* rows) {
  constexpr int kNotFinite = 0x01 | 0x08 | 0x10 | 0x80;  // quiet NaN, both infinities, signalling NaN
  std::size_t count = 0;
  __mmask16 odd = 0;
  const __m512i sixteen = _mm512_set1_epi32(16);
  const __m512 same = _mm512_set1_ps(t_step == 0 ? *t : 0.0f);
  __m512i row = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (std::size_t i = 0; i < k; i += 16) {
    const __mmask16 there = static_cast<__mmask16>(k - i >= 16 ? 0xffff : (1u << (k - i)) - 1);
    const __m512 now = _mm512_maskz_loadu_ps(there, x + i), before = _mm512_maskz_loadu_ps(there, last + i);
    const __m512 limit = t_step == 0 ? same : _mm512_maskz_loadu_ps(there, t + i);
    const __m512 d = _mm512_sub_ps(now, before);
    const __mmask16 sent = _mm512_mask_cmp_ps_mask(there, _mm512_abs_ps(d), limit, _CMP_NLE_UQ);
    odd = static_cast<__mmask16>(odd | _mm512_fpclass_ps_mask(d, kNotFinite));
    _mm512_mask_storeu_ps(last_out + i, there, _mm512_mask_blend_ps(sent, before, now));
    const unsigned found = static_cast<unsigned>(__builtin_popcount(sent));
    const __mmask16 first = static_cast<__mmask16>((1u << found) - 1);
    // Compressed in the register: compressing stores are slow on some processors.
    _mm512_mask_storeu_ps(values + count, first, _mm512_maskz_compress_ps(sent, d));
    _mm512_mask_storeu_epi32(rows + count, first, _mm512_maskz_compress_epi32(sent, row));
    row = _mm512_add_epi32(row, sixteen);
    count += found;
  }
  return {count, odd == 0};
}

#endif

using Select = Changes (*)(const float* x, const float* last, std::size_t k, const float* t, std::size_t t_step,
                           float* last_out, float* values, std::uint32_t* rows);

// Without a form for AVX2: a row of W takes longer to read than some thousands of elements to look at one by one.
inline Select choose_select(Isa isa) {
#if defined(ONNXCOMP_X86)
  if (isa == Isa::kAvx512 || isa == Isa::kVnni) return select_avx512;
#endif
  (void)isa;
  return select;
}

// y = the nearest multiple of the step, of two the even one; x itself where the step is not above 0.
//
// Called through a pointer and never inlined into `select`: the product would be fused with the subtraction there, and
// an element that has not changed would differ by the rounding that was left out.
ONNXCOMP_INLINE void quantize_body(const float* x, std::size_t k, const float* step, std::size_t step_step,
                                   float* ONNXCOMP_RESTRICT y) {
  if (step_step == 0) {
    const float s = *step;
    for (std::size_t i = 0; i < k; ++i) y[i] = std::rint(x[i] / s) * s;
    return;
  }
  for (std::size_t i = 0; i < k; ++i) y[i] = step[i] > 0.0f ? std::rint(x[i] / step[i]) * step[i] : x[i];
}

// A single step has to be above 0.
using Quantize = void (*)(const float* x, std::size_t k, const float* step, std::size_t step_step, float* y);

#define ONNXCOMP_DEFINE(name)                                                                                 \
  inline void name(const float* x, std::size_t k, const float* step, std::size_t step_step, float* y) {      \
    quantize_body(x, k, step, step_step, y);                                                                 \
  }

ONNXCOMP_DEFINE(quantize_portable)
#if defined(ONNXCOMP_X86)
ONNXCOMP_TARGET(ONNXCOMP_AVX2) ONNXCOMP_DEFINE(quantize_avx2)
ONNXCOMP_TARGET(ONNXCOMP_AVX512) ONNXCOMP_DEFINE(quantize_avx512)
#endif
#undef ONNXCOMP_DEFINE

inline Quantize choose_quantize(Isa isa) {
#if defined(ONNXCOMP_X86)
  if (isa == Isa::kAvx512 || isa == Isa::kVnni) return quantize_avx512;
  if (isa == Isa::kAvx2) return quantize_avx2;
#endif
  (void)isa;
  return quantize_portable;
}

// Whether no value is NaN or infinite.
inline bool all_finite(const float* x, std::size_t count) {
  std::uint32_t odd = 0;
  for (std::size_t i = 0; i < count; ++i) odd |= magnitude_bits(x[i]) >= kInfinity;
  return odd == 0;
}

}  // namespace onnxcomp::delta_rows
