// Products with N:M weights, in the blocks of kernels/nm.h.

#pragma once

#include "kernels/nm.h"
#include "ort_op.h"

namespace onnxcomp {

// Floats or halves.
struct NmFloat {
  using X = float;
  static constexpr std::size_t kInputs = 3;  // values, places, bias
  static ort::ElementType type(std::size_t index) {
    return index == 0 ? ort::ElementType::kAny : index == 1 ? ort::ElementType::kUint8 : ort::ElementType::kFloat;
  }

  explicit NmFloat(Isa isa) : single(nm::choose_float<float>(isa)), half(nm::choose_float<std::uint16_t>(isa)) {}

  const char* check(const Tensor* in) const {
    const ort::ElementType type = in[0].type;
    return type == ort::ElementType::kFloat || type == ort::ElementType::kFloat16 ? nullptr
                                                                                  : "values have to be float or float16";
  }
  static bool ready(std::size_t k, std::size_t length) { return k == length; }
  static std::size_t spans(std::size_t) { return 0; }
  void prepare(const float* x, std::size_t k, std::size_t length, float* out, float*) const {
    std::memcpy(out, x, k * sizeof(float));
    std::memset(out + k, 0, (length - k) * sizeof(float));
  }
  void multiply(const Tensor* in, std::size_t kept, std::size_t quads, std::size_t columns, const nm::Inputs<float>& x,
                float* y, std::size_t begin, std::size_t end) const {
    const auto with = [&](const auto* values, auto kernel) {
      kernel({values, in[1].as<std::uint8_t>(), in[2].as<float>(), nullptr, quads, columns, kept}, x, y, columns, begin,
             end);
    };
    in[0].type == ort::ElementType::kFloat ? with(in[0].as<float>(), single) : with(in[0].as<std::uint16_t>(), half);
  }

  nm::Kernel<float, float> single;
  nm::Kernel<std::uint16_t, float> half;
};

struct NmInt8 {
  using X = std::uint8_t;
  static constexpr std::size_t kInputs = 4;  // values, places, bias, scale
  static ort::ElementType type(std::size_t index) {
    return index == 0 ? ort::ElementType::kInt8 : index == 1 ? ort::ElementType::kUint8 : ort::ElementType::kFloat;
  }

  explicit NmInt8(Isa isa) : kernel(nm::choose_int8(isa)) {}

  const char* check(const Tensor* in) const {
    return in[3].shape.rank == 1 && in[3].shape.dims[0] == in[2].shape.dims[0]
               ? nullptr
               : "scale has to hold one value for each column, like bias";
  }
  static bool ready(std::size_t, std::size_t) { return false; }
  static std::size_t spans(std::size_t length) { return (length + nm::kSpan - 1) / nm::kSpan; }
  void prepare(const float* x, std::size_t k, std::size_t length, std::uint8_t* out, float* steps) const {
    kernel.round(x, k, length, kernel.flip, out, steps);
  }
  void multiply(const Tensor* in, std::size_t kept, std::size_t quads, std::size_t columns,
                const nm::Inputs<std::uint8_t>& x, float* y, std::size_t begin, std::size_t end) const {
    const nm::Weight<std::int8_t> w{in[0].as<std::int8_t>(), in[1].as<std::uint8_t>(), in[2].as<float>(),
                                    in[3].as<float>(),       quads,                    columns, kept};
    kernel.multiply(w, x, y, columns, begin, end);
  }

  nm::Int8 kernel;
};

// X [..., K], values [blocks, quads, 64], places [blocks, quads, 16], bias [N] -> Y [..., N]; attribute `kept`, 1 or 2 of 4.
template <typename Name, typename Format>
class NmMatMul : public OpBase<NmMatMul<Name, Format>, 1 + Format::kInputs> {
 public:
  static constexpr const char* kName = Name::kName;

  NmMatMul(const ort::Api* api, const ort::KernelInfo* info)
      : NmMatMul::OpBase(api), format_(choose_isa()), kept_(attribute(api, info, "kept", 0)) {
    this->ask_for_huge_pages(api, info);
  }

  static ort::ElementType input_type(std::size_t index) {
    return index == 0 ? ort::ElementType::kFloat : Format::type(index - 1);
  }

  ort::Status* check_attributes() const {
    return kept_ == 1 || kept_ == 2 ? nullptr : this->fail("attribute kept has to be 1 or 2");
  }

  ort::Status* compute(ort::KernelContext* context) const {
    Tensor in[NmMatMul::kInputs];
    ONNXCOMP_RETURN_IF_ERROR(this->read(context, in));
    const Shape &xs = in[0].shape, &vs = in[1].shape, &ps = in[2].shape, &bs = in[3].shape;
    if (xs.rank == 0) return this->fail("X has to have an axis");
    if (vs.rank != 3 || ps.rank != 3 || bs.rank != 1) return this->fail("values and places have three axes, bias one");
    const std::size_t kept = static_cast<std::size_t>(kept_), k = static_cast<std::size_t>(xs.last());
    const std::size_t columns = static_cast<std::size_t>(bs.dims[0]);
    const std::size_t blocks = (columns + nm::kColumns - 1) / nm::kColumns, quads = nm::quads_of(k, kept);
    const auto has = [&](const Shape& shape, std::size_t last) {
      return shape.dims[0] == static_cast<std::int64_t>(blocks) && shape.dims[1] == static_cast<std::int64_t>(quads) &&
             shape.dims[2] == static_cast<std::int64_t>(last);
    };
    if (!has(vs, nm::kColumns * nm::kQuad) || !has(ps, nm::kColumns)) {
      return this->fail("values and places have to hold one block for every 16 columns, of as many quads as X takes");
    }
    if (const char* problem = format_.check(in + 1)) return this->fail(problem);
    float* y = nullptr;
    ONNXCOMP_RETURN_IF_ERROR(make_output(this->api_, context, xs, columns, &y));

    using X = typename Format::X;
    const float* x = in[0].template as<float>();
    const std::size_t batch = xs.count(0, xs.rank - 1), length = quads * nm::quad_inputs(kept);
    const std::size_t spans = Format::spans(length);
    const bool ready = Format::ready(k, length);
    const std::size_t most = std::min(batch, kRows);
    Scratch scratch(Scratch::size(ready ? 0 : most * length * sizeof(X)) + Scratch::size(most * spans * sizeof(float)));
    if (!scratch.ok()) return out_of_memory(this->api_);
    X* room = scratch.take<X>(ready ? 0 : most * length);
    float* steps = scratch.take<float>(most * spans);
    for (std::size_t first = 0; first < batch; first += kRows) {
      const std::size_t count = std::min(batch - first, kRows);
      const float* rows = x + first * k;
      const auto prepare = [&](std::size_t r) {
        format_.prepare(rows + r * k, k, length, room + r * length, steps + r * spans);
      };
      if (!ready) ONNXCOMP_RETURN_IF_ERROR(parallel_for(this->api_, context, count, count * k >= kSerial, prepare));
      const X* given = room;
      if constexpr (std::is_same_v<X, float>) given = ready ? rows : room;
      const auto work = [&](std::size_t i) {
        const std::size_t begin = i * kTask;
        format_.multiply(in + 1, kept, quads, columns, {given, length, count, steps, spans}, y + first * columns, begin,
                         std::min(begin + kTask, blocks));
      };
      const std::size_t tasks = (blocks + kTask - 1) / kTask;
      ONNXCOMP_RETURN_IF_ERROR(parallel_for(this->api_, context, tasks, count * k * columns >= 4 * kSerial, work));
    }
    return nullptr;
  }

  static ort::Status* infer_shape(const ort::Api* api, ort::ShapeInferContext* context) {
    return infer_product(api, context, 0, 3, 1);
  }

 private:
  static constexpr std::size_t kRows = 256;  // of inputs that are prepared at once, so that they stay in a cache
  static constexpr std::size_t kTask = 8;    // blocks

  Format format_;
  std::int64_t kept_;
};

}  // namespace onnxcomp
