// Products with weights of which one or two of every four consecutive ones in a column are stored (1:4, 2:4).
//
// A column is a sequence of slots, one for each weight that is stored: the value, and two bits that say which of the four
// inputs of its group it is multiplied with. So no branch and no gather is needed: the four inputs lie in a register, and
// the bits select among them for sixteen columns at once.

#pragma once

#include <algorithm>
#include <cmath>

#include "isa.h"
#include "quantized.h"

namespace onnxcomp::nm {

inline constexpr std::size_t kColumns = 16;  // of a block, whose weights lie together
inline constexpr std::size_t kQuad = 4;      // slots of a column whose bits share a byte
inline constexpr std::size_t kSpan = 128;    // inputs that share a step where they are rounded

// Inputs that a quad of slots is multiplied with.
constexpr std::size_t quad_inputs(std::size_t kept) { return 16 / kept; }
inline std::size_t quads_of(std::size_t k, std::size_t kept) {
  return (k + quad_inputs(kept) - 1) / quad_inputs(kept);
}

// Blocks of columns one after another; those of the last that are beyond `columns` hold zeros. Within a block follow the
// quads, [kQuad][kColumns] floats or halves, or [kColumns][kQuad] integers, and apart from them their bits, [kColumns]
// bytes a quad, the first slot in the lowest two.
template <typename Value>
struct Weight {
  const Value* values;
  const std::uint8_t* places;
  const float* bias;   // one a column
  const float* scale;  // one a column; of integers only
  std::size_t quads, columns, kept;

  const Value* block_values(std::size_t block) const { return values + block * quads * kQuad * kColumns; }
  const std::uint8_t* block_places(std::size_t block) const { return places + block * quads * kColumns; }
};

// Rows of inputs, each filled up with zeros to a multiple of what a quad takes. Integers have a step for every kSpan.
template <typename X>
struct Inputs {
  const X* x;
  std::size_t length, count;
  const float* steps;
  std::size_t spans;
};

// Does columns [begin * kColumns, end * kColumns) of y [in.count, y_step].
template <typename Value, typename X>
using Kernel = void (*)(const Weight<Value>& w, const Inputs<X>& in, float* y, std::size_t y_step, std::size_t begin,
                        std::size_t end);

// Rounds a row: integers, filled up to `length`, and steps. What is not finite makes its step, and so all sums, NaN.
using Round = void (*)(const float* x, std::size_t k, std::size_t length, std::uint8_t flip, std::uint8_t* integers,
                       float* steps);

struct Int8 {
  Kernel<std::int8_t, std::uint8_t> multiply;
  Round round;
  std::uint8_t flip;  // exclusive or with the integers: 0x80 where the instruction takes them without a sign
};

ONNXCOMP_INLINE void round_body(const float* ONNXCOMP_RESTRICT x, std::size_t k, std::size_t length, std::uint8_t flip,
                                std::uint8_t* ONNXCOMP_RESTRICT integers, float* ONNXCOMP_RESTRICT steps) {
  constexpr std::uint32_t kInfinite = 0x7f800000u;
  std::memset(integers, flip, length);
  for (std::size_t begin = 0; begin < length; begin += kSpan) {
    const std::size_t end = std::min(begin + kSpan, k);
    std::int32_t most = 0;  // magnitudes are in the order of their bits, and whatever is not finite comes last
    for (std::size_t i = begin; i < end; ++i) most = std::max(most, static_cast<std::int32_t>(magnitude_bits(x[i])));
    float largest;
    std::memcpy(&largest, &most, sizeof(largest));
    const bool finite = static_cast<std::uint32_t>(most) < kInfinite;
    const float inverse = finite ? inverse_step(largest) : 0.0f;
    steps[begin / kSpan] = finite ? largest / 127.0f : NAN;
    for (std::size_t i = begin; i < end; ++i) {
      integers[i] = static_cast<std::uint8_t>(nearest(x[i] * inverse)) ^ flip;
    }
  }
}

#define ONNXCOMP_DEFINE(name)                                                                                     \
  inline void name(const float* x, std::size_t k, std::size_t length, std::uint8_t flip, std::uint8_t* integers, \
                   float* steps) {                                                                                \
    round_body(x, k, length, flip, integers, steps);                                                              \
  }

ONNXCOMP_DEFINE(round_portable)
#if defined(ONNXCOMP_X86)
ONNXCOMP_TARGET(ONNXCOMP_AVX2) ONNXCOMP_DEFINE(round_avx2)
ONNXCOMP_TARGET(ONNXCOMP_AVX512) ONNXCOMP_DEFINE(round_avx512)
#endif
#undef ONNXCOMP_DEFINE

// ---- portable -------------------------------------------------------------------------------------------------------

template <typename Value>
void float_portable(const Weight<Value>& w, const Inputs<float>& in, float* y, std::size_t y_step, std::size_t begin,
                    std::size_t end) {
  for (std::size_t b = begin; b < end; ++b) {
    const std::size_t some = std::min(kColumns, w.columns - b * kColumns);
    for (std::size_t r = 0; r < in.count; ++r) {
      const Value* values = w.block_values(b);
      const std::uint8_t* places = w.block_places(b);
      const float* x = in.x + r * in.length;
      float sums[kColumns] = {};
      for (std::size_t q = 0; q < w.quads; ++q, x += quad_inputs(w.kept), places += kColumns) {
        for (std::size_t s = 0; s < kQuad; ++s, values += kColumns) {
          const float* group = x + s / w.kept * 4;
          for (std::size_t j = 0; j < kColumns; ++j) sums[j] += group[places[j] >> (2 * s) & 3] * to_float(values[j]);
        }
      }
      for (std::size_t j = 0; j < some; ++j) y[r * y_step + b * kColumns + j] = sums[j] + w.bias[b * kColumns + j];
    }
  }
}

inline void int8_portable(const Weight<std::int8_t>& w, const Inputs<std::uint8_t>& in, float* y, std::size_t y_step,
                          std::size_t begin, std::size_t end) {
  const std::size_t span_quads = kSpan / quad_inputs(w.kept);
  for (std::size_t b = begin; b < end; ++b) {
    const std::size_t some = std::min(kColumns, w.columns - b * kColumns);
    for (std::size_t r = 0; r < in.count; ++r) {
      const std::int8_t* values = w.block_values(b);
      const std::uint8_t* places = w.block_places(b);
      const std::int8_t* x = reinterpret_cast<const std::int8_t*>(in.x + r * in.length);
      float sums[kColumns] = {};
      for (std::size_t q = 0; q < w.quads;) {
        std::int32_t products[kColumns] = {};
        const float step = in.steps[r * in.spans + q / span_quads];
        for (const std::size_t stop = std::min(q + span_quads, w.quads); q < stop; ++q) {
          for (std::size_t j = 0; j < kColumns; ++j) {
            for (std::size_t s = 0; s < kQuad; ++s) {
              products[j] += x[s / w.kept * 4 + (places[j] >> (2 * s) & 3)] * values[j * kQuad + s];
            }
          }
          x += quad_inputs(w.kept);
          values += kQuad * kColumns;
          places += kColumns;
        }
        for (std::size_t j = 0; j < kColumns; ++j) sums[j] += step * static_cast<float>(products[j]);
      }
      for (std::size_t j = 0; j < some; ++j) {
        const std::size_t column = b * kColumns + j;
        y[r * y_step + column] = sums[j] * w.scale[column] + w.bias[column];
      }
    }
  }
}

}  // namespace onnxcomp::nm

#include "nm_arm.h"
#include "nm_x86.h"

namespace onnxcomp::nm {

template <typename Value>
Kernel<Value, float> choose_float(Isa isa) {
#if defined(ONNXCOMP_X86)
  if (isa == Isa::kAvx512 || isa == Isa::kVnni) return float_avx512<Value>;
  if (isa == Isa::kAvx2) return float_avx2<Value>;
#elif defined(ONNXCOMP_ARM)
  return float_neon<Value>;
#endif
  (void)isa;
  return float_portable<Value>;
}

inline Int8 choose_int8(Isa isa) {
#if defined(ONNXCOMP_X86)
  if (isa == Isa::kVnni) return {int8_vnni<std::int8_t>, round_avx512, 0x80};
  if (isa == Isa::kAvx2 || isa == Isa::kAvx512) return {int8_avx2<std::int8_t>, round_avx2, 0};
#elif defined(ONNXCOMP_ARM)
  if (isa == Isa::kDotprod) return {int8_dotprod, round_portable, 0};
#endif
  (void)isa;
  return {int8_portable, round_portable, 0};
}

}  // namespace onnxcomp::nm
