// What an artifact's manifest.json says, checked before anything is done with it.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "tensors.h"

namespace onnxcomp {

// A dimension: a number, or a symbol if the name is not empty; the symbol kAny stands for any size each time.
struct Dimension {
  std::int64_t size = 0;
  std::string symbol;
};

inline constexpr const char* kAny = "?";

struct Port {
  std::string name;
  const ElementType* type = nullptr;
  std::vector<Dimension> shape;
  bool any_shape = false;
};

// A tensor that one run hands to the next, zeros before the first.
struct State {
  std::string input, output;
  const ElementType* type = nullptr;
  Shape shape;
};

struct Weight {
  const ElementType* type = nullptr;
  Shape shape;
  std::size_t offset = 0;
};

// Size and hash that a file of the artifact has to have.
struct FileFacts {
  std::uint64_t bytes = 0;
  std::string sha256;
};

struct Manifest {
  std::string triple;
  std::string gpu;  // architecture of the GPU that kernels run on, as sm_87; empty if it is the CPU
  FileFacts model, weights_file;
  std::vector<Port> inputs;
  std::vector<std::string> outputs;
  std::vector<State> state;
  std::vector<Weight> weights;
  std::vector<std::string> parameters, returns;  // of `main`, without the weights
};

// Throws BadInput if it is malformed, if its parts do not fit together, or if a weight lies outside of its file.
Manifest read_manifest(const std::string& path);

}  // namespace onnxcomp
