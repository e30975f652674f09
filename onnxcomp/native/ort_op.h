// What every op with a kernel has: its inputs, read in order, and errors that name it.

#pragma once

#include "huge_pages.h"
#include "ort_kernel.h"

namespace onnxcomp {

// Below this many multiply-adds waking a thread costs more than it saves (about 4 us of work).
inline constexpr std::size_t kSerial = std::size_t{1} << 16;

inline std::size_t element_size(ort::ElementType type) {
  return type == ort::ElementType::kFloat ? 4 : type == ort::ElementType::kFloat16 ? 2 : 1;
}

// What the ops have in common: their inputs, read in order, and where weights lie.
template <typename Op, std::size_t Inputs>
class OpBase {
 public:
  static constexpr std::size_t kInputs = Inputs;

 protected:
  explicit OpBase(const ort::Api* api) : api_(api) {}

  ort::Status* fail(const char* problem) const { return invalid(api_, Op::kName, problem); }
  ort::Status* read(const ort::KernelContext* context, Tensor* in) const {
    for (std::size_t i = 0; i < Inputs; ++i) ONNXCOMP_RETURN_IF_ERROR(read_input(api_, context, i, in + i));
    return nullptr;
  }
  // Rows picked at random are slow to read from small pages, since the processor has to look up where each of them is.
  static void ask_for_huge_pages(const ort::Api* api, const ort::KernelInfo* info) {
    for (std::size_t i = 0; i < Inputs; ++i) {
      Tensor tensor;
      if (ort::Status* status = read_constant(api, info, i, &tensor)) {
        call<ort::ReleaseStatus>(api, status);
      } else if (tensor.data != nullptr) {
        move_to_huge_pages(tensor.data, tensor.shape.count() * element_size(tensor.type));
      }
    }
  }
  static bool exact(const ort::Api* api, const ort::KernelInfo* info) { return attribute(api, info, "exact", 0) != 0; }

  const ort::Api* api_;
};

}  // namespace onnxcomp
