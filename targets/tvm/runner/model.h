// An artifact in TVM's virtual machine, called step by step.

#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <string>
#include <utility>
#include <vector>

#include "manifest.h"
#include "placement.h"

namespace onnxcomp {

class Model {
 public:
  // Loads `folder`/model.so and maps `folder`/weights.bin. Throws BadInput if they are not those of the manifest: by
  // their sizes, and by their hashes if `hashed`. Throws CannotLoad if this machine cannot run the code.
  Model(const std::string& folder, const Manifest& manifest, bool hashed);

  // Sets an input, in the order of the manifest. The tensor is read at every step; the caller may change its content.
  void bind(std::size_t input, tvm::ffi::Tensor tensor);

  // Runs once. The new state is kept and taken up by the next step. With a GPU, inputs are copied to it and outputs back.
  void call();

  // Hands the state on, after `call` and outside of what is timed.
  void advance();

  // An output of the last call, in the order of the manifest.
  tvm::ffi::Tensor output(std::size_t index) const;

 private:
  std::size_t parameter(const std::string& name) const;
  tvm::ffi::Tensor returned(const std::string& name) const;

  const Manifest& manifest_;
  const Placement placement_;
  Mapped weights_;
  tvm::ffi::Optional<tvm::ffi::Module> machine_;
  tvm::ffi::Function main_;
  std::vector<tvm::ffi::Tensor> arguments_;
  std::vector<tvm::ffi::Tensor> results_;
  std::vector<std::pair<std::size_t, tvm::ffi::Tensor>> given_;  // inputs in memory that a GPU gets copies of
  std::vector<tvm::ffi::Tensor> fetched_;                        // outputs that came back from a GPU
};

}  // namespace onnxcomp
