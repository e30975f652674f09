// Which instructions a kernel may use, and the macros that hide compilers from each other.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define ONNXCOMP_X86 1
#include <immintrin.h>
#elif (defined(__GNUC__) || defined(__clang__)) && defined(__aarch64__)
#define ONNXCOMP_ARM 1
#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

#if defined(__GNUC__) || defined(__clang__)
#define ONNXCOMP_RESTRICT __restrict__
#define ONNXCOMP_INLINE inline __attribute__((always_inline))
#define ONNXCOMP_PREFETCH(address) __builtin_prefetch((address), 0, 2)  // into the second-level cache
#define ONNXCOMP_TARGET(features) __attribute__((target(features)))
#else
#define ONNXCOMP_RESTRICT
#define ONNXCOMP_INLINE inline
#define ONNXCOMP_PREFETCH(address) ((void)0)
#define ONNXCOMP_TARGET(features)
#endif

// Keep the order of the additions to a sum: the first, at the begin of a function, for clang; the second, between two
// additions to a vector, for gcc, which would reorder them within a turn of a loop.
#if defined(__clang__)
#define ONNXCOMP_IN_ORDER _Pragma("clang fp reassociate(off)")
#define ONNXCOMP_THEN(sum) ((void)0)
#elif defined(ONNXCOMP_X86)
#define ONNXCOMP_IN_ORDER
#define ONNXCOMP_THEN(sum) __asm__("" : "+v"(sum))
#elif defined(ONNXCOMP_ARM)
#define ONNXCOMP_IN_ORDER
#define ONNXCOMP_THEN(sum) __asm__("" : "+w"(sum))
#else
#define ONNXCOMP_IN_ORDER
#define ONNXCOMP_THEN(sum) ((void)0)
#endif

// Feature lists for ONNXCOMP_TARGET. F16C comes with every processor that has AVX2.
#define ONNXCOMP_AVX2 "avx2,fma,f16c"
#define ONNXCOMP_AVX512 "avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq"
#define ONNXCOMP_VNNI "avx2,fma,f16c,avx512f,avx512vl,avx512bw,avx512dq,avx512vnni"
#define ONNXCOMP_DOTPROD "arch=armv8.2-a+dotprod"

namespace onnxcomp {

// Kernels for x86 in rising order; kDotprod is the one step above portable on aarch64.
enum class Isa { kPortable, kAvx2, kAvx512, kVnni, kDotprod };

// The best that this machine runs. ONNXCOMP_ISA = portable | avx2 | avx512 lowers the choice, for tests.
inline Isa choose_isa() {
  const char* wish = std::getenv("ONNXCOMP_ISA");
  const auto wished = [wish](const char* name) { return wish != nullptr && std::strcmp(wish, name) == 0; };
  if (wished("portable")) return Isa::kPortable;
#if defined(ONNXCOMP_X86)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kPortable;
  if (wished("avx2") || !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq")) {
    return Isa::kAvx2;
  }
  return wished("avx512") || !__builtin_cpu_supports("avx512vnni") ? Isa::kAvx512 : Isa::kVnni;
#elif defined(ONNXCOMP_ARM) && defined(__linux__)
  constexpr unsigned long kAsimdDp = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kAsimdDp) != 0 ? Isa::kDotprod : Isa::kPortable;
#else
  return Isa::kPortable;
#endif
}

// IEEE half precision to single; exact.
ONNXCOMP_INLINE float half_to_float(std::uint16_t h) {
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
  const std::uint32_t rest = h & 0x7fffu;
  // Shifted into place the exponent is 112 too small; a product puts it right and normalises subnormals on the way.
  std::uint32_t bits = rest << 13;
  float magnitude;
  std::memcpy(&magnitude, &bits, sizeof(magnitude));
  magnitude *= 5.192296858534828e+33f;  // 2^112
  std::memcpy(&bits, &magnitude, sizeof(bits));
  if (rest >= 0x7c00u) bits |= 0x7f800000u;  // infinity and NaN
  bits |= sign;
  std::memcpy(&magnitude, &bits, sizeof(magnitude));
  return magnitude;
}

ONNXCOMP_INLINE float to_float(float value) { return value; }
ONNXCOMP_INLINE float to_float(std::uint16_t value) { return half_to_float(value); }

}  // namespace onnxcomp
