// Holds ort_abi.h against the vendor's header. Compiled only where that header is given (ONNXCOMP_ORT_INCLUDE_DIR).

#include <onnxruntime_c_api.h>

#include "ort_abi.h"

namespace ours = onnxcomp::ort;

#define CHECK_SLOT(name) \
  static_assert(offsetof(OrtApi, name) / sizeof(void*) == ours::name::index, "slot of " #name)
#define CHECK_FIELD(name) \
  static_assert(offsetof(OrtCustomOp, name) == offsetof(ours::CustomOp, name), "offset of " #name)

static_assert(ORT_API_VERSION >= ours::kApiVersion, "the header is older than what we use");
static_assert(offsetof(OrtApiBase, GetApi) == offsetof(ours::ApiBase, GetApi), "offset of GetApi");
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT == static_cast<int>(ours::ElementType::kFloat), "float");
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED == static_cast<int>(ours::ElementType::kAny), "any");
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 == static_cast<int>(ours::ElementType::kUint8), "uint8");
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 == static_cast<int>(ours::ElementType::kInt8), "int8");
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL == static_cast<int>(ours::ElementType::kBool), "bool");
static_assert(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 == static_cast<int>(ours::ElementType::kFloat16), "float16");
static_assert(ORT_FAIL == static_cast<int>(ours::ErrorCode::kFail), "fail");
static_assert(ORT_INVALID_ARGUMENT == static_cast<int>(ours::ErrorCode::kInvalidArgument), "invalid argument");
static_assert(INPUT_OUTPUT_REQUIRED == static_cast<int>(ours::Presence::kRequired), "required");
static_assert(OrtMemTypeDefault == static_cast<int>(ours::MemType::kDefault), "default memory");

CHECK_SLOT(CreateStatus);
CHECK_SLOT(CreateCustomOpDomain);
CHECK_SLOT(CustomOpDomain_Add);
CHECK_SLOT(AddCustomOpDomain);
CHECK_SLOT(GetTensorMutableData);
CHECK_SLOT(CreateTensorTypeAndShapeInfo);
CHECK_SLOT(SetTensorElementType);
CHECK_SLOT(SetDimensions);
CHECK_SLOT(GetTensorElementType);
CHECK_SLOT(GetDimensionsCount);
CHECK_SLOT(GetDimensions);
CHECK_SLOT(GetSymbolicDimensions);
CHECK_SLOT(GetTensorTypeAndShape);
CHECK_SLOT(KernelInfoGetAttribute_float);
CHECK_SLOT(KernelInfoGetAttribute_int64);
CHECK_SLOT(KernelContext_GetInput);
CHECK_SLOT(KernelContext_GetOutput);
CHECK_SLOT(ReleaseStatus);
CHECK_SLOT(ReleaseTensorTypeAndShapeInfo);
CHECK_SLOT(ReleaseCustomOpDomain);
CHECK_SLOT(AddSessionConfigEntry);
CHECK_SLOT(HasSessionConfigEntry);
CHECK_SLOT(KernelInfoGetConstantInput_tensor);
CHECK_SLOT(ShapeInferContext_GetInputTypeShape);
CHECK_SLOT(ShapeInferContext_SetOutputTypeShape);
CHECK_SLOT(SetSymbolicDimensions);
CHECK_SLOT(KernelContext_ParallelFor);

CHECK_FIELD(version);
CHECK_FIELD(CreateKernel);
CHECK_FIELD(GetName);
CHECK_FIELD(GetExecutionProviderType);
CHECK_FIELD(GetInputType);
CHECK_FIELD(GetInputTypeCount);
CHECK_FIELD(GetOutputType);
CHECK_FIELD(GetOutputTypeCount);
CHECK_FIELD(KernelCompute);
CHECK_FIELD(KernelDestroy);
CHECK_FIELD(GetInputCharacteristic);
CHECK_FIELD(GetOutputCharacteristic);
CHECK_FIELD(GetInputMemoryType);
CHECK_FIELD(GetVariadicInputMinArity);
CHECK_FIELD(GetVariadicInputHomogeneity);
CHECK_FIELD(GetVariadicOutputMinArity);
CHECK_FIELD(GetVariadicOutputHomogeneity);
CHECK_FIELD(CreateKernelV2);
CHECK_FIELD(KernelComputeV2);
CHECK_FIELD(InferOutputShapeFn);
CHECK_FIELD(GetStartVersion);
CHECK_FIELD(GetEndVersion);
