// Depthwise convolution of some pixels: every channel of the input makes `multiplier` of the output.

#pragma once

#include <algorithm>

#include "isa.h"

namespace onnxcomp::depthwise {

struct Work {
  const float* const* x;  // [count, taps]: where the input's pixel under each tap lies
  std::size_t count, taps;
  const float* w;     // [taps, channels]
  const float* bias;  // [channels]
  std::size_t channels, multiplier;
  float* y;  // [count, channels]
  // Of windows without dilation that move by one pixel: taps of a row, which follow each other as pixels do. Else 0.
  std::size_t row = 0;
};
using Kernel = void (*)(const Work& work);

// Sums are one chain each, from the bias on and in the order of the taps, in whatever tile a pixel is.
inline void scalar(const Work& o, std::size_t begin, std::size_t end) {
  ONNXCOMP_IN_ORDER
  for (std::size_t i = 0; i < o.count; ++i) {
    for (std::size_t c = begin; c < end; ++c) {
      float sum = o.bias[c];
      for (std::size_t t = 0; t < o.taps; ++t) sum += o.x[i * o.taps + t][c / o.multiplier] * o.w[t * o.channels + c];
      o.y[i * o.channels + c] = sum;
    }
  }
}

#if defined(__GNUC__) || defined(__clang__)

template <std::size_t kLanes, std::size_t kRows, std::size_t kVectors>
ONNXCOMP_INLINE void tile(const Work& o, std::size_t first, std::size_t c) {
  ONNXCOMP_IN_ORDER
  typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
  Vector sums[kRows][kVectors];
  const float* const* x = o.x + first * o.taps;
#pragma GCC unroll 4
  for (std::size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (std::size_t v = 0; v < kVectors; ++v) sums[r][v] = reinterpret_cast<const Vector*>(o.bias + c)[v];
  }
  for (std::size_t t = 0; t < o.taps; ++t) {
    const Vector* w = reinterpret_cast<const Vector*>(o.w + t * o.channels + c);
    Vector row[kVectors];
#pragma GCC unroll 4
    for (std::size_t v = 0; v < kVectors; ++v) row[v] = w[v];
#pragma GCC unroll 4
    for (std::size_t r = 0; r < kRows; ++r) {
      const Vector* from = reinterpret_cast<const Vector*>(x[r * o.taps + t] + c);
#pragma GCC unroll 4
      for (std::size_t v = 0; v < kVectors; ++v) sums[r][v] += from[v] * row[v];
    }
  }
#pragma GCC unroll 4
  for (std::size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (std::size_t v = 0; v < kVectors; ++v) {
      reinterpret_cast<Vector*>(o.y + (first + r) * o.channels + c)[v] = sums[r][v];
    }
  }
}

// Whether the pixels from `first` on are neighbours whose windows lie on the map: the corners of a window tell, since
// what is outside has the same address for all.
ONNXCOMP_INLINE bool neighbours(const Work& o, std::size_t first, std::size_t rows) {
  const float* const* x = o.x + first * o.taps;
  for (std::size_t r = 1; r < rows; ++r) {
    const std::size_t distance = r * o.channels;
    if (x[r * o.taps] != x[0] + distance || x[(r + 1) * o.taps - 1] != x[o.taps - 1] + distance) return false;
  }
  return true;
}

// The same for neighbours: what their windows have in common is read once.
template <std::size_t kLanes, std::size_t kRows, std::size_t kVectors, std::size_t kWidth>
ONNXCOMP_INLINE void sliding(const Work& o, std::size_t first, std::size_t c) {
  ONNXCOMP_IN_ORDER
  typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
  Vector sums[kRows][kVectors];
  const float* const* x = o.x + first * o.taps;
#pragma GCC unroll 4
  for (std::size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (std::size_t v = 0; v < kVectors; ++v) sums[r][v] = reinterpret_cast<const Vector*>(o.bias + c)[v];
  }
  for (std::size_t t = 0; t < o.taps; t += kWidth) {
    Vector w[kWidth][kVectors];
#pragma GCC unroll 8
    for (std::size_t k = 0; k < kWidth; ++k) {
#pragma GCC unroll 4
      for (std::size_t v = 0; v < kVectors; ++v) {
        w[k][v] = reinterpret_cast<const Vector*>(o.w + (t + k) * o.channels + c)[v];
      }
    }
    const float* from = x[t] + c;
#pragma GCC unroll 16
    for (std::size_t j = 0; j < kWidth + kRows - 1; ++j, from += o.channels) {
#pragma GCC unroll 4
      for (std::size_t v = 0; v < kVectors; ++v) {
        const Vector value = reinterpret_cast<const Vector*>(from)[v];
#pragma GCC unroll 4
        for (std::size_t r = 0; r < kRows; ++r) {
          if (j >= r && j - r < kWidth) {
            sums[r][v] += value * w[j - r][v];
            ONNXCOMP_THEN(sums[r][v]);
          }
        }
      }
    }
  }
#pragma GCC unroll 4
  for (std::size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (std::size_t v = 0; v < kVectors; ++v) {
      reinterpret_cast<Vector*>(o.y + (first + r) * o.channels + c)[v] = sums[r][v];
    }
  }
}

template <std::size_t kLanes, std::size_t kVectors, std::size_t kWidth>
ONNXCOMP_INLINE void all_sliding(const Work& o, std::size_t c) {
  std::size_t i = 0;
  while (i < o.count) {
    if (i + 4 <= o.count && neighbours(o, i, 4)) {
      sliding<kLanes, 4, kVectors, kWidth>(o, i, c);
      i += 4;
    } else {
      tile<kLanes, 1, kVectors>(o, i, c);
      ++i;
    }
  }
}

template <std::size_t kLanes, std::size_t kWidth, std::size_t kVectors>
ONNXCOMP_INLINE void sliding_body(const Work& o) {
  std::size_t c = 0;
  for (; c + kVectors * kLanes <= o.channels; c += kVectors * kLanes) all_sliding<kLanes, kVectors, kWidth>(o, c);
  for (; kVectors > 1 && c + kLanes <= o.channels; c += kLanes) all_sliding<kLanes, 1, kWidth>(o, c);
  if (c < o.channels) all_sliding<kLanes, 1, kWidth>(o, o.channels - kLanes);
}

template <std::size_t kLanes, std::size_t kRows, std::size_t kVectors>
ONNXCOMP_INLINE void all_rows(const Work& o, std::size_t c) {
  std::size_t i = 0;
  for (; i + kRows <= o.count; i += kRows) tile<kLanes, kRows, kVectors>(o, i, c);
  for (; i < o.count; ++i) tile<kLanes, 1, kVectors>(o, i, c);
}

template <std::size_t kLanes, std::size_t kRows>
ONNXCOMP_INLINE void body(const Work& o) {
  if (o.multiplier > 1 || o.channels < kLanes) return scalar(o, 0, o.channels);
  constexpr std::size_t kTogether = kLanes == 16 ? 2 : 1;  // vectors for which there are registers
  if (o.row == 3) return sliding_body<kLanes, 3, kTogether>(o);
  if (o.row == 5) return sliding_body<kLanes, 5, kTogether>(o);
  std::size_t c = 0;
  for (; c + 4 * kLanes <= o.channels; c += 4 * kLanes) all_rows<kLanes, kRows, 4>(o, c);
  for (; c + 2 * kLanes <= o.channels; c += 2 * kLanes) all_rows<kLanes, kRows, 2>(o, c);
  for (; c + kLanes <= o.channels; c += kLanes) all_rows<kLanes, kRows, 1>(o, c);
  // Some of these are computed twice.
  if (c < o.channels) all_rows<kLanes, kRows, 1>(o, o.channels - kLanes);
}

#define ONNXCOMP_DEFINE(name, lanes, rows) \
  inline void name(const Work& work) { body<lanes, rows>(work); }

ONNXCOMP_DEFINE(portable, 4, 2)
#if defined(ONNXCOMP_X86)
ONNXCOMP_TARGET(ONNXCOMP_AVX2) ONNXCOMP_DEFINE(avx2, 8, 2)
ONNXCOMP_TARGET(ONNXCOMP_AVX512) ONNXCOMP_DEFINE(avx512, 16, 4)
#endif
#undef ONNXCOMP_DEFINE

#else

inline void portable(const Work& work) { scalar(work, 0, work.channels); }

#endif

inline Kernel choose(Isa isa) {
#if defined(ONNXCOMP_X86)
  if (isa == Isa::kAvx512 || isa == Isa::kVnni) return avx512;
  if (isa == Isa::kAvx2) return avx2;
#endif
  (void)isa;
  return portable;
}

}  // namespace onnxcomp::depthwise
