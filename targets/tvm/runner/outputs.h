// Writes outputs to files, stacked along the steps.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "files.h"
#include "manifest.h"
#include "model.h"
#include "options.h"
#include "tensors.h"

namespace onnxcomp {

class Writer {
 public:
  // Opens a file for each output under a temporary name; none if no folder is wanted. Throws BadInput.
  Writer(const Manifest& manifest, const Options& options);

  // Appends the outputs of a step, counted from 0. Throws BadInput.
  void add(const Model& model, std::int64_t step);

  // Gives the files their names.
  void commit();

  // Names of the files, in the order of the outputs.
  const std::vector<std::string>& names() const { return names_; }

 private:
  const Manifest& manifest_;
  const Options& options_;
  std::vector<std::string> names_;
  std::vector<Output> files_;
  std::vector<Shape> shapes_;
};

}  // namespace onnxcomp
