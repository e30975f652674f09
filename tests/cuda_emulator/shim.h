// CUDA C++, as far as TVM emits it, in C++ for the emulator: included before a kernel's source.
//
// What the source includes of CUDA (cuda.h, cuda_fp16.h, ...) is taken out: it is all here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "engine.h"

static emulator::Engine* onnxcomp_engine;
extern "C" void onnxcomp_emulator_attach(emulator::Engine* engine) { onnxcomp_engine = engine; }

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __cluster_dims__(...)
#define __grid_constant__

#define threadIdx (onnxcomp_engine->thread)
#define blockIdx (onnxcomp_engine->block)
#define blockDim (onnxcomp_engine->block_size)
#define gridDim (onnxcomp_engine->grid)
constexpr int warpSize = 32;

// Reports from the compiler's own checks (-fsanitize), whose library is not linked.

struct OnnxcompPlace {
  const char* file;
  uint32_t line, column;
};
extern "C" void __ubsan_handle_out_of_bounds_abort(void* data, void* index) {
  auto place = static_cast<OnnxcompPlace*>(data);
  onnxcomp_engine->fail(emulator::kIllegalAddress, int(place->line), "index %zd is out of an array's bounds",
                        size_t(index));
}
extern "C" void __ubsan_handle_type_mismatch_v1_abort(void* data, void* pointer) {
  auto place = static_cast<OnnxcompPlace*>(data);
  onnxcomp_engine->fail(emulator::kMisaligned, int(place->line), "address %p is misaligned for the access", pointer);
}

#include "shim_half.h"
#include "shim_warp.h"

// How the driver calls a kernel.

namespace onnxcomp {

template <typename T> inline void check(void* argument, int number) {
  if constexpr (std::is_pointer_v<T>) onnxcomp_engine->check_pointer(*static_cast<T*>(argument), number);
}
template <size_t... I> struct Numbers {};
template <size_t N, size_t... I> struct Count : Count<N - 1, N - 1, I...> {};
template <size_t... I> struct Count<0, I...> { using type = Numbers<I...>; };
template <typename... A, size_t... I>
inline void run(void (*kernel)(A...), void** arguments, bool check_only, Numbers<I...>) {
  if (check_only) {
    (check<A>(arguments[I], int(I)), ...);
  } else {
    kernel(*static_cast<A*>(arguments[I])...);
  }
}
template <typename... A> inline void run(void (*kernel)(A...), void** arguments, bool check_only) {
  run(kernel, arguments, check_only, typename Count<sizeof...(A)>::type{});
}

}  // namespace onnxcomp

#define ONNXCOMP_KERNEL(name) \
  extern "C" void onnxcomp_run_##name(void** arguments, bool check) { onnxcomp::run(name, arguments, check); }
