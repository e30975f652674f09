// Inputs of a run, step by step.

#pragma once

#include <tvm/ffi/container/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "manifest.h"
#include "options.h"
#include "tensors.h"

namespace onnxcomp {

class Feeds {
 public:
  // Opens the arrays and checks them against the manifest. Throws BadInput.
  Feeds(const Manifest& manifest, const Options& options);

  // Memory of an input, which `fill` writes to.
  const tvm::ffi::Tensor& tensor(std::size_t input) const { return tensors_[input]; }

  // Copies the inputs of a step, counted from 0.
  void fill(std::int64_t step);

 private:
  std::vector<std::optional<Npy>> arrays_;
  std::vector<const ElementType*> types_;
  std::vector<tvm::ffi::Tensor> tensors_;
};

}  // namespace onnxcomp
