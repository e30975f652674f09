#include "placement.h"

#include <dlfcn.h>
#include <tvm/ffi/container/shape.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "files.h"

namespace onnxcomp {
namespace {

namespace ffi = tvm::ffi;

constexpr std::size_t kAlignment = 64;
constexpr DLDevice kCpu{kDLCPU, 0};
constexpr int kExists = 0, kComputeVersion = 4;  // of tvm::runtime::DeviceAttrKind

struct Owned {
  void AllocData(DLTensor* tensor, std::size_t bytes) {
    const std::size_t room = std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    tensor->data = std::aligned_alloc(kAlignment, room);
    if (tensor->data == nullptr) throw BadInput("there is no memory for " + std::to_string(bytes) + " bytes");
    std::memset(tensor->data, 0, room);
  }
  void FreeData(DLTensor* tensor) { std::free(tensor->data); }
};

struct Borrowed {
  void AllocData(DLTensor* tensor, const std::uint8_t* data) { tensor->data = const_cast<std::uint8_t*>(data); }
  void FreeData(DLTensor*) {}
};

DLDataType dl_type(const ElementType& type) { return {type.code, type.bits, 1}; }

ffi::ShapeView view(const Shape& shape) { return {shape.data(), shape.size()}; }

// The digits of a version: 87 for both sm_87 and 8.7.
int number(const std::string& version) {
  int found = 0;
  for (const char c : version) {
    if (c >= '0' && c <= '9') found = found * 10 + (c - '0');
  }
  return found;
}

std::string last_error() {
  const char* const text = dlerror();
  return text == nullptr ? "unknown reason" : text;
}

}  // namespace

ffi::Tensor new_tensor(const Shape& shape, const ElementType& type) {
  return ffi::Tensor::FromNDAlloc(Owned{}, view(shape), dl_type(type), kCpu, bytes_of(shape, type));
}

ffi::Tensor borrowed_tensor(const Shape& shape, const ElementType& type, const std::uint8_t* data) {
  return ffi::Tensor::FromNDAlloc(Borrowed{}, view(shape), dl_type(type), kCpu, data);
}

void* begin_of(const ffi::Tensor& tensor) {
  const DLTensor* const about = tensor.GetDLTensorPtr();
  return static_cast<char*>(about->data) + about->byte_offset;
}

Placement::Placement(const std::string& arch) {
  if (arch.empty()) return;
  if (dlopen("libtvm_runtime_cuda.so", RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    throw CannotLoad("TVM's runtime for CUDA cannot be loaded; it needs NVIDIA's driver and libcudart.so.13: " +
                     last_error());
  }
  device_ = DLDevice{kDLCUDA, 0};
  const ffi::Function attribute = ffi::Function::GetGlobalRequired("runtime.GetDeviceAttr");
  if (attribute(static_cast<int>(kDLCUDA), 0, kExists).cast<int>() != 1) {
    throw CannotLoad("no NVIDIA GPU can be used: there is none, or its driver is too old for CUDA 13");
  }
  const auto version = std::string(attribute(static_cast<int>(kDLCUDA), 0, kComputeVersion).cast<ffi::String>());
  const bool only = arch.back() == 'a';  // such code runs on no later GPU
  const int here = number(version), wanted = number(arch);
  if (here < wanted || (only && here != wanted)) {
    throw CannotLoad("the artifact is for " + arch + (only ? "" : " and later") + ", and the GPU here is of compute " +
                     "capability " + version);
  }
}

ffi::Tensor Placement::zeros(const Shape& shape, const ElementType& type) const { return placed(new_tensor(shape, type)); }

ffi::Tensor Placement::placed(const ffi::Tensor& given) const {
  if (!gpu()) return given;
  static const ffi::Function allocate = ffi::Function::GetGlobalRequired("runtime.TVMTensorAllocWithScope");
  const ffi::Shape shape(given.shape().begin(), given.shape().end());
  const auto out = allocate(shape, given.dtype(), device_, nullptr).cast<ffi::Tensor>();
  copy(given, out);
  return out;
}

void Placement::copy(const ffi::Tensor& from, const ffi::Tensor& to) const {
  if (!gpu()) {
    const ElementType* const type = element_type(from.dtype().code, from.dtype().bits);
    const Shape shape(from.shape().begin(), from.shape().end());
    if (type == nullptr) throw BadInput("a tensor is of a type that .npy has not");
    std::memcpy(begin_of(to), begin_of(from), bytes_of(shape, *type));
    return;
  }
  static const ffi::Function copy_between = ffi::Function::GetGlobalRequired("runtime.TVMTensorCopyFromTo");
  copy_between(from, to);
  wait();
}

ffi::Tensor Placement::fetched(const ffi::Tensor& given) const {
  if (!gpu()) return given;
  const ElementType* const type = element_type(given.dtype().code, given.dtype().bits);
  if (type == nullptr) throw BadInput("an output is of a type that .npy has not");
  const ffi::Tensor out = new_tensor(Shape(given.shape().begin(), given.shape().end()), *type);
  copy(given, out);
  return out;
}

void Placement::wait() const {
  if (!gpu()) return;
  static const ffi::Function wait_for = ffi::Function::GetGlobalRequired("runtime.Device_StreamSync");
  wait_for(device_, std::int64_t{0});
}

}  // namespace onnxcomp
