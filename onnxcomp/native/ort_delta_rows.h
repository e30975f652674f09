// Products that are accumulated from changes (delta networks, Neil et al. 2017): only those rows of the weight are read
// whose input has changed by more than a threshold since it was last sent. What the sums are rounded by adds up as in a
// random walk, to about 2e-5 of the largest sum in 100 000 steps.
//
// States may be updated in place: each output may be the buffer of the state that it follows. A NaN or an infinity in a
// sum would never leave it, since changes are only ever added. So wherever a change or a sum is not finite, the row is
// started afresh: its sums from all of its inputs, and all of them count as sent.

#pragma once

#include "kernels/delta_rows.h"
#include "ort_sparse.h"

namespace onnxcomp {

// The output `index`, fp32.
inline ort::Status* make_state(const ort::Api* api, ort::KernelContext* context, std::size_t index, const Shape& shape,
                               float** y) {
  ort::Value* output = nullptr;
  ONNXCOMP_RETURN_IF_ERROR(call<ort::KernelContext_GetOutput>(
      api, context, index, static_cast<const std::int64_t*>(shape.dims), shape.rank, &output));
  void* raw = nullptr;
  ONNXCOMP_RETURN_IF_ERROR(call<ort::GetTensorMutableData>(api, output, &raw));
  *y = static_cast<float*>(raw);
  return nullptr;
}

// Gives an output the shape of an input.
inline ort::Status* infer_state(const ort::Api* api, ort::ShapeInferContext* context, std::size_t output,
                                std::size_t input) {
  ort::TensorTypeAndShapeInfo* like = nullptr;
  ONNXCOMP_RETURN_IF_ERROR(call<ort::ShapeInferContext_GetInputTypeShape>(api, context, input, &like));
  Shape shape;
  ONNXCOMP_RETURN_IF_ERROR(read_shape(api, like, &shape));
  const char* names[kMaxRank] = {};
  ONNXCOMP_RETURN_IF_ERROR(call<ort::GetSymbolicDimensions>(api, like, static_cast<const char**>(names), shape.rank));
  // The runtime shows an unknown rank as rank 0, and would take an axis without length and name for one of length -1.
  if (shape.rank == 0) return nullptr;
  for (std::size_t i = 0; i < shape.rank; ++i) {
    if (shape.dims[i] < 0 && (names[i] == nullptr || names[i][0] == 0)) return nullptr;
  }
  return call<ort::ShapeInferContext_SetOutputTypeShape>(api, context, output,
                                                         static_cast<const ort::TensorTypeAndShapeInfo*>(like));
}

// One row of inputs: what of it is sent. `values` and `rows` have room for k.
struct DeltaStream {
  const float *x, *last;
  float* last_out;
  std::size_t k;
  float* values;
  std::uint32_t* rows;
  delta_rows::Changes changes = {0, true};

  static std::size_t scratch(std::size_t k) { return sorted_scratch(k); }

  void select(delta_rows::Select kernel, const float* t, std::size_t t_step) {
    changes = kernel(x, last, k, t, t_step, last_out, values, rows);
  }
  // All that was sent instead of the changes.
  void restart() {
    std::memcpy(values, last_out, k * sizeof(float));
    for (std::size_t i = 0; i < k; ++i) rows[i] = static_cast<std::uint32_t>(i);
    changes.count = k;
  }
  Kept kept() const { return {values, rows, changes.count}; }
};

// y = base + the sums of some rows of at most two weights with as many columns; without base if that is null.
template <typename Rows>
struct RowSums {
  struct Term {
    const typename Rows::Matrix* w;
    Kept kept;
  };
  const float* base;
  float* y;
  std::size_t columns;
  Term terms[2];
  std::size_t count;  // of terms

  std::size_t blocks() const { return (columns + kBlock - 1) / kBlock; }
  std::size_t work() const {
    std::size_t rows = 0;
    for (std::size_t i = 0; i < count; ++i) rows += terms[i].kept.count;
    return rows * columns;
  }
  // What is new is summed apart and then added: that costs little, and rounds less than adding rows to a large sum.
  void add_block(const Rows& format, std::size_t block) const {
    alignas(64) float part[kBlock];
    const std::size_t begin = block * kBlock, size = std::min(kBlock, columns - begin);
    float* to = y + begin;
    if (base == nullptr) {
      std::memset(to, 0, size * sizeof(float));
    } else if (base != y) {
      std::memmove(to, base + begin, size * sizeof(float));
    }
    for (std::size_t i = 0; i < count; ++i) {
      const Term& term = terms[i];
      if (term.kept.count == 0) continue;
      format.sum(*term.w, format.prepare(term.kept, term.w->rows, nullptr), begin, size, part);
      for (std::size_t j = 0; j < size; ++j) to[j] += part[j];
    }
  }
};

// `parts` sums at once.
template <typename Rows>
ort::Status* accumulate(const ort::Api* api, const ort::KernelContext* context, const Rows& format,
                        const RowSums<Rows>* sums, std::size_t parts) {
  std::size_t tasks = 0, work = 0;
  for (std::size_t i = 0; i < parts; ++i) {
    tasks += sums[i].blocks();
    work += sums[i].work();
  }
  return parallel_for(api, context, tasks, work >= kSerial, [&](std::size_t task) {
    const RowSums<Rows>* part = sums;
    for (; task >= part->blocks(); ++part) task -= part->blocks();
    part->add_block(format, task);
  });
}

// A format with its exact kernels, which need no memory to prepare. Changes rounded to 8 bits would leave the sums off
// for ever, unless `last` took in what was sent instead of what there was; all that for a seventh of the time.
template <typename Rows>
Rows exact_rows(Isa isa) {
  return Rows(isa, true);
}

// X [..., K], last like X, sum [..., N], threshold and step [1] or [K], the weight [K, N]
// -> sum [..., N], last like X.
template <typename Name, typename Rows>
class DeltaMatMul : public OpBase<DeltaMatMul<Name, Rows>, 5 + Rows::Matrix::kInputs> {
 public:
  using Matrix = typename Rows::Matrix;
  static constexpr const char* kName = Name::kName;
  static constexpr std::size_t kLast = 1, kSum = 2, kThreshold = 3, kStep = 4, kWeight = 5, kOutputs = 2;

  DeltaMatMul(const ort::Api* api, const ort::KernelInfo* info)
      : DeltaMatMul::OpBase(api),
        rows_(exact_rows<Rows>(choose_isa())),
        select_(delta_rows::choose_select(choose_isa())),
        quantize_(delta_rows::choose_quantize(choose_isa())) {
    this->ask_for_huge_pages(api, info);
  }

  static ort::ElementType input_type(std::size_t index) {
    return index >= kWeight ? Matrix::type(index - kWeight) : ort::ElementType::kFloat;
  }
  static ort::ElementType output_type(std::size_t) { return ort::ElementType::kFloat; }
  ort::Status* check_attributes() const { return nullptr; }

  ort::Status* compute(ort::KernelContext* context) const {
    Tensor in[DeltaMatMul::kInputs];
    ONNXCOMP_RETURN_IF_ERROR(this->read(context, in));
    Job job{};
    if (const Problem problem = job.bind(in)) return this->fail(problem);
    ONNXCOMP_RETURN_IF_ERROR(make_state(this->api_, context, 0, in[kSum].shape, &job.y));
    ONNXCOMP_RETURN_IF_ERROR(make_state(this->api_, context, 1, in[kLast].shape, &job.last_out));
    const std::size_t together = Rows::kDense ? kJointInputs : 1;
    for (std::size_t first = 0; first < job.batch; first += together) {
      ONNXCOMP_RETURN_IF_ERROR(several(context, job, first, std::min(together, job.batch - first)));
    }
    return nullptr;
  }

  static ort::Status* infer_shape(const ort::Api* api, ort::ShapeInferContext* context) {
    ONNXCOMP_RETURN_IF_ERROR(infer_state(api, context, 0, kSum));
    return infer_state(api, context, 1, kLast);
  }

 private:
  struct Job {
    Matrix w;
    const float *x, *last, *sum, *threshold, *step;
    std::size_t threshold_step, step_step, batch;
    bool quantized;
    float *y, *last_out;

    Problem bind(const Tensor* in) {
      if (const Problem problem = w.bind(in + kWeight)) return problem;
      const Shape &xs = in[0].shape, &ls = in[kLast].shape, &ss = in[kSum].shape;
      if (xs.last() != static_cast<std::int64_t>(w.rows)) {
        return "the last axis of X has to be as long as the first of W";
      }
      if (ls.last() != xs.last() || !same_rows(ls, xs)) return "last has to have the shape of X";
      if (ss.last() != static_cast<std::int64_t>(w.columns) || !same_rows(ss, xs)) {
        return "sum has to have the shape of X with the columns of W as its last axis";
      }
      if (!one_or_each(in[kThreshold].shape, w.rows)) return "threshold has to hold one value or one for each row of W";
      if (!one_or_each(in[kStep].shape, w.rows)) return "step has to hold one value or one for each row of W";
      x = in[0].as<float>();
      last = in[kLast].as<float>();
      sum = in[kSum].as<float>();
      threshold = in[kThreshold].as<float>();
      step = in[kStep].as<float>();
      threshold_step = in[kThreshold].shape.count() == 1 ? 0 : 1;
      step_step = in[kStep].shape.count() == 1 ? 0 : 1;
      quantized = step_step == 1 || *step > 0.0f;
      batch = xs.count(0, xs.rank - 1);
      return nullptr;
    }
    static bool same_rows(const Shape& a, const Shape& b) {
      return a.rank == b.rank && std::equal(a.dims, a.dims + a.rank - 1, b.dims);
    }
    static bool one_or_each(const Shape& shape, std::size_t k) {
      return shape.rank <= 1 && (shape.count() == 1 || shape.count() == k);
    }
  };

  // Sends what has changed in input `b`. Returns whether its sums are to be started afresh.
  bool send(const Job& job, std::size_t b, float* rounded, DeltaStream* stream) const {
    const std::size_t k = job.w.rows, n = job.w.columns;
    stream->x = job.x + b * k;
    stream->last = job.last + b * k;
    stream->last_out = job.last_out + b * k;
    if (job.quantized) {
      quantize_(stream->x, k, job.step, job.step_step, rounded);
      stream->x = rounded;
    }
    stream->select(select_, job.threshold, job.threshold_step);
    const bool afresh = !stream->changes.finite || !delta_rows::all_finite(job.sum + b * n, n);
    if (afresh) stream->restart();
    return afresh;
  }

  // Inputs [first, first + count). All of the weight is multiplied where they need most of it together.
  ort::Status* several(ort::KernelContext* context, const Job& job, std::size_t first, std::size_t count) const {
    const std::size_t k = job.w.rows, n = job.w.columns;
    const std::size_t held = count == 1 ? 0 : count * k;
    Scratch scratch(DeltaStream::scratch(k) + Scratch::size(k * sizeof(float)) + Scratch::size(held * sizeof(float)));
    if (!scratch.ok()) return out_of_memory(this->api_);
    DeltaStream stream{};
    stream.k = k;
    stream.values = scratch.template take<float>(k);
    stream.rows = scratch.template take<std::uint32_t>(k);
    float* rounded = scratch.template take<float>(k);
    const auto one = [&](std::size_t b, bool afresh, const Kept& kept) {
      const RowSums<Rows> sums{afresh ? nullptr : job.sum + b * n, job.y + b * n, n, {{&job.w, kept}}, 1};
      return accumulate(this->api_, context, rows_, &sums, 1);
    };
    if (count == 1) {
      const bool afresh = send(job, first, rounded, &stream);
      return one(first, afresh, stream.kept());
    }
    float* sent = scratch.template take<float>(held);
    std::memset(sent, 0, held * sizeof(float));
    bool afresh[kJointInputs];
    std::size_t total = 0;
    for (std::size_t b = 0; b < count; ++b) {
      afresh[b] = send(job, first + b, rounded, &stream);
      for (std::size_t i = 0; i < stream.changes.count; ++i) sent[b * k + stream.rows[i]] = stream.values[i];
      total += stream.changes.count;
    }
    if constexpr (Rows::kDense) {
      if (dense_f32::pays(total, count, k)) return all_rows(context, job, sent, afresh, first, count);
    }
    const float nothing = 0.0f;
    for (std::size_t b = 0; b < count; ++b) {
      const Kept kept{stream.values, stream.rows,
                      keep_above(sent + b * k, k, &nothing, 0, false, stream.values, stream.rows)};
      ONNXCOMP_RETURN_IF_ERROR(one(first + b, afresh[b], kept));
    }
    return nullptr;
  }

  ort::Status* all_rows(ort::KernelContext* context, const Job& job, const float* sent, const bool* afresh,
                        std::size_t first, std::size_t count) const {
    const std::size_t n = job.w.columns;
    Scratch scratch(Scratch::size(count * n * sizeof(float)));
    if (!scratch.ok()) return out_of_memory(this->api_);
    float* product = scratch.template take<float>(count * n);
    const dense_f32::Weight weight{job.w.data, n, 1};
    ONNXCOMP_RETURN_IF_ERROR(
        multiply_dense(this->api_, context, rows_.dense, weight, sent, job.w.rows, count, n, product));
    for (std::size_t b = 0; b < count; ++b) {
      const float* base = job.sum + (first + b) * n;
      float* y = job.y + (first + b) * n;
      for (std::size_t j = 0; j < n; ++j) y[j] = (afresh[b] ? 0.0f : base[j]) + product[b * n + j];
    }
    return nullptr;
  }

  Rows rows_;
  delta_rows::Select select_;
  delta_rows::Quantize quantize_;
};

}  // namespace onnxcomp
