// What every op needs of the runtime: tensors and shapes read, attributes, errors, and the description of an op.
//
// Nothing here throws; every failure becomes a status.

#pragma once

#include <atomic>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "ort_abi.h"

namespace onnxcomp {

using ort::call;

#define ONNXCOMP_RETURN_IF_ERROR(expression)                 \
  do {                                                       \
    if (ort::Status* status_ = (expression)) return status_; \
  } while (false)

// The table that shape inference uses: the runtime hands it to kernels only. Every call gives the same pointer.
inline std::atomic<const ort::Api*> g_api{nullptr};

// Memory for the duration of one call, handed out in pieces that start at a cache line. Not kept with the kernel: a
// session may be run by several threads at once.
class Scratch {
 public:
  static constexpr std::size_t kLine = 64;

  explicit Scratch(std::size_t bytes) : memory_(std::malloc(bytes + kLine)) {
    const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(memory_);
    next_ = reinterpret_cast<char*>((at + kLine - 1) / kLine * kLine);
  }
  ~Scratch() { std::free(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  bool ok() const { return memory_ != nullptr; }

  // What a piece takes of the total.
  static constexpr std::size_t size(std::size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

  template <typename T>
  T* take(std::size_t count) {
    T* piece = reinterpret_cast<T*>(next_);
    next_ += size(count * sizeof(T));
    return piece;
  }

 private:
  void* memory_;
  char* next_;
};

inline constexpr std::size_t kMaxRank = 16;

struct Shape {
  std::int64_t dims[kMaxRank] = {};
  std::size_t rank = 0;

  std::size_t count(std::size_t begin, std::size_t end) const {
    std::size_t product = 1;
    for (std::size_t i = begin; i < end; ++i) product *= static_cast<std::size_t>(dims[i]);
    return product;
  }
  std::size_t count() const { return count(0, rank); }
  bool is(std::int64_t a, std::int64_t b) const { return rank == 2 && dims[0] == a && dims[1] == b; }
  std::int64_t last() const { return rank == 0 ? -1 : dims[rank - 1]; }
};

// An input of a kernel.
struct Tensor {
  const void* data = nullptr;
  ort::ElementType type = ort::ElementType::kAny;
  Shape shape;

  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

// `name` is the op's: "name: text".
inline ort::Status* invalid(const ort::Api* api, const char* name, const char* text) {
  char message[256];
  std::snprintf(message, sizeof(message), "%s: %s", name, text);
  return call<ort::CreateStatus>(api, ort::ErrorCode::kInvalidArgument, static_cast<const char*>(message));
}

inline ort::Status* out_of_memory(const ort::Api* api) {
  return call<ort::CreateStatus>(api, ort::ErrorCode::kFail, "out of memory");
}

inline ort::Status* read_shape(const ort::Api* api, const ort::TensorTypeAndShapeInfo* info, Shape* shape) {
  ONNXCOMP_RETURN_IF_ERROR(call<ort::GetDimensionsCount>(api, info, &shape->rank));
  if (shape->rank > kMaxRank) {
    return call<ort::CreateStatus>(api, ort::ErrorCode::kInvalidArgument, "a tensor has more than 16 axes");
  }
  return call<ort::GetDimensions>(api, info, shape->dims, shape->rank);
}

inline ort::Status* read_value(const ort::Api* api, const ort::Value* value, Tensor* tensor) {
  ort::TensorTypeAndShapeInfo* info = nullptr;
  ONNXCOMP_RETURN_IF_ERROR(call<ort::GetTensorTypeAndShape>(api, value, &info));
  ort::Status* status = read_shape(api, info, &tensor->shape);
  if (status == nullptr) {
    status = call<ort::GetTensorElementType>(api, static_cast<const ort::TensorTypeAndShapeInfo*>(info), &tensor->type);
  }
  call<ort::ReleaseTensorTypeAndShapeInfo>(api, info);
  ONNXCOMP_RETURN_IF_ERROR(status);
  void* raw = nullptr;
  // The table has only the writable form of this function; the input itself is never written.
  ONNXCOMP_RETURN_IF_ERROR(call<ort::GetTensorMutableData>(api, const_cast<ort::Value*>(value), &raw));
  tensor->data = raw;
  return nullptr;
}

inline ort::Status* read_input(const ort::Api* api, const ort::KernelContext* context, std::size_t index,
                               Tensor* tensor) {
  const ort::Value* value = nullptr;
  ONNXCOMP_RETURN_IF_ERROR(call<ort::KernelContext_GetInput>(api, context, index, &value));
  return read_value(api, value, tensor);
}

// Reads an input that is known when the session is made; leaves `tensor` empty if it is not.
inline ort::Status* read_constant(const ort::Api* api, const ort::KernelInfo* info, std::size_t index, Tensor* tensor) {
  const ort::Value* value = nullptr;
  int constant = 0;
  ONNXCOMP_RETURN_IF_ERROR(call<ort::KernelInfoGetConstantInput_tensor>(api, info, index, &constant, &value));
  return constant != 0 && value != nullptr ? read_value(api, value, tensor) : nullptr;
}

// The output Y [leading axes of `like`, columns], fp32.
inline ort::Status* make_output(const ort::Api* api, ort::KernelContext* context, Shape like, std::size_t columns,
                                float** y) {
  like.dims[like.rank - 1] = static_cast<std::int64_t>(columns);
  ort::Value* output = nullptr;
  ONNXCOMP_RETURN_IF_ERROR(call<ort::KernelContext_GetOutput>(
      api, context, std::size_t{0}, static_cast<const std::int64_t*>(like.dims), like.rank, &output));
  void* raw = nullptr;
  ONNXCOMP_RETURN_IF_ERROR(call<ort::GetTensorMutableData>(api, output, &raw));
  *y = static_cast<float*>(raw);
  return nullptr;
}

// An integer attribute, or `missing` where the node does not have it.
inline std::int64_t attribute(const ort::Api* api, const ort::KernelInfo* info, const char* name,
                              std::int64_t missing) {
  std::int64_t value = missing;
  if (ort::Status* status = call<ort::KernelInfoGetAttribute_int64>(api, info, name, &value)) {
    call<ort::ReleaseStatus>(api, status);
    return missing;
  }
  return value;
}

// Calls work(i) for every i < tasks on the threads of the session.
template <typename Work>
ort::Status* parallel_for(const ort::Api* api, const ort::KernelContext* context, std::size_t tasks, bool worth_it,
                          const Work& work) {
  if (tasks <= 1 || !worth_it) {
    for (std::size_t i = 0; i < tasks; ++i) work(i);
    return nullptr;
  }
  return call<ort::KernelContext_ParallelFor>(
      api, context, +[](void* data, std::size_t i) { (*static_cast<const Work*>(data))(i); }, tasks, std::size_t{0},
      static_cast<void*>(const_cast<Work*>(&work)));
}

// Gives output 0 the shape of input `like` with its last axis replaced by the last of input `weight` times `factor`; by
// nothing if `weight` is `like`. A weight is a matrix, or a vector with one element a column.
inline ort::Status* infer_product(const ort::Api* api, ort::ShapeInferContext* context, std::size_t like,
                                  std::size_t weight, std::int64_t factor) {
  ort::TensorTypeAndShapeInfo *x = nullptr, *w = nullptr;
  ONNXCOMP_RETURN_IF_ERROR(call<ort::ShapeInferContext_GetInputTypeShape>(api, context, like, &x));
  ONNXCOMP_RETURN_IF_ERROR(call<ort::ShapeInferContext_GetInputTypeShape>(api, context, weight, &w));
  Shape xs, ws;
  ONNXCOMP_RETURN_IF_ERROR(read_shape(api, x, &xs));
  ONNXCOMP_RETURN_IF_ERROR(read_shape(api, w, &ws));
  // The runtime shows an unknown rank as rank 0; then there is nothing to infer.
  if (xs.rank == 0 || (weight != like && ws.rank != 1 && ws.rank != 2)) return nullptr;
  const char* names[kMaxRank] = {};
  const char* w_names[kMaxRank] = {};
  ONNXCOMP_RETURN_IF_ERROR(call<ort::GetSymbolicDimensions>(api, x, static_cast<const char**>(names), xs.rank));
  ONNXCOMP_RETURN_IF_ERROR(call<ort::GetSymbolicDimensions>(api, w, static_cast<const char**>(w_names), ws.rank));
  if (weight != like) {
    const std::size_t last = ws.rank - 1;
    const bool known = ws.dims[last] >= 0;
    xs.dims[xs.rank - 1] = known ? ws.dims[last] * factor : -1;
    names[xs.rank - 1] = !known && factor == 1 ? w_names[last] : "";
  }
  // The runtime would take an axis without length and name for one of length -1.
  for (std::size_t i = 0; i < xs.rank; ++i) {
    if (xs.dims[i] < 0 && (names[i] == nullptr || names[i][0] == 0)) return nullptr;
  }

  ort::TensorTypeAndShapeInfo* y = nullptr;
  ONNXCOMP_RETURN_IF_ERROR(call<ort::CreateTensorTypeAndShapeInfo>(api, &y));
  ort::Status* status = call<ort::SetTensorElementType>(api, y, ort::ElementType::kFloat);
  if (status == nullptr) {
    status = call<ort::SetDimensions>(api, y, static_cast<const std::int64_t*>(xs.dims), xs.rank);
  }
  if (status == nullptr) status = call<ort::SetSymbolicDimensions>(api, y, static_cast<const char**>(names), xs.rank);
  if (status == nullptr) {
    status = call<ort::ShapeInferContext_SetOutputTypeShape>(api, context, std::size_t{0},
                                                             static_cast<const ort::TensorTypeAndShapeInfo*>(y));
  }
  call<ort::ReleaseTensorTypeAndShapeInfo>(api, y);
  return status;
}

// Outputs of an op and their types: one fp32 tensor unless it says otherwise.
template <typename Op, typename = void>
struct Outputs {
  static constexpr std::size_t kCount = 1;
  static ort::ElementType type(std::size_t) { return ort::ElementType::kFloat; }
};

template <typename Op>
struct Outputs<Op, std::void_t<decltype(Op::kOutputs)>> {
  static constexpr std::size_t kCount = Op::kOutputs;
  static ort::ElementType type(std::size_t index) { return Op::output_type(index); }
};

// Describes the op `Op` to the runtime: required tensors in, one fp32 tensor out, or kOutputs of output_type(i). `Op` is
// made of (api, info), and has kName, kInputs, input_type(i), check_attributes(), compute(context) and
// infer_shape(api, context).
template <typename Op>
ort::CustomOp describe() {
  ort::CustomOp op{};
  op.version = ort::kApiVersion;
  op.GetName = [](const ort::CustomOp*) { return Op::kName; };
  op.GetExecutionProviderType = [](const ort::CustomOp*) -> const char* { return nullptr; };
  op.GetInputType = [](const ort::CustomOp*, std::size_t index) { return Op::input_type(index); };
  op.GetInputTypeCount = [](const ort::CustomOp*) { return std::size_t{Op::kInputs}; };
  op.GetOutputType = [](const ort::CustomOp*, std::size_t index) { return Outputs<Op>::type(index); };
  op.GetOutputTypeCount = [](const ort::CustomOp*) { return Outputs<Op>::kCount; };
  op.KernelDestroy = [](void* kernel) {
    static_cast<Op*>(kernel)->~Op();
    std::free(kernel);
  };
  op.GetInputCharacteristic = [](const ort::CustomOp*, std::size_t) { return ort::Presence::kRequired; };
  op.GetOutputCharacteristic = [](const ort::CustomOp*, std::size_t) { return ort::Presence::kRequired; };
  op.GetInputMemoryType = [](const ort::CustomOp*, std::size_t) { return ort::MemType::kDefault; };
  op.GetVariadicInputMinArity = [](const ort::CustomOp*) { return 0; };
  op.GetVariadicInputHomogeneity = [](const ort::CustomOp*) { return 0; };
  op.GetVariadicOutputMinArity = [](const ort::CustomOp*) { return 0; };
  op.GetVariadicOutputHomogeneity = [](const ort::CustomOp*) { return 0; };
  op.CreateKernelV2 = [](const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo* info,
                         void** kernel) -> ort::Status* {
    void* memory = std::malloc(sizeof(Op));
    if (memory == nullptr) return out_of_memory(api);
    Op* made = ::new (memory) Op(api, info);
    if (ort::Status* status = made->check_attributes()) {
      made->~Op();
      std::free(memory);
      return status;
    }
    *kernel = made;
    return nullptr;
  };
  op.KernelComputeV2 = [](void* kernel, ort::KernelContext* context) {
    return static_cast<const Op*>(kernel)->compute(context);
  };
  op.InferOutputShapeFn = [](const ort::CustomOp*, ort::ShapeInferContext* context) {
    return Op::infer_shape(g_api.load(std::memory_order_acquire), context);
  };
  op.GetStartVersion = [](const ort::CustomOp*) { return 1; };
  op.GetEndVersion = [](const ort::CustomOp*) { return INT_MAX; };
  return op;
}

}  // namespace onnxcomp
