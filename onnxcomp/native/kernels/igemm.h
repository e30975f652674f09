// Convolution of some pixels: products of weights with the inputs under a window, which are read where they lie.
//
// The inputs of a pixel are `runs` pieces of `length` floats, each with an address of its own: one for every tap of the
// window, or for every row of taps where few channels make those short. Columns of the weight lie in panels of one to
// three vectors. Every sum is a single chain that starts with the bias and takes the products in the order of the
// weight's rows, whatever tile of pixels it is in: a pixel has the same bits whether it is computed alone or with all
// others.

#pragma once

#include <algorithm>
#include <utility>

#include "isa.h"

namespace onnxcomp::igemm {

inline constexpr std::size_t kMostVectors = 3;

struct Tile {
  const float* const* x;  // [rows, runs]
  std::size_t runs, length;
  std::size_t offset;  // of a group's channels within a pixel
  const float* w;      // a panel: [runs * length, floats of the panel]
  const float* bias;   // as many as the panel is wide
  float* y;
  std::size_t y_pitch, columns;  // columns beyond those of the panel's that count are not written
};
using Kernel = void (*)(const Tile& tile);

// How an instruction set does it: floats a vector, pixels a tile for panels of 1, 2, 3 vectors, and their kernels for
// 1 pixel, 2, and so on.
struct Form {
  std::size_t lanes;
  std::size_t rows[kMostVectors + 1];
  const Kernel* kernels[kMostVectors + 1];
};

// Panels for a number of vectors: pairs, and first one of three if it is odd.
struct Panels {
  std::size_t vectors;

  explicit Panels(std::size_t all) : vectors(all) {}
  std::size_t count() const { return vectors == 1 ? 1 : vectors / 2; }
  std::size_t begin(std::size_t panel) const { return panel == 0 ? 0 : 2 * panel + vectors % 2; }
  std::size_t width(std::size_t panel) const {
    return vectors == 1 ? 1 : panel == 0 && vectors % 2 == 1 ? 3 : 2;
  }
};

// The weight [k, groups * columns]; each group has columns of its own.
struct Weight {
  std::size_t k, groups, columns;  // of a group

  std::size_t vectors(const Form& form) const { return (columns + form.lanes - 1) / form.lanes; }
  std::size_t padded(const Form& form) const { return vectors(form) * form.lanes; }
  std::size_t floats(const Form& form) const { return groups * k * padded(form); }
};

// Zeros fill up the last vector.
inline void pack(const Weight& shape, const Form& form, const float* w, float* packed) {
  const std::size_t row = shape.groups * shape.columns;
  const Panels panels(shape.vectors(form));
  for (std::size_t g = 0; g < shape.groups; ++g) {
    for (std::size_t p = 0; p < panels.count(); ++p) {
      const std::size_t begin = panels.begin(p) * form.lanes, wide = panels.width(p) * form.lanes;
      const std::size_t real = std::min(wide, shape.columns - begin);
      for (std::size_t i = 0; i < shape.k; ++i, packed += wide) {
        std::memcpy(packed, w + i * row + g * shape.columns + begin, real * sizeof(float));
        std::memset(packed + real, 0, (wide - real) * sizeof(float));
      }
    }
  }
}

inline void pack_bias(const Weight& shape, const Form& form, const float* bias, float* packed) {
  const std::size_t wide = shape.padded(form);
  std::memset(packed, 0, shape.groups * wide * sizeof(float));
  for (std::size_t g = 0; g < shape.groups; ++g) {
    std::memcpy(packed + g * wide, bias + g * shape.columns, shape.columns * sizeof(float));
  }
}

#if defined(__GNUC__) || defined(__clang__)

template <std::size_t kLanes, std::size_t kRows, std::size_t kVectors>
ONNXCOMP_INLINE void tile_body(const Tile& t) {
  ONNXCOMP_IN_ORDER
  typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4), may_alias));
  Vector sums[kRows][kVectors];
#pragma GCC unroll 16
  for (std::size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (std::size_t v = 0; v < kVectors; ++v) sums[r][v] = reinterpret_cast<const Vector*>(t.bias)[v];
  }
  constexpr std::size_t kAhead = 4096;  // bytes: at the border of a page the hardware's prefetcher stops
  const Vector* w = reinterpret_cast<const Vector*>(t.w);
  const std::size_t runs = t.runs, length = t.length;
  for (std::size_t run = 0; run < runs; ++run) {
    const float* x[kRows];
#pragma GCC unroll 16
    for (std::size_t r = 0; r < kRows; ++r) x[r] = t.x[r * runs + run] + t.offset;
    for (std::size_t i = 0; i < length; ++i, w += kVectors) {
      Vector row[kVectors];
#pragma GCC unroll 3
      for (std::size_t v = 0; v < kVectors; ++v) {
        row[v] = w[v];
        ONNXCOMP_PREFETCH(w + v + kAhead / sizeof(Vector));
      }
#pragma GCC unroll 16
      for (std::size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
        for (std::size_t v = 0; v < kVectors; ++v) sums[r][v] += row[v] * x[r][i];
      }
    }
  }
  if (t.columns >= kVectors * kLanes) {
#pragma GCC unroll 16
    for (std::size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
      for (std::size_t v = 0; v < kVectors; ++v) {
        reinterpret_cast<Vector*>(t.y + r * t.y_pitch)[v] = sums[r][v];
      }
    }
    return;
  }
#pragma GCC unroll 16
  for (std::size_t r = 0; r < kRows; ++r) {
    float all[kVectors * kLanes];
#pragma GCC unroll 3
    for (std::size_t v = 0; v < kVectors; ++v) reinterpret_cast<Vector*>(all)[v] = sums[r][v];
    std::memcpy(t.y + r * t.y_pitch, all, t.columns * sizeof(float));
  }
}

#define ONNXCOMP_DEFINE(target, name, lanes, rows1, rows2, rows3)                                                  \
  template <std::size_t kRows, std::size_t kVectors>                                                               \
  target inline void name##_tile(const Tile& tile) {                                                               \
    tile_body<lanes, kRows, kVectors>(tile);                                                                       \
  }                                                                                                                \
  template <std::size_t kVectors, std::size_t... kLess>                                                            \
  inline const Kernel* name##_kernels(std::index_sequence<kLess...>) {                                             \
    static constexpr Kernel kAll[] = {name##_tile<kLess + 1, kVectors>...};                                        \
    return kAll;                                                                                                   \
  }                                                                                                                \
  inline Form name##_form() {                                                                                      \
    return {lanes,                                                                                                 \
            {0, rows1, rows2, rows3},                                                                              \
            {nullptr, name##_kernels<1>(std::make_index_sequence<rows1>()),                                        \
             name##_kernels<2>(std::make_index_sequence<rows2>()),                                                 \
             name##_kernels<3>(std::make_index_sequence<rows3>())}};                                               \
  }

#if defined(ONNXCOMP_X86)
ONNXCOMP_DEFINE(, portable, 4, 6, 4, 3)
ONNXCOMP_DEFINE(ONNXCOMP_TARGET(ONNXCOMP_AVX2), avx2, 8, 10, 6, 4)
ONNXCOMP_DEFINE(ONNXCOMP_TARGET(ONNXCOMP_AVX512), avx512, 16, 12, 12, 8)
#else
ONNXCOMP_DEFINE(, portable, 4, 8, 8, 8)
#endif
#undef ONNXCOMP_DEFINE

#else

template <std::size_t kVectors>
void plain_tile(const Tile& t) {
  for (std::size_t j = 0; j < t.columns && j < 4 * kVectors; ++j) {
    float sum = t.bias[j];
    for (std::size_t i = 0; i < t.runs * t.length; ++i) {
      sum += t.x[i / t.length][t.offset + i % t.length] * t.w[i * 4 * kVectors + j];
    }
    t.y[j] = sum;
  }
}

inline Form portable_form() {
  static constexpr Kernel kAll[] = {plain_tile<1>, plain_tile<2>, plain_tile<3>};
  return {4, {0, 1, 1, 1}, {nullptr, kAll, kAll + 1, kAll + 2}};
}

#endif

inline Form choose(Isa isa) {
#if defined(ONNXCOMP_X86)
  if (isa == Isa::kAvx512 || isa == Isa::kVnni) return avx512_form();
  if (isa == Isa::kAvx2) return avx2_form();
#endif
  (void)isa;
  return portable_form();
}

// Pixels as they are prepared: addresses [count, runs].
struct Inputs {
  const float* const* x;
  std::size_t count, runs, length;
};

// Panels [begin, end) of all groups' panels, for all pixels. y [count, y_pitch] has room for whole vectors in every row
// if there is one group.
inline void multiply(const Weight& shape, const Form& form, const float* packed, const float* bias, const Inputs& in,
                     float* y, std::size_t y_pitch, std::size_t begin, std::size_t end) {
  const Panels panels(shape.vectors(form));
  for (std::size_t all = begin; all < end; ++all) {
    const std::size_t group = all / panels.count(), panel = all % panels.count();
    const std::size_t column = panels.begin(panel) * form.lanes, vectors = panels.width(panel);
    const std::size_t most = form.rows[vectors], tiles = (in.count + most - 1) / most;
    const float* w = packed + (group * shape.padded(form) + column) * shape.k;
    const std::size_t columns = shape.groups == 1 ? vectors * form.lanes : shape.columns - column;
    for (std::size_t i = 0, row = 0; i < tiles; ++i) {
      // As even as can be: a tile of few pixels takes nearly the time of a full one, most of which is for the weight.
      const std::size_t rows = in.count / tiles + (i < in.count % tiles);
      form.kernels[vectors][rows - 1]({in.x + row * in.runs, in.runs, in.length, group * in.length, w,
                                       bias + group * shape.padded(form) + column,
                                       y + row * y_pitch + group * shape.columns + column, y_pitch, columns});
      row += rows;
    }
  }
}

}  // namespace onnxcomp::igemm
