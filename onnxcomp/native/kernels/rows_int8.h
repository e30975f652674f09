// Sum of some rows of an int8 matrix with one scale a column:
// y[j] = scale[j] * sum of values[i] * w[rows[i] * stride + j], for j < columns.
//
// Two forms. `exact` multiplies floats. `rounded` (VNNI, dot product) rounds the inputs to 8 bits (see quantized.h) and
// multiplies integers, four rows at a time: a vector of one byte from each of four rows, times the same four inputs in
// every lane. The rows are interleaved on the way, in registers, since which four meet is not known before.

#pragma once

#include "interleave.h"
#include "quantized.h"

namespace onnxcomp::rows_int8 {

struct Weight {
  const std::int8_t* data;  // at the first of the columns
  std::size_t stride;
  const float* scale;  // at the first of the columns
};

inline constexpr std::size_t kMaxColumns = 2048;  // of one call

// ---- exact ----------------------------------------------------------------------------------------------------------

ONNXCOMP_INLINE void exact_body(const Weight& w, const Kept& kept, float* ONNXCOMP_RESTRICT y, std::size_t columns) {
  constexpr std::size_t kLine = 64;
  const float* values = kept.values;
  std::memset(y, 0, columns * sizeof(float));
  std::size_t i = 0;
  for (; i + 4 <= kept.count; i += 4) {
    const float a = values[i], b = values[i + 1], c = values[i + 2], d = values[i + 3];
    const std::int8_t *r[4], *next[4];
    for (std::size_t u = 0; u < 4; ++u) {
      r[u] = w.data + kept.rows[i + u] * w.stride;
      next[u] = w.data + kept.rows[std::min(i + 4 + u, kept.count - 1)] * w.stride;
    }
    const std::int8_t *ONNXCOMP_RESTRICT wa = r[0], *ONNXCOMP_RESTRICT wb = r[1];
    const std::int8_t *ONNXCOMP_RESTRICT wc = r[2], *ONNXCOMP_RESTRICT wd = r[3];
    for (std::size_t begin = 0; begin < columns; begin += kLine) {
      for (std::size_t u = 0; u < 4; ++u) ONNXCOMP_PREFETCH(next[u] + begin);
      const std::size_t end = std::min(begin + kLine, columns);
      for (std::size_t j = begin; j < end; ++j) {
        y[j] += a * static_cast<float>(wa[j]) + b * static_cast<float>(wb[j]) +
                (c * static_cast<float>(wc[j]) + d * static_cast<float>(wd[j]));
      }
    }
  }
  for (; i < kept.count; ++i) {
    const float a = values[i];
    const std::int8_t* ONNXCOMP_RESTRICT wa = w.data + kept.rows[i] * w.stride;
    for (std::size_t j = 0; j < columns; ++j) y[j] += a * static_cast<float>(wa[j]);
  }
  for (std::size_t j = 0; j < columns; ++j) y[j] *= w.scale[j];
}

using Exact = void (*)(const Weight& w, const Kept& kept, float* y, std::size_t columns);

#define ONNXCOMP_DEFINE(name)                                                          \
  inline void name(const Weight& w, const Kept& kept, float* y, std::size_t columns) { \
    exact_body(w, kept, y, columns);                                                   \
  }

ONNXCOMP_DEFINE(exact_portable)
#if defined(ONNXCOMP_X86)
ONNXCOMP_TARGET(ONNXCOMP_AVX2) ONNXCOMP_DEFINE(exact_avx2)
ONNXCOMP_TARGET(ONNXCOMP_AVX512) ONNXCOMP_DEFINE(exact_avx512)
#endif
#undef ONNXCOMP_DEFINE

inline Exact choose_exact(Isa isa) {
#if defined(ONNXCOMP_X86)
  if (isa == Isa::kAvx512 || isa == Isa::kVnni) return exact_avx512;
  if (isa == Isa::kAvx2) return exact_avx2;
#endif
  (void)isa;
  return exact_portable;
}

// ---- rounded --------------------------------------------------------------------------------------------------------

// Inputs of one chunk: words [begin, end) of `Rounded`.
struct Chunk {
  std::uint32_t begin, end;
  float step;
  std::int32_t sum;  // of the integers
};

// Inputs in 8 bits, four in a word; the last word of a chunk is filled up with zeros. The same for all columns.
struct Rounded {
  const std::int32_t* words;
  const std::uint32_t* rows;  // four a word
  const Chunk* chunks;
  std::size_t count;  // chunks
};

// Bytes of memory that `round` needs for `count` inputs.
inline std::size_t rounded_bytes(std::size_t count) {
  const std::size_t chunks = most_chunks(count), words = count / 4 + chunks;
  return words * (4 + 16) + chunks * sizeof(Chunk);
}

// `kept` is in order of exponent; `memory` is aligned to 4 bytes and has room for `most` inputs.
inline Rounded round(const Kept& kept, std::size_t most, void* memory) {
  Chunk* chunks = static_cast<Chunk*>(memory);
  std::int32_t* words = reinterpret_cast<std::int32_t*>(chunks + most_chunks(most));
  std::uint32_t* rows = reinterpret_cast<std::uint32_t*>(words + most / 4 + most_chunks(most));
  std::size_t count = 0;
  std::uint32_t at = 0;
  for (std::size_t begin = 0, end; begin < kept.count; begin = end) {
    end = chunk_end(kept, begin);
    std::uint32_t bits = 0;
    for (std::size_t i = begin; i < end; ++i) bits = std::max(bits, magnitude_bits(kept.values[i]));
    float largest;
    std::memcpy(&largest, &bits, sizeof(largest));
    const float inverse = inverse_step(largest);
    Chunk& chunk = chunks[count++];
    chunk = {at, at, largest / 127.0f, 0};
    const std::size_t inputs = end - begin;
    std::int32_t rounded[kChunk] = {};
    for (std::size_t i = 0; i < inputs; ++i) rounded[i] = nearest(kept.values[begin + i] * inverse);
    std::int8_t bytes[kChunk];
    for (std::size_t i = 0; i < kChunk; ++i) {
      chunk.sum += rounded[i];
      bytes[i] = static_cast<std::int8_t>(rounded[i]);
    }
    const std::size_t padded = (inputs + 3) / 4 * 4;
    std::memcpy(words + at, bytes, padded);
    std::memcpy(rows + 4 * at, kept.rows + begin, inputs * sizeof(*rows));
    for (std::size_t i = inputs; i < padded; ++i) rows[4 * at + i] = kept.rows[end - 1];
    at += static_cast<std::uint32_t>(padded / 4);
    chunk.end = at;
  }
  return {words, rows, chunks, count};
}

using Summed = void (*)(const Weight& w, const Rounded& x, float* y, std::size_t columns);

#if defined(ONNXCOMP_X86)

// 64 columns of one chunk, added to `sums` in the order of `interleave`.
template <bool kFull>
ONNXCOMP_TARGET(ONNXCOMP_VNNI)
ONNXCOMP_INLINE void add_chunk(const std::int8_t* w, std::size_t stride, const Rounded& x, const Chunk& chunk,
                               __mmask64 mask, RowFetcher* next, __m512 sums[4]) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));  // s8 to u8: adds 128 to each weight
  const __m512i start = _mm512_set1_epi32(-128 * chunk.sum);
  __m512i total[4] = {start, start, start, start};
  for (std::size_t i = chunk.begin; i < chunk.end; ++i) {
    __m512i row[4], mixed[4];
    for (int u = 0; u < 4; ++u) {
      const std::int8_t* p = w + x.rows[4 * i + u] * stride;
      row[u] = _mm512_xor_si512(kFull ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(mask, p), flip);
    }
    next->fetch();
    interleave(row[0], row[1], row[2], row[3], mixed);
    const __m512i inputs = _mm512_set1_epi32(x.words[i]);
    for (int t = 0; t < 4; ++t) total[t] = _mm512_dpbusd_epi32(total[t], mixed[t], inputs);
  }
  const __m512 step = _mm512_set1_ps(chunk.step);
  for (int t = 0; t < 4; ++t) sums[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total[t]), step, sums[t]);
}

ONNXCOMP_TARGET(ONNXCOMP_VNNI)
inline void rounded_vnni(const Weight& w, const Rounded& x, float* y, std::size_t columns) {
  constexpr std::size_t kStep = 64;
  alignas(64) float scratch[kMaxColumns];
  std::memset(scratch, 0, (columns + kStep - 1) / kStep * kStep * sizeof(float));
  RowFetcher next(w.data, w.stride, columns);
  if (x.count > 0) {
    next.aim(x.rows, 4 * std::size_t{x.chunks[0].end}, 1);
    next.fetch();
  }
  const std::size_t steps = (columns + kStep - 1) / kStep;
  for (std::size_t c = 0; c < x.count; ++c) {
    if (c + 1 < x.count) {
      const Chunk &now = x.chunks[c], &then = x.chunks[c + 1];
      next.aim(x.rows + 4 * std::size_t{then.begin}, 4 * std::size_t{then.end - then.begin}, steps * (now.end - now.begin));
    } else {
      next.aim(x.rows, 0, 1);
    }
    for (std::size_t j = 0; j < columns; j += kStep) {
      __m512 sums[4];
      for (int t = 0; t < 4; ++t) sums[t] = _mm512_load_ps(scratch + j + 16 * t);
      if (j + kStep <= columns) {
        add_chunk<true>(w.data + j, w.stride, x, x.chunks[c], 0, &next, sums);
      } else {
        add_chunk<false>(w.data + j, w.stride, x, x.chunks[c], ~0ull >> (kStep - (columns - j)), &next, sums);
      }
      for (int t = 0; t < 4; ++t) _mm512_store_ps(scratch + j + 16 * t, sums[t]);
    }
  }
  for (std::size_t j = 0; j < columns; j += kStep) {
    __m512 sums[4];
    for (int t = 0; t < 4; ++t) sums[t] = _mm512_load_ps(scratch + j + 16 * t);
    in_order(sums);
    for (std::size_t t = 0; t < 4 && j + 16 * t < columns; ++t) {
      const std::size_t rest = columns - j - 16 * t;
      const __mmask16 mask = static_cast<__mmask16>(rest >= 16 ? 0xffff : (1u << rest) - 1);
      const __m512 scale = _mm512_maskz_loadu_ps(mask, w.scale + j + 16 * t);
      _mm512_mask_storeu_ps(y + j + 16 * t, mask, _mm512_mul_ps(sums[t], scale));
    }
  }
}

#elif defined(ONNXCOMP_ARM)

ONNXCOMP_TARGET(ONNXCOMP_DOTPROD)
inline void rounded_dotprod(const Weight& w, const Rounded& x, float* y, std::size_t columns) {
  constexpr std::size_t kStep = 16, kAhead = kChunk / 4;
  std::memset(y, 0, columns * sizeof(float));
  for (std::size_t c = 0; c < x.count; ++c) {
    const Chunk& chunk = x.chunks[c];
    const std::size_t last = x.chunks[x.count - 1].end - 1;
    std::size_t j = 0;
    for (; j + kStep <= columns; j += kStep) {
      int32x4_t total[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
      for (std::size_t i = chunk.begin; i < chunk.end; ++i) {
        int8x16_t row[4], mixed[4];
        for (int u = 0; u < 4; ++u) row[u] = vld1q_s8(w.data + x.rows[4 * i + u] * w.stride + j);
        const std::size_t later = std::min(i + kAhead, last);
        if (j % 64 == 0) {
          for (int u = 0; u < 4; ++u) ONNXCOMP_PREFETCH(w.data + x.rows[4 * later + u] * w.stride + j);
        }
        interleave(row[0], row[1], row[2], row[3], mixed);
        const int8x16_t inputs = vreinterpretq_s8_s32(vdupq_n_s32(x.words[i]));
        for (int t = 0; t < 4; ++t) total[t] = vdotq_s32(total[t], mixed[t], inputs);
      }
      for (int t = 0; t < 4; ++t) {
        float* p = y + j + 4 * t;
        vst1q_f32(p, vfmaq_n_f32(vld1q_f32(p), vcvtq_f32_s32(total[t]), chunk.step));
      }
    }
    for (; j < columns; ++j) {
      std::int32_t total = 0;
      for (std::size_t i = 4 * std::size_t{chunk.begin}; i < 4 * std::size_t{chunk.end}; ++i) {
        total += reinterpret_cast<const std::int8_t*>(x.words)[i] * w.data[x.rows[i] * w.stride + j];
      }
      y[j] += static_cast<float>(total) * chunk.step;
    }
  }
  for (std::size_t j = 0; j < columns; ++j) y[j] *= w.scale[j];
}

#endif

// Null where there are no instructions for it.
inline Summed choose_rounded(Isa isa) {
#if defined(ONNXCOMP_X86)
  if (isa == Isa::kVnni) return rounded_vnni;
#elif defined(ONNXCOMP_ARM)
  if (isa == Isa::kDotprod) return rounded_dotprod;
#endif
  (void)isa;
  return nullptr;
}

}  // namespace onnxcomp::rows_int8
