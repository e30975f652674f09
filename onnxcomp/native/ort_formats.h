// The formats that a weight may come in: which inputs of a node they are, what shapes those have, and which kernels sum
// the rows of such a matrix or multiply them with an input.
//
// A format of rows sums some rows of [K, N]: `bind` checks the inputs, `prepare` does once what is the same for all
// columns, `sum` does a block of columns, `sum_joint` one for several inputs. A format of dots multiplies one input with
// some rows of [F, K].

#pragma once

#include "kernels/dense_f32.h"
#include "kernels/dots.h"
#include "kernels/joint.h"
#include "kernels/rows_f32.h"
#include "kernels/rows_int4.h"
#include "kernels/rows_int8.h"
#include "ort_kernel.h"

namespace onnxcomp {

inline constexpr std::int64_t kGroup = static_cast<std::int64_t>(rows_int4::kGroup);

// Errors of `bind`, null if all is well. `K` and `N` in them are the axes of the weight.
using Problem = const char*;

// ---- fp32: one input, [K, N] ----------------------------------------------------------------------------------------

struct MatrixF32 {
  static constexpr std::size_t kInputs = 1;
  static constexpr std::int64_t kColumnsFactor = 1;
  static ort::ElementType type(std::size_t) { return ort::ElementType::kFloat; }

  std::size_t rows = 0, columns = 0;
  const float* data = nullptr;

  Problem bind(const Tensor* in) {
    if (in[0].shape.rank != 2) return "a weight has to have two axes";
    rows = static_cast<std::size_t>(in[0].shape.dims[0]);
    columns = static_cast<std::size_t>(in[0].shape.dims[1]);
    data = in[0].as<float>();
    return nullptr;
  }
};

struct RowsF32 {
  using Matrix = MatrixF32;
  static constexpr bool kDense = true;  // has a product for batches that need most of the weight
  static constexpr std::size_t kJoint = 0;
  struct Prepared {
    Kept kept;
  };

  RowsF32(Isa isa, bool) : kernel(rows_f32::choose(isa)), dense(dense_f32::choose(isa)) {}

  static std::size_t scratch(std::size_t) { return 0; }
  Prepared prepare(const Kept& kept, std::size_t, Scratch*) const { return {kept}; }
  void sum(const Matrix& w, const Prepared& p, std::size_t begin, std::size_t columns, float* y) const {
    kernel(w.data + begin, w.columns, p.kept, y, columns);
  }

  rows_f32::Kernel kernel;
  dense_f32::Kernel dense;
};

struct DotsF32 {
  using Matrix = MatrixF32;
  struct Prepared {
    const float* x;
  };

  DotsF32(Isa isa, bool) : kernel(dots::choose_exact<dots::F32>(isa)) {}

  static std::size_t scratch(std::size_t) { return 0; }
  Prepared prepare(const float* x, std::size_t, Scratch*) const { return {x}; }
  void multiply(const Matrix& w, const Prepared& p, const Kept& kept, float* out) const {
    kernel({w.data}, p.x, w.columns, kept, out);
  }

  dots::Exact<dots::F32> kernel;
};

// ---- int8: the matrix, and one scale a column (rows) or a row (dots) ------------------------------------------------

struct MatrixInt8 {
  static constexpr std::size_t kInputs = 2;
  static constexpr std::int64_t kColumnsFactor = 1;
  static ort::ElementType type(std::size_t index) {
    return index == 0 ? ort::ElementType::kInt8 : ort::ElementType::kFloat;
  }

  std::size_t rows = 0, columns = 0;
  const std::int8_t* data = nullptr;
  const float* scale = nullptr;

  Problem bind(const Tensor* in, std::size_t scaled_axis) {
    if (in[0].shape.rank != 2) return "a weight has to have two axes";
    if (in[1].shape.rank != 1 || in[1].shape.dims[0] != in[0].shape.dims[scaled_axis]) {
      return scaled_axis == 1 ? "the scale has to hold one value for each column of the weight"
                              : "the scale of U has to hold one value for each row of U";
    }
    rows = static_cast<std::size_t>(in[0].shape.dims[0]);
    columns = static_cast<std::size_t>(in[0].shape.dims[1]);
    data = in[0].as<std::int8_t>();
    scale = in[1].as<float>();
    return nullptr;
  }
};

// Room for the inputs in order of exponent.
inline std::size_t sorted_scratch(std::size_t k) {
  return Scratch::size(k * sizeof(float)) + Scratch::size(k * sizeof(std::uint32_t));
}

inline Kept take_sorted(const Kept& kept, std::size_t k, Scratch* scratch) {
  float* values = scratch->take<float>(k);
  std::uint32_t* rows = scratch->take<std::uint32_t>(k);
  sort_by_exponent(kept, values, rows);
  return {values, rows, kept.count};
}

struct RowsInt8 {
  struct Matrix : MatrixInt8 {
    Problem bind(const Tensor* in) { return MatrixInt8::bind(in, 1); }
  };
  static constexpr bool kDense = false;
  static constexpr std::size_t kJoint = joint::kMostInt8;  // inputs that there may be a kernel for at once
  struct Prepared {
    Kept kept;
    rows_int8::Rounded rounded;
    bool round;
  };

  RowsInt8(Isa isa, bool stay_exact)
      : exact(rows_int8::choose_exact(isa)),
        rounded(stay_exact ? nullptr : rows_int8::choose_rounded(isa)),
        several(stay_exact ? nullptr : joint::choose_int8(isa)) {}

  bool has_joint() const { return several != nullptr; }
  void sum_joint(const Matrix& w, const joint::Inputs& in, std::size_t begin, std::size_t columns, float* y) const {
    several({w.data + begin, w.columns, w.scale + begin}, in, y, w.columns, columns);
  }

  static std::size_t scratch(std::size_t k) {
    return sorted_scratch(k) + Scratch::size(rows_int8::rounded_bytes(k));
  }
  Prepared prepare(const Kept& kept, std::size_t k, Scratch* scratch) const {
    if (rounded == nullptr) return {kept, {}, false};
    const Kept sorted = take_sorted(kept, k, scratch);
    void* memory = scratch->take<std::uint64_t>((rows_int8::rounded_bytes(k) + 7) / 8);
    if (!can_round(sorted)) return {kept, {}, false};
    return {sorted, rows_int8::round(sorted, k, memory), true};
  }
  void sum(const Matrix& w, const Prepared& p, std::size_t begin, std::size_t columns, float* y) const {
    const rows_int8::Weight part{w.data + begin, w.columns, w.scale + begin};
    if (p.round) {
      rounded(part, p.rounded, y, columns);
    } else {
      exact(part, p.kept, y, columns);
    }
  }

  rows_int8::Exact exact;
  rows_int8::Summed rounded;
  joint::Int8 several;
};

// The rounded form of x, or x itself where it holds something that is not finite.
struct PreparedInput {
  const float* x;
  dots::Input rounded;
  bool round;
};

inline PreparedInput prepare_input(const float* x, std::size_t k, bool round, bool split, Scratch* scratch) {
  PreparedInput prepared{x, {}, false};
  if (round) {
    void* memory = scratch->take<char>(dots::input_bytes(k));
    prepared.round = dots::round(x, k, split, memory, &prepared.rounded);
  }
  return prepared;
}

struct DotsInt8 {
  struct Matrix : MatrixInt8 {
    Problem bind(const Tensor* in) { return MatrixInt8::bind(in, 0); }
  };
  using Prepared = PreparedInput;

  DotsInt8(Isa isa, bool stay_exact)
      : exact(dots::choose_exact<dots::Int8>(isa)),
        rounded(stay_exact ? nullptr : dots::choose_rounded<dots::Int8>(isa)) {}

  static std::size_t scratch(std::size_t k) { return Scratch::size(dots::input_bytes(k)); }
  Prepared prepare(const float* x, std::size_t k, Scratch* scratch) const {
    return prepare_input(x, k, rounded != nullptr, false, scratch);
  }
  void multiply(const Matrix& w, const Prepared& p, const Kept& kept, float* out) const {
    const dots::Int8 weight{w.data, w.scale};
    if (p.round) {
      rounded(weight, p.rounded, w.columns, kept, out);
    } else {
      exact(weight, p.x, w.columns, kept, out);
    }
  }

  dots::Exact<dots::Int8> exact;
  dots::Rounded<dots::Int8> rounded;
};

// ---- int4: packed pairs [K, N/2], scales [K, N/32] (fp32 or half), zero points [] or [K, N/32] ----------------------

struct MatrixInt4 {
  static constexpr std::size_t kInputs = 3;
  static constexpr std::int64_t kColumnsFactor = 2;
  static ort::ElementType type(std::size_t index) {
    return index == 1 ? ort::ElementType::kAny : ort::ElementType::kUint8;
  }

  std::size_t rows = 0, columns = 0, groups = 0, zero_stride = 0;
  const std::uint8_t *data = nullptr, *zero = nullptr;
  const void* scale = nullptr;
  bool half = false;

  Problem bind(const Tensor* in) {
    const Shape &w = in[0].shape, &s = in[1].shape, &z = in[2].shape;
    if (w.rank != 2) return "a weight has to have two axes";
    if (w.dims[1] * 2 % kGroup != 0) return "the columns of a 4-bit weight have to be a multiple of 32";
    const std::int64_t count = w.dims[1] * 2 / kGroup;
    if (!s.is(w.dims[0], count)) return "the scale of a 4-bit weight has to hold one value for each row and 32 columns";
    if (in[1].type != ort::ElementType::kFloat && in[1].type != ort::ElementType::kFloat16) {
      return "the scale of a 4-bit weight has to be float or float16";
    }
    if (z.count() != 1 && !z.is(w.dims[0], count)) {
      return "the zero point of a 4-bit weight has to be a scalar or have the shape of the scale";
    }
    rows = static_cast<std::size_t>(w.dims[0]);
    columns = static_cast<std::size_t>(w.dims[1] * 2);
    groups = static_cast<std::size_t>(count);
    zero_stride = z.count() == 1 ? 0 : groups;
    data = in[0].as<std::uint8_t>();
    scale = in[1].data;
    zero = in[2].as<std::uint8_t>();
    half = in[1].type == ort::ElementType::kFloat16;
    return nullptr;
  }
};

struct RowsInt4 {
  using Matrix = MatrixInt4;
  static constexpr bool kDense = false;
  static constexpr std::size_t kJoint = joint::kMostInt4;
  struct Prepared {
    Kept kept;
    bool round;
  };

  RowsInt4(Isa isa, bool stay_exact)
      : exact_f32(rows_int4::choose_exact<float>(isa)), exact_f16(rows_int4::choose_exact<std::uint16_t>(isa)) {
    if (!stay_exact) {
      rounded_f32 = rows_int4::choose_rounded<float>(isa);
      rounded_f16 = rows_int4::choose_rounded<std::uint16_t>(isa);
      several_f32 = joint::choose_int4<float>(isa);
      several_f16 = joint::choose_int4<std::uint16_t>(isa);
    }
  }

  bool has_joint() const { return several_f32 != nullptr; }
  void sum_joint(const Matrix& w, const joint::Inputs& in, std::size_t begin, std::size_t columns, float* y) const {
    if (w.half) {
      several_f16(part<std::uint16_t>(w, begin), in, y, w.columns, columns / kGroup);
    } else {
      several_f32(part<float>(w, begin), in, y, w.columns, columns / kGroup);
    }
  }

  static std::size_t scratch(std::size_t k) { return sorted_scratch(k); }
  Prepared prepare(const Kept& kept, std::size_t k, Scratch* scratch) const {
    if (rounded_f32 == nullptr) return {kept, false};
    const Kept sorted = take_sorted(kept, k, scratch);
    return can_round(sorted) ? Prepared{sorted, true} : Prepared{kept, false};
  }
  void sum(const Matrix& w, const Prepared& p, std::size_t begin, std::size_t columns, float* y) const {
    if (w.half) {
      (p.round ? rounded_f16 : exact_f16)(part<std::uint16_t>(w, begin), p.kept, y, columns / kGroup);
    } else {
      (p.round ? rounded_f32 : exact_f32)(part<float>(w, begin), p.kept, y, columns / kGroup);
    }
  }

  template <typename Scale>
  static rows_int4::Weight<Scale> part(const Matrix& w, std::size_t begin) {
    const std::size_t group = begin / kGroup;
    return {w.data + begin / 2, w.columns / 2, static_cast<const Scale*>(w.scale) + group,
            w.zero_stride == 0 ? w.zero : w.zero + group, w.zero_stride, w.groups};
  }

  rows_int4::Kernel<float> exact_f32, rounded_f32 = nullptr;
  rows_int4::Kernel<std::uint16_t> exact_f16, rounded_f16 = nullptr;
  joint::Int4<float> several_f32 = nullptr;
  joint::Int4<std::uint16_t> several_f16 = nullptr;
};

struct DotsInt4 {
  using Matrix = MatrixInt4;
  using Prepared = PreparedInput;

  DotsInt4(Isa isa, bool stay_exact)
      : exact_f32(dots::choose_exact<dots::Int4<float>>(isa)),
        exact_f16(dots::choose_exact<dots::Int4<std::uint16_t>>(isa)) {
    if (!stay_exact) {
      rounded_f32 = dots::choose_rounded<dots::Int4<float>>(isa);
      rounded_f16 = dots::choose_rounded<dots::Int4<std::uint16_t>>(isa);
    }
  }

  static std::size_t scratch(std::size_t k) { return Scratch::size(dots::input_bytes(k)); }
  Prepared prepare(const float* x, std::size_t k, Scratch* scratch) const {
    return prepare_input(x, k, rounded_f32 != nullptr, true, scratch);
  }
  void multiply(const Matrix& w, const Prepared& p, const Kept& kept, float* out) const {
    if (w.half) {
      run<std::uint16_t>(w, p, kept, out, exact_f16, rounded_f16);
    } else {
      run<float>(w, p, kept, out, exact_f32, rounded_f32);
    }
  }

  template <typename Scale>
  static void run(const Matrix& w, const Prepared& p, const Kept& kept, float* out,
                  dots::Exact<dots::Int4<Scale>> exact, dots::Rounded<dots::Int4<Scale>> rounded) {
    const dots::Int4<Scale> weight{w.data, static_cast<const Scale*>(w.scale), w.zero, w.zero_stride};
    if (p.round) {
      rounded(weight, p.rounded, w.columns, kept, out);
    } else {
      exact(weight, p.x, w.columns, kept, out);
    }
  }

  dots::Exact<dots::Int4<float>> exact_f32;
  dots::Exact<dots::Int4<std::uint16_t>> exact_f16;
  dots::Rounded<dots::Int4<float>> rounded_f32 = nullptr;
  dots::Rounded<dots::Int4<std::uint16_t>> rounded_f16 = nullptr;
};

}  // namespace onnxcomp
