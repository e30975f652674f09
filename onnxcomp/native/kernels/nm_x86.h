// The kernels of nm.h for x86. Included from there.

#pragma once

#if defined(ONNXCOMP_X86)

namespace onnxcomp::nm {

// Defines a kernel out of `rows_of<Kept, Rows>(w, in, first, block, y, y_step)`, which does one block for so many rows of
// inputs: as many at a time as there are, since weights are read once for them, up to `most`, 4 or 8.
#define ONNXCOMP_DEFINE(target, name, rows_of, X, most)                                                              \
  template <std::size_t Kept, typename Value>                                                                       \
  ONNXCOMP_TARGET(target)                                                                                           \
  inline void name##_blocks(const Weight<Value>& w, const Inputs<X>& in, float* y, std::size_t y_step,              \
                            std::size_t begin, std::size_t end) {                                                   \
    for (std::size_t b = begin; b < end; ++b) {                                                                     \
      std::size_t row = 0;                                                                                          \
      for (; most == 8 && row + 8 <= in.count; row += 8) rows_of<Kept, most>(w, in, row, b, y, y_step);             \
      for (; row + 4 <= in.count; row += 4) rows_of<Kept, 4>(w, in, row, b, y, y_step);                             \
      for (; row + 2 <= in.count; row += 2) rows_of<Kept, 2>(w, in, row, b, y, y_step);                             \
      if (row < in.count) rows_of<Kept, 1>(w, in, row, b, y, y_step);                                               \
    }                                                                                                               \
  }                                                                                                                 \
  template <typename Value>                                                                                         \
  ONNXCOMP_TARGET(target)                                                                                           \
  inline void name(const Weight<Value>& w, const Inputs<X>& in, float* y, std::size_t y_step, std::size_t begin,    \
                   std::size_t end) {                                                                               \
    w.kept == 1 ? name##_blocks<1>(w, in, y, y_step, begin, end) : name##_blocks<2>(w, in, y, y_step, begin, end);   \
  }

// Fetches what the same loop reads some turns later: at the border of a page the hardware's prefetcher stops.
template <typename Value>
ONNXCOMP_INLINE void fetch_ahead(const Value* values, const std::uint8_t* places) {
  constexpr std::size_t kLine = 64, kBytes = kQuad * kColumns * sizeof(Value), kAhead = 4096;  // bytes of values
  for (std::size_t at = 0; at < kBytes; at += kLine) {
    ONNXCOMP_PREFETCH(reinterpret_cast<const char*>(values) + kAhead + at);
  }
  ONNXCOMP_PREFETCH(places + kAhead / kBytes * kColumns);
}

// ---- AVX-512: 16 columns a vector -----------------------------------------------------------------------------------

ONNXCOMP_TARGET(ONNXCOMP_AVX512) ONNXCOMP_INLINE __m512 load_values(const float* p) { return _mm512_loadu_ps(p); }
ONNXCOMP_TARGET(ONNXCOMP_AVX512) ONNXCOMP_INLINE __m512 load_values(const std::uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

ONNXCOMP_TARGET(ONNXCOMP_AVX512)
ONNXCOMP_INLINE void put(const __m512 sum, float* y, std::size_t columns) {
  _mm512_mask_storeu_ps(y, static_cast<__mmask16>(columns >= 16 ? 0xffff : (1u << columns) - 1), sum);
}

template <std::size_t Kept, std::size_t Rows, typename Value>
ONNXCOMP_TARGET(ONNXCOMP_AVX512)
ONNXCOMP_INLINE void float_rows(const Weight<Value>& w, const Inputs<float>& in, std::size_t first, std::size_t block,
                                float* y, std::size_t y_step) {
  constexpr std::size_t kSums = Rows == 1 ? kQuad : Rows == 2 ? 2 : 1;  // so that no addition waits for the one before
  const Value* values = w.block_values(block);
  const std::uint8_t* places = w.block_places(block);
  const float* x = in.x + first * in.length;
  __m512 sums[Rows][kSums];
  for (std::size_t r = 0; r < Rows; ++r) {
    for (std::size_t s = 0; s < kSums; ++s) sums[r][s] = _mm512_setzero_ps();
  }
  for (std::size_t q = 0; q < w.quads; ++q) {
    fetch_ahead(values, places);
    const __m512i bits = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(places)));
#pragma GCC unroll 4
    for (std::size_t s = 0; s < kQuad; ++s) {
      const __m512i place = _mm512_srli_epi32(bits, static_cast<unsigned>(2 * s));  // only the lowest two bits count
      const __m512 value = load_values(values + s * kColumns);
#pragma GCC unroll 8
      for (std::size_t r = 0; r < Rows; ++r) {
        const __m512 group = _mm512_broadcast_f32x4(_mm_loadu_ps(x + r * in.length + s / Kept * 4));
        sums[r][s % kSums] = _mm512_fmadd_ps(_mm512_permutevar_ps(group, place), value, sums[r][s % kSums]);
      }
    }
    x += quad_inputs(Kept);
    values += kQuad * kColumns;
    places += kColumns;
  }
  const std::size_t begin = block * kColumns, columns = w.columns - begin;
  const __mmask16 some = static_cast<__mmask16>(columns >= 16 ? 0xffff : (1u << columns) - 1);
  const __m512 bias = _mm512_maskz_loadu_ps(some, w.bias + begin);
  for (std::size_t r = 0; r < Rows; ++r) {
    __m512 sum = bias;
    for (std::size_t s = 0; s < kSums; ++s) sum = _mm512_add_ps(sum, sums[r][s]);
    put(sum, y + (first + r) * y_step + begin, columns);
  }
}

ONNXCOMP_DEFINE(ONNXCOMP_AVX512, float_avx512, float_rows, float, 8)

// ---- VNNI -----------------------------------------------------------------------------------------------------------

// What a byte shuffle needs to select the inputs of four slots: the two bits of each, and where its group begins.
template <std::size_t Kept>
ONNXCOMP_TARGET(ONNXCOMP_VNNI)
ONNXCOMP_INLINE __m512i selection(const std::uint8_t* places) {
  constexpr int kOr3And = 0xa8;  // (a | b) & c
  const __m512i bits = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(places)));
  const __m512i pairs = _mm512_ternarylogic_epi32(bits, _mm512_slli_epi32(bits, 12), _mm512_set1_epi32(0x000f000f),
                                                  kOr3And);
  const __m512i each = _mm512_ternarylogic_epi32(pairs, _mm512_slli_epi32(pairs, 6), _mm512_set1_epi32(0x03030303),
                                                 kOr3And);
  return _mm512_or_si512(each, _mm512_set1_epi32(Kept == 1 ? 0x0c080400 : 0x04040000));
}

template <std::size_t Kept>
ONNXCOMP_TARGET(ONNXCOMP_VNNI)
ONNXCOMP_INLINE __m512i load_groups(const std::uint8_t* x) {
  if constexpr (Kept == 1) return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  std::int64_t two;
  std::memcpy(&two, x, sizeof(two));
  return _mm512_set1_epi64(two);
}

template <std::size_t Kept, std::size_t Rows>
ONNXCOMP_TARGET(ONNXCOMP_VNNI)
ONNXCOMP_INLINE void int8_rows(const Weight<std::int8_t>& w, const Inputs<std::uint8_t>& in, std::size_t first,
                               std::size_t block, float* y, std::size_t y_step) {
  constexpr std::size_t kSpanQuads = kSpan / quad_inputs(Kept);
  const std::int8_t* values = w.block_values(block);
  const std::uint8_t* places = w.block_places(block);
  const std::uint8_t* x = in.x + first * in.length;
  const float* steps = in.steps + first * in.spans;
  __m512 sums[Rows];
  for (std::size_t r = 0; r < Rows; ++r) sums[r] = _mm512_setzero_ps();
  for (std::size_t q = 0; q < w.quads; ++steps) {
    __m512i products[Rows], surplus = _mm512_setzero_si512();  // of the 128 that each input has too much
    for (std::size_t r = 0; r < Rows; ++r) products[r] = _mm512_setzero_si512();
    for (const std::size_t stop = std::min(q + kSpanQuads, w.quads); q < stop; ++q) {
      fetch_ahead(values, places);
      const __m512i select = selection<Kept>(places), value = _mm512_loadu_si512(values);
      surplus = _mm512_dpbusd_epi32(surplus, _mm512_set1_epi8(static_cast<char>(0x80)), value);
#pragma GCC unroll 8
      for (std::size_t r = 0; r < Rows; ++r) {
        const __m512i chosen = _mm512_shuffle_epi8(load_groups<Kept>(x + r * in.length), select);
        products[r] = _mm512_dpbusd_epi32(products[r], chosen, value);
      }
      x += quad_inputs(Kept);
      values += kQuad * kColumns;
      places += kColumns;
    }
    for (std::size_t r = 0; r < Rows; ++r) {
      const __m512 product = _mm512_cvtepi32_ps(_mm512_sub_epi32(products[r], surplus));
      sums[r] = _mm512_fmadd_ps(product, _mm512_set1_ps(steps[r * in.spans]), sums[r]);
    }
  }
  const std::size_t begin = block * kColumns, columns = w.columns - begin;
  const __mmask16 some = static_cast<__mmask16>(columns >= 16 ? 0xffff : (1u << columns) - 1);
  const __m512 bias = _mm512_maskz_loadu_ps(some, w.bias + begin);
  const __m512 scale = _mm512_maskz_loadu_ps(some, w.scale + begin);
  for (std::size_t r = 0; r < Rows; ++r) {
    put(_mm512_fmadd_ps(sums[r], scale, bias), y + (first + r) * y_step + begin, columns);
  }
}

ONNXCOMP_DEFINE(ONNXCOMP_VNNI, int8_vnni, int8_rows, std::uint8_t, 8)

// ---- AVX2: half a block a vector ------------------------------------------------------------------------------------

ONNXCOMP_TARGET(ONNXCOMP_AVX2) ONNXCOMP_INLINE __m256 load_half(const float* p) { return _mm256_loadu_ps(p); }
ONNXCOMP_TARGET(ONNXCOMP_AVX2) ONNXCOMP_INLINE __m256 load_half(const std::uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

ONNXCOMP_TARGET(ONNXCOMP_AVX2)
ONNXCOMP_INLINE __m256i load_bits(const std::uint8_t* places) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(places)));
}

// Adds bias and, of integers, scale; the columns of a block that the weight has not are left out.
template <typename Value>
ONNXCOMP_TARGET(ONNXCOMP_AVX2)
ONNXCOMP_INLINE void put_block(const Weight<Value>& w, const __m256* sums, std::size_t block, float* y) {
  alignas(32) float all[kColumns];
  for (std::size_t h = 0; h < 2; ++h) _mm256_store_ps(all + 8 * h, sums[h]);
  const std::size_t begin = block * kColumns, columns = std::min(kColumns, w.columns - begin);
  for (std::size_t j = 0; j < columns; ++j) {
    const float scale = w.scale == nullptr ? 1.0f : w.scale[begin + j];
    y[begin + j] = all[j] * scale + w.bias[begin + j];
  }
}

template <std::size_t Kept, std::size_t Rows, typename Value>
ONNXCOMP_TARGET(ONNXCOMP_AVX2)
ONNXCOMP_INLINE void half_float_rows(const Weight<Value>& w, const Inputs<float>& in, std::size_t first,
                                     std::size_t block, float* y, std::size_t y_step) {
  const Value* values = w.block_values(block);
  const std::uint8_t* places = w.block_places(block);
  const float* x = in.x + first * in.length;
  __m256 sums[Rows][2];
  for (std::size_t r = 0; r < Rows; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_ps();
  for (std::size_t q = 0; q < w.quads; ++q) {
    fetch_ahead(values, places);
    const __m256i bits[2] = {load_bits(places), load_bits(places + 8)};
#pragma GCC unroll 4
    for (std::size_t s = 0; s < kQuad; ++s) {
#pragma GCC unroll 4
      for (std::size_t r = 0; r < Rows; ++r) {
        const __m256 group = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x + r * in.length + s / Kept * 4));
        for (std::size_t h = 0; h < 2; ++h) {
          const __m256i place = _mm256_srli_epi32(bits[h], static_cast<int>(2 * s));
          const __m256 value = load_half(values + s * kColumns + 8 * h);
          sums[r][h] = _mm256_fmadd_ps(_mm256_permutevar_ps(group, place), value, sums[r][h]);
        }
      }
    }
    x += quad_inputs(Kept);
    values += kQuad * kColumns;
    places += kColumns;
  }
  for (std::size_t r = 0; r < Rows; ++r) put_block(w, sums[r], block, y + (first + r) * y_step);
}

template <std::size_t Kept>
ONNXCOMP_TARGET(ONNXCOMP_AVX2)
ONNXCOMP_INLINE __m256i half_selection(const std::uint8_t* places) {
  const __m256i bits = load_bits(places);
  const __m256i pairs = _mm256_and_si256(_mm256_or_si256(bits, _mm256_slli_epi32(bits, 12)),
                                         _mm256_set1_epi32(0x000f000f));
  const __m256i each = _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi32(pairs, 6)),
                                        _mm256_set1_epi32(0x03030303));
  return _mm256_or_si256(each, _mm256_set1_epi32(Kept == 1 ? 0x0c080400 : 0x04040000));
}

template <std::size_t Kept, std::size_t Rows>
ONNXCOMP_TARGET(ONNXCOMP_AVX2)
ONNXCOMP_INLINE void half_int8_rows(const Weight<std::int8_t>& w, const Inputs<std::uint8_t>& in, std::size_t first,
                                    std::size_t block, float* y, std::size_t y_step) {
  constexpr std::size_t kSpanQuads = kSpan / quad_inputs(Kept);
  const std::int8_t* values = w.block_values(block);
  const std::uint8_t* places = w.block_places(block);
  const std::uint8_t* x = in.x + first * in.length;
  const float* steps = in.steps + first * in.spans;
  const __m256i ones = _mm256_set1_epi16(1);
  __m256 sums[Rows][2];
  for (std::size_t r = 0; r < Rows; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_ps();
  for (std::size_t q = 0; q < w.quads; ++steps) {
    __m256i products[Rows][2];
    for (std::size_t r = 0; r < Rows; ++r) products[r][0] = products[r][1] = _mm256_setzero_si256();
    for (const std::size_t stop = std::min(q + kSpanQuads, w.quads); q < stop; ++q) {
      fetch_ahead(values, places);
      for (std::size_t h = 0; h < 2; ++h) {
        const __m256i select = half_selection<Kept>(places + 8 * h);
        const __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + 32 * h));
        const __m256i magnitude = _mm256_abs_epi8(value);  // -128 becomes 128 without a sign
#pragma GCC unroll 4
        for (std::size_t r = 0; r < Rows; ++r) {
          __m256i groups;
          if constexpr (Kept == 1) {
            groups = _mm256_broadcastsi128_si256(
                _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + r * in.length)));
          } else {
            std::int64_t two;
            std::memcpy(&two, x + r * in.length, sizeof(two));
            groups = _mm256_set1_epi64x(two);
          }
          // The sign goes to the input; two products of 128 and 127 do not overflow 16 bits.
          const __m256i chosen = _mm256_sign_epi8(_mm256_shuffle_epi8(groups, select), value);
          const __m256i pairs = _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, chosen), ones);
          products[r][h] = _mm256_add_epi32(products[r][h], pairs);
        }
      }
      x += quad_inputs(Kept);
      values += kQuad * kColumns;
      places += kColumns;
    }
    for (std::size_t r = 0; r < Rows; ++r) {
      const __m256 step = _mm256_set1_ps(steps[r * in.spans]);
      for (std::size_t h = 0; h < 2; ++h) {
        sums[r][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[r][h]), step, sums[r][h]);
      }
    }
  }
  for (std::size_t r = 0; r < Rows; ++r) put_block(w, sums[r], block, y + (first + r) * y_step);
}

ONNXCOMP_DEFINE(ONNXCOMP_AVX2, float_avx2, half_float_rows, float, 4)
ONNXCOMP_DEFINE(ONNXCOMP_AVX2, int8_avx2, half_int8_rows, std::uint8_t, 4)

#undef ONNXCOMP_DEFINE

}  // namespace onnxcomp::nm

#endif
