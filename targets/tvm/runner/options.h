// The command line.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace onnxcomp {

struct Options {
  std::string artifact;
  std::vector<std::string> inputs;  // NAME=FILE.npy
  std::string out;
  std::int64_t steps = 0;  // 0: one, whose arrays have no axis of steps
  std::int64_t warmup = 3;
  std::int64_t repeat = 0;
  std::int64_t threads = 0;
  double seconds = 0;
  bool random = false, check = false, help = false;

  std::int64_t runs() const { return steps > 0 ? steps : 1; }
};

extern const char* const kUsage;

// Throws BadInput.
Options parse(int count, char** words);

}  // namespace onnxcomp
