// Sum of some rows of a 4-bit matrix whose every row has its own scale for each group of 32 columns:
// y[j] = sum of values[i] * scale[r][j / 32] * (w[r][j] - zero[r][j / 32]), r = rows[i].
//
// Two weights share a byte, low bits first. Two forms, as for int8 (see rows_int8.h); in the rounded one it is the
// product of input and scale that is rounded to 8 bits, for each group on its own, so that rows with different scales can
// be added up as integers.

#pragma once

#include "rows_int4_arm.h"
#include "rows_int4_common.h"
#include "rows_int4_x86.h"

namespace onnxcomp::rows_int4 {

template <typename Scale>
Kernel<Scale> choose_exact(Isa isa) {
#if defined(ONNXCOMP_X86)
  if (isa == Isa::kAvx512 || isa == Isa::kVnni) return exact_avx512<Scale>;
  if (isa == Isa::kAvx2) return exact_avx2<Scale>;
#endif
  (void)isa;
  return exact_portable<Scale>;
}

// Null where there are no instructions for it.
template <typename Scale>
Kernel<Scale> choose_rounded(Isa isa) {
#if defined(ONNXCOMP_X86)
  if (isa == Isa::kVnni) return rounded_vnni<Scale>;
  if (isa == Isa::kAvx2 || isa == Isa::kAvx512) return rounded_avx2<Scale>;
#elif defined(ONNXCOMP_ARM)
  if (isa == Isa::kDotprod) return rounded_dotprod<Scale>;
#endif
  (void)isa;
  return nullptr;
}

}  // namespace onnxcomp::rows_int4
