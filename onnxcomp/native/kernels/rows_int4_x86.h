// The rounded form of rows_int4.h for x86.

#pragma once

#include "rows_int4_common.h"

#if defined(ONNXCOMP_X86)

namespace onnxcomp::rows_int4 {

// Up to eight scales as floats, zeros behind them.
ONNXCOMP_TARGET(ONNXCOMP_AVX2)
ONNXCOMP_INLINE __m256 load_eight(const float* p, std::size_t count) {
  if (count >= 8) return _mm256_loadu_ps(p);
  float some[8] = {};
  std::memcpy(some, p, count * sizeof(*p));
  return _mm256_loadu_ps(some);
}
ONNXCOMP_TARGET(ONNXCOMP_AVX2)
ONNXCOMP_INLINE __m256 load_eight(const std::uint16_t* p, std::size_t count) {
  if (count >= 8) return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  std::uint16_t some[8] = {};
  std::memcpy(some, p, count * sizeof(*p));
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(some)));
}

// `kept` holds the rows of the chunk, at most kChunk.
template <typename Scale>
ONNXCOMP_TARGET(ONNXCOMP_AVX2)
ONNXCOMP_INLINE void coefficients(const Weight<Scale>& w, const Kept& kept, std::size_t groups, Coefficients* out) {
  // Bytes of four vectors packed in turn, per 128-bit lane, to words of one byte of each.
  const __m128i fours = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m256i order = _mm256_broadcastsi128_si256(fours);
  const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  for (std::size_t g = 0; g < groups; g += 8) {
    const std::size_t rest = std::min<std::size_t>(groups - g, 8);
    __m256 largest = _mm256_setzero_ps();
    for (std::size_t i = 0; i < kept.count; ++i) {
      const __m256 scale = load_eight(w.scale + kept.rows[i] * w.groups + g, rest);
      largest = _mm256_max_ps(largest, _mm256_and_ps(no_sign, _mm256_mul_ps(scale, _mm256_set1_ps(kept.values[i]))));
    }
    const __m256 sound = _mm256_cmp_ps(largest, _mm256_set1_ps(kTiny), _CMP_GT_OQ);
    const __m256 inverse = _mm256_and_ps(sound, _mm256_div_ps(_mm256_set1_ps(127.0f), largest));
    __m256i zeros = _mm256_setzero_si256();
    for (std::size_t i = 0; i < kept.count; i += 4) {
      __m256i c[4];
      for (std::size_t u = 0; u < 4; ++u) {
        const std::size_t at = std::min(i + u, kept.count - 1);
        const float x = i + u < kept.count ? kept.values[at] : 0.0f;
        const __m256 scale = load_eight(w.scale + kept.rows[at] * w.groups + g, rest);
        c[u] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_mul_ps(scale, _mm256_set1_ps(x)), inverse));
        __m256i zero = _mm256_set1_epi32(*w.zero);
        if (w.zero_stride != 0) {
          std::uint8_t some[16] = {};
          std::memcpy(some, w.zero + kept.rows[at] * w.zero_stride + g, rest);
          zero = _mm256_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(some)));
        }
        zeros = _mm256_add_epi32(zeros, _mm256_madd_epi16(c[u], zero));
      }
      const __m256i ab = _mm256_packs_epi32(c[0], c[1]), cd = _mm256_packs_epi32(c[2], c[3]);
      const __m256i words = _mm256_shuffle_epi8(_mm256_packs_epi16(ab, cd), order);
      _mm256_store_si256(reinterpret_cast<__m256i*>(out->words[i / 4] + g), words);
    }
    _mm256_store_ps(out->steps + g, _mm256_mul_ps(largest, _mm256_set1_ps(1.0f / 127.0f)));
    _mm256_store_si256(reinterpret_cast<__m256i*>(out->zeros + g), zeros);
  }
}

// Without VNNI: products of 4-bit integers fit in 16 bits, so that two instructions do for one. `kept` is in order of
// exponent, and finite.
template <typename Scale>
ONNXCOMP_TARGET(ONNXCOMP_AVX2)
inline void rounded_avx2(const Weight<Scale>& w, const Kept& kept, float* y, std::size_t groups) {
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  const __m256i spread = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);  // lane l gets word l
  const auto of_groups = [&](const void* p) ONNXCOMP_TARGET(ONNXCOMP_AVX2) {
    const __m128i two = _mm_loadl_epi64(static_cast<const __m128i*>(p));
    return _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(two), spread);
  };
  const auto product = [&](__m256i weights, __m256i factors) ONNXCOMP_TARGET(ONNXCOMP_AVX2) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(weights, factors), ones);
  };
  Coefficients c;
  std::memset(y, 0, groups * kGroup * sizeof(float));
  RowFetcher fetcher(w.data, w.stride, groups * (kGroup / 2));
  std::size_t begin = 0, end = kept.count == 0 ? 0 : chunk_end(kept, 0);
  fetcher.aim(kept.rows, end, 1);
  fetcher.fetch();
  while (begin < end) {
    const std::size_t count = end - begin, next_end = end < kept.count ? chunk_end(kept, end) : end;
    const std::uint32_t* rows = kept.rows + begin;
    coefficients(w, {kept.values + begin, rows, count}, groups, &c);
    fetcher.aim(kept.rows + end, next_end - end, (groups + 3) / 4 * ((count + 3) / 4));
    for (std::size_t g = 0; g < groups; g += 2) {
      const bool pair = g + 1 < groups;
      const std::uint8_t* data = w.data + g * (kGroup / 2);
      const __m256i start = _mm256_sub_epi32(_mm256_setzero_si256(), of_groups(c.zeros + g));
      __m256i even[4] = {start, start, start, start}, odd[4] = {start, start, start, start};
      for (std::size_t i = 0; i < count; i += 4) {
        __m256i row[4];
        for (std::size_t u = 0; u < 4; ++u) {
          const __m128i* p = reinterpret_cast<const __m128i*>(data + rows[std::min(i + u, count - 1)] * w.stride);
          row[u] = pair ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                        : _mm256_zextsi128_si256(_mm_loadu_si128(p));
        }
        if (g % 4 == 0) fetcher.fetch();
        const __m256i ab_low = _mm256_unpacklo_epi8(row[0], row[1]), ab_high = _mm256_unpackhi_epi8(row[0], row[1]);
        const __m256i cd_low = _mm256_unpacklo_epi8(row[2], row[3]), cd_high = _mm256_unpackhi_epi8(row[2], row[3]);
        const __m256i mixed[4] = {_mm256_unpacklo_epi16(ab_low, cd_low), _mm256_unpackhi_epi16(ab_low, cd_low),
                                  _mm256_unpacklo_epi16(ab_high, cd_high), _mm256_unpackhi_epi16(ab_high, cd_high)};
        const __m256i factors = of_groups(c.words[i / 4] + g);
        for (int t = 0; t < 4; ++t) {
          const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(mixed[t], 4), low);
          even[t] = _mm256_add_epi32(even[t], product(_mm256_and_si256(mixed[t], low), factors));
          odd[t] = _mm256_add_epi32(odd[t], product(upper, factors));
        }
      }
      const __m256 step = _mm256_castsi256_ps(of_groups(c.steps + g));
      for (int t = 0; t < 4; ++t) {
        const __m256 e = _mm256_mul_ps(_mm256_cvtepi32_ps(even[t]), step);
        const __m256 o = _mm256_mul_ps(_mm256_cvtepi32_ps(odd[t]), step);
        const __m256 first = _mm256_unpacklo_ps(e, o), second = _mm256_unpackhi_ps(e, o);
        float* p = y + g * kGroup + 8 * t;
        _mm_storeu_ps(p, _mm_add_ps(_mm_loadu_ps(p), _mm256_castps256_ps128(first)));
        _mm_storeu_ps(p + 4, _mm_add_ps(_mm_loadu_ps(p + 4), _mm256_castps256_ps128(second)));
        if (!pair) continue;
        p += kGroup;
        _mm_storeu_ps(p, _mm_add_ps(_mm_loadu_ps(p), _mm256_extractf128_ps(first, 1)));
        _mm_storeu_ps(p + 4, _mm_add_ps(_mm_loadu_ps(p + 4), _mm256_extractf128_ps(second, 1)));
      }
    }
    begin = end;
    end = next_end;
  }
}

ONNXCOMP_TARGET(ONNXCOMP_VNNI)
ONNXCOMP_INLINE __m512 load_scales(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
ONNXCOMP_TARGET(ONNXCOMP_VNNI)
ONNXCOMP_INLINE __m512 load_scales(const std::uint16_t* p, __mmask16 mask) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p));
}

// `kept` holds the rows of the chunk, at most kChunk; `next` are those whose scales to fetch ahead.
template <typename Scale>
ONNXCOMP_TARGET(ONNXCOMP_VNNI)
ONNXCOMP_INLINE void coefficients(const Weight<Scale>& w, const Kept& kept, const std::uint32_t* next,
                                  std::size_t next_count, std::size_t groups, Coefficients* out) {
  // Bytes of four vectors packed in turn, per 128-bit lane, to words of one byte of each.
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const std::size_t padded = (kept.count + 3) / 4 * 4;
  alignas(64) float products[kChunk * 16];
  for (std::size_t g = 0; g < groups; g += 16) {
    const __mmask16 mask = static_cast<__mmask16>(groups - g >= 16 ? 0xffff : (1u << (groups - g)) - 1);
    // Products of inputs and scales, and the largest of them; several at a time, since each waits for the one before.
    __m512 most[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (std::size_t i = 0; i < padded; i += 4) {
      for (std::size_t u = 0; u < 4; ++u) {
        const std::size_t at = std::min(i + u, kept.count - 1);
        const float x = i + u < kept.count ? kept.values[at] : 0.0f;
        const __m512 scale = load_scales(w.scale + kept.rows[at] * w.groups + g, mask);
        const __m512 product = _mm512_mul_ps(scale, _mm512_set1_ps(x));
        _mm512_store_ps(products + 16 * (i + u), product);
        most[u] = _mm512_max_ps(most[u], _mm512_abs_ps(product));
        if (i + u < next_count) ONNXCOMP_PREFETCH(w.scale + next[i + u] * w.groups + g);
      }
    }
    const __m512 largest = _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3]));
    const __mmask16 sound = _mm512_cmp_ps_mask(largest, _mm512_set1_ps(kTiny), _CMP_GT_OQ);
    const __m512 inverse = _mm512_maskz_div_ps(sound, _mm512_set1_ps(127.0f), largest);
    __m512i zeros = _mm512_setzero_si512();
    for (std::size_t i = 0; i < padded; i += 4) {
      __m512i c[4];
      for (std::size_t u = 0; u < 4; ++u) {
        c[u] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(products + 16 * (i + u)), inverse));
        if (w.zero_stride != 0) {
          const std::size_t at = std::min(i + u, kept.count - 1);
          const __m128i zero = _mm_maskz_loadu_epi8(mask, w.zero + kept.rows[at] * w.zero_stride + g);
          zeros = _mm512_add_epi32(zeros, _mm512_madd_epi16(c[u], _mm512_cvtepu8_epi32(zero)));
        }
      }
      const __m512i ab = _mm512_packs_epi32(c[0], c[1]), cd = _mm512_packs_epi32(c[2], c[3]);
      const __m512i words = _mm512_shuffle_epi8(_mm512_packs_epi16(ab, cd), order);
      _mm512_store_si512(out->words[i / 4] + g, words);
      if (w.zero_stride == 0) zeros = _mm512_dpbusd_epi32(zeros, _mm512_set1_epi8(static_cast<char>(*w.zero)), words);
    }
    _mm512_store_ps(out->steps + g, _mm512_mul_ps(largest, _mm512_set1_ps(1.0f / 127.0f)));
    _mm512_store_si512(out->zeros + g, zeros);
  }
}

// Four groups of one chunk, added to `sums`: low[t] and high[t] in the order of `interleave`.
template <bool kFull>
ONNXCOMP_TARGET(ONNXCOMP_VNNI)
ONNXCOMP_INLINE void add_chunk(const std::uint8_t* w, std::size_t stride, const std::uint32_t* rows, std::size_t count,
                               RowFetcher* next, const Coefficients& c, std::size_t g, __mmask64 mask, float* sums) {
  const __m512i spread = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);  // lane l gets word l
  const auto of_groups = [&](const void* p) ONNXCOMP_TARGET(ONNXCOMP_VNNI) {
    return _mm512_permutexvar_epi32(spread,
                                    _mm512_castsi128_si512(_mm_loadu_si128(static_cast<const __m128i*>(p))));
  };
  const __m512i zeros = of_groups(c.zeros + g);
  const __m512i upper = _mm512_set1_epi8(static_cast<char>(0xf0));
  const __m512i start = _mm512_sub_epi32(_mm512_setzero_si512(), zeros);
  // `both` adds up whole bytes, low + 16 high, and `high` 16 high: masking out the low bits is saved.
  __m512i both[4] = {start, start, start, start}, high[4] = {};
  for (std::size_t i = 0; i < count; i += 4) {
    __m512i row[4], mixed[4];
    for (std::size_t u = 0; u < 4; ++u) {
      const std::uint8_t* p = w + rows[std::min(i + u, count - 1)] * stride;
      row[u] = kFull ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(mask, p);
    }
    next->fetch();
    interleave(row[0], row[1], row[2], row[3], mixed);
    const __m512i factors = of_groups(c.words[i / 4] + g);
    for (int t = 0; t < 4; ++t) {
      both[t] = _mm512_dpbusd_epi32(both[t], mixed[t], factors);
      high[t] = _mm512_dpbusd_epi32(high[t], _mm512_and_si512(mixed[t], upper), factors);
    }
  }
  const __m512 step = _mm512_castsi512_ps(of_groups(c.steps + g));
  for (int t = 0; t < 4; ++t) {
    const __m512i low = _mm512_sub_epi32(both[t], high[t]);
    const __m512i top = _mm512_sub_epi32(_mm512_srai_epi32(high[t], 4), zeros);
    float* p = sums + 32 * t;
    _mm512_store_ps(p, _mm512_fmadd_ps(_mm512_cvtepi32_ps(low), step, _mm512_load_ps(p)));
    _mm512_store_ps(p + 16, _mm512_fmadd_ps(_mm512_cvtepi32_ps(top), step, _mm512_load_ps(p + 16)));
  }
}

// `kept` is in order of exponent, and finite.
template <typename Scale>
ONNXCOMP_TARGET(ONNXCOMP_VNNI)
inline void rounded_vnni(const Weight<Scale>& w, const Kept& kept, float* y, std::size_t groups) {
  constexpr std::size_t kStep = 4;  // groups, 128 columns, in 64 bytes of a row
  alignas(64) float sums[kMaxColumns];
  Coefficients c;
  std::memset(sums, 0, (groups + kStep - 1) / kStep * kStep * kGroup * sizeof(float));
  std::size_t begin = 0, end = kept.count == 0 ? 0 : chunk_end(kept, 0);
  // What comes first is fetched while the coefficients are computed.
  RowFetcher fetcher(w.data, w.stride, groups * (kGroup / 2));
  fetcher.aim(kept.rows, end, 1);
  fetcher.fetch();
  const std::size_t steps = (groups + kStep - 1) / kStep;
  while (begin < end) {
    const std::size_t count = end - begin, next_end = end < kept.count ? chunk_end(kept, end) : end;
    const std::uint32_t *rows = kept.rows + begin, *next = kept.rows + end;
    const std::size_t next_count = next_end - end;
    coefficients(w, {kept.values + begin, rows, count}, next, next_count, groups, &c);
    fetcher.aim(next, next_count, steps * ((count + 3) / 4));
    for (std::size_t g = 0; g < groups; g += kStep) {
      const std::uint8_t* data = w.data + g * (kGroup / 2);
      float* part = sums + g * kGroup;
      if (g + kStep <= groups) {
        add_chunk<true>(data, w.stride, rows, count, &fetcher, c, g, 0, part);
      } else {
        const __mmask64 mask = ~0ull >> (64 - (groups - g) * (kGroup / 2));
        add_chunk<false>(data, w.stride, rows, count, &fetcher, c, g, mask, part);
      }
    }
    begin = end;
    end = next_end;
  }
  // Of words 2 j and 2 j + 1: one from the vector of low bits, one from that of the high ones.
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  for (std::size_t g = 0; g < groups; g += kStep) {
    __m512 low[4], high[4];
    for (int t = 0; t < 4; ++t) {
      low[t] = _mm512_load_ps(sums + g * kGroup + 32 * t);
      high[t] = _mm512_load_ps(sums + g * kGroup + 32 * t + 16);
    }
    in_order(low);
    in_order(high);
    for (std::size_t t = 0; t < kStep && g + t < groups; ++t) {
      _mm512_storeu_ps(y + (g + t) * kGroup, _mm512_permutex2var_ps(low[t], first, high[t]));
      _mm512_storeu_ps(y + (g + t) * kGroup + 16, _mm512_permutex2var_ps(low[t], second, high[t]));
    }
  }
}

}  // namespace onnxcomp::rows_int4

#endif
