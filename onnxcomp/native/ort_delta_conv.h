// Convolution of changed pixels.

#pragma once

#include "kernels/depthwise.h"
#include "kernels/igemm.h"
#include "ort_delta_window.h"

namespace onnxcomp {

// X [N, H, W, Cin], mask [N, H, W], W [kh, kw, Cin / group, Cout], B [Cout].
class DeltaConv : public DeltaOp<DeltaConv, 4> {
 public:
  static constexpr const char* kName = "DeltaConv";

  DeltaConv(const ort::Api* api, const ort::KernelInfo* info)
      : DeltaOp(api, info),
        form_(igemm::choose(isa_)),
        depthwise_(depthwise::choose(isa_)),
        attributes_(api, info),
        group_(attribute(api, info, "group", 1)) {
    Tensor w;
    if (ort::Status* status = read_constant(api, info, kW, &w)) {
      call<ort::ReleaseStatus>(api, status);
    } else if (w.data != nullptr && w.shape.rank == 4 && group_ > 0 && w.shape.last() % group_ == 0 &&
               !is_depthwise(w.shape)) {
      const igemm::Weight shape = weight(w.shape);
      // The weight exists, so its size is no overflow; filled up to whole vectors it is at most 16 times as large.
      packed_ = static_cast<float*>(std::malloc(shape.floats(form_) * sizeof(float)));
      if (packed_ != nullptr) {
        igemm::pack(shape, form_, w.as<float>(), packed_);
        move_to_huge_pages(packed_, shape.floats(form_) * sizeof(float));
      }
    }
  }
  ~DeltaConv() { std::free(packed_); }
  DeltaConv(const DeltaConv&) = delete;
  DeltaConv& operator=(const DeltaConv&) = delete;

  static ort::ElementType source_type(std::size_t index) {
    return index == kMask ? ort::ElementType::kUint8 : ort::ElementType::kFloat;
  }

  ort::Status* check_attributes() const {
    ONNXCOMP_RETURN_IF_ERROR(DeltaOp::check_attributes());
    if (const char* problem = attributes_.check()) return fail(problem);
    return group_ >= 1 && group_ < (std::int64_t{1} << 31) ? nullptr : fail("attribute group has to be 1 or more");
  }

  ort::Status* compute(ort::KernelContext* context) const {
    Step step;
    ONNXCOMP_RETURN_IF_ERROR(read_step(context, &step));
    const Shape &xs = step.in[kX].shape, &ws = step.in[kW].shape, &bs = step.in[kB].shape;
    if (!is_map(step, kX)) return fail("X has to have the axes [N, H, W, C] with the N of last, mask those without C");
    if (ws.rank != 4 || bs.rank != 1) return fail("W has to have four axes, B one");
    const std::int64_t columns = static_cast<std::int64_t>(step.channels);
    if (columns % group_ != 0 || ws.dims[2] * group_ != xs.dims[3] || ws.dims[3] != columns || bs.dims[0] != columns) {
      return fail("W has to be [kh, kw, Cin / group, Cout] and B [Cout], with the Cin of X and the Cout of last, which "
                  "is a multiple of group");
    }
    if (ws.count() == 0) return fail("W has to hold a weight");
    const delta::Window window = attributes_.window(xs, step.in[kLast].shape, ws.dims[0], ws.dims[1]);
    if (!step.empty() && !WindowAttributes::fits(window)) return fail(WindowAttributes::kTooLarge);
    ONNXCOMP_RETURN_IF_ERROR(open(context, &step));
    if (step.empty()) return nullptr;
    Reached reached(step, window, step.in[kMask].as<std::uint8_t>());
    if (!reached.ok()) return out_of_memory(api_);
    if (reached.count == 0) return nullptr;
    Scratch steps(steps_bytes(step.channels));
    if (!steps.ok()) return out_of_memory(api_);
    spread_steps(&step, step.channels, &steps);
    return is_depthwise(ws) ? compute_depthwise(context, step, window, reached.places, reached.count)
                            : compute_dense(context, step, window, reached.places, reached.count);
  }

 private:
  static constexpr std::size_t kX = 0, kMask = 1, kW = 2, kB = 3;
  static constexpr std::size_t kShortRun = 32;  // channels; below, all taps of a row are one run

  bool is_depthwise(const Shape& w) const { return w.dims[2] == 1 && group_ > 1; }
  igemm::Weight weight(const Shape& w) const {
    return {w.count(0, 3), static_cast<std::size_t>(group_), static_cast<std::size_t>(w.last() / group_)};
  }

  ort::Status* compute_depthwise(ort::KernelContext* context, const Step& step, const delta::Window& window,
                                 const delta::Place* places, std::size_t count) const {
    const std::size_t taps = step.in[kW].shape.count(0, 2), inputs = static_cast<std::size_t>(step.in[kX].shape.last());
    Scratch scratch(Scratch::size(inputs * sizeof(float)));
    if (!scratch.ok()) return out_of_memory(api_);
    float* zeros = scratch.take<float>(inputs);
    std::memset(zeros, 0, inputs * sizeof(float));
    const std::size_t more =
        Scratch::size(kBlock * taps * sizeof(float*)) + Scratch::size(taps * sizeof(std::ptrdiff_t));
    const bool neighbours = attributes_.stride_w == 1 && attributes_.dilation_w == 1;
    const std::size_t row = neighbours ? static_cast<std::size_t>(window.x.kernel) : 0;
    const auto fill = [&](const delta::Place* some, std::size_t n, float* values, Scratch* room) {
      const float** x = room->take<const float*>(n * taps);
      delta::point_at_taps(step.in[kX].as<float>(), inputs, window, some, n, zeros,
                           room->take<std::ptrdiff_t>(taps), x);
      depthwise_({x, n, taps, step.in[kW].as<float>(), step.in[kB].as<float>(), step.channels,
                  step.channels / static_cast<std::size_t>(group_), values, row});
    };
    return send_all(context, step, places, count, step.channels, more, 4 * taps * step.channels, fill);
  }

  ort::Status* compute_dense(ort::KernelContext* context, const Step& step, const delta::Window& window,
                             const delta::Place* places, std::size_t count) const {
    const Shape& ws = step.in[kW].shape;
    const igemm::Weight shape = weight(ws);
    const std::size_t inputs = static_cast<std::size_t>(step.in[kX].shape.last());
    const std::size_t kh = static_cast<std::size_t>(ws.dims[0]), kw = static_cast<std::size_t>(ws.dims[1]);
    const bool rows_only = group_ == 1 && kw > 1 && attributes_.dilation_w == 1 && inputs < kShortRun;
    const std::size_t runs = rows_only ? kh : kh * kw, length = shape.k / runs, outside = rows_only ? length : inputs;
    const std::size_t biases = shape.groups * shape.padded(form_);
    // A weight that is no constant is put in order in every call.
    const std::size_t packed_floats = packed_ != nullptr ? 0 : shape.floats(form_);
    Scratch scratch(Scratch::size(outside * sizeof(float)) + Scratch::size(biases * sizeof(float)) +
                    Scratch::size(packed_floats * sizeof(float)));
    if (!scratch.ok()) return out_of_memory(api_);
    float *zeros = scratch.take<float>(outside), *bias = scratch.take<float>(biases);
    std::memset(zeros, 0, outside * sizeof(float));
    igemm::pack_bias(shape, form_, step.in[kB].as<float>(), bias);
    const float* w = packed_;
    if (w == nullptr) {
      float* made = scratch.take<float>(packed_floats);
      igemm::pack(shape, form_, step.in[kW].as<float>(), made);
      w = made;
    }

    const std::size_t pitch = shape.groups == 1 ? shape.padded(form_) : step.channels;
    const std::size_t panels = shape.groups * igemm::Panels(shape.vectors(form_)).count();
    const std::size_t cost = shape.k * step.channels;
    const auto more = [&](std::size_t n) {
      return Scratch::size(n * runs * sizeof(float*)) + Scratch::size(runs * sizeof(std::ptrdiff_t)) +
             Scratch::size(rows_only ? n * shape.k * sizeof(float) : 0);
    };
    const float* x = step.in[kX].as<float>();
    const auto point = [&](const delta::Place* some, std::size_t n, Scratch* room) {
      const float** to = room->take<const float*>(n * runs);
      std::ptrdiff_t* distances = room->take<std::ptrdiff_t>(runs);
      float* cut = rows_only ? room->take<float>(n * shape.k) : nullptr;
      delta::point_at_taps(x, inputs, window, some, n, zeros, distances, to, cut);
      return igemm::Inputs{to, n, runs, shape.k / runs};
    };

    // Few pixels: the threads share the columns.
    if (count <= kBlock && panels > kPanels && count * cost >= 4 * kSerial) {
      Scratch room(Scratch::size(count * pitch * sizeof(float)) + more(count));
      if (!room.ok()) return out_of_memory(api_);
      float* values = room.take<float>(count * pitch);
      const igemm::Inputs in = point(places, count, &room);
      const auto work = [&](std::size_t i) {
        const std::size_t begin = i * kPanels;
        igemm::multiply(shape, form_, w, bias, in, values, pitch, begin, std::min(begin + kPanels, panels));
      };
      ONNXCOMP_RETURN_IF_ERROR(parallel_for(api_, context, (panels + kPanels - 1) / kPanels, true, work));
      send_(step.stage, places, count, step.width, values, pitch);
      return nullptr;
    }
    const auto fill = [&](const delta::Place* some, std::size_t n, float* values, Scratch* room) {
      igemm::multiply(shape, form_, w, bias, point(some, n, room), values, pitch, 0, panels);
    };
    return send_all(context, step, places, count, pitch, more(kBlock), cost, fill);
  }

  static constexpr std::size_t kPanels = 2;  // of a task where threads share columns

  igemm::Form form_;
  depthwise::Kernel depthwise_;
  WindowAttributes attributes_;
  std::int64_t group_;
  float* packed_ = nullptr;
};

}  // namespace onnxcomp
