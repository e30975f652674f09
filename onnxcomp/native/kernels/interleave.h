// Four rows to vectors with one byte of each, for the rounded kernels.

#pragma once

#include "isa.h"

#if defined(ONNXCOMP_X86)

namespace onnxcomp {

// 64 bytes of four rows to words of one byte from each row: out[t], lane l (of 128 bits), word i holds byte
// 16 l + 4 t + i of the rows.
ONNXCOMP_TARGET(ONNXCOMP_VNNI)
ONNXCOMP_INLINE void interleave(__m512i a, __m512i b, __m512i c, __m512i d, __m512i out[4]) {
  const __m512i ab_low = _mm512_unpacklo_epi8(a, b), ab_high = _mm512_unpackhi_epi8(a, b);
  const __m512i cd_low = _mm512_unpacklo_epi8(c, d), cd_high = _mm512_unpackhi_epi8(c, d);
  out[0] = _mm512_unpacklo_epi16(ab_low, cd_low);
  out[1] = _mm512_unpackhi_epi16(ab_low, cd_low);
  out[2] = _mm512_unpacklo_epi16(ab_high, cd_high);
  out[3] = _mm512_unpackhi_epi16(ab_high, cd_high);
}

// Undoes the order of `interleave` on four vectors of words: v[t], lane l to v[l], lane t.
ONNXCOMP_TARGET(ONNXCOMP_VNNI)
ONNXCOMP_INLINE void in_order(__m512 v[4]) {
  const __m512 a = _mm512_shuffle_f32x4(v[0], v[1], 0x44), b = _mm512_shuffle_f32x4(v[0], v[1], 0xee);
  const __m512 c = _mm512_shuffle_f32x4(v[2], v[3], 0x44), d = _mm512_shuffle_f32x4(v[2], v[3], 0xee);
  v[0] = _mm512_shuffle_f32x4(a, c, 0x88);
  v[1] = _mm512_shuffle_f32x4(a, c, 0xdd);
  v[2] = _mm512_shuffle_f32x4(b, d, 0x88);
  v[3] = _mm512_shuffle_f32x4(b, d, 0xdd);
}

}  // namespace onnxcomp

#elif defined(ONNXCOMP_ARM)

namespace onnxcomp {

// 16 bytes of four rows to words of one byte from each row, in order.
ONNXCOMP_INLINE void interleave(int8x16_t a, int8x16_t b, int8x16_t c, int8x16_t d, int8x16_t out[4]) {
  const int16x8_t ab_low = vreinterpretq_s16_s8(vzip1q_s8(a, b)), ab_high = vreinterpretq_s16_s8(vzip2q_s8(a, b));
  const int16x8_t cd_low = vreinterpretq_s16_s8(vzip1q_s8(c, d)), cd_high = vreinterpretq_s16_s8(vzip2q_s8(c, d));
  out[0] = vreinterpretq_s8_s16(vzip1q_s16(ab_low, cd_low));
  out[1] = vreinterpretq_s8_s16(vzip2q_s16(ab_low, cd_low));
  out[2] = vreinterpretq_s8_s16(vzip1q_s16(ab_high, cd_high));
  out[3] = vreinterpretq_s8_s16(vzip2q_s16(ab_high, cd_high));
}

}  // namespace onnxcomp

#endif
