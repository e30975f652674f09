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

// Reorders the surviving inputs by exponent, stable within one. `values` and `rows` have room for kept.count.
//
// In four parts at once: most inputs have one of few exponents, and counters would wait for what was just written.
inline void sort_by_exponent(const Kept& kept, float* values, std::uint32_t* rows) {
  constexpr std::size_t kParts = 4;
  std::uint32_t place[256][kParts] = {};
  const std::size_t part = kept.count / kParts, rest = kept.count - kParts * part;  // the last part has the rest
  const auto bin = [&kept](std::size_t i) { return 255u - (magnitude_bits(kept.values[i]) >> 23); };
  const auto each = [&](const auto& visit) {
    for (std::size_t i = 0; i < part; ++i) {
      for (std::size_t p = 0; p < kParts; ++p) visit(p * part + i, p);
    }
    for (std::size_t i = 0; i < rest; ++i) visit(kParts * part + i, kParts - 1);
  };
  each([&](std::size_t i, std::size_t p) { ++place[bin(i)][p]; });
  std::uint32_t begin = 0;
  for (auto& parts : place) {
    for (std::uint32_t& entry : parts) {
      const std::uint32_t count = entry;
      entry = begin;
      begin += count;
    }
  }
  each([&](std::size_t i, std::size_t p) {
    const std::uint32_t to = place[bin(i)][p]++;
    values[to] = kept.values[i];
    rows[to] = kept.rows[i];
  });
}

// Whether the inputs can be rounded to 8 bits: all are finite, and so are their products with scales.
//
// `kept` is in order of exponent, so that the first tells. The others are left to the kernels that do not round.
inline constexpr float kHuge = 1e30f;
inline bool can_round(const Kept& kept) { return kept.count == 0 || std::fabs(kept.values[0]) < kHuge; }

// The same of inputs in any order.
inline bool can_round_any(const Kept& kept) {
  bool sound = true;
  for (std::size_t i = 0; i < kept.count; ++i) sound &= std::fabs(kept.values[i]) < kHuge;
  return sound;
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

// Fetches the rows of the next chunk while one is computed with. Long rows one after another, since processors fetch ahead
// by themselves where addresses go on, and have few lines under way at once without that; short ones, of which a page
// holds several, line by line in the order in which they will be read.
class RowFetcher {
 public:
  RowFetcher(const void* data, std::size_t stride, std::size_t bytes)
      : data_(static_cast<const char*>(data)), stride_(stride), bytes_(bytes), part_(bytes >= kLong ? kPart : kLine) {}

  // Spreads the fetching of rows over `turns` calls of `fetch`.
  void aim(const std::uint32_t* rows, std::size_t count, std::size_t turns) {
    rows_ = rows;
    count_ = count;
    left_ = count * ((bytes_ + part_ - 1) / part_);
    row_ = at_ = 0;
    each_ = (left_ + turns - 1) / turns;
  }
  ONNXCOMP_INLINE void fetch() {
    const std::size_t now = std::min(each_, left_);
    left_ -= now;
    if (part_ == kLine) {
      for (std::size_t i = 0; i < now; ++i) {
        ONNXCOMP_PREFETCH(data_ + rows_[row_] * stride_ + at_);
        if (++row_ == count_) {
          row_ = 0;
          at_ += kLine;
        }
      }
      return;
    }
    for (std::size_t i = 0; i < now; ++i) {
      const char* p = data_ + rows_[row_] * stride_ + at_;
      for (std::size_t line = 0; line < kPart; line += kLine) ONNXCOMP_PREFETCH(p + line);
      at_ += kPart;
      if (at_ >= bytes_) {
        at_ = 0;
        ++row_;
      }
    }
  }

 private:
  static constexpr std::size_t kLine = 64, kPart = 4 * kLine, kLong = 1024;  // bytes; kPart is what a step reads
  const char* data_;
  std::size_t stride_, bytes_, part_;
  const std::uint32_t* rows_ = nullptr;
  std::size_t count_ = 0, left_ = 0, row_ = 0, at_ = 0, each_ = 0;
};

}  // namespace onnxcomp
