// Largest value or mean of some pixels, for each channel.

#pragma once

#include <limits>

#include "delta_pixels.h"

namespace onnxcomp::delta {

enum class Pool { kMax, kAverage };

// Of the pixels under the taps those that are not null; `divisor` 0 stands for how many those are.
struct PoolWork {
  Pool kind;
  const float* const* taps;  // [count, taps]
  std::size_t count, each, channels, divisor;
  float* y;  // [count, channels]
};
// All of an image, pixels [pixels, channels].
struct GlobalPoolWork {
  Pool kind;
  const float* x;
  std::size_t pixels, channels;
  float* y;  // [channels]
};

inline constexpr std::size_t kPoolChannels = 64;  // whose sums are kept at hand

ONNXCOMP_INLINE void take_largest(float* ONNXCOMP_RESTRICT most, const float* ONNXCOMP_RESTRICT x, std::size_t count) {
  // A NaN is kept.
  for (std::size_t c = 0; c < count; ++c) most[c] = !(x[c] <= most[c]) && most[c] == most[c] ? x[c] : most[c];
}
ONNXCOMP_INLINE void add(float* ONNXCOMP_RESTRICT sums, const float* ONNXCOMP_RESTRICT x, std::size_t count) {
  for (std::size_t c = 0; c < count; ++c) sums[c] += x[c];
}

ONNXCOMP_INLINE void pool_body(const PoolWork& o) {
  const float lowest = o.kind == Pool::kMax ? -std::numeric_limits<float>::infinity() : 0.0f;
  for (std::size_t i = 0; i < o.count; ++i) {
    const float* const* taps = o.taps + i * o.each;
    std::size_t present = 0;
    for (std::size_t t = 0; t < o.each; ++t) present += taps[t] != nullptr;
    const std::size_t divisor = o.divisor != 0 ? o.divisor : std::max<std::size_t>(present, 1);
    for (std::size_t begin = 0; begin < o.channels; begin += kPoolChannels) {
      const std::size_t some = std::min(kPoolChannels, o.channels - begin);
      float* ONNXCOMP_RESTRICT y = o.y + i * o.channels + begin;
      for (std::size_t c = 0; c < some; ++c) y[c] = lowest;
      for (std::size_t t = 0; t < o.each; ++t) {
        if (taps[t] == nullptr) continue;
        o.kind == Pool::kMax ? take_largest(y, taps[t] + begin, some) : add(y, taps[t] + begin, some);
      }
      if (o.kind == Pool::kMax) continue;
      for (std::size_t c = 0; c < some; ++c) y[c] /= static_cast<float>(divisor);
    }
  }
}

ONNXCOMP_INLINE void global_pool_body(const GlobalPoolWork& o) {
  constexpr std::size_t kTogether = 32;  // pixels summed apart, so that the error does not grow with all of them
  for (std::size_t begin = 0; begin < o.channels; begin += kPoolChannels) {
    const std::size_t some = std::min(kPoolChannels, o.channels - begin);
    float* ONNXCOMP_RESTRICT y = o.y + begin;
    for (std::size_t c = 0; c < some; ++c) y[c] = o.kind == Pool::kMax ? o.x[begin + c] : 0.0f;
    for (std::size_t first = 0; first < o.pixels; first += kTogether) {
      const std::size_t stop = std::min(first + kTogether, o.pixels);
      float sums[kPoolChannels] = {};
      for (std::size_t p = first; p < stop; ++p) {
        const float* x = o.x + p * o.channels + begin;
        o.kind == Pool::kMax ? take_largest(y, x, some) : add(sums, x, some);
      }
      if (o.kind == Pool::kAverage) add(y, sums, some);
    }
    if (o.kind == Pool::kMax) continue;
    for (std::size_t c = 0; c < some; ++c) y[c] /= static_cast<float>(o.pixels);
  }
}

struct Pools {
  void (*window)(const PoolWork& work);
  void (*global)(const GlobalPoolWork& work);
};

#define ONNXCOMP_DEFINE(target, name)                                                  \
  target inline void pool_##name(const PoolWork& work) { pool_body(work); }            \
  target inline void global_pool_##name(const GlobalPoolWork& work) { global_pool_body(work); }

ONNXCOMP_DEFINE(, portable)
#if defined(ONNXCOMP_X86)
ONNXCOMP_DEFINE(ONNXCOMP_TARGET(ONNXCOMP_AVX2), avx2)
ONNXCOMP_DEFINE(ONNXCOMP_TARGET(ONNXCOMP_AVX512), avx512)
#endif
#undef ONNXCOMP_DEFINE

inline Pools choose_pools(Isa isa) {
#if defined(ONNXCOMP_X86)
  if (isa == Isa::kAvx512 || isa == Isa::kVnni) return {pool_avx512, global_pool_avx512};
  if (isa == Isa::kAvx2) return {pool_avx2, global_pool_avx2};
#endif
  (void)isa;
  return {pool_portable, global_pool_portable};
}

}  // namespace onnxcomp::delta
