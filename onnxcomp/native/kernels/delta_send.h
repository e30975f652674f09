// What a layer does with the pixels that it recomputed: activation, rounding, and the decision whether the pixel
// differs enough from what was sent last to be sent again.

#pragma once

#include <cmath>

#include "delta_pixels.h"

namespace onnxcomp::delta {

enum class Activation { kNone, kRelu, kClip, kLeakyRelu, kSigmoid, kSilu, kHardSigmoid, kHardSwish };
inline constexpr std::int64_t kActivations = 8;

struct Stage {
  float* held;           // [pixels, channels]: what was sent last, and is overwritten where a pixel is sent
  std::uint8_t* mask;    // [pixels], all 0 to begin with
  float limit;           // of the sum of squared changes of a pixel's channels, beyond which it is sent
  const float* step;     // one a channel
  std::size_t channels;
  bool started;  // false: everything is sent
  bool rounds;   // a step is above 0
  Activation activation = Activation::kNone;
  float alpha = 0.0f, beta = 0.0f;
};

// Values [count, pitch] of the pixels `places` of maps `width` pixels wide; they are changed.
using Send = void (*)(const Stage& stage, const Place* places, std::size_t count, std::size_t width, float* values,
                      std::size_t pitch);

// e^x. One product per argument instead of an exact reduction, which reordered sums would undo:
// the relative error grows with |x|, where the functions below are flat.
ONNXCOMP_INLINE float exponential(float x) {
  float t = x * 1.44269504f;
  t = t < -126.0f ? -126.0f : t;  // a NaN passes
  t = t > 127.0f ? 127.0f : t;
  const float whole = std::nearbyint(t), f = t - whole;
  float p = 1.5403530e-4f;
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  const std::int32_t bits = (static_cast<std::int32_t>(whole >= -126.0f ? whole : -126.0f) + 127) * (1 << 23);
  float scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

ONNXCOMP_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }
ONNXCOMP_INLINE float clip(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

template <typename Function>
ONNXCOMP_INLINE void each(float* values, std::size_t count, const Function& function) {
  for (std::size_t c = 0; c < count; ++c) values[c] = function(values[c]);
}

ONNXCOMP_INLINE void activate(float* values, std::size_t count, Activation activation, float alpha, float beta) {
  switch (activation) {
    case Activation::kNone: break;
    case Activation::kRelu: each(values, count, [](float v) { return v < 0.0f ? 0.0f : v; }); break;
    case Activation::kClip: each(values, count, [=](float v) { return clip(v, alpha, beta); }); break;
    case Activation::kLeakyRelu: each(values, count, [=](float v) { return v < 0.0f ? v * alpha : v; }); break;
    case Activation::kSigmoid: each(values, count, [](float v) { return sigmoid(v); }); break;
    case Activation::kSilu: each(values, count, [](float v) { return v * sigmoid(v); }); break;
    case Activation::kHardSigmoid:
      each(values, count, [=](float v) { return clip(alpha * v + beta, 0.0f, 1.0f); });
      break;
    case Activation::kHardSwish:
      each(values, count, [](float v) { return v * clip(v * (1.0f / 6.0f) + 0.5f, 0.0f, 1.0f); });
      break;
  }
}

ONNXCOMP_INLINE void round_to_steps(float* ONNXCOMP_RESTRICT values, const float* ONNXCOMP_RESTRICT step,
                                    std::size_t count) {
  for (std::size_t c = 0; c < count; ++c) {
    const float divisor = step[c] > 0.0f ? step[c] : 1.0f, rounded = std::nearbyint(values[c] / divisor) * divisor;
    values[c] = step[c] > 0.0f ? rounded : values[c];
  }
}

// The largest sum of squares of `channels` changes whose root mean square is within a threshold. None is within one below
// 0.
inline float square_limit(float threshold, std::size_t channels) {
  return threshold < 0.0f ? -1.0f : threshold * threshold * static_cast<float>(channels);
}

#if defined(__GNUC__) || defined(__clang__)
// Left to itself, gcc unrolls a loop this short to single floats.
typedef float Squares __attribute__((vector_size(32), aligned(4), may_alias));

// Adds the squared differences of kCount channels, a multiple of 8.
template <std::size_t kCount>
ONNXCOMP_INLINE void add_squares(const float* values, const float* held, Squares* sum) {
  for (std::size_t i = 0; i < kCount; i += 8) {
    const Squares difference =
        *reinterpret_cast<const Squares*>(values + i) - *reinterpret_cast<const Squares*>(held + i);
    *sum += difference * difference;
  }
}
ONNXCOMP_INLINE float total(const Squares& sum) {
  float parts[8];
  std::memcpy(parts, &sum, sizeof(parts));
  return ((parts[0] + parts[4]) + (parts[1] + parts[5])) + ((parts[2] + parts[6]) + (parts[3] + parts[7]));
}
#endif

inline constexpr std::size_t kFew = 16, kMany = 64;

// Whether the squared differences add up to more than `limit`, or to NaN.
ONNXCOMP_INLINE bool differs(const float* values, const float* held, float limit, std::size_t count) {
  float rest = 0.0f;
  std::size_t c = 0;
#if defined(__GNUC__) || defined(__clang__)
  Squares sum = {0, 0, 0, 0, 0, 0, 0, 0};
  if (count >= kFew) {
    // The first tell of most pixels that they changed: a sum of squares does not fall again.
    add_squares<kFew>(values, held, &sum);
    if (!(total(sum) <= limit)) return true;
    c = kFew;
  }
  for (; c + kMany <= count; c += kMany) add_squares<kMany>(values + c, held + c, &sum);
  for (; c + 8 <= count; c += 8) add_squares<8>(values + c, held + c, &sum);
  rest = total(sum);
#endif
  for (; c < count; ++c) {
    const float difference = values[c] - held[c];
    rest += difference * difference;
  }
  return !(rest <= limit);
}

ONNXCOMP_INLINE void copy(float* ONNXCOMP_RESTRICT to, const float* ONNXCOMP_RESTRICT values, std::size_t count) {
  if (count < kFew || count > 16 * kFew) return std::memcpy(to, values, count * sizeof(float)), void();
  for (std::size_t c = 0; c + kFew <= count; c += kFew) std::memcpy(to + c, values + c, kFew * sizeof(float));
  std::memcpy(to + count - kFew, values + count - kFew, kFew * sizeof(float));
}

ONNXCOMP_INLINE void send_body(const Stage& stage, const Place* places, std::size_t count, std::size_t width,
                               float* values, std::size_t pitch) {
  const std::size_t channels = stage.channels;
  for (std::size_t i = 0; i < count; ++i, values += pitch) {
    activate(values, channels, stage.activation, stage.alpha, stage.beta);
    if (stage.rounds) round_to_steps(values, stage.step, channels);
    const std::size_t pixel = static_cast<std::size_t>(places[i].row) * width + places[i].x;
    float* held = stage.held + pixel * channels;
    if (stage.started && !differs(values, held, stage.limit, channels)) continue;
    copy(held, values, channels);
    stage.mask[pixel] = 1;
  }
}

#define ONNXCOMP_DEFINE(name)                                                                                   \
  inline void name(const Stage& stage, const Place* places, std::size_t count, std::size_t width, float* values, \
                   std::size_t pitch) {                                                                         \
    send_body(stage, places, count, width, values, pitch);                                                      \
  }

ONNXCOMP_DEFINE(send_portable)
#if defined(ONNXCOMP_X86)
ONNXCOMP_TARGET(ONNXCOMP_AVX2) ONNXCOMP_DEFINE(send_avx2)
ONNXCOMP_TARGET(ONNXCOMP_AVX512) ONNXCOMP_DEFINE(send_avx512)
#endif
#undef ONNXCOMP_DEFINE

inline Send choose_send(Isa isa) {
#if defined(ONNXCOMP_X86)
  if (isa == Isa::kAvx512 || isa == Isa::kVnni) return send_avx512;
  if (isa == Isa::kAvx2) return send_avx2;
#endif
  (void)isa;
  return send_portable;
}

}  // namespace onnxcomp::delta
