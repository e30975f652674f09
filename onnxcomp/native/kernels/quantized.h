// Rounding of the surviving inputs to 8 bits, for kernels that multiply integers.
//
// Inputs are taken in chunks that share a step, and are first put in order of their binary exponent, largest first. A chunk
// ends early where the exponent falls by three. So an outlier shares its step with its like instead of taking the bits
// from all others: an input is rounded by at most 1/254 of the largest of its chunk, which is less than eight times it.

#pragma once

#include <cmath>
#include <cstring>

#include "isa.h"
#include "select.h"

namespace onnxcomp {

inline constexpr std::size_t kChunk = 64;  // inputs that share a step, at most
inline constexpr std::size_t kFirstBytes = 256;  // of each row of the first chunk, fetched before anything is done

// Reorders the surviving inputs by exponent, stable within one. `values` and `rows` have room for kept.count.
inline void sort_by_exponent(const Kept& kept, float* values, std::uint32_t* rows) {
  std::uint32_t begin[257] = {};
  const auto bin = [&kept](std::size_t i) { return 255u - (magnitude_bits(kept.values[i]) >> 23); };
  for (std::size_t i = 0; i < kept.count; ++i) ++begin[bin(i) + 1];
  for (std::size_t b = 1; b < 257; ++b) begin[b] += begin[b - 1];
  for (std::size_t i = 0; i < kept.count; ++i) {
    const std::uint32_t place = begin[bin(i)]++;
    values[place] = kept.values[i];
    rows[place] = kept.rows[i];
  }
}

// Whether the inputs can be rounded to 8 bits: all are finite, and so are their products with scales.
//
// `kept` is in order of exponent, so that the first tells. The others are left to the kernels that do not round.
inline bool can_round(const Kept& kept) {
  constexpr float kHuge = 1e30f;
  return kept.count == 0 || std::fabs(kept.values[0]) < kHuge;
}

// Where the chunk that starts at `begin` ends.
inline std::size_t chunk_end(const Kept& kept, std::size_t begin) {
  const auto exponent = [&kept](std::size_t i) { return magnitude_bits(kept.values[i]) >> 23; };
  const std::size_t limit = std::min(begin + kChunk, kept.count);
  const std::uint32_t first = exponent(begin);
  std::size_t end = begin + 1;
  while (end < limit && exponent(end) + 3 > first) ++end;
  return end;
}

// The most chunks that `count` inputs can have: full ones, and one for every third exponent.
inline std::size_t most_chunks(std::size_t count) { return count / kChunk + 256 / 3 + 2; }

// The step of a chunk whose largest magnitude is `largest`, and what to multiply by to count in steps. A chunk of nothing
// but tiny numbers counts as zero: its step would not have a finite inverse.
inline constexpr float kTiny = 1e-35f;
ONNXCOMP_INLINE float inverse_step(float largest) { return largest > kTiny ? 127.0f / largest : 0.0f; }

// The nearest integer of a value of small magnitude, in a form that every compiler makes vectors of.
ONNXCOMP_INLINE std::int32_t nearest(float value) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the integer is what is left in the mantissa
  const float shifted = value + kMagic;
  std::int32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  return bits - 0x4b400000;
}

}  // namespace onnxcomp
