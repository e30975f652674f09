// The 4-bit form of joint_x86.h. Included from there.

#pragma once

#if defined(ONNXCOMP_X86)

namespace onnxcomp::joint {

// Products of inputs and scales of a span; those of outliers apart.
struct Products {
  rows_int4::Coefficients all[2 * kMostInt4];
  std::size_t inputs[2 * kMostInt4];  // which it is
  std::size_t count;

  ONNXCOMP_TARGET(ONNXCOMP_VNNI)
  ONNXCOMP_INLINE __m512i word(std::size_t at, std::size_t i, std::size_t strip) const {
    return spread(all[at].words[i], strip);
  }
  ONNXCOMP_TARGET(ONNXCOMP_VNNI)
  ONNXCOMP_INLINE __m512i start(std::size_t at, std::size_t strip) const {
    return _mm512_sub_epi32(_mm512_setzero_si512(), spread(all[at].zeros, strip));
  }
  ONNXCOMP_TARGET(ONNXCOMP_VNNI)
  ONNXCOMP_INLINE __m512 step(std::size_t at, std::size_t strip) const {
    return _mm512_castsi512_ps(spread(all[at].steps, strip));
  }
  // Of the four groups of a strip each to one lane.
  ONNXCOMP_TARGET(ONNXCOMP_VNNI)
  ONNXCOMP_INLINE static __m512i spread(const void* groups, std::size_t strip) {
    const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m128i* p = static_cast<const __m128i*>(groups) + strip;
    return _mm512_permutexvar_epi32(lanes, _mm512_castsi128_si512(_mm_load_si128(p)));
  }
};

template <typename Scale>
class StripsInt4 {
 public:
  static constexpr std::size_t kGroup = rows_int4::kGroup, kGroups = 4, kColumns = kGroups * kGroup, kParts = 2;
  static constexpr std::size_t kMost = kMostInt4;

  StripsInt4(const rows_int4::Weight<Scale>& w, std::size_t k, std::size_t groups) : w_(w), k_(k), groups_(groups) {}

  std::size_t columns() const { return groups_ * kGroup; }
  std::size_t stride() const { return w_.stride; }
  RowFetcher fetcher() const { return {w_.data, w_.stride, groups_ * (kGroup / 2)}; }
  const Products& inputs() const { return products_; }

  // Fetches the scales of a span ahead.
  void fetch(const Span& span) const {
    for (std::size_t row = span.begin; row < std::min(span.begin + kSpan, k_); ++row) {
      const char* p = reinterpret_cast<const char*>(w_.scale + row * w_.groups);
      for (std::size_t i = 0; i < groups_ * sizeof(Scale); i += 64) ONNXCOMP_PREFETCH(p + i);
      if (w_.zero_stride != 0) ONNXCOMP_PREFETCH(w_.zero + row * w_.zero_stride);
    }
  }

  ONNXCOMP_TARGET(ONNXCOMP_VNNI)
  ONNXCOMP_INLINE void begin(const Inputs& in, const Span& span) {
    products_.count = 0;
    for (std::size_t b = 0; b < in.count; ++b) {
      __m512 x[kSpan / 16], sum = _mm512_setzero_ps();
      int count = 0;
      for (std::size_t p = 0; p < kSpan / 16; ++p) {
        x[p] = load_part(in, b, span.begin + 16 * p);
        sum = _mm512_add_ps(sum, _mm512_abs_ps(x[p]));
        count += __builtin_popcount(_mm512_cmp_ps_mask(x[p], _mm512_setzero_ps(), _CMP_NEQ_UQ));
      }
      if (count == 0) continue;
      const __m512 limit = _mm512_set1_ps(kFar * _mm512_reduce_add_ps(sum) / static_cast<float>(count));
      float near[kSpan], far[kSpan];
      std::size_t at = 0;
      bool any = false;
      for (std::size_t p = 0; p < kSpan / 16; ++p) {
        const __mmask16 kept = static_cast<__mmask16>(span.kept >> 16 * p);
        const __mmask16 beyond = _mm512_cmp_ps_mask(_mm512_abs_ps(x[p]), limit, _CMP_GT_OQ);
        const __mmask16 within = static_cast<__mmask16>(~beyond);
        any |= beyond != 0;
        _mm512_storeu_ps(near + at, _mm512_maskz_compress_ps(kept, _mm512_maskz_mov_ps(within, x[p])));
        _mm512_storeu_ps(far + at, _mm512_maskz_compress_ps(kept, _mm512_maskz_mov_ps(beyond, x[p])));
        at += static_cast<std::size_t>(__builtin_popcount(kept));
      }
      add(near, span, b);
      if (any) add(far, span, b);
    }
  }

  template <bool kFull>
  ONNXCOMP_TARGET(ONNXCOMP_VNNI)
  ONNXCOMP_INLINE void lay(const Span& span, const std::size_t* offsets, std::size_t strip, RowFetcher* next,
                           Laid* out) const {
    RowFetcher ahead = *next;  // in registers
    const __m512i fifteen = _mm512_set1_epi8(15);
    const std::uint8_t* w = w_.data + strip * (kColumns / 2);
    const __mmask64 there = kFull ? 0 : ~0ull >> (64 - groups_ % kGroups * (kGroup / 2));
    for (std::size_t i = 0; i < 4 * span.words(); i += 4) {
      __m512i row[4], mixed[4];
      for (std::size_t u = 0; u < 4; ++u) {
        const std::uint8_t* p = w + offsets[i + u];
        row[u] = kFull ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(there, p);
      }
      ahead.fetch();
      interleave(row[0], row[1], row[2], row[3], mixed);
      for (std::size_t t = 0; t < 4; ++t) {
        const std::size_t to = 64 * (i + t);
        _mm512_store_si512(out[0].bytes + to, _mm512_and_si512(mixed[t], fifteen));
        _mm512_store_si512(out[1].bytes + to, _mm512_and_si512(_mm512_srli_epi16(mixed[t], 4), fifteen));
      }
    }
    *next = ahead;
  }

  // Sums of a strip, those of low bits in its first half, to y.
  ONNXCOMP_TARGET(ONNXCOMP_VNNI)
  ONNXCOMP_INLINE void finish(std::size_t strip, const float* sums, float* y) const {
    // Of words 2 j and 2 j + 1: one from the vector of low bits, one from that of the high ones.
    const __m512i even = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(8));
    __m512 low[4], high[4];
    for (int t = 0; t < 4; ++t) {
      low[t] = _mm512_loadu_ps(sums + 16 * t);
      high[t] = _mm512_loadu_ps(sums + 64 + 16 * t);
    }
    in_order(low);
    in_order(high);
    for (std::size_t t = 0; t < kGroups && strip * kGroups + t < groups_; ++t) {
      _mm512_storeu_ps(y + t * kGroup, _mm512_permutex2var_ps(low[t], even, high[t]));
      _mm512_storeu_ps(y + t * kGroup + 16, _mm512_permutex2var_ps(low[t], odd, high[t]));
    }
  }

 private:
  ONNXCOMP_TARGET(ONNXCOMP_VNNI)
  ONNXCOMP_INLINE void add(const float* x, const Span& span, std::size_t input) {
    const std::size_t at = products_.count++;
    coefficients(w_, {x, span.rows, span.count}, nullptr, 0, groups_, &products_.all[at]);
    products_.inputs[at] = input;
  }

  const rows_int4::Weight<Scale>& w_;
  std::size_t k_, groups_;
  Products products_;
};

}  // namespace onnxcomp::joint

#endif
