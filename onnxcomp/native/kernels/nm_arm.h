// The kernels of nm.h for aarch64, four columns a vector. Included from there.

#pragma once

#if defined(ONNXCOMP_ARM)

namespace onnxcomp::nm {

inline float32x4_t load_values(const float* p) { return vld1q_f32(p); }
inline float32x4_t load_values(const std::uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

// The bytes of four columns, one a lane.
inline uint32x4_t load_bits(const std::uint8_t* places) {
  std::uint32_t four;
  std::memcpy(&four, places, sizeof(four));
  const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(four));
  return vmovl_u16(vget_low_u16(vmovl_u8(bytes)));
}

template <typename Value>
void put(const Weight<Value>& w, const float32x4_t* sums, std::size_t block, float* y) {
  float all[kColumns];
  for (std::size_t p = 0; p < 4; ++p) vst1q_f32(all + 4 * p, sums[p]);
  const std::size_t begin = block * kColumns, columns = std::min(kColumns, w.columns - begin);
  for (std::size_t j = 0; j < columns; ++j) {
    const float scale = w.scale == nullptr ? 1.0f : w.scale[begin + j];
    y[begin + j] = all[j] * scale + w.bias[begin + j];
  }
}

template <typename Value>
void float_neon(const Weight<Value>& w, const Inputs<float>& in, float* y, std::size_t y_step, std::size_t begin,
                std::size_t end) {
  const uint32x4_t three = vdupq_n_u32(3), spread = vdupq_n_u32(0x04040404), bytes = vdupq_n_u32(0x03020100);
  for (std::size_t b = begin; b < end; ++b) {
    for (std::size_t r = 0; r < in.count; ++r) {
      const Value* values = w.block_values(b);
      const std::uint8_t* places = w.block_places(b);
      const float* x = in.x + r * in.length;
      float32x4_t sums[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
      for (std::size_t q = 0; q < w.quads; ++q, x += quad_inputs(w.kept), places += kColumns) {
        uint32x4_t bits[4];
        for (std::size_t p = 0; p < 4; ++p) bits[p] = load_bits(places + 4 * p);
        for (std::size_t s = 0; s < kQuad; ++s, values += kColumns) {
          const uint8x16_t group = vreinterpretq_u8_f32(vld1q_f32(x + s / w.kept * 4));
          for (std::size_t p = 0; p < 4; ++p) {
            const uint32x4_t select = vmlaq_u32(bytes, vandq_u32(bits[p], three), spread);
            const uint8x16_t chosen = vqtbl1q_u8(group, vreinterpretq_u8_u32(select));
            sums[p] = vfmaq_f32(sums[p], vreinterpretq_f32_u8(chosen), load_values(values + 4 * p));
            bits[p] = vshrq_n_u32(bits[p], 2);
          }
        }
      }
      put(w, sums, b, y + r * y_step);
    }
  }
}

ONNXCOMP_TARGET(ONNXCOMP_DOTPROD)
inline void int8_dotprod(const Weight<std::int8_t>& w, const Inputs<std::uint8_t>& in, float* y, std::size_t y_step,
                         std::size_t begin, std::size_t end) {
  const std::size_t span_quads = kSpan / quad_inputs(w.kept);
  const uint32x4_t origin = vdupq_n_u32(w.kept == 1 ? 0x0c080400 : 0x04040000);
  for (std::size_t b = begin; b < end; ++b) {
    for (std::size_t r = 0; r < in.count; ++r) {
      const std::int8_t* values = w.block_values(b);
      const std::uint8_t* places = w.block_places(b);
      const std::uint8_t* x = in.x + r * in.length;
      float32x4_t sums[4] = {vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)};
      for (std::size_t q = 0; q < w.quads;) {
        const float step = in.steps[r * in.spans + q / span_quads];
        int32x4_t products[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
        for (const std::size_t stop = std::min(q + span_quads, w.quads); q < stop; ++q) {
          const uint8x8_t first = vld1_u8(x);
          const uint8x16_t groups = w.kept == 1 ? vld1q_u8(x) : vcombine_u8(first, first);
          for (std::size_t p = 0; p < 4; ++p) {
            const uint32x4_t bits = load_bits(places + 4 * p);
            const uint32x4_t pairs = vandq_u32(vorrq_u32(bits, vshlq_n_u32(bits, 12)), vdupq_n_u32(0x000f000f));
            const uint32x4_t each = vandq_u32(vorrq_u32(pairs, vshlq_n_u32(pairs, 6)), vdupq_n_u32(0x03030303));
            const uint8x16_t chosen = vqtbl1q_u8(groups, vreinterpretq_u8_u32(vorrq_u32(each, origin)));
            products[p] = vdotq_s32(products[p], vreinterpretq_s8_u8(chosen), vld1q_s8(values + 16 * p));
          }
          x += quad_inputs(w.kept);
          values += kQuad * kColumns;
          places += kColumns;
        }
        for (std::size_t p = 0; p < 4; ++p) sums[p] = vfmaq_n_f32(sums[p], vcvtq_f32_s32(products[p]), step);
      }
      put(w, sums, b, y + r * y_step);
    }
  }
}

}  // namespace onnxcomp::nm

#endif
