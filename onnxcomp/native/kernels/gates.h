// The gates of a GRU and an LSTM, given their sums.
//
// Outputs may be the buffers of the states that they follow. So a block of units is computed into an array of its own:
// the compiler need not ask what overlaps, and makes the same vectors, with the same bits, wherever the outputs lie.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "isa.h"

namespace onnxcomp::gates {

// Both bounds let NaN through, since it does not compare.
ONNXCOMP_INLINE float clamp(float x, float bound) {
  const float low = x < -bound ? -bound : x;
  return low > bound ? bound : low;
}

// A quotient of polynomials (that of Eigen and of ONNX Runtime), good to 4e-7 of the result; exactly 1 where tanh is in
// single precision, and NaN for NaN.
ONNXCOMP_INLINE float tanh(float x) {
  const float a = clamp(x, 9.0f), s = a * a;
  float p = -2.76076847742355e-16f;
  p = p * s + 2.00018790482477e-13f;
  p = p * s + -8.60467152213735e-11f;
  p = p * s + 5.12229709037114e-08f;
  p = p * s + 1.48572235717979e-05f;
  p = p * s + 6.37261928875436e-04f;
  p = p * s + 4.89352455891786e-03f;
  float q = 1.19825839466702e-06f;
  q = q * s + 1.18534705686654e-04f;
  q = q * s + 2.26843463243900e-03f;
  q = q * s + 4.89352518554385e-03f;
  return clamp(a * p / q, 1.0f);
}

ONNXCOMP_INLINE float sigmoid(float x) { return 0.5f + 0.5f * tanh(0.5f * x); }

inline constexpr std::size_t kUnits = 64;  // of a block

// Sums [3 H] in the order z, r, h; the reset gate multiplies the recurrent part of the last (linear_before_reset).
struct Gru {
  const float *x_sums, *h_sums, *x_bias, *h_bias;
  const float* h;  // [H]
};

// y = the next state, [H].
ONNXCOMP_INLINE void gru_body(const Gru& in, std::size_t units, float* y) {
  for (std::size_t begin = 0; begin < units; begin += kUnits) {
    float next[kUnits];
    const std::size_t count = std::min(kUnits, units - begin);
    const float *xz = in.x_sums + begin, *xr = xz + units, *xn = xr + units;
    const float *hz = in.h_sums + begin, *hr = hz + units, *hn = hr + units;
    const float *bxz = in.x_bias + begin, *bxr = bxz + units, *bxn = bxr + units;
    const float *bhz = in.h_bias + begin, *bhr = bhz + units, *bhn = bhr + units;
    const float* h = in.h + begin;
    for (std::size_t i = 0; i < count; ++i) {
      const float z = sigmoid((xz[i] + bxz[i]) + (hz[i] + bhz[i]));
      const float r = sigmoid((xr[i] + bxr[i]) + (hr[i] + bhr[i]));
      const float n = tanh((xn[i] + bxn[i]) + r * (hn[i] + bhn[i]));
      next[i] = (1.0f - z) * n + z * h[i];
    }
    std::memcpy(y + begin, next, count * sizeof(float));
  }
}

// Sums [4 H] in the order i, o, f, c.
struct Lstm {
  const float *sums, *bias;
  const float* c;  // [H]
};

// The next states, [H].
ONNXCOMP_INLINE void lstm_body(const Lstm& in, std::size_t units, float* h_out, float* c_out) {
  for (std::size_t begin = 0; begin < units; begin += kUnits) {
    float cells[kUnits], outputs[kUnits];
    const std::size_t count = std::min(kUnits, units - begin);
    const float *si = in.sums + begin, *so = si + units, *sf = so + units, *sc = sf + units;
    const float *bi = in.bias + begin, *bo = bi + units, *bf = bo + units, *bc = bf + units;
    const float* c = in.c + begin;
    for (std::size_t i = 0; i < count; ++i) {
      const float cell = sigmoid(sf[i] + bf[i]) * c[i] + sigmoid(si[i] + bi[i]) * tanh(sc[i] + bc[i]);
      cells[i] = cell;
      outputs[i] = sigmoid(so[i] + bo[i]) * tanh(cell);
    }
    std::memcpy(c_out + begin, cells, count * sizeof(float));
    std::memcpy(h_out + begin, outputs, count * sizeof(float));
  }
}

using GruKernel = void (*)(const Gru& in, std::size_t units, float* y);
using LstmKernel = void (*)(const Lstm& in, std::size_t units, float* h_out, float* c_out);

// The bodies once for every instruction set; the compiler vectorises them (SSE2 or NEON without a target).
#define ONNXCOMP_GRU(name) \
  inline void name(const Gru& in, std::size_t units, float* y) { gru_body(in, units, y); }
#define ONNXCOMP_LSTM(name)                                                             \
  inline void name(const Lstm& in, std::size_t units, float* h_out, float* c_out) {     \
    lstm_body(in, units, h_out, c_out);                                                 \
  }

ONNXCOMP_GRU(gru_portable)
ONNXCOMP_LSTM(lstm_portable)
#if defined(ONNXCOMP_X86)
ONNXCOMP_TARGET(ONNXCOMP_AVX2) ONNXCOMP_GRU(gru_avx2)
ONNXCOMP_TARGET(ONNXCOMP_AVX2) ONNXCOMP_LSTM(lstm_avx2)
ONNXCOMP_TARGET(ONNXCOMP_AVX512) ONNXCOMP_GRU(gru_avx512)
ONNXCOMP_TARGET(ONNXCOMP_AVX512) ONNXCOMP_LSTM(lstm_avx512)
#endif
#undef ONNXCOMP_GRU
#undef ONNXCOMP_LSTM

inline GruKernel choose_gru(Isa isa) {
#if defined(ONNXCOMP_X86)
  if (isa == Isa::kAvx512 || isa == Isa::kVnni) return gru_avx512;
  if (isa == Isa::kAvx2) return gru_avx2;
#endif
  (void)isa;
  return gru_portable;
}

inline LstmKernel choose_lstm(Isa isa) {
#if defined(ONNXCOMP_X86)
  if (isa == Isa::kAvx512 || isa == Isa::kVnni) return lstm_avx512;
  if (isa == Isa::kAvx2) return lstm_avx2;
#endif
  (void)isa;
  return lstm_portable;
}

}  // namespace onnxcomp::gates
