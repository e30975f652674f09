// The domain `onnxcomp.native` of custom ops for ONNX Runtime on the CPU: reads tensors and shapes, checks them, and
// hands plain pointers to kernels/*.h. Nothing here throws; every failure becomes a status.

#include <atomic>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <new>

#include "kernels/threshold_matmul.h"
#include "ort_abi.h"

namespace {

namespace ort = onnxcomp::ort;
using ort::call;

constexpr const char* kDomain = "onnxcomp.native";

#define ONNXCOMP_RETURN_IF_ERROR(expression)                    \
  do {                                                          \
    if (ort::Status* status_ = (expression)) return status_;    \
  } while (false)

// Memory for the duration of one call. Not kept with the kernel: a session may be run by several threads at once.
class Scratch {
 public:
  explicit Scratch(std::size_t bytes) : data_(std::malloc(bytes == 0 ? 1 : bytes)) {}
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return data_; }

 private:
  void* data_;
};

constexpr std::size_t kMaxRank = 16;

struct Shape {
  std::int64_t dims[kMaxRank] = {};
  std::size_t rank = 0;

  std::size_t count(std::size_t begin, std::size_t end) const {
    std::size_t product = 1;
    for (std::size_t i = begin; i < end; ++i) product *= static_cast<std::size_t>(dims[i]);
    return product;
  }
};

ort::Status* invalid(const ort::Api* api, const char* text) {
  return call<ort::CreateStatus>(api, ort::ErrorCode::kInvalidArgument, text);
}

ort::Status* read_shape(const ort::Api* api, const ort::TensorTypeAndShapeInfo* info, Shape* shape) {
  ONNXCOMP_RETURN_IF_ERROR(call<ort::GetDimensionsCount>(api, info, &shape->rank));
  if (shape->rank > kMaxRank) return invalid(api, "a tensor has more than 16 axes");
  return call<ort::GetDimensions>(api, info, shape->dims, shape->rank);
}

ort::Status* read_input(const ort::Api* api, const ort::KernelContext* context, std::size_t index, const float** data,
                        Shape* shape) {
  const ort::Value* value = nullptr;
  ONNXCOMP_RETURN_IF_ERROR(call<ort::KernelContext_GetInput>(api, context, index, &value));
  ort::TensorTypeAndShapeInfo* info = nullptr;
  ONNXCOMP_RETURN_IF_ERROR(call<ort::GetTensorTypeAndShape>(api, value, &info));
  ort::Status* status = read_shape(api, info, shape);
  call<ort::ReleaseTensorTypeAndShapeInfo>(api, info);
  ONNXCOMP_RETURN_IF_ERROR(status);
  void* raw = nullptr;
  // The table has only the writable form of this function; the input itself is never written.
  ONNXCOMP_RETURN_IF_ERROR(call<ort::GetTensorMutableData>(api, const_cast<ort::Value*>(value), &raw));
  *data = static_cast<const float*>(raw);
  return nullptr;
}

// ---------------------------------------------------------------------------------------------------------------------
// ThresholdMatMul(X [..., K], W [K, N], threshold [] | [1] | [K]) -> Y [..., N], all fp32.
class ThresholdMatMul {
 public:
  static constexpr const char* kName = "ThresholdMatMul";
  static constexpr std::size_t kInputs = 3;
  static constexpr std::size_t kOutputs = 1;

  explicit ThresholdMatMul(const ort::Api* api)
      : api_(api), accumulate_(onnxcomp::threshold_matmul::choose_accumulate()) {}

  ort::Status* compute(ort::KernelContext* context) const {
    const float *x = nullptr, *w = nullptr, *t = nullptr;
    Shape xs, ws, ts;
    ONNXCOMP_RETURN_IF_ERROR(read_input(api_, context, 0, &x, &xs));
    ONNXCOMP_RETURN_IF_ERROR(read_input(api_, context, 1, &w, &ws));
    ONNXCOMP_RETURN_IF_ERROR(read_input(api_, context, 2, &t, &ts));
    ONNXCOMP_RETURN_IF_ERROR(check(xs, ws, ts));

    const std::size_t k = static_cast<std::size_t>(ws.dims[0]);
    const std::size_t n = static_cast<std::size_t>(ws.dims[1]);
    const std::size_t t_step = ts.count(0, ts.rank) == 1 ? 0 : 1;
    const std::size_t batch = xs.count(0, xs.rank - 1);
    Shape ys = xs;
    ys.dims[ys.rank - 1] = ws.dims[1];
    ort::Value* output = nullptr;
    ONNXCOMP_RETURN_IF_ERROR(call<ort::KernelContext_GetOutput>(
        api_, context, std::size_t{0}, static_cast<const std::int64_t*>(ys.dims), ys.rank, &output));
    void* raw = nullptr;
    ONNXCOMP_RETURN_IF_ERROR(call<ort::GetTensorMutableData>(api_, output, &raw));
    float* y = static_cast<float*>(raw);

    const Scratch scratch(k * (sizeof(std::size_t) + sizeof(float)));
    if (scratch.get() == nullptr) {
      return call<ort::CreateStatus>(api_, ort::ErrorCode::kFail, "ThresholdMatMul: out of memory");
    }
    std::size_t* rows = static_cast<std::size_t*>(scratch.get());
    float* values = reinterpret_cast<float*>(rows + k);
    for (std::size_t b = 0; b < batch; ++b) {
      const std::size_t kept = onnxcomp::threshold_matmul::compact(x + b * k, k, t, t_step, values, rows);
      ONNXCOMP_RETURN_IF_ERROR(add_rows(context, w, n, values, rows, kept, y + b * n));
    }
    return nullptr;
  }

  static ort::Status* infer_shape(const ort::Api* api, ort::ShapeInferContext* context) {
    ort::TensorTypeAndShapeInfo *x = nullptr, *w = nullptr;
    ONNXCOMP_RETURN_IF_ERROR(call<ort::ShapeInferContext_GetInputTypeShape>(api, context, std::size_t{0}, &x));
    ONNXCOMP_RETURN_IF_ERROR(call<ort::ShapeInferContext_GetInputTypeShape>(api, context, std::size_t{1}, &w));
    Shape xs, ws;
    ONNXCOMP_RETURN_IF_ERROR(read_shape(api, x, &xs));
    ONNXCOMP_RETURN_IF_ERROR(read_shape(api, w, &ws));
    // The runtime shows an unknown rank as rank 0; then there is nothing to infer.
    if (xs.rank == 0 || ws.rank != 2) return nullptr;
    const char* names[kMaxRank] = {};
    const char* w_names[kMaxRank] = {};
    ONNXCOMP_RETURN_IF_ERROR(call<ort::GetSymbolicDimensions>(api, x, static_cast<const char**>(names), xs.rank));
    ONNXCOMP_RETURN_IF_ERROR(call<ort::GetSymbolicDimensions>(api, w, static_cast<const char**>(w_names), ws.rank));
    xs.dims[xs.rank - 1] = ws.dims[1];
    names[xs.rank - 1] = w_names[1];

    ort::TensorTypeAndShapeInfo* y = nullptr;
    ONNXCOMP_RETURN_IF_ERROR(call<ort::CreateTensorTypeAndShapeInfo>(api, &y));
    ort::Status* status = describe_output(api, context, y, xs, names);
    call<ort::ReleaseTensorTypeAndShapeInfo>(api, y);
    return status;
  }

 private:
  // Below this many multiply-adds waking a thread costs more than it saves (about 4 us of work).
  static constexpr std::size_t kSerial = std::size_t{1} << 16;
  // Columns a task: whole cache lines, and a part of y that stays in the first-level cache. A row of W is read in runs of
  // this length, and shorter ones waste bandwidth (1024 cost a fifth); the runtime does not tell how many threads it has.
  static constexpr std::size_t kBlock = 2048;

  struct Work {
    onnxcomp::threshold_matmul::Accumulate accumulate;
    const float* w;
    std::size_t n;
    const float* values;
    const std::size_t* rows;
    std::size_t kept;
    float* y;
    std::size_t block;

    void run(std::size_t index) const {
      const std::size_t begin = index * block;
      accumulate(w + begin, n, values, rows, kept, y + begin, begin + block < n ? block : n - begin);
    }
  };

  ort::Status* check(const Shape& x, const Shape& w, const Shape& t) const {
    if (w.rank != 2) return invalid(api_, "ThresholdMatMul: W has to have two axes, [K, N]");
    if (x.rank == 0 || x.dims[x.rank - 1] != w.dims[0]) {
      return invalid(api_, "ThresholdMatMul: the last axis of X has to be as long as the first of W");
    }
    const bool scalar = t.rank == 0 || (t.rank == 1 && t.dims[0] == 1);
    if (!scalar && !(t.rank == 1 && t.dims[0] == w.dims[0])) {
      return invalid(api_, "ThresholdMatMul: threshold has to be a scalar or one value for each element of X's last axis");
    }
    return nullptr;
  }

  ort::Status* add_rows(const ort::KernelContext* context, const float* w, std::size_t n, const float* values,
                        const std::size_t* rows, std::size_t kept, float* y) const {
    Work work{accumulate_, w, n, values, rows, kept, y, kBlock};
    const std::size_t tasks = (n + work.block - 1) / work.block;
    if (tasks <= 1 || kept * n < kSerial) {
      for (std::size_t i = 0; i < tasks; ++i) work.run(i);
      return nullptr;
    }
    return call<ort::KernelContext_ParallelFor>(
        api_, context, +[](void* data, std::size_t i) { static_cast<const Work*>(data)->run(i); }, tasks,
        std::size_t{0}, static_cast<void*>(&work));
  }

  static ort::Status* describe_output(const ort::Api* api, const ort::ShapeInferContext* context,
                                      ort::TensorTypeAndShapeInfo* y, const Shape& shape, const char** names) {
    ONNXCOMP_RETURN_IF_ERROR(call<ort::SetTensorElementType>(api, y, ort::ElementType::kFloat));
    ONNXCOMP_RETURN_IF_ERROR(
        call<ort::SetDimensions>(api, y, static_cast<const std::int64_t*>(shape.dims), shape.rank));
    ONNXCOMP_RETURN_IF_ERROR(call<ort::SetSymbolicDimensions>(api, y, names, shape.rank));
    return call<ort::ShapeInferContext_SetOutputTypeShape>(api, context, std::size_t{0},
                                                           static_cast<const ort::TensorTypeAndShapeInfo*>(y));
  }

  const ort::Api* api_;
  onnxcomp::threshold_matmul::Accumulate accumulate_;
};

// ---------------------------------------------------------------------------------------------------------------------

// The table that shape inference uses: the runtime hands it to kernels only. Every call gives the same pointer.
std::atomic<const ort::Api*> g_api{nullptr};

// Describes the op `Op` to the runtime. All inputs and outputs are required fp32 tensors.
template <typename Op>
ort::CustomOp describe() {
  ort::CustomOp op{};
  op.version = ort::kApiVersion;
  op.GetName = [](const ort::CustomOp*) { return Op::kName; };
  op.GetExecutionProviderType = [](const ort::CustomOp*) -> const char* { return nullptr; };
  op.GetInputType = [](const ort::CustomOp*, std::size_t) { return ort::ElementType::kFloat; };
  op.GetInputTypeCount = [](const ort::CustomOp*) { return Op::kInputs; };
  op.GetOutputType = [](const ort::CustomOp*, std::size_t) { return ort::ElementType::kFloat; };
  op.GetOutputTypeCount = [](const ort::CustomOp*) { return Op::kOutputs; };
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
  op.CreateKernelV2 = [](const ort::CustomOp*, const ort::Api* api, const ort::KernelInfo*,
                         void** kernel) -> ort::Status* {
    void* memory = std::malloc(sizeof(Op));
    if (memory == nullptr) return call<ort::CreateStatus>(api, ort::ErrorCode::kFail, "out of memory");
    *kernel = ::new (memory) Op(api);
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

const ort::CustomOp kThresholdMatMul = describe<ThresholdMatMul>();

ort::Status* add_domain(const ort::Api* api, ort::SessionOptions* options) {
  // The runtime refuses two domains of one name only when a session is made, with an obscure message. A mark in the
  // options makes registering twice harmless.
  constexpr const char* kMark = "onnxcomp.native.registered";
  int registered = 0;
  ONNXCOMP_RETURN_IF_ERROR(
      call<ort::HasSessionConfigEntry>(api, static_cast<const ort::SessionOptions*>(options), kMark, &registered));
  if (registered != 0) return nullptr;

  // One domain for the whole process, never released: every session made from any of the options refers to it.
  static std::atomic<ort::CustomOpDomain*> shared{nullptr};
  ort::CustomOpDomain* domain = shared.load(std::memory_order_acquire);
  if (domain == nullptr) {
    ort::CustomOpDomain* mine = nullptr;
    ONNXCOMP_RETURN_IF_ERROR(call<ort::CreateCustomOpDomain>(api, kDomain, &mine));
    if (ort::Status* status = call<ort::CustomOpDomain_Add>(api, mine, &kThresholdMatMul)) {
      call<ort::ReleaseCustomOpDomain>(api, mine);
      return status;
    }
    if (shared.compare_exchange_strong(domain, mine, std::memory_order_acq_rel)) {
      domain = mine;
    } else {
      call<ort::ReleaseCustomOpDomain>(api, mine);  // another thread was first
    }
  }
  ONNXCOMP_RETURN_IF_ERROR(call<ort::AddCustomOpDomain>(api, options, domain));
  return call<ort::AddSessionConfigEntry>(api, options, kMark, "1");
}

}  // namespace

#if defined(_WIN32)
#define ONNXCOMP_EXPORT extern "C" __declspec(dllexport)
#else
#define ONNXCOMP_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// The runtime looks this function up when the library is registered with `SessionOptions`.
ONNXCOMP_EXPORT ort::Status* ONNXCOMP_ORT_CALL RegisterCustomOps(ort::SessionOptions* options,
                                                                 const ort::ApiBase* base) {
  const ort::Api* api = base->GetApi(ort::kApiVersion);
  if (api == nullptr) {
    char text[128];
    std::snprintf(text, sizeof(text), "onnxcomp needs ONNX Runtime 1.17 or newer; this is %s", base->GetVersionString());
    // Version 1 of the table is in every runtime, and all that is needed of it is its first slot.
    return call<ort::CreateStatus>(base->GetApi(1), ort::ErrorCode::kFail, static_cast<const char*>(text));
  }
  g_api.store(api, std::memory_order_release);
  return add_domain(api, options);
}
