// Where tensors of a model lie: in memory, or on a GPU, to which TVM's runtime copies.

#pragma once

#include <tvm/ffi/container/tensor.h>

#include <cstdint>
#include <string>

#include "tensors.h"

namespace onnxcomp {

// Memory of zeros, aligned as kernels may count on.
tvm::ffi::Tensor new_tensor(const Shape& shape, const ElementType& type);

// Memory that belongs to somebody else, seen as a tensor.
tvm::ffi::Tensor borrowed_tensor(const Shape& shape, const ElementType& type, const std::uint8_t* data);

// First byte of a tensor.
void* begin_of(const tvm::ffi::Tensor& tensor);

// The device that a model runs on.
class Placement {
 public:
  // A GPU that runs code for `arch`, as sm_87, or the CPU if that is empty. Throws CannotLoad if there is no such GPU, or
  // its driver or TVM's part for it cannot be loaded.
  explicit Placement(const std::string& arch);

  DLDevice device() const { return device_; }
  bool gpu() const { return device_.device_type != kDLCPU; }

  // A tensor on the device, of zeros.
  tvm::ffi::Tensor zeros(const Shape& shape, const ElementType& type) const;

  // A tensor on the device with the content of one in memory; without a GPU, that one itself.
  tvm::ffi::Tensor placed(const tvm::ffi::Tensor& given) const;

  // Copies between two tensors of one shape and type, wherever they lie, and waits for it.
  void copy(const tvm::ffi::Tensor& from, const tvm::ffi::Tensor& to) const;

  // A tensor in memory with the content of one on the device; without a GPU, that one itself.
  tvm::ffi::Tensor fetched(const tvm::ffi::Tensor& given) const;

  // Waits for all that runs on the device.
  void wait() const;

 private:
  DLDevice device_{kDLCPU, 0};
};

}  // namespace onnxcomp
