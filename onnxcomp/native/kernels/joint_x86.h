// The kernels of joint.h for x86. Included from there.

#pragma once

#if defined(ONNXCOMP_X86)

namespace onnxcomp::joint {

// An input this many times as large as the mean of its span is an outlier.
inline constexpr float kFar = 6.0f;

// Positions [begin, begin + kSpan) of the inputs, and those among them that any input keeps.
struct Span {
  std::size_t begin = 0, count = 0;
  std::uint64_t kept = 0;  // bit i: begin + i
  std::uint32_t rows[kSpan];  // the last one again, up to a multiple of four
  std::size_t words() const { return (count + 3) / 4; }
};

// The inputs of a span: a byte for each of its rows, the last word filled up with zeros. First one for each input, then
// what rounding left of those with an outlier.
struct Rounded {
  alignas(64) std::int32_t words[2 * kMostInt8][kSpan / 4];
  float steps[2 * kMostInt8];
  std::int32_t starts[2 * kMostInt8];  // what the 128 that is added to each weight comes to
  std::size_t inputs[2 * kMostInt8];   // which it is
  std::size_t count;

  ONNXCOMP_TARGET(ONNXCOMP_VNNI)
  ONNXCOMP_INLINE __m512i word(std::size_t at, std::size_t i, std::size_t) const {
    return _mm512_set1_epi32(words[at][i]);
  }
  ONNXCOMP_TARGET(ONNXCOMP_VNNI)
  ONNXCOMP_INLINE __m512i start(std::size_t at, std::size_t) const { return _mm512_set1_epi32(starts[at]); }
  ONNXCOMP_TARGET(ONNXCOMP_VNNI)
  ONNXCOMP_INLINE __m512 step(std::size_t at, std::size_t) const { return _mm512_set1_ps(steps[at]); }
};

// Bytes of W as `interleave` orders them, four vectors for four rows.
struct Laid {
  alignas(64) std::uint8_t bytes[kSpan * 64];
};

ONNXCOMP_TARGET(ONNXCOMP_VNNI)
ONNXCOMP_INLINE __m512 load_part(const Inputs& in, std::size_t row, std::size_t at) {
  const std::size_t rest = at < in.k ? in.k - at : 0;
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>(rest >= 16 ? 0xffff : (1u << rest) - 1), in.x + row * in.k + at);
}

// The first span from `begin` on of which something is kept; without rows if there is none.
ONNXCOMP_TARGET(ONNXCOMP_VNNI)
ONNXCOMP_INLINE void find(const Inputs& in, std::size_t begin, Span* out) {
  const __m512i order = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  out->kept = 0;
  out->count = 0;
  for (; begin < in.k && out->count == 0; begin += kSpan) {
    out->begin = begin;
    for (std::size_t i = 0; i < kSpan; i += 16) {
      __mmask16 kept = 0;
      for (std::size_t b = 0; b < in.count; ++b) {
        const __m512 x = load_part(in, b, begin + i);
        kept = static_cast<__mmask16>(kept | _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_UQ));
      }
      const unsigned count = static_cast<unsigned>(__builtin_popcount(kept));
      const __m512i rows = _mm512_add_epi32(order, _mm512_set1_epi32(static_cast<int>(begin + i)));
      _mm512_mask_storeu_epi32(out->rows + out->count, static_cast<__mmask16>((1u << count) - 1),
                               _mm512_maskz_compress_epi32(kept, rows));
      out->kept |= static_cast<std::uint64_t>(kept) << i;
      out->count += count;
    }
  }
  for (std::size_t i = out->count; i < 4 * out->words(); ++i) out->rows[i] = out->rows[i - 1];
}

ONNXCOMP_TARGET(ONNXCOMP_VNNI)
ONNXCOMP_INLINE void put(const __m512i values[kSpan / 16], float step, std::uint64_t kept, std::size_t input,
                         std::size_t at, Rounded* out) {
  __m512i sum = _mm512_setzero_si512();
  char* bytes = reinterpret_cast<char*>(out->words[at]);
  _mm512_store_si512(bytes, sum);
  for (std::size_t p = 0; p < kSpan / 16; ++p, kept >>= 16) {
    const __mmask16 mask = static_cast<__mmask16>(kept);
    const __m512i some = _mm512_maskz_compress_epi32(mask, values[p]);
    sum = _mm512_add_epi32(sum, some);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm512_cvtepi32_epi8(some));
    bytes += __builtin_popcount(mask);
  }
  out->steps[at] = step;
  out->starts[at] = -128 * _mm512_reduce_add_epi32(sum);
  out->inputs[at] = input;
}

ONNXCOMP_TARGET(ONNXCOMP_VNNI)
ONNXCOMP_INLINE void round(const Inputs& in, const Span& span, Rounded* out) {
  constexpr std::size_t kParts = kSpan / 16;
  constexpr float kLeast = 1e-30f;
  out->count = in.count;
  for (std::size_t b = 0; b < in.count; ++b) {
    __m512 x[kParts], largest = _mm512_setzero_ps(), sum = largest;
    int count = 0;
    for (std::size_t p = 0; p < kParts; ++p) {
      x[p] = load_part(in, b, span.begin + 16 * p);
      largest = _mm512_max_ps(largest, _mm512_abs_ps(x[p]));
      sum = _mm512_add_ps(sum, _mm512_abs_ps(x[p]));
      count += __builtin_popcount(_mm512_cmp_ps_mask(x[p], _mm512_setzero_ps(), _CMP_NEQ_UQ));
    }
    const float most = _mm512_reduce_max_ps(largest), step = most / 127.0f;
    const __m512 inverse = _mm512_set1_ps(inverse_step(most));
    __m512i rounded[kParts];
    for (std::size_t p = 0; p < kParts; ++p) rounded[p] = _mm512_cvtps_epi32(_mm512_mul_ps(x[p], inverse));
    put(rounded, step, span.kept, b, b, out);
    // Beside an outlier the others lose too much: what rounding left of them is half a step at most.
    if (most > kLeast && most * static_cast<float>(count) > kFar * _mm512_reduce_add_ps(sum)) {
      const __m512 finer = _mm512_set1_ps(254.0f / step);
      for (std::size_t p = 0; p < kParts; ++p) {
        const __m512 left = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(rounded[p]), _mm512_set1_ps(step), x[p]);
        rounded[p] = _mm512_cvtps_epi32(_mm512_mul_ps(left, finer));
      }
      put(rounded, step / 254.0f, span.kept, b, out->count++, out);
    }
  }
}

// Adds to 64 sums each of kInputs inputs, in the order of `interleave`.
template <std::size_t kInputs, typename X>
ONNXCOMP_TARGET(ONNXCOMP_VNNI)
ONNXCOMP_INLINE void multiply(const Laid& w, std::size_t words, const X& x, std::size_t first, std::size_t strip,
                              float* sums, std::size_t sums_step) {
  __m512i total[kInputs][4];
  for (std::size_t b = 0; b < kInputs; ++b) {
    for (int t = 0; t < 4; ++t) total[b][t] = x.start(first + b, strip);
  }
  for (std::size_t i = 0; i < words; ++i) {
    __m512i mixed[4];
    for (int t = 0; t < 4; ++t) mixed[t] = _mm512_load_si512(w.bytes + 256 * i + 64 * t);
    for (std::size_t b = 0; b < kInputs; ++b) {
      const __m512i word = x.word(first + b, i, strip);
      for (int t = 0; t < 4; ++t) total[b][t] = _mm512_dpbusd_epi32(total[b][t], mixed[t], word);
    }
  }
  for (std::size_t b = 0; b < kInputs; ++b) {
    const __m512 step = x.step(first + b, strip);
    float* p = sums + x.inputs[first + b] * sums_step;
    for (int t = 0; t < 4; ++t) {
      const __m512 sum = _mm512_loadu_ps(p + 16 * t);
      _mm512_storeu_ps(p + 16 * t, _mm512_fmadd_ps(_mm512_cvtepi32_ps(total[b][t]), step, sum));
    }
  }
}

template <typename X>
ONNXCOMP_TARGET(ONNXCOMP_VNNI)
inline void multiply_all(const Laid& w, std::size_t words, const X& x, std::size_t strip, float* sums,
                         std::size_t sums_step) {
  std::size_t b = 0;
  for (; b + 4 <= x.count; b += 4) multiply<4>(w, words, x, b, strip, sums, sums_step);
  switch (x.count - b) {
    case 3: return multiply<3>(w, words, x, b, strip, sums, sums_step);
    case 2: return multiply<2>(w, words, x, b, strip, sums, sums_step);
    case 1: return multiply<1>(w, words, x, b, strip, sums, sums_step);
    default: return;
  }
}

// What `run` needs of a format: strips of kColumns columns, whose bytes in a row are 64, in kParts of 64 columns.

class StripsInt8 {
 public:
  static constexpr std::size_t kColumns = 64, kParts = 1, kMost = kMostInt8;

  StripsInt8(const rows_int8::Weight& w, std::size_t columns) : w_(w), columns_(columns) {}

  std::size_t columns() const { return columns_; }
  std::size_t stride() const { return w_.stride; }
  RowFetcher fetcher() const { return {w_.data, w_.stride, columns_}; }
  void fetch(const Span&) const {}
  ONNXCOMP_TARGET(ONNXCOMP_VNNI)
  ONNXCOMP_INLINE void begin(const Inputs& in, const Span& span) { round(in, span, &rounded_); }
  const Rounded& inputs() const { return rounded_; }

  template <bool kFull>
  ONNXCOMP_TARGET(ONNXCOMP_VNNI)
  ONNXCOMP_INLINE void lay(const Span& span, const std::size_t* offsets, std::size_t strip, RowFetcher* next,
                           Laid* out) const {
    RowFetcher ahead = *next;  // in registers
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));  // s8 to u8: adds 128 to each weight
    const std::int8_t* w = w_.data + strip * kColumns;
    const __mmask64 mask = kFull ? 0 : ~0ull >> (kColumns - columns_ % kColumns);
    for (std::size_t i = 0; i < 4 * span.words(); i += 4) {
      __m512i row[4], mixed[4];
      for (std::size_t u = 0; u < 4; ++u) {
        const std::int8_t* p = w + offsets[i + u];
        row[u] = _mm512_xor_si512(kFull ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(mask, p), flip);
      }
      ahead.fetch();
      interleave(row[0], row[1], row[2], row[3], mixed);
      for (std::size_t t = 0; t < 4; ++t) _mm512_store_si512(out->bytes + 64 * (i + t), mixed[t]);
    }
    *next = ahead;
  }

  // Sums of a strip, in the order of `multiply`, to y.
  ONNXCOMP_TARGET(ONNXCOMP_VNNI)
  ONNXCOMP_INLINE void finish(std::size_t strip, const float* sums, float* y) const {
    __m512 v[4];
    for (std::size_t t = 0; t < 4; ++t) v[t] = _mm512_loadu_ps(sums + 16 * t);
    in_order(v);
    for (std::size_t t = 0, j = strip * kColumns; t < 4 && j < columns_; ++t, j += 16) {
      const std::size_t rest = columns_ - j;
      const __mmask16 mask = static_cast<__mmask16>(rest >= 16 ? 0xffff : (1u << rest) - 1);
      _mm512_mask_storeu_ps(y + 16 * t, mask, _mm512_mul_ps(v[t], _mm512_maskz_loadu_ps(mask, w_.scale + j)));
    }
  }

 private:
  const rows_int8::Weight& w_;
  std::size_t columns_;
  Rounded rounded_;
};

}  // namespace onnxcomp::joint

#include "joint_int4_x86.h"

namespace onnxcomp::joint {

// Spans of W one after another, for all inputs while they lie in the cache. The sums are kept in y, out of order, but for
// those of a strip that is not full.
template <typename Strips>
ONNXCOMP_TARGET(ONNXCOMP_VNNI)
ONNXCOMP_INLINE void run(Strips* format, const Inputs& in, float* y, std::size_t y_step) {
  constexpr std::size_t kColumns = Strips::kColumns;
  const std::size_t columns = format->columns(), full = columns / kColumns, strips = (columns + kColumns - 1) / kColumns;
  alignas(64) float tail[Strips::kMost * kColumns];
  Laid laid[Strips::kParts];
  Span spans[2];
  if (full < strips) std::memset(tail, 0, in.count * kColumns * sizeof(float));
  for (std::size_t b = 0; b < in.count; ++b) std::memset(y + b * y_step, 0, full * kColumns * sizeof(float));
  RowFetcher fetcher = format->fetcher();
  Span *now = spans, *next = spans + 1;
  find(in, 0, now);
  if (now->count > 0) format->fetch(*now);
  fetcher.aim(now->rows, now->count, 1);
  fetcher.fetch();
  while (now->count > 0) {
    const std::size_t words = now->words();
    std::size_t offsets[kSpan];
    for (std::size_t i = 0; i < 4 * words; ++i) offsets[i] = now->rows[i] * format->stride();
    find(in, now->begin + kSpan, next);
    if (next->count > 0) format->fetch(*next);
    format->begin(in, *now);
    fetcher.aim(next->rows, next->count, strips * words);
    for (std::size_t s = 0; s < strips; ++s) {
      const bool whole = s < full;
      if (whole) {
        format->template lay<true>(*now, offsets, s, &fetcher, laid);
      } else {
        format->template lay<false>(*now, offsets, s, &fetcher, laid);
      }
      float* sums = whole ? y + s * kColumns : tail;
      for (std::size_t p = 0; p < Strips::kParts; ++p) {
        multiply_all(laid[p], words, format->inputs(), s, sums + 64 * p, whole ? y_step : kColumns);
      }
    }
    std::swap(now, next);
  }
  for (std::size_t b = 0; b < in.count; ++b) {
    for (std::size_t s = 0; s < strips; ++s) {
      float* to = y + b * y_step + s * kColumns;
      format->finish(s, s < full ? to : tail + b * kColumns, to);
    }
  }
}

ONNXCOMP_TARGET(ONNXCOMP_VNNI)
inline void int8_vnni(const rows_int8::Weight& w, const Inputs& in, float* y, std::size_t y_step, std::size_t columns) {
  StripsInt8 format(w, columns);
  run(&format, in, y, y_step);
}

template <typename Scale>
ONNXCOMP_TARGET(ONNXCOMP_VNNI)
inline void int4_vnni(const rows_int4::Weight<Scale>& w, const Inputs& in, float* y, std::size_t y_step,
                      std::size_t groups) {
  StripsInt4<Scale> format(w, in.k, groups);
  run(&format, in, y, y_step);
}

}  // namespace onnxcomp::joint

#endif
