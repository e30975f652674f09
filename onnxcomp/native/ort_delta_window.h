// Windows that slide over a map, as attributes give them, and the pixels of the output that changes reach through them.

#pragma once

#include "ort_delta.h"

namespace onnxcomp {

// A window's attributes.
struct WindowAttributes {
  std::int64_t stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;

  WindowAttributes(const ort::Api* api, const ort::KernelInfo* info)
      : stride_h(attribute(api, info, "stride_h", 1)),
        stride_w(attribute(api, info, "stride_w", 1)),
        pad_top(attribute(api, info, "pad_top", 0)),
        pad_left(attribute(api, info, "pad_left", 0)),
        dilation_h(attribute(api, info, "dilation_h", 1)),
        dilation_w(attribute(api, info, "dilation_w", 1)) {}

  const char* check() const {
    for (const std::int64_t i : {stride_h, stride_w, dilation_h, dilation_w}) {
      if (i < 1 || i > kMost) return "strides and dilations have to be 1 or more";
    }
    for (const std::int64_t i : {pad_top, pad_left}) {
      if (i < 0 || i > kMost) return "pads have to be 0 or more";
    }
    return nullptr;
  }

  // The window over `in` [N, H, W, C]; all axes are below 2^31.
  delta::Window window(const Shape& in, const Shape& out, std::int64_t kernel_h, std::int64_t kernel_w) const {
    return {static_cast<std::size_t>(out.dims[0]),
            {in.dims[1], out.dims[1], kernel_h, stride_h, pad_top, dilation_h},
            {in.dims[2], out.dims[2], kernel_w, stride_w, pad_left, dilation_w}};
  }
  // Whether the last windows begin on the map: else the output has more pixels than there can be.
  static bool fits(const delta::Window& w) {
    return w.y.at(w.y.out - 1, 0) < w.y.in && w.x.at(w.x.out - 1, 0) < w.x.in;
  }

  static constexpr const char* kTooLarge = "last has more rows or columns than windows begin on the map";

 private:
  static constexpr std::int64_t kMost = std::int64_t{1} << 30;
};

// The pixels of an output that have to be computed.
class Reached {
 public:
  template <typename Step>
  Reached(const Step& step, const delta::Window& window, const std::uint8_t* mask)
      : scratch_(bytes(step, window, mask)) {
    if (!scratch_.ok() || bytes(step, window, mask) == 0) return;
    places = scratch_.template take<delta::Place>(step.pixels() + 1);
    count = step.started ? delta::list_reached(mask, window, scratch_.template take<std::uint8_t>(0), places)
                         : delta::list_all(step.rows(), step.width, places);
  }

  bool ok() const { return scratch_.ok(); }

  delta::Place* places = nullptr;
  std::size_t count = 0;

 private:
  // None where no pixel changed, which is the usual case.
  template <typename Step>
  static std::size_t bytes(const Step& step, const delta::Window& w, const std::uint8_t* mask) {
    if (step.started && !delta::any_set(mask, w.images * static_cast<std::size_t>(w.y.in * w.x.in))) return 0;
    return Scratch::size((step.pixels() + 1) * sizeof(delta::Place)) + Scratch::size(delta::reach_bytes(w));
  }

  Scratch scratch_;
};

}  // namespace onnxcomp
