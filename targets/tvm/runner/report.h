// What a run prints: one JSON object.

#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace onnxcomp {

struct Report {
  double load_ms = 0;
  std::optional<double> first_ms;
  std::vector<double> samples;  // in milliseconds
  std::int64_t threads = 0;
  std::int64_t steps = 0;
  std::vector<std::pair<std::string, std::string>> outputs;  // names of tensors and of their files
};

// Prints to the standard output. Throws BadInput if that cannot be written.
void print(const Report& report);

}  // namespace onnxcomp
