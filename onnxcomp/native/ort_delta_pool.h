// Pooling of changed pixels.

#pragma once

#include "kernels/delta_pool.h"
#include "ort_delta_window.h"

namespace onnxcomp {

// X [N, H, W, C], mask [N, H, W]; attributes kind (0 largest value, 1 mean), those of a window, and count_include_pad.
class DeltaPool : public DeltaOp<DeltaPool, 2> {
 public:
  static constexpr const char* kName = "DeltaPool";

  DeltaPool(const ort::Api* api, const ort::KernelInfo* info)
      : DeltaOp(api, info),
        pools_(delta::choose_pools(isa_)),
        attributes_(api, info),
        kind_(attribute(api, info, "kind", 0)),
        kernel_h_(attribute(api, info, "kernel_h", 0)),
        kernel_w_(attribute(api, info, "kernel_w", 0)),
        include_pad_(attribute(api, info, "count_include_pad", 0) != 0) {}

  static ort::ElementType source_type(std::size_t index) { return map_or_mask(index); }

  ort::Status* check_attributes() const {
    ONNXCOMP_RETURN_IF_ERROR(DeltaOp::check_attributes());
    if (const char* problem = attributes_.check()) return fail(problem);
    if (kind_ != 0 && kind_ != 1) return fail("attribute kind has to be 0 or 1");
    // The product is the number of pixels under a window, of which there is a list.
    for (const std::int64_t i : {kernel_h_, kernel_w_}) {
      if (i < 1 || i > kMostTaps) return fail("kernel_h and kernel_w have to be 1 to 1024");
    }
    return nullptr;
  }

  ort::Status* compute(ort::KernelContext* context) const {
    Step step;
    ONNXCOMP_RETURN_IF_ERROR(read_step(context, &step));
    const Shape& xs = step.in[0].shape;
    if (!is_map(step, 0) || xs.dims[3] != static_cast<std::int64_t>(step.channels)) {
      return fail("X has to have the axes [N, H, W, C] with the N and C of last, mask those without C");
    }
    const delta::Window window = attributes_.window(xs, step.in[kLast].shape, kernel_h_, kernel_w_);
    if (!step.empty() && !WindowAttributes::fits(window)) return fail(WindowAttributes::kTooLarge);
    ONNXCOMP_RETURN_IF_ERROR(open(context, &step));
    if (step.empty()) return nullptr;
    Reached reached(step, window, step.in[1].as<std::uint8_t>());
    if (!reached.ok()) return out_of_memory(api_);
    if (reached.count == 0) return nullptr;
    Scratch steps(steps_bytes(step.channels));
    if (!steps.ok()) return out_of_memory(api_);
    spread_steps(&step, step.channels, &steps);

    const std::size_t taps = static_cast<std::size_t>(kernel_h_ * kernel_w_);
    const delta::Pool kind = kind_ == 0 ? delta::Pool::kMax : delta::Pool::kAverage;
    const std::size_t more =
        Scratch::size(kBlock * taps * sizeof(float*)) + Scratch::size(taps * sizeof(std::ptrdiff_t));
    const auto fill = [&](const delta::Place* some, std::size_t n, float* values, Scratch* room) {
      const float** x = room->take<const float*>(n * taps);
      delta::point_at_taps(step.in[0].as<float>(), step.channels, window, some, n, nullptr,
                           room->take<std::ptrdiff_t>(taps), x);
      pools_.window({kind, x, n, taps, step.channels, include_pad_ ? taps : 0, values});
    };
    return send_all(context, step, reached.places, reached.count, step.channels, more, 4 * taps * step.channels, fill);
  }

 private:
  static constexpr std::int64_t kMostTaps = 1024;

  delta::Pools pools_;
  WindowAttributes attributes_;
  std::int64_t kind_, kernel_h_, kernel_w_;
  bool include_pad_;
};

// X [N, H, W, C], mask [N, H, W], last [N, 1, 1, C]: all of an image is read again if a pixel of it changed.
class DeltaGlobalPool : public DeltaOp<DeltaGlobalPool, 2> {
 public:
  static constexpr const char* kName = "DeltaGlobalPool";

  DeltaGlobalPool(const ort::Api* api, const ort::KernelInfo* info)
      : DeltaOp(api, info), pools_(delta::choose_pools(isa_)), kind_(attribute(api, info, "kind", 0)) {}

  static ort::ElementType source_type(std::size_t index) { return map_or_mask(index); }

  ort::Status* check_attributes() const {
    ONNXCOMP_RETURN_IF_ERROR(DeltaOp::check_attributes());
    return kind_ == 0 || kind_ == 1 ? nullptr : fail("attribute kind has to be 0 or 1");
  }

  ort::Status* compute(ort::KernelContext* context) const {
    Step step;
    ONNXCOMP_RETURN_IF_ERROR(read_step(context, &step));
    const Shape& xs = step.in[0].shape;
    if (!is_map(step, 0) || xs.dims[3] != static_cast<std::int64_t>(step.channels) || step.height != 1 ||
        step.width != 1) {
      return fail("X has to have the axes [N, H, W, C], mask those without C, and last has to be [N, 1, 1, C]");
    }
    const std::size_t pixels = xs.count(1, 3);
    if (!step.empty() && pixels == 0) return fail("X has to have pixels");
    ONNXCOMP_RETURN_IF_ERROR(open(context, &step));
    if (step.empty()) return nullptr;
    Scratch scratch(list_bytes(step) + steps_bytes(step.channels));
    if (!scratch.ok()) return out_of_memory(api_);
    delta::Place* places = scratch.take<delta::Place>(step.pixels() + 1);
    std::size_t count = 0;
    for (std::size_t n = 0; n < step.images; ++n) {
      if (!step.started || delta::any_set(step.in[1].as<std::uint8_t>() + n * pixels, pixels)) {
        places[count++] = {static_cast<std::uint32_t>(n), 0};
      }
    }
    if (count == 0) return nullptr;
    spread_steps(&step, step.channels, &scratch);
    const delta::Pool kind = kind_ == 0 ? delta::Pool::kMax : delta::Pool::kAverage;
    const auto fill = [&](const delta::Place* some, std::size_t n, float* values, Scratch*) {
      for (std::size_t i = 0; i < n; ++i) {
        pools_.global({kind, step.in[0].as<float>() + some[i].row * pixels * step.channels, pixels, step.channels,
                       values + i * step.channels});
      }
    };
    return send_all(context, step, places, count, step.channels, 0, pixels * step.channels, fill);
  }

 private:
  delta::Pools pools_;
  std::int64_t kind_;
};

}  // namespace onnxcomp
