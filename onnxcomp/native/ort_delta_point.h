// Layers whose pixels depend on one pixel of each input: sums, products, activations, and those that only move values.

#pragma once

#include "ort_delta.h"

namespace onnxcomp {

// An op with Maps pairs of a map and its mask. `Op` has check(step), null if all is well, and compute_pixel(step,
// place, y), and may replace marks(step, row, room), the mask of a row of the output.
template <typename Op, std::size_t Maps>
class DeltaPoint : public DeltaOp<Op, 2 * Maps> {
 public:
  static ort::ElementType source_type(std::size_t index) { return map_or_mask(index); }

  ort::Status* compute(ort::KernelContext* context) const {
    Step step;
    ONNXCOMP_RETURN_IF_ERROR(this->read_step(context, &step));
    const Op& op = static_cast<const Op&>(*this);
    if (const char* problem = op.check(step)) return this->fail(problem);
    ONNXCOMP_RETURN_IF_ERROR(this->open(context, &step));
    if (step.empty()) return nullptr;
    bool changed = !step.started;
    for (std::size_t i = 0; i < Maps && !changed; ++i) {
      const Tensor& mask = step.in[2 * i + 1];
      changed = delta::any_set(mask.template as<std::uint8_t>(), mask.shape.count());
    }
    if (!changed) return nullptr;

    Scratch scratch(this->list_bytes(step) + Scratch::size(step.width) + this->steps_bytes(step.channels));
    if (!scratch.ok()) return out_of_memory(this->api_);
    delta::Place* places = scratch.template take<delta::Place>(step.pixels() + 1);
    std::uint8_t* room = scratch.template take<std::uint8_t>(step.width);
    this->spread_steps(&step, step.channels, &scratch);
    std::size_t count = 0;
    if (!step.started) {
      count = delta::list_all(step.rows(), step.width, places);
    } else {
      delta::Place* end = places;
      for (std::size_t row = 0; row < step.rows(); ++row) {
        end = delta::list_row(op.marks(step, row, room), step.width, static_cast<std::uint32_t>(row), end);
      }
      count = static_cast<std::size_t>(end - places);
    }
    if (count == 0) return nullptr;
    const auto fill = [&](const delta::Place* some, std::size_t n, float* values, Scratch*) {
      for (std::size_t i = 0; i < n; ++i) op.compute_pixel(step, some[i], values + i * step.channels);
    };
    return this->send_all(context, step, places, count, step.channels, 0, 4 * step.channels, fill);
  }

  using Step = typename DeltaOp<Op, 2 * Maps>::Step;

  const std::uint8_t* marks(const Step& step, std::size_t row, std::uint8_t* room) const {
    const std::uint8_t* first = step.in[1].template as<std::uint8_t>() + row * step.width;
    if constexpr (Maps == 1) return first;
    const std::uint8_t* second = step.in[Maps * 2 - 1].template as<std::uint8_t>() + row * step.width;
    for (std::size_t x = 0; x < step.width; ++x) room[x] = static_cast<std::uint8_t>(first[x] | second[x]);
    return room;
  }

 protected:
  DeltaPoint(const ort::Api* api, const ort::KernelInfo* info) : DeltaOp<Op, 2 * Maps>(api, info) {}

  static std::int64_t channels_of(const Step& step, std::size_t map) { return step.in[2 * map].shape.last(); }
  static const float* pixel(const Step& step, std::size_t map, const delta::Place& place) {
    const Tensor& from = step.in[2 * map];
    return from.template as<float>() +
           (static_cast<std::size_t>(place.row) * step.width + place.x) * static_cast<std::size_t>(from.shape.last());
  }
};

// A and B of the same shape, or B [N, 1, 1, C].
template <typename Name, bool kProduct>
class DeltaBinary : public DeltaPoint<DeltaBinary<Name, kProduct>, 2> {
  using Base = DeltaPoint<DeltaBinary<Name, kProduct>, 2>;

 public:
  using Step = typename Base::Step;
  static constexpr const char* kName = Name::kName;

  DeltaBinary(const ort::Api* api, const ort::KernelInfo* info) : Base(api, info) {}

  const char* check(const Step& step) const {
    const std::int64_t channels = static_cast<std::int64_t>(step.channels);
    const Shape& b = step.in[2].shape;
    if (!this->same_pixels(step, 0) || this->channels_of(step, 0) != channels) {
      return "A has to have the shape of last, and its mask that without the last axis";
    }
    const bool one = this->is_map(step, 2) && b.dims[1] == 1 && b.dims[2] == 1;
    return (one || this->same_pixels(step, 2)) && b.last() == channels
               ? nullptr
               : "B has to have the shape of last or [N, 1, 1, C], and its mask that without the last axis";
  }

  const std::uint8_t* marks(const Step& step, std::size_t row, std::uint8_t* room) const {
    if (!one_pixel(step)) return Base::marks(step, row, room);
    const std::uint8_t* a = step.in[1].template as<std::uint8_t>() + row * step.width;
    if (step.in[3].template as<std::uint8_t>()[row / step.height] == 0) return a;
    std::memset(room, 1, step.width);
    return room;
  }

  void compute_pixel(const Step& step, const delta::Place& place, float* ONNXCOMP_RESTRICT y) const {
    const float* ONNXCOMP_RESTRICT a = this->pixel(step, 0, place);
    const float* ONNXCOMP_RESTRICT b = one_pixel(step)
                                           ? step.in[2].template as<float>() + place.row / step.height * step.channels
                                           : this->pixel(step, 1, place);
    for (std::size_t c = 0; c < step.channels; ++c) y[c] = kProduct ? a[c] * b[c] : a[c] + b[c];
  }

 private:
  static bool one_pixel(const Step& step) { return step.in[2].shape.dims[1] == 1 && step.in[2].shape.dims[2] == 1; }
};

// The channels of A, then those of B.
class DeltaConcat : public DeltaPoint<DeltaConcat, 2> {
 public:
  static constexpr const char* kName = "DeltaConcat";

  DeltaConcat(const ort::Api* api, const ort::KernelInfo* info) : DeltaPoint(api, info) {}

  const char* check(const Step& step) const {
    return same_pixels(step, 0) && same_pixels(step, 2) &&
                   channels_of(step, 0) + channels_of(step, 1) == static_cast<std::int64_t>(step.channels)
               ? nullptr
               : "A and B have to have the pixels of last, and together its channels; their masks one value a pixel";
  }
  void compute_pixel(const Step& step, const delta::Place& place, float* y) const {
    const std::size_t a = static_cast<std::size_t>(channels_of(step, 0));
    std::memcpy(y, pixel(step, 0, place), a * sizeof(float));
    std::memcpy(y + a, pixel(step, 1, place), (step.channels - a) * sizeof(float));
  }
};

// Channels of X from `begin` on, as many as last has.
class DeltaSlice : public DeltaPoint<DeltaSlice, 1> {
 public:
  static constexpr const char* kName = "DeltaSlice";

  DeltaSlice(const ort::Api* api, const ort::KernelInfo* info)
      : DeltaPoint(api, info), begin_(attribute(api, info, "begin", 0)) {}

  const char* check(const Step& step) const {
    if (!same_pixels(step, 0)) return "X has to have the pixels of last, and its mask one value a pixel";
    const std::int64_t channels = static_cast<std::int64_t>(step.channels);
    return begin_ >= 0 && begin_ <= channels_of(step, 0) && channels <= channels_of(step, 0) - begin_
               ? nullptr
               : "X has to have the channels of last from attribute begin on";
  }
  void compute_pixel(const Step& step, const delta::Place& place, float* y) const {
    std::memcpy(y, pixel(step, 0, place) + begin_, step.channels * sizeof(float));
  }

 private:
  std::int64_t begin_;
};

class DeltaUnary : public DeltaPoint<DeltaUnary, 1> {
 public:
  static constexpr const char* kName = "DeltaUnary";

  DeltaUnary(const ort::Api* api, const ort::KernelInfo* info) : DeltaPoint(api, info) {}

  const char* check(const Step& step) const {
    return same_pixels(step, 0) && channels_of(step, 0) == static_cast<std::int64_t>(step.channels)
               ? nullptr
               : "X has to have the shape of last, and its mask that without the last axis";
  }
  void compute_pixel(const Step& step, const delta::Place& place, float* y) const {
    std::memcpy(y, pixel(step, 0, place), step.channels * sizeof(float));
  }
};

// Every pixel of X several times in each direction: output pixel (y, x) is input pixel (y / factor, x / factor).
class DeltaResize : public DeltaPoint<DeltaResize, 1> {
 public:
  static constexpr const char* kName = "DeltaResize";

  DeltaResize(const ort::Api* api, const ort::KernelInfo* info) : DeltaPoint(api, info) {}

  const char* check(const Step& step) const {
    const Shape &in = step.in[0].shape, &out = step.in[kLast].shape;
    if (!is_map(step, 0) || in.last() != out.last()) {
      return "X has to have the axes [N, H, W, C] with the N and C of last, mask those without C";
    }
    for (const std::size_t axis : {1, 2}) {
      if (step.empty()) break;
      if (in.dims[axis] == 0 || out.dims[axis] % in.dims[axis] != 0) {
        return "height and width of last have to be multiples of those of X";
      }
    }
    return nullptr;
  }
  const std::uint8_t* marks(const Step& step, std::size_t row, std::uint8_t* room) const {
    const Shape& in = step.in[0].shape;
    const std::size_t width = static_cast<std::size_t>(in.dims[2]), factor = step.width / width;
    const std::uint8_t* from = step.in[1].as<std::uint8_t>() + in_row(step, row) * width;
    for (std::size_t x = 0; x < width; ++x) std::memset(room + x * factor, from[x], factor);
    return room;
  }
  void compute_pixel(const Step& step, const delta::Place& place, float* y) const {
    const std::size_t width = static_cast<std::size_t>(step.in[0].shape.dims[2]);
    const std::size_t at = in_row(step, place.row) * width + place.x / (step.width / width);
    std::memcpy(y, step.in[0].as<float>() + at * step.channels, step.channels * sizeof(float));
  }

 private:
  static std::size_t in_row(const Step& step, std::size_t row) {
    return row / (step.height / static_cast<std::size_t>(step.in[0].shape.dims[1]));  // images follow each other
  }
};

}  // namespace onnxcomp
