// Products of one dense input with some rows of a matrix: out[i] = values[i] * scale * (x . w[rows[i]]).
//
// This is the up projection of a gated MLP, where `values` are the gates that were kept: a row is a neuron. Every form
// takes fp32 inputs; those for VNNI round them to 8 bits, each block with a step of its own (`Input`).

#pragma once

#include "dots_arm.h"
#include "dots_common.h"
#include "dots_x86.h"

namespace onnxcomp::dots {

template <typename W>
Exact<W> choose_exact(Isa isa) {
#if defined(ONNXCOMP_X86)
  if (isa == Isa::kAvx512 || isa == Isa::kVnni) return exact_avx512<W>;
  if (isa == Isa::kAvx2) return exact_avx2<W>;
#endif
  (void)isa;
  return exact_portable<W>;
}

// Null where there are no instructions for it.
template <typename W>
Rounded<W> choose_rounded(Isa isa) {
#if defined(ONNXCOMP_X86)
  if (isa == Isa::kVnni) return static_cast<Rounded<W>>(rounded_vnni);
  if constexpr (!std::is_same_v<W, Int8>) {
    if (isa == Isa::kAvx2 || isa == Isa::kAvx512) return static_cast<Rounded<W>>(rounded_avx2);
  }
#elif defined(ONNXCOMP_ARM)
  if (isa == Isa::kDotprod) return static_cast<Rounded<W>>(rounded_dotprod);
#endif
  (void)isa;
  return nullptr;
}

}  // namespace onnxcomp::dots
