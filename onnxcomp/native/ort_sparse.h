// The sparse ops, each over the formats of ort_formats.h.

#pragma once

#include "ort_formats.h"
#include "ort_op.h"

namespace onnxcomp {

// Columns a task: whole cache lines, and a part of y that stays in the first-level cache. A row of W is read in runs of
// this length, and shorter ones waste bandwidth (1024 cost fp32 a fifth); the runtime does not tell how many threads it
// has.
inline constexpr std::size_t kBlock = 2048;
// Neurons a task of a gated MLP's first half.
inline constexpr std::size_t kNeurons = 128;

static_assert(kBlock <= rows_int8::kMaxColumns && kBlock <= rows_int4::kMaxColumns, "kernels keep it on the stack");

// y = sum of the kept rows of w. `scratch` has Rows::scratch(k) bytes left.
template <typename Rows>
ort::Status* sum_rows(const ort::Api* api, const ort::KernelContext* context, const Rows& format,
                      const typename Rows::Matrix& w, const Kept& kept, Scratch* scratch, float* y) {
  const typename Rows::Prepared prepared = format.prepare(kept, w.rows, scratch);
  const auto work = [&](std::size_t i) {
    const std::size_t begin = i * kBlock;
    format.sum(w, prepared, begin, begin + kBlock < w.columns ? kBlock : w.columns - begin, y + begin);
  };
  return parallel_for(api, context, (w.columns + kBlock - 1) / kBlock, kept.count * w.columns >= kSerial, work);
}

// Inputs whose kept elements are held between zeros at once.
inline constexpr std::size_t kJointInputs = 256;

inline std::size_t joint_scratch(std::size_t batch, std::size_t k) {
  return sorted_scratch(k) + Scratch::size(std::min(batch, kJointInputs) * k * sizeof(float));
}

// y [batch, columns]: for each input the sum of the kept rows of w, read once for many. `list(b, values, rows, kept)`
// lists what input b keeps; `alone(b)` does an input that cannot be rounded. `scratch` has joint_scratch(batch, k) left.
template <typename Rows, typename List, typename Alone>
ort::Status* sum_rows_jointly(const ort::Api* api, const ort::KernelContext* context, const Rows& format,
                              const typename Rows::Matrix& w, std::size_t batch, Scratch* scratch, float* y,
                              const List& list, const Alone& alone) {
  const std::size_t k = w.rows, blocks = (w.columns + kBlock - 1) / kBlock;
  float* values = scratch->take<float>(k);
  std::uint32_t* rows = scratch->take<std::uint32_t>(k);
  float* x = scratch->take<float>(std::min(batch, kJointInputs) * k);
  for (std::size_t first = 0; first < batch; first += kJointInputs) {
    const std::size_t count = std::min(batch - first, kJointInputs);
    std::size_t total = 0;
    bool sound[kJointInputs];
    std::memset(x, 0, count * k * sizeof(float));
    for (std::size_t b = 0; b < count; ++b) {
      Kept kept;
      ONNXCOMP_RETURN_IF_ERROR(list(first + b, values, rows, &kept));
      sound[b] = can_round_any(kept);
      if (!sound[b]) continue;
      for (std::size_t i = 0; i < kept.count; ++i) x[b * k + kept.rows[i]] = kept.values[i];
      total += kept.count;
    }
    const auto work = [&](std::size_t i) {
      const std::size_t b = i / blocks * Rows::kJoint, begin = i % blocks * kBlock;
      format.sum_joint(w, {x + b * k, k, std::min(count - b, Rows::kJoint)}, begin, std::min(kBlock, w.columns - begin),
                       y + (first + b) * w.columns + begin);
    };
    const std::size_t tasks = blocks * ((count + Rows::kJoint - 1) / Rows::kJoint);
    ONNXCOMP_RETURN_IF_ERROR(parallel_for(api, context, tasks, total * w.columns >= kSerial, work));
    for (std::size_t b = 0; b < count; ++b) {
      if (!sound[b]) ONNXCOMP_RETURN_IF_ERROR(alone(first + b));
    }
  }
  return nullptr;
}

// Selections: how an op finds the inputs that count.

struct AboveThreshold {
  static constexpr std::size_t kInputs = 1;
  explicit AboveThreshold(const ort::Api* api, const ort::KernelInfo* info)
      : keep_above(choose_keep_above(choose_isa())), one_sided(attribute(api, info, "one_sided", 0) != 0) {}

  Problem check_attributes() const { return nullptr; }
  Problem bind(const Tensor* in, std::size_t k) {
    const Shape& shape = in[0].shape;
    if (shape.rank > 1 || (shape.count() != 1 && shape.count() != k)) {
      return "threshold has to be a scalar or one value for each element that it is compared with";
    }
    threshold = in[0].template as<float>();
    step = shape.count() == 1 ? 0 : 1;
    return nullptr;
  }
  std::size_t keep(const float* x, std::size_t k, float* values, std::uint32_t* rows) const {
    return keep_above(x, k, threshold, step, one_sided, values, rows);
  }

  KeepAbove keep_above;
  bool one_sided;
  const float* threshold = nullptr;
  std::size_t step = 0;
};

struct Largest {
  static constexpr std::size_t kInputs = 0;
  explicit Largest(const ort::Api* api, const ort::KernelInfo* info) : count(attribute(api, info, "k", 0)) {}

  Problem check_attributes() const { return count < 1 ? "attribute k has to be at least 1" : nullptr; }
  Problem bind(const Tensor*, std::size_t) { return nullptr; }
  std::size_t keep(const float* x, std::size_t k, float* values, std::uint32_t* rows) const {
    return keep_largest(x, k, static_cast<std::size_t>(count), values, rows);
  }

  std::int64_t count;
};

// Copies the kept elements of `batch` rows of x between zeros; returns how many there are.
template <typename Selection>
std::size_t mask(const Selection& selection, const float* x, std::size_t batch, std::size_t k, float* values,
                 std::uint32_t* rows, float* masked) {
  std::size_t total = 0;
  std::memset(masked, 0, batch * k * sizeof(float));
  for (std::size_t b = 0; b < batch; ++b) {
    const std::size_t kept = selection.keep(x + b * k, k, values, rows);
    for (std::size_t i = 0; i < kept; ++i) masked[b * k + rows[i]] = values[i];
    total += kept;
  }
  return total;
}

// y [batch, columns] = x [batch, k] @ w.
inline ort::Status* multiply_dense(const ort::Api* api, const ort::KernelContext* context, dense_f32::Kernel kernel,
                                   const dense_f32::Weight& w, const float* x, std::size_t k, std::size_t batch,
                                   std::size_t columns, float* y) {
  constexpr std::size_t kStep = dense_f32::kColumns;
  const auto work = [&](std::size_t i) {
    const std::size_t begin = i * kStep, count = begin + kStep < columns ? kStep : columns - begin;
    kernel({w.data + begin * w.column_step, w.row_step, w.column_step}, x, k, batch, count, y + begin, columns);
  };
  return parallel_for(api, context, (columns + kStep - 1) / kStep, true, work);
}

// X [..., K], the weight [K, N], inputs of the selection -> Y [..., N].
template <typename Name, typename Rows, typename Selection>
class SparseMatMul
    : public OpBase<SparseMatMul<Name, Rows, Selection>, 1 + Rows::Matrix::kInputs + Selection::kInputs> {
 public:
  using Matrix = typename Rows::Matrix;
  static constexpr const char* kName = Name::kName;

  SparseMatMul(const ort::Api* api, const ort::KernelInfo* info)
      : SparseMatMul::OpBase(api), rows_(choose_isa(), this->exact(api, info)), selection_(api, info) {
    this->ask_for_huge_pages(api, info);
  }

  static ort::ElementType input_type(std::size_t index) {
    return index >= 1 && index <= Matrix::kInputs ? Matrix::type(index - 1) : ort::ElementType::kFloat;
  }

  ort::Status* check_attributes() const {
    const Problem problem = selection_.check_attributes();
    return problem == nullptr ? nullptr : this->fail(problem);
  }

  ort::Status* compute(ort::KernelContext* context) const {
    Tensor in[SparseMatMul::kInputs];
    ONNXCOMP_RETURN_IF_ERROR(this->read(context, in));
    Matrix w;
    if (const Problem problem = w.bind(in + 1)) return this->fail(problem);
    const std::size_t k = w.rows;
    const Shape& shape = in[0].shape;
    if (shape.last() != static_cast<std::int64_t>(k)) {
      return this->fail("the last axis of X has to be as long as the first of W");
    }
    Selection selection = selection_;
    if (const Problem problem = selection.bind(in + 1 + Matrix::kInputs, k)) return this->fail(problem);
    float* y = nullptr;
    ONNXCOMP_RETURN_IF_ERROR(make_output(this->api_, context, shape, w.columns, &y));

    const float* x = in[0].template as<float>();
    const std::size_t batch = shape.count(0, shape.rank - 1);
    if constexpr (Rows::kDense) {
      if (batch > 1) {
        Scratch scratch(sorted_scratch(k) + Scratch::size(batch * k * sizeof(float)));
        if (!scratch.ok()) return out_of_memory(this->api_);
        float* values = scratch.template take<float>(k);
        std::uint32_t* rows = scratch.template take<std::uint32_t>(k);
        float* masked = scratch.template take<float>(batch * k);
        if (dense_f32::pays(mask(selection, x, batch, k, values, rows, masked), batch, k)) {
          const dense_f32::Weight weight{w.data, w.columns, 1};
          return multiply_dense(this->api_, context, rows_.dense, weight, masked, k, batch, w.columns, y);
        }
      }
    }
    const auto one = [&](std::size_t b) -> ort::Status* {
      Scratch scratch(sorted_scratch(k) + Rows::scratch(k));
      if (!scratch.ok()) return out_of_memory(this->api_);
      float* values = scratch.take<float>(k);
      std::uint32_t* rows = scratch.take<std::uint32_t>(k);
      const Kept kept{values, rows, selection.keep(x + b * k, k, values, rows)};
      return sum_rows(this->api_, context, rows_, w, kept, &scratch, y + b * w.columns);
    };
    if constexpr (Rows::kJoint > 0) {
      if (batch > 1 && rows_.has_joint()) {
        Scratch scratch(joint_scratch(batch, k));
        if (!scratch.ok()) return out_of_memory(this->api_);
        const auto list = [&](std::size_t b, float* values, std::uint32_t* rows, Kept* kept) -> ort::Status* {
          *kept = {values, rows, selection.keep(x + b * k, k, values, rows)};
          return nullptr;
        };
        return sum_rows_jointly(this->api_, context, rows_, w, batch, &scratch, y, list, one);
      }
    }
    for (std::size_t b = 0; b < batch; ++b) ONNXCOMP_RETURN_IF_ERROR(one(b));
    return nullptr;
  }

  static ort::Status* infer_shape(const ort::Api* api, ort::ShapeInferContext* context) {
    return infer_product(api, context, 0, 1, Matrix::kColumnsFactor);
  }

 private:
  Rows rows_;
  Selection selection_;
};

// X [..., K], inputs of the selection -> X with zeros in place of what is not selected. In front of dense products it does
// what the ops above do.
template <typename Name, typename Selection>
class Keep : public OpBase<Keep<Name, Selection>, 1 + Selection::kInputs> {
 public:
  static constexpr const char* kName = Name::kName;

  Keep(const ort::Api* api, const ort::KernelInfo* info) : Keep::OpBase(api), selection_(api, info) {}

  static ort::ElementType input_type(std::size_t) { return ort::ElementType::kFloat; }

  ort::Status* check_attributes() const {
    const Problem problem = selection_.check_attributes();
    return problem == nullptr ? nullptr : this->fail(problem);
  }

  ort::Status* compute(ort::KernelContext* context) const {
    Tensor in[Keep::kInputs];
    ONNXCOMP_RETURN_IF_ERROR(this->read(context, in));
    const Shape& shape = in[0].shape;
    if (shape.rank == 0) return this->fail("X has to have an axis");
    const std::size_t k = static_cast<std::size_t>(shape.last()), batch = shape.count(0, shape.rank - 1);
    Selection selection = selection_;
    if (const Problem problem = selection.bind(in + 1, k)) return this->fail(problem);
    float* y = nullptr;
    ONNXCOMP_RETURN_IF_ERROR(make_output(this->api_, context, shape, k, &y));
    Scratch scratch(sorted_scratch(k));
    if (!scratch.ok()) return out_of_memory(this->api_);
    float* values = scratch.take<float>(k);
    std::uint32_t* rows = scratch.take<std::uint32_t>(k);
    mask(selection, in[0].template as<float>(), batch, k, values, rows, y);
    return nullptr;
  }

  static ort::Status* infer_shape(const ort::Api* api, ort::ShapeInferContext* context) {
    return infer_product(api, context, 0, 0, 1);
  }

 private:
  Selection selection_;
};

// A [..., F], X [..., K], U [F, K], D [F, N], threshold -> Y [..., N].
template <typename Name, typename Dots, typename Rows>
class GatedMlp
    : public OpBase<GatedMlp<Name, Dots, Rows>, 3 + Dots::Matrix::kInputs + Rows::Matrix::kInputs> {
 public:
  using Up = typename Dots::Matrix;
  using Down = typename Rows::Matrix;
  static constexpr const char* kName = Name::kName;
  static constexpr std::size_t kUp = 2, kDown = kUp + Up::kInputs, kThreshold = kDown + Down::kInputs;

  GatedMlp(const ort::Api* api, const ort::KernelInfo* info)
      : GatedMlp::OpBase(api),
        dots_(choose_isa(), this->exact(api, info)),
        rows_(choose_isa(), this->exact(api, info)),
        selection_(api, info) {
    this->ask_for_huge_pages(api, info);
  }

  static ort::ElementType input_type(std::size_t index) {
    if (index >= kUp && index < kDown) return Up::type(index - kUp);
    if (index >= kDown && index < kThreshold) return Down::type(index - kDown);
    return ort::ElementType::kFloat;
  }

  ort::Status* check_attributes() const { return nullptr; }

  ort::Status* compute(ort::KernelContext* context) const {
    Tensor in[GatedMlp::kInputs];
    ONNXCOMP_RETURN_IF_ERROR(this->read(context, in));
    Up up;
    Down down;
    if (const Problem problem = up.bind(in + kUp)) return this->fail(problem);
    if (const Problem problem = down.bind(in + kDown)) return this->fail(problem);
    const std::size_t neurons = up.rows, k = up.columns;
    const Shape &as = in[0].shape, &xs = in[1].shape;
    if (down.rows != neurons) return this->fail("U and D have to have as many rows");
    if (as.last() != static_cast<std::int64_t>(neurons)) return this->fail("the last axis of A has to be as long as U");
    if (xs.last() != static_cast<std::int64_t>(k)) {
      return this->fail("the last axis of X has to be as long as a row of U");
    }
    const std::size_t batch = as.count(0, as.rank - 1);
    if (xs.count(0, xs.rank - 1) != batch) return this->fail("A and X have to have as many rows");
    AboveThreshold selection = selection_;
    if (const Problem problem = selection.bind(in + kThreshold, neurons)) return this->fail(problem);
    float* y = nullptr;
    ONNXCOMP_RETURN_IF_ERROR(make_output(this->api_, context, as, down.columns, &y));

    if constexpr (Rows::kDense) {
      if (batch > 1) {
        const std::size_t size = batch * neurons;
        Scratch scratch(sorted_scratch(neurons) + 2 * Scratch::size(size * sizeof(float)));
        if (!scratch.ok()) return out_of_memory(this->api_);
        float* values = scratch.template take<float>(neurons);
        std::uint32_t* rows = scratch.template take<std::uint32_t>(neurons);
        float* gates = scratch.template take<float>(size);
        float* hidden = scratch.template take<float>(size);
        const std::size_t kept = mask(selection, in[0].template as<float>(), batch, neurons, values, rows, gates);
        if (dense_f32::pays(kept, batch, neurons)) {
          const dense_f32::Weight turned{up.data, 1, k};
          ONNXCOMP_RETURN_IF_ERROR(multiply_dense(this->api_, context, rows_.dense, turned,
                                                  in[1].template as<float>(), k, batch, neurons, hidden));
          for (std::size_t i = 0; i < size; ++i) hidden[i] *= gates[i];
          return multiply_dense(this->api_, context, rows_.dense, {down.data, down.columns, 1}, hidden, neurons, batch,
                                down.columns, y);
        }
      }
    }
    // The first half for one input: where its kept neurons' values are.
    const auto half = [&](std::size_t b, Scratch* scratch, float* hidden, std::uint32_t* rows, Kept* kept) {
      return hide(context, up, selection, in[0].template as<float>() + b * neurons, in[1].template as<float>() + b * k,
                  scratch, hidden, rows, kept);
    };
    const auto one = [&](std::size_t b) -> ort::Status* {
      Scratch scratch(sorted_scratch(neurons) + hide_scratch(neurons, k) + Rows::scratch(neurons));
      if (!scratch.ok()) return out_of_memory(this->api_);
      float* hidden = scratch.template take<float>(neurons);
      std::uint32_t* rows = scratch.template take<std::uint32_t>(neurons);
      Kept kept;
      ONNXCOMP_RETURN_IF_ERROR(half(b, &scratch, hidden, rows, &kept));
      return sum_rows(this->api_, context, rows_, down, kept, &scratch, y + b * down.columns);
    };
    if constexpr (Rows::kJoint > 0) {
      if (batch > 1 && rows_.has_joint()) {
        Scratch scratch(joint_scratch(batch, neurons));
        if (!scratch.ok()) return out_of_memory(this->api_);
        const auto list = [&](std::size_t b, float* hidden, std::uint32_t* rows, Kept* kept) -> ort::Status* {
          Scratch more(hide_scratch(neurons, k));
          return more.ok() ? half(b, &more, hidden, rows, kept) : out_of_memory(this->api_);
        };
        return sum_rows_jointly(this->api_, context, rows_, down, batch, &scratch, y, list, one);
      }
    }
    for (std::size_t b = 0; b < batch; ++b) ONNXCOMP_RETURN_IF_ERROR(one(b));
    return nullptr;
  }

  static ort::Status* infer_shape(const ort::Api* api, ort::ShapeInferContext* context) {
    return infer_product(api, context, 0, kDown, Down::kColumnsFactor);
  }

 private:
  static std::size_t hide_scratch(std::size_t neurons, std::size_t k) {
    return Scratch::size(neurons * sizeof(float)) + Dots::scratch(k);
  }

  // Values of the neurons whose gates are kept, each times its gate.
  ort::Status* hide(const ort::KernelContext* context, const Up& up, const AboveThreshold& selection, const float* a,
                    const float* x, Scratch* scratch, float* hidden, std::uint32_t* rows, Kept* out) const {
    const std::size_t neurons = up.rows, k = up.columns;
    float* gates = scratch->take<float>(neurons);
    const Kept kept{gates, rows, selection.keep(a, neurons, gates, rows)};
    const typename Dots::Prepared prepared = dots_.prepare(x, k, scratch);
    const auto work = [&](std::size_t i) {
      const std::size_t begin = i * kNeurons;
      const std::size_t count = begin + kNeurons < kept.count ? kNeurons : kept.count - begin;
      dots_.multiply(up, prepared, {gates + begin, rows + begin, count}, hidden + begin);
    };
    *out = {hidden, rows, kept.count};
    return parallel_for(this->api_, context, (kept.count + kNeurons - 1) / kNeurons, kept.count * k >= kSerial, work);
  }

  Dots dots_;
  Rows rows_;
  AboveThreshold selection_;
};

}  // namespace onnxcomp
