// What all layers that recompute only changed pixels have in common. A layer keeps what it sent last, and takes with
// every input a mask of the pixels that changed; kernels/delta_send.h says when a pixel is sent.
//
// Inputs end with last [N, H, W, C], started, threshold, step; outputs are held, of the same shape, and its mask [N, H,
// W]. `held` may be the very buffer of `last`: then only sent pixels are written.

#pragma once

#include "kernels/delta_enter.h"
#include "ort_op.h"

namespace onnxcomp {

inline float float_attribute(const ort::Api* api, const ort::KernelInfo* info, const char* name, float missing) {
  float value = missing;
  if (ort::Status* status = call<ort::KernelInfoGetAttribute_float>(api, info, name, &value)) {
    call<ort::ReleaseStatus>(api, status);
    return missing;
  }
  return value;
}

inline ort::Status* make_tensor(const ort::Api* api, ort::KernelContext* context, std::size_t index, const Shape& shape,
                                std::size_t rank, void** data) {
  ort::Value* output = nullptr;
  ONNXCOMP_RETURN_IF_ERROR(call<ort::KernelContext_GetOutput>(
      api, context, index, static_cast<const std::int64_t*>(shape.dims), rank, &output));
  return call<ort::GetTensorMutableData>(api, output, data);
}

// Output 0 has the shape of input `last`, output 1 its first three axes. Nothing is said of what is not known.
inline ort::Status* infer_held(const ort::Api* api, ort::ShapeInferContext* context, std::size_t last) {
  ort::TensorTypeAndShapeInfo* info = nullptr;
  ONNXCOMP_RETURN_IF_ERROR(call<ort::ShapeInferContext_GetInputTypeShape>(api, context, last, &info));
  Shape shape;
  ONNXCOMP_RETURN_IF_ERROR(read_shape(api, info, &shape));
  if (shape.rank != 4) return nullptr;
  const char* names[kMaxRank] = {};
  ONNXCOMP_RETURN_IF_ERROR(call<ort::GetSymbolicDimensions>(api, info, static_cast<const char**>(names), shape.rank));
  for (std::size_t i = 0; i < shape.rank; ++i) {
    // The runtime would take an axis without length and name for one of length -1.
    if (shape.dims[i] < 0 && (names[i] == nullptr || names[i][0] == 0)) return nullptr;
  }
  for (const std::size_t output : {std::size_t{0}, std::size_t{1}}) {
    ort::TensorTypeAndShapeInfo* made = nullptr;
    ONNXCOMP_RETURN_IF_ERROR(call<ort::CreateTensorTypeAndShapeInfo>(api, &made));
    const std::size_t rank = shape.rank - output;
    ort::Status* status = call<ort::SetTensorElementType>(
        api, made, output == 0 ? ort::ElementType::kFloat : ort::ElementType::kUint8);
    if (status == nullptr) {
      status = call<ort::SetDimensions>(api, made, static_cast<const std::int64_t*>(shape.dims), rank);
    }
    if (status == nullptr) status = call<ort::SetSymbolicDimensions>(api, made, static_cast<const char**>(names), rank);
    if (status == nullptr) {
      status = call<ort::ShapeInferContext_SetOutputTypeShape>(api, context, output,
                                                               static_cast<const ort::TensorTypeAndShapeInfo*>(made));
    }
    call<ort::ReleaseTensorTypeAndShapeInfo>(api, made);
    ONNXCOMP_RETURN_IF_ERROR(status);
  }
  return nullptr;
}

// Types of sources that are maps and their masks in turn.
inline ort::ElementType map_or_mask(std::size_t index) {
  return index % 2 == 0 ? ort::ElementType::kFloat : ort::ElementType::kUint8;
}

// An op with `Sources` inputs of its own before the four that all have.
template <typename Op, std::size_t Sources>
class DeltaOp : public OpBase<Op, Sources + 4> {
 public:
  static constexpr std::size_t kInputs = Sources + 4, kLast = Sources, kOutputs = 2;

  static ort::ElementType input_type(std::size_t index) {
    if (index < Sources) return Op::source_type(index);
    return index == Sources + 1 ? ort::ElementType::kBool : ort::ElementType::kFloat;
  }
  static ort::ElementType output_type(std::size_t index) {
    return index == 0 ? ort::ElementType::kFloat : ort::ElementType::kUint8;
  }
  static ort::Status* infer_shape(const ort::Api* api, ort::ShapeInferContext* context) {
    return infer_held(api, context, kLast);
  }
  ort::Status* check_attributes() const {
    return activation_ >= 0 && activation_ < delta::kActivations ? nullptr
                                                                 : this->fail("attribute activation has to be 0 to 7");
  }

 protected:
  using Base = OpBase<Op, Sources + 4>;

  DeltaOp(const ort::Api* api, const ort::KernelInfo* info)
      : Base(api),
        isa_(choose_isa()),
        send_(delta::choose_send(isa_)),
        activation_(attribute(api, info, "activation", 0)),
        alpha_(float_attribute(api, info, "alpha", 0.0f)),
        beta_(float_attribute(api, info, "beta", 0.0f)) {}

  // One call: its inputs, and its outputs once `open` has made them.
  struct Step {
    Tensor in[kInputs];
    std::size_t images = 0, height = 0, width = 0, channels = 0;  // of the output
    bool started = false;
    delta::Stage stage{};
    const float* last = nullptr;

    std::size_t rows() const { return images * height; }
    std::size_t pixels() const { return rows() * width; }
    bool empty() const { return pixels() == 0 || channels == 0; }
  };

  // Reads and checks what all ops have. A step that is empty passes all further checks.
  ort::Status* read_step(const ort::KernelContext* context, Step* step) const {
    ONNXCOMP_RETURN_IF_ERROR(this->read(context, step->in));
    const Shape& shape = step->in[kLast].shape;
    if (shape.rank != 4) return this->fail("last has to have the axes [N, H, W, C]");
    // Then no product of a few of them overflows, also where one is 0.
    for (std::size_t i = 0; i < kInputs; ++i) {
      if (!small(step->in[i].shape)) return this->fail("an input is too large");
    }
    step->images = static_cast<std::size_t>(shape.dims[0]), step->height = static_cast<std::size_t>(shape.dims[1]);
    step->width = static_cast<std::size_t>(shape.dims[2]), step->channels = static_cast<std::size_t>(shape.dims[3]);
    if (step->in[kLast + 1].shape.count() != 1) return this->fail("started has to hold one value");
    const Shape &threshold = step->in[kLast + 2].shape, &steps = step->in[kLast + 3].shape;
    if (threshold.rank > 1 || threshold.count() != 1) return this->fail("threshold has to hold one value");
    if (steps.rank > 1 || (steps.count() != 1 && steps.count() != step->channels)) {
      return this->fail("step has to hold one value, or one for each channel");
    }
    std::uint8_t started;
    std::memcpy(&started, step->in[kLast + 1].data, 1);
    step->started = started != 0;
    step->last = step->in[kLast].template as<float>();
    return nullptr;
  }

  // Whether input `index` is a map [N, H, W, C] of the output's images, and the input after it the mask of that.
  static bool is_map(const Step& step, std::size_t index) {
    const Shape &map = step.in[index].shape, &mask = step.in[index + 1].shape;
    return map.rank == 4 && mask.rank == 3 && map.dims[0] == static_cast<std::int64_t>(step.images) &&
           mask.dims[0] == map.dims[0] && mask.dims[1] == map.dims[1] && mask.dims[2] == map.dims[2];
  }
  static bool same_pixels(const Step& step, std::size_t index) {
    const Shape& map = step.in[index].shape;
    return is_map(step, index) && map.dims[1] == static_cast<std::int64_t>(step.height) &&
           map.dims[2] == static_cast<std::int64_t>(step.width);
  }

  // Makes the outputs: nothing marked, and held as it was last.
  ort::Status* open(ort::KernelContext* context, Step* step) const {
    void *held = nullptr, *mask = nullptr;
    const Shape& shape = step->in[kLast].shape;
    ONNXCOMP_RETURN_IF_ERROR(make_tensor(this->api_, context, 0, shape, 4, &held));
    ONNXCOMP_RETURN_IF_ERROR(make_tensor(this->api_, context, 1, shape, 3, &mask));
    const float limit = delta::square_limit(*step->in[kLast + 2].template as<float>(), step->channels);
    step->stage = {static_cast<float*>(held), static_cast<std::uint8_t*>(mask), limit, nullptr, step->channels,
                   step->started, false, static_cast<delta::Activation>(activation_), alpha_, beta_};
    if (step->empty()) return nullptr;
    std::memset(mask, 0, step->pixels());
    // Whatever is not sent stays; on the first step everything is.
    if (held != step->last && step->started) {
      std::memcpy(held, step->last, step->pixels() * step->channels * sizeof(float));
    }
    return nullptr;
  }

  // The step of each channel, `count` values: repeated if that is more.
  static std::size_t steps_bytes(std::size_t count) { return Scratch::size(count * sizeof(float)); }
  static void spread_steps(Step* step, std::size_t count, Scratch* scratch) {
    const Tensor& given = step->in[kLast + 3];
    const float* from = given.template as<float>();
    const std::size_t each = given.shape.count();
    float* to = scratch->take<float>(count);
    for (std::size_t c = 0; c < count; ++c) {
      to[c] = each == 1 ? from[0] : c < each ? from[c] : to[c - each];
      if (to[c] > 0.0f) step->stage.rounds = true;
    }
    step->stage.step = to;
  }

  static constexpr std::size_t kBlock = 96;  // pixels that are done at once

  // Computes the pixels `places` and sends those that differ: fill(places, count, values, scratch) writes values
  // [count, pitch] of some of them, with `more` bytes of scratch memory. `cost` is that of a pixel, in multiply-adds.
  template <typename Fill>
  ort::Status* send_all(ort::KernelContext* context, const Step& step, const delta::Place* places, std::size_t count,
                        std::size_t pitch, std::size_t more, std::size_t cost, const Fill& fill) const {
    std::atomic<bool> failed{false};
    const auto work = [&](std::size_t task) {
      const std::size_t begin = task * kBlock, some = std::min(kBlock, count - begin);
      Scratch scratch(Scratch::size(some * pitch * sizeof(float)) + more);
      if (!scratch.ok()) return failed.store(true, std::memory_order_relaxed);
      float* values = scratch.take<float>(some * pitch);
      fill(places + begin, some, values, &scratch);
      send_(step.stage, places + begin, some, step.width, values, pitch);
    };
    ONNXCOMP_RETURN_IF_ERROR(
        parallel_for(this->api_, context, (count + kBlock - 1) / kBlock, count * cost >= 4 * kSerial, work));
    return failed.load(std::memory_order_relaxed) ? out_of_memory(this->api_) : nullptr;
  }

  // Room for a list of all pixels of the output.
  static std::size_t list_bytes(const Step& step) { return Scratch::size((step.pixels() + 1) * sizeof(delta::Place)); }

  Isa isa_;
  delta::Send send_;

 private:
  static bool small(const Shape& shape) {
    constexpr std::int64_t kMost = std::int64_t{1} << 31;
    std::int64_t product = 1;
    for (std::size_t i = 0; i < shape.rank; ++i) {
      if (shape.dims[i] < 0 || shape.dims[i] >= kMost) return false;
      // Axes of length 0 are left out: the others are still multiplied with each other.
      product *= std::max<std::int64_t>(shape.dims[i], 1);
      if (product >= (std::int64_t{1} << 40)) return false;
      if (i == 2 && product >= kMost) return false;  // pixels
    }
    return true;
  }

  std::int64_t activation_;
  float alpha_, beta_;
};

// X [N, C, H, W] is a dense frame, of which the pixels are compared.
class DeltaEnter : public DeltaOp<DeltaEnter, 1> {
 public:
  static constexpr const char* kName = "DeltaEnter";

  DeltaEnter(const ort::Api* api, const ort::KernelInfo* info)
      : DeltaOp(api, info), enter_(delta::choose_enter(isa_)) {}

  static ort::ElementType source_type(std::size_t) { return ort::ElementType::kFloat; }

  ort::Status* compute(ort::KernelContext* context) const {
    Step step;
    ONNXCOMP_RETURN_IF_ERROR(read_step(context, &step));
    const Shape &xs = step.in[0].shape, &ls = step.in[kLast].shape;
    if (xs.rank != 4 || xs.dims[0] != ls.dims[0] || xs.dims[1] != ls.dims[3] || xs.dims[2] != ls.dims[1] ||
        xs.dims[3] != ls.dims[2]) {
      return fail("X has to have the axes [N, C, H, W] of last [N, H, W, C]");
    }
    ONNXCOMP_RETURN_IF_ERROR(open(context, &step));
    if (step.empty()) return nullptr;
    const std::size_t channels = step.channels, plane = step.height * step.width;
    const std::size_t block = delta::frame_block(channels), steps = delta::frame_steps(channels);
    const std::size_t blocks = (plane + block - 1) / block, tasks = (blocks + kTask - 1) / kTask;
    Scratch scratch(steps_bytes(steps));
    if (!scratch.ok()) return out_of_memory(api_);
    spread_steps(&step, steps, &scratch);
    std::atomic<bool> failed{false};
    const auto work = [&](std::size_t task) {
      const std::size_t image = task / tasks, begin = task % tasks * kTask, end = std::min(begin + kTask, blocks);
      Scratch room(2 * Scratch::size(block * channels * sizeof(float)));
      if (!room.ok()) return failed.store(true, std::memory_order_relaxed);
      float* values = room.take<float>(block * channels);
      float* squares = room.take<float>(block * channels);
      for (std::size_t b = begin; b < end; ++b) {
        const std::size_t first = b * block, pixel = image * plane + first;
        enter_({step.in[0].as<float>() + image * plane * channels + first, plane, &step.stage,
                step.stage.held + pixel * channels, step.stage.mask + pixel, std::min(block, plane - first), values,
                squares});
      }
    };
    ONNXCOMP_RETURN_IF_ERROR(parallel_for(api_, context, step.images * tasks,
                                          step.pixels() * channels >= kSerial, work));
    return failed.load(std::memory_order_relaxed) ? out_of_memory(api_) : nullptr;
  }

 private:
  static constexpr std::size_t kTask = 16;  // blocks

  delta::Enter enter_;
};

}  // namespace onnxcomp
