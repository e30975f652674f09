// One step of a GRU or an LSTM whose products are accumulated from changes of its inputs and of its state.
//
// The state that is handed on is the exact one; only what the weights see of it lags behind, by the threshold at most.

#pragma once

#include "kernels/gates.h"
#include "ort_delta_rows.h"

namespace onnxcomp {

// What both have in common. Inputs: X [1, B, I], the states, thresholds of X and H, W [I, Gates H], R [H, Gates H],
// biases. `States` of the inputs, from 1 on, are states, H first; Op::kXLast and Op::kHLast say where those are.
template <typename Op, typename Rows, std::size_t Gates, std::size_t States, std::size_t Biases>
class DeltaCell : public OpBase<Op, 3 + States + 2 * Rows::Matrix::kInputs + Biases> {
 public:
  using Matrix = typename Rows::Matrix;
  static constexpr std::size_t kThresholds = 1 + States, kW = kThresholds + 2, kR = kW + Matrix::kInputs;
  static constexpr std::size_t kBias = kR + Matrix::kInputs, kOutputs = States;

  static ort::ElementType input_type(std::size_t index) {
    if (index >= kW && index < kBias) return Matrix::type((index - kW) % Matrix::kInputs);
    return ort::ElementType::kFloat;
  }
  static ort::ElementType output_type(std::size_t) { return ort::ElementType::kFloat; }
  ort::Status* check_attributes() const { return nullptr; }

  // Outputs follow the states in their order.
  static ort::Status* infer_shape(const ort::Api* api, ort::ShapeInferContext* context) {
    for (std::size_t i = 0; i < States; ++i) ONNXCOMP_RETURN_IF_ERROR(infer_state(api, context, i, 1 + i));
    return nullptr;
  }

 protected:
  using Base = DeltaCell;

  DeltaCell(const ort::Api* api, const ort::KernelInfo* info)
      : DeltaCell::OpBase(api),
        rows_(exact_rows<Rows>(choose_isa())),
        select_(delta_rows::choose_select(choose_isa())) {
    this->ask_for_huge_pages(api, info);
  }

  struct Job {
    Tensor in[DeltaCell::kInputs];
    Matrix w, r;
    std::size_t batch, inputs, units;
    float* out[States];

    const float* bias(std::size_t i) const { return in[kBias + i].template as<float>(); }
    // State or output `i`, counted from H on, of row `b`.
    const float* state(std::size_t i, std::size_t b) const {
      return in[1 + i].template as<float>() + b * length(i);
    }
    float* next(std::size_t i, std::size_t b) const { return out[i] + b * length(i); }
    // Of a row.
    std::size_t length(std::size_t i) const {
      return 1 + i == Op::kXLast ? inputs : 1 + i >= Op::kSums ? Gates * units : units;
    }

    Problem bind() {
      if (const Problem problem = w.bind(in + kW)) return problem;
      if (const Problem problem = r.bind(in + kR)) return problem;
      inputs = w.rows;
      units = r.rows;
      if (w.columns != Gates * units || r.columns != Gates * units) {
        return "W and R have to have as many columns as there are units, for each gate";
      }
      const Shape& xs = in[0].shape;
      if (xs.rank != 3 || xs.dims[0] != 1) return "X has to have three axes, the first of length 1";
      batch = static_cast<std::size_t>(xs.dims[1]);
      if (!is(xs, inputs)) return "the last axis of X has to be as long as the first of W";
      for (std::size_t i = 0; i < States; ++i) {
        if (!is(in[1 + i].shape, length(i))) return "a state has to have three axes: 1, the batch, and its own length";
      }
      for (std::size_t i = 0; i < 2; ++i) {
        const Shape& shape = in[kThresholds + i].shape;
        if (shape.rank > 1 || shape.count() != 1) return "a threshold has to be a single value";
      }
      for (std::size_t i = 0; i < Biases; ++i) {
        const Shape& shape = in[kBias + i].shape;
        if (shape.rank != 1 || shape.count() != Gates * units) {
          return "a bias has to hold one value for each column of W";
        }
      }
      return nullptr;
    }
    bool is(const Shape& shape, std::size_t length) const {
      return shape.rank == 3 && shape.dims[0] == 1 && shape.dims[1] == static_cast<std::int64_t>(batch) &&
             shape.dims[2] == static_cast<std::int64_t>(length);
    }
  };

  // Calls step(x, h, b) for each row, with what is sent of its inputs and of its state.
  template <typename Step>
  ort::Status* run(ort::KernelContext* context, Job* job, const Step& step) const {
    ONNXCOMP_RETURN_IF_ERROR(this->read(context, job->in));
    if (const Problem problem = job->bind()) return this->fail(problem);
    for (std::size_t i = 0; i < States; ++i) {
      ONNXCOMP_RETURN_IF_ERROR(make_state(this->api_, context, i, job->in[1 + i].shape, &job->out[i]));
    }
    Scratch scratch(DeltaStream::scratch(job->inputs) + DeltaStream::scratch(job->units));
    if (!scratch.ok()) return out_of_memory(this->api_);
    DeltaStream x{}, h{};
    for (DeltaStream* stream : {&x, &h}) {
      stream->k = stream == &x ? job->inputs : job->units;
      stream->values = scratch.template take<float>(stream->k);
      stream->rows = scratch.template take<std::uint32_t>(stream->k);
    }
    for (std::size_t b = 0; b < job->batch; ++b) {
      x.x = job->in[0].template as<float>() + b * job->inputs;
      h.x = job->state(0, b);
      x.last = job->state(Op::kXLast - 1, b);
      h.last = job->state(Op::kHLast - 1, b);
      x.last_out = job->next(Op::kXLast - 1, b);
      h.last_out = job->next(Op::kHLast - 1, b);
      x.select(select_, job->in[kThresholds].template as<float>(), 0);
      h.select(select_, job->in[kThresholds + 1].template as<float>(), 0);
      ONNXCOMP_RETURN_IF_ERROR(step(&x, &h, b));
    }
    return nullptr;
  }

  Rows rows_;
  delta_rows::Select select_;
};

// X, H, last X and H, sums of X and of H [1, B, 3 H], thresholds, W, R, bias of X and of H [3 H]
// -> H, last X and H, both sums.
template <typename Name, typename Rows>
class DeltaGru : public DeltaCell<DeltaGru<Name, Rows>, Rows, 3, 5, 2> {
 public:
  static constexpr const char* kName = Name::kName;
  static constexpr std::size_t kXLast = 2, kHLast = 3, kSums = 4;

  DeltaGru(const ort::Api* api, const ort::KernelInfo* info)
      : DeltaGru::Base(api, info), cell_(gates::choose_gru(choose_isa())) {}

  ort::Status* compute(ort::KernelContext* context) const {
    typename DeltaGru::Base::Job job;
    return this->run(context, &job, [&](DeltaStream* x, DeltaStream* h, std::size_t b) -> ort::Status* {
      const std::size_t n = 3 * job.units;
      // The sums of the input and of the state start afresh each on its own.
      const auto sums = [&](std::size_t i, DeltaStream* stream, const auto& w) -> RowSums<Rows> {
        const float* base = job.state(i, b);
        const bool afresh = !stream->changes.finite || !delta_rows::all_finite(base, n);
        if (afresh) stream->restart();
        return {afresh ? nullptr : base, job.next(i, b), n, {{&w, stream->kept()}}, 1};
      };
      const RowSums<Rows> both[] = {sums(kSums - 1, x, job.w), sums(kSums, h, job.r)};
      ONNXCOMP_RETURN_IF_ERROR(accumulate(this->api_, context, this->rows_, both, 2));
      cell_({both[0].y, both[1].y, job.bias(0), job.bias(1), job.state(0, b)}, job.units, job.next(0, b));
      return nullptr;
    });
  }

 private:
  gates::GruKernel cell_;
};

// X, H, C, last X and H, sums [1, B, 4 H], thresholds, W, R, bias [4 H] -> H, C, last X and H, sums.
template <typename Name, typename Rows>
class DeltaLstm : public DeltaCell<DeltaLstm<Name, Rows>, Rows, 4, 5, 1> {
 public:
  static constexpr const char* kName = Name::kName;
  static constexpr std::size_t kXLast = 3, kHLast = 4, kSums = 5;

  DeltaLstm(const ort::Api* api, const ort::KernelInfo* info)
      : DeltaLstm::Base(api, info), cell_(gates::choose_lstm(choose_isa())) {}

  ort::Status* compute(ort::KernelContext* context) const {
    typename DeltaLstm::Base::Job job;
    return this->run(context, &job, [&](DeltaStream* x, DeltaStream* h, std::size_t b) -> ort::Status* {
      const std::size_t n = 4 * job.units;
      const float* base = job.state(kSums - 1, b);
      const bool afresh = !x->changes.finite || !h->changes.finite || !delta_rows::all_finite(base, n);
      if (afresh) {
        x->restart();
        h->restart();
      }
      const RowSums<Rows> sums{
          afresh ? nullptr : base, job.next(kSums - 1, b), n, {{&job.w, x->kept()}, {&job.r, h->kept()}}, 2};
      ONNXCOMP_RETURN_IF_ERROR(accumulate(this->api_, context, this->rows_, &sums, 1));
      cell_({sums.y, job.bias(0), job.state(1, b)}, job.units, job.next(0, b), job.next(1, b));
      return nullptr;
    });
  }

 private:
  gates::LstmKernel cell_;
};

}  // namespace onnxcomp
