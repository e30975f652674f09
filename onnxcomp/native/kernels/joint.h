// Sums of rows of W for several inputs at once: every row that any of them keeps is read and interleaved once, and
// multiplied with each of them.
//
// A row of x is rounded to 8 bits in spans of kSpan positions, and not in order of exponent as one that comes alone (see
// quantized.h): so a row gets the same bits whatever the others in its batch are, but not quite those that it gets alone.
// An outlier in a span takes a second product: int8 weights are multiplied with what rounding left as well, 4-bit ones
// with outliers and others apart.

#pragma once

#include "rows_int4.h"
#include "rows_int8.h"

namespace onnxcomp::joint {

inline constexpr std::size_t kSpan = 64;  // positions of an input that share a step
// Inputs of one call: their sums stay in the second-level cache; 4-bit ones have a product with each scale.
inline constexpr std::size_t kMostInt8 = 32, kMostInt4 = 8;

// Inputs [count, k] with zeros in place of what is dropped; those that are kept can be rounded.
struct Inputs {
  const float* x;
  std::size_t k, count;
};

using Int8 = void (*)(const rows_int8::Weight& w, const Inputs& in, float* y, std::size_t y_step, std::size_t columns);
template <typename Scale>
using Int4 = void (*)(const rows_int4::Weight<Scale>& w, const Inputs& in, float* y, std::size_t y_step,
                      std::size_t groups);

}  // namespace onnxcomp::joint

#include "joint_x86.h"

namespace onnxcomp::joint {

// Null where there are no instructions for it.
inline Int8 choose_int8(Isa isa) {
#if defined(ONNXCOMP_X86)
  if (isa == Isa::kVnni) return int8_vnni;
#endif
  (void)isa;
  return nullptr;
}

template <typename Scale>
Int4<Scale> choose_int4(Isa isa) {
#if defined(ONNXCOMP_X86)
  if (isa == Isa::kVnni) return int4_vnni<Scale>;
#endif
  (void)isa;
  return nullptr;
}

}  // namespace onnxcomp::joint
