// A dense frame [channels, pixels] of an image turned into pixels [pixels, channels] and compared with what was sent
// last.

#pragma once

#include "delta_send.h"

namespace onnxcomp::delta {

// Pixels that are done at once: so many that few channels fill vectors, so few that they stay in the first-level cache.
inline std::size_t frame_block(std::size_t channels) {
  return std::max<std::size_t>(8, std::min<std::size_t>(256, 4096 / channels / 8 * 8));
}
// With few channels the step is repeated for all pixels of a block, so that pixels are rounded together.
inline constexpr std::size_t kFewChannels = 16;
inline std::size_t frame_steps(std::size_t channels) {
  return channels < kFewChannels ? channels * frame_block(channels) : channels;
}

struct Frame {
  const float* x;           // at the first of the pixels
  std::size_t plane;        // pixels of a channel
  const Stage* stage;       // step holds frame_steps(channels) values
  float* held;              // at the first of the pixels, like the mask
  std::uint8_t* mask;
  std::size_t count;        // pixels, at most frame_block(channels)
  float* values;            // room for [count, channels]
  float* squares;           // room for [count, channels] if there are few channels
};
using Enter = void (*)(const Frame& frame);

template <std::size_t kChannels>
ONNXCOMP_INLINE void interleave(const Frame& f) {
  const float* ONNXCOMP_RESTRICT x = f.x;
  float* ONNXCOMP_RESTRICT values = f.values;
  for (std::size_t i = 0; i < f.count; ++i) {
    for (std::size_t c = 0; c < kChannels; ++c) values[i * kChannels + c] = x[c * f.plane + i];
  }
}

// Four rows of four floats, `step` apart, to columns.
ONNXCOMP_INLINE void transpose4(const float* ONNXCOMP_RESTRICT x, std::size_t step, float* ONNXCOMP_RESTRICT y,
                                std::size_t y_step) {
#if defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 12)
  typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
  const auto in = [=](std::size_t i) { return *reinterpret_cast<const Four*>(x + i * step); };
  const Four a = in(0), b = in(1), c = in(2), d = in(3);
  const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab2 = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd2 = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  *reinterpret_cast<Four*>(y) = __builtin_shufflevector(ab, cd, 0, 1, 4, 5);
  *reinterpret_cast<Four*>(y + y_step) = __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
  *reinterpret_cast<Four*>(y + 2 * y_step) = __builtin_shufflevector(ab2, cd2, 0, 1, 4, 5);
  *reinterpret_cast<Four*>(y + 3 * y_step) = __builtin_shufflevector(ab2, cd2, 2, 3, 6, 7);
#else
  for (std::size_t i = 0; i < 4; ++i) {
    for (std::size_t j = 0; j < 4; ++j) y[j * y_step + i] = x[i * step + j];
  }
#endif
}

ONNXCOMP_INLINE void transpose(const Frame& f) {
  const std::size_t channels = f.stage->channels;
  const std::size_t whole_c = channels / 4 * 4, whole_i = f.count / 4 * 4;
  for (std::size_t c = 0; c < whole_c; c += 4) {
    for (std::size_t i = 0; i < whole_i; i += 4) {
      transpose4(f.x + c * f.plane + i, f.plane, f.values + i * channels + c, channels);
    }
  }
  for (std::size_t i = 0; i < f.count; ++i) {
    const std::size_t done = i < whole_i ? whole_c : 0;
    for (std::size_t c = done; c < channels; ++c) f.values[i * channels + c] = f.x[c * f.plane + i];
  }
}

// Marks the pixels whose squared changes add up to too much; whether there are any.
template <std::size_t kChannels>
ONNXCOMP_INLINE bool mark(const Frame& f) {
  const float* ONNXCOMP_RESTRICT squares = f.squares;
  std::uint8_t* ONNXCOMP_RESTRICT mask = f.mask;
  const std::size_t channels = kChannels == 0 ? f.stage->channels : kChannels;
  const float limit = f.stage->limit;
  std::uint8_t any = 0;
  for (std::size_t i = 0; i < f.count; ++i) {
    float sum = 0.0f;
    for (std::size_t c = 0; c < channels; ++c) sum += squares[i * channels + c];
    mask[i] = !(sum <= limit);
    any = static_cast<std::uint8_t>(any | mask[i]);
  }
  return any != 0;
}

ONNXCOMP_INLINE void enter_few(const Frame& f) {
  const std::size_t channels = f.stage->channels, all = f.count * channels;
  const float* ONNXCOMP_RESTRICT values = f.values;
  const float* ONNXCOMP_RESTRICT held = f.held;
  float* ONNXCOMP_RESTRICT squares = f.squares;
  for (std::size_t i = 0; i < all; ++i) {
    const float difference = values[i] - held[i];
    squares[i] = difference * difference;
  }
  if (!(channels == 3 ? mark<3>(f) : mark<0>(f))) return;
  for (std::size_t i = 0; i < f.count; ++i) {
    if (f.mask[i] == 0) continue;
    for (std::size_t c = i * channels; c < (i + 1) * channels; ++c) f.held[c] = f.values[c];
  }
}

ONNXCOMP_INLINE void enter_body(const Frame& f) {
  const Stage& stage = *f.stage;
  const std::size_t channels = stage.channels, all = f.count * channels;
  switch (channels) {
    case 1: std::memcpy(f.values, f.x, f.count * sizeof(float)); break;
    case 2: interleave<2>(f); break;
    case 3: interleave<3>(f); break;
    default: transpose(f);
  }
  const bool few = channels < kFewChannels;
  if (stage.rounds) {
    if (few) round_to_steps(f.values, stage.step, all);
    for (std::size_t i = 0; !few && i < f.count; ++i) round_to_steps(f.values + i * channels, stage.step, channels);
  }
  if (!stage.started) {
    std::memcpy(f.held, f.values, all * sizeof(float));
    std::memset(f.mask, 1, f.count);
  } else if (few) {
    enter_few(f);
  } else {
    for (std::size_t i = 0; i < f.count; ++i) {
      const float* values = f.values + i * channels;
      float* held = f.held + i * channels;
      f.mask[i] = differs(values, held, stage.limit, channels);
      if (f.mask[i] != 0) copy(held, values, channels);
    }
  }
}

#define ONNXCOMP_DEFINE(name) \
  inline void name(const Frame& frame) { enter_body(frame); }

ONNXCOMP_DEFINE(enter_portable)
#if defined(ONNXCOMP_X86)
ONNXCOMP_TARGET(ONNXCOMP_AVX2) ONNXCOMP_DEFINE(enter_avx2)
ONNXCOMP_TARGET(ONNXCOMP_AVX512) ONNXCOMP_DEFINE(enter_avx512)
#endif
#undef ONNXCOMP_DEFINE

inline Enter choose_enter(Isa isa) {
#if defined(ONNXCOMP_X86)
  if (isa == Isa::kAvx512 || isa == Isa::kVnni) return enter_avx512;
  if (isa == Isa::kAvx2) return enter_avx2;
#endif
  (void)isa;
  return enter_portable;
}

}  // namespace onnxcomp::delta
