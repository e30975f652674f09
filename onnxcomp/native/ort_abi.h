// The part of ONNX Runtime's C ABI that a custom-op library needs, as we see it.
//
// The runtime's wheels ship no headers, and the library does not link against the runtime: it is handed a table of
// function pointers. That table is append-only, so a slot number holds for every version from the one that introduced it.
// All slots used here exist since version 17 (ONNX Runtime 1.17); `ort_abi_check.cpp` holds slots and field order against
// the vendor's header wherever that can be had.
//
// Names are the vendor's without the `Ort` prefix, in a namespace of our own, so that both views fit in one file.

#pragma once

#include <cstddef>
#include <cstdint>

#if defined(_WIN32)
#define ONNXCOMP_ORT_CALL __stdcall
#else
#define ONNXCOMP_ORT_CALL
#endif

namespace onnxcomp::ort {

// The version of the table that we ask for, and of the `CustomOp` structs that we fill in.
inline constexpr std::uint32_t kApiVersion = 17;

struct Api;  // the table of function pointers
struct CustomOpDomain;
struct KernelContext;
struct KernelInfo;
struct SessionOptions;
struct ShapeInferContext;
struct Status;  // null means success; whoever receives one releases it
struct TensorTypeAndShapeInfo;
struct Value;

enum class ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
// kAny: of an op's input.
enum class ElementType : int { kAny = 0, kFloat = 1, kUint8 = 2, kInt8 = 3, kBool = 9, kFloat16 = 10 };
enum class Presence : int { kRequired = 0 };  // OrtCustomOpInputOutputCharacteristic
enum class MemType : int { kDefault = 0 };

struct ApiBase {
  const Api*(ONNXCOMP_ORT_CALL* GetApi)(std::uint32_t version);  // null if the runtime is older than `version`
  const char*(ONNXCOMP_ORT_CALL* GetVersionString)();
};

// One op. The runtime reads a field only if `version` says that it is there. Ours end with those of version 17.
struct CustomOp {
  std::uint32_t version;
  void*(ONNXCOMP_ORT_CALL* CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char*(ONNXCOMP_ORT_CALL* GetName)(const CustomOp*);
  const char*(ONNXCOMP_ORT_CALL* GetExecutionProviderType)(const CustomOp*);  // null means the CPU
  ElementType(ONNXCOMP_ORT_CALL* GetInputType)(const CustomOp*, std::size_t index);
  std::size_t(ONNXCOMP_ORT_CALL* GetInputTypeCount)(const CustomOp*);
  ElementType(ONNXCOMP_ORT_CALL* GetOutputType)(const CustomOp*, std::size_t index);
  std::size_t(ONNXCOMP_ORT_CALL* GetOutputTypeCount)(const CustomOp*);
  void(ONNXCOMP_ORT_CALL* KernelCompute)(void* kernel, KernelContext*);
  void(ONNXCOMP_ORT_CALL* KernelDestroy)(void* kernel);
  Presence(ONNXCOMP_ORT_CALL* GetInputCharacteristic)(const CustomOp*, std::size_t index);
  Presence(ONNXCOMP_ORT_CALL* GetOutputCharacteristic)(const CustomOp*, std::size_t index);
  MemType(ONNXCOMP_ORT_CALL* GetInputMemoryType)(const CustomOp*, std::size_t index);
  int(ONNXCOMP_ORT_CALL* GetVariadicInputMinArity)(const CustomOp*);
  int(ONNXCOMP_ORT_CALL* GetVariadicInputHomogeneity)(const CustomOp*);
  int(ONNXCOMP_ORT_CALL* GetVariadicOutputMinArity)(const CustomOp*);
  int(ONNXCOMP_ORT_CALL* GetVariadicOutputHomogeneity)(const CustomOp*);
  Status*(ONNXCOMP_ORT_CALL* CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status*(ONNXCOMP_ORT_CALL* KernelComputeV2)(void* kernel, KernelContext*);
  Status*(ONNXCOMP_ORT_CALL* InferOutputShapeFn)(const CustomOp*, ShapeInferContext*);
  int(ONNXCOMP_ORT_CALL* GetStartVersion)(const CustomOp*);
  int(ONNXCOMP_ORT_CALL* GetEndVersion)(const CustomOp*);
};

// A function of the table: its slot and its signature.
template <std::size_t Index, typename Signature>
struct Slot;

template <std::size_t Index, typename Result, typename... Args>
struct Slot<Index, Result(Args...)> {
  static constexpr std::size_t index = Index;
  using Function = Result(ONNXCOMP_ORT_CALL*)(Args...);
};

// clang-format off
using CreateStatus = Slot<0, Status*(ErrorCode, const char*)>;
using CreateCustomOpDomain = Slot<26, Status*(const char*, CustomOpDomain**)>;
using CustomOpDomain_Add = Slot<27, Status*(CustomOpDomain*, const CustomOp*)>;
using AddCustomOpDomain = Slot<28, Status*(SessionOptions*, CustomOpDomain*)>;
using GetTensorMutableData = Slot<51, Status*(Value*, void**)>;
using CreateTensorTypeAndShapeInfo = Slot<57, Status*(TensorTypeAndShapeInfo**)>;
using SetTensorElementType = Slot<58, Status*(TensorTypeAndShapeInfo*, ElementType)>;
using SetDimensions = Slot<59, Status*(TensorTypeAndShapeInfo*, const std::int64_t*, std::size_t)>;
using GetTensorElementType = Slot<60, Status*(const TensorTypeAndShapeInfo*, ElementType*)>;
using GetDimensionsCount = Slot<61, Status*(const TensorTypeAndShapeInfo*, std::size_t*)>;
using GetDimensions = Slot<62, Status*(const TensorTypeAndShapeInfo*, std::int64_t*, std::size_t)>;
using GetSymbolicDimensions = Slot<63, Status*(const TensorTypeAndShapeInfo*, const char**, std::size_t)>;
using GetTensorTypeAndShape = Slot<65, Status*(const Value*, TensorTypeAndShapeInfo**)>;
using KernelInfoGetAttribute_float = Slot<85, Status*(const KernelInfo*, const char*, float*)>;
using KernelInfoGetAttribute_int64 = Slot<86, Status*(const KernelInfo*, const char*, std::int64_t*)>;
using KernelContext_GetInput = Slot<90, Status*(const KernelContext*, std::size_t, const Value**)>;
using KernelContext_GetOutput = Slot<91, Status*(KernelContext*, std::size_t, const std::int64_t*, std::size_t, Value**)>;
using ReleaseStatus = Slot<93, void(Status*)>;
using ReleaseTensorTypeAndShapeInfo = Slot<99, void(TensorTypeAndShapeInfo*)>;
using ReleaseCustomOpDomain = Slot<101, void(CustomOpDomain*)>;
using AddSessionConfigEntry = Slot<130, Status*(SessionOptions*, const char*, const char*)>;
using HasSessionConfigEntry = Slot<237, Status*(const SessionOptions*, const char*, int*)>;
// The value that this gives, null unless the input is constant, belongs to the kernel's node: it is not to be released.
using KernelInfoGetConstantInput_tensor = Slot<249, Status*(const KernelInfo*, std::size_t, int*, const Value**)>;
// The shape that this gives belongs to the context: it is not to be released.
using ShapeInferContext_GetInputTypeShape = Slot<268, Status*(const ShapeInferContext*, std::size_t, TensorTypeAndShapeInfo**)>;
using ShapeInferContext_SetOutputTypeShape = Slot<270, Status*(const ShapeInferContext*, std::size_t, const TensorTypeAndShapeInfo*)>;
using SetSymbolicDimensions = Slot<271, Status*(TensorTypeAndShapeInfo*, const char**, std::size_t)>;
// Calls function(data, i) for every i < total on the session's own threads; batches = 0 lets the runtime choose.
using KernelContext_ParallelFor = Slot<274, Status*(const KernelContext*, void(*)(void*, std::size_t), std::size_t, std::size_t, void*)>;
// clang-format on

// Calls the function `S` of the table: `call<CreateStatus>(api, code, text)`.
template <typename S, typename... Args>
auto call(const Api* api, Args... args) {
  using Entry = typename S::Function;
  return reinterpret_cast<const Entry*>(api)[S::index](args...);
}

}  // namespace onnxcomp::ort
