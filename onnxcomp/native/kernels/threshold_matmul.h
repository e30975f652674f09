// y = where(|x| > t, x, 0) @ W for one row x, fp32, reading only the rows of W whose x survives.
//
// Two steps: `compact` lists the surviving elements of x, `accumulate` adds up their rows of W. A product with batch 1
// is bound by memory, so what counts is that a row which is not needed is not read, and that those which are needed
// arrive as long runs.
//
// NaN: an element is dropped only if |x| <= t holds, so a NaN of x or t keeps its row and reaches the output. What is not
// read cannot reach it: unlike 0 * W, a dropped element hides a NaN or infinity in its row of W.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>

#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define ONNXCOMP_X86 1
#endif

#if defined(__GNUC__) || defined(__clang__)
#define ONNXCOMP_RESTRICT __restrict__
#define ONNXCOMP_INLINE inline __attribute__((always_inline))
#define ONNXCOMP_PREFETCH(address) __builtin_prefetch((address), 0, 2)  // into the second-level cache
#else
#define ONNXCOMP_RESTRICT
#define ONNXCOMP_INLINE inline
#define ONNXCOMP_PREFETCH(address) ((void)0)
#endif

namespace onnxcomp::threshold_matmul {

// Lists the elements of x that survive, in order.
//
// `t` holds one threshold an element (t_step 1) or a single one (t_step 0). `values` and `rows` have room for k.
// Returns how many survive. Without a branch, since which elements survive is as good as random.
inline std::size_t compact(const float* x, std::size_t k, const float* t, std::size_t t_step, float* values,
                           std::size_t* rows) {
  std::size_t kept = 0;
  for (std::size_t i = 0; i < k; ++i) {
    values[kept] = x[i];
    rows[kept] = i;
    kept += !(std::fabs(x[i]) <= t[i * t_step]);
  }
  return kept;
}

// y[0, columns) = sum of values[i] * w[rows[i] * stride + (0, columns)].
//
// Four rows a pass, so that y is loaded and stored once for four rows read; y (`columns` floats) is meant to stay in the
// first-level cache. The next four rows are fetched ahead, into the second-level cache so as not to push y out of the
// first: each row lies on pages of its own, where the hardware's prefetcher has to start anew every time.
ONNXCOMP_INLINE void accumulate_body(const float* w, std::size_t stride, const float* values, const std::size_t* rows,
                                     std::size_t kept, float* ONNXCOMP_RESTRICT y, std::size_t columns) {
  constexpr std::size_t kLine = 16;  // floats in a cache line
  std::memset(y, 0, columns * sizeof(float));
  std::size_t i = 0;
  for (; i + 4 <= kept; i += 4) {
    const float a = values[i], b = values[i + 1], c = values[i + 2], d = values[i + 3];
    const float* ONNXCOMP_RESTRICT wa = w + rows[i] * stride;
    const float* ONNXCOMP_RESTRICT wb = w + rows[i + 1] * stride;
    const float* ONNXCOMP_RESTRICT wc = w + rows[i + 2] * stride;
    const float* ONNXCOMP_RESTRICT wd = w + rows[i + 3] * stride;
    const std::size_t last = kept - 1;
    const float* na = w + rows[std::min(i + 4, last)] * stride;
    const float* nb = w + rows[std::min(i + 5, last)] * stride;
    const float* nc = w + rows[std::min(i + 6, last)] * stride;
    const float* nd = w + rows[std::min(i + 7, last)] * stride;
    std::size_t j = 0;
    for (; j + kLine <= columns; j += kLine) {
      ONNXCOMP_PREFETCH(na + j);
      ONNXCOMP_PREFETCH(nb + j);
      ONNXCOMP_PREFETCH(nc + j);
      ONNXCOMP_PREFETCH(nd + j);
      for (std::size_t u = j; u < j + kLine; ++u) {
        y[u] += a * wa[u] + b * wb[u] + (c * wc[u] + d * wd[u]);
      }
    }
    for (; j < columns; ++j) {
      y[j] += a * wa[j] + b * wb[j] + (c * wc[j] + d * wd[j]);
    }
  }
  for (; i < kept; ++i) {
    const float a = values[i];
    const float* ONNXCOMP_RESTRICT wa = w + rows[i] * stride;
    for (std::size_t j = 0; j < columns; ++j) {
      y[j] += a * wa[j];
    }
  }
}

using Accumulate = void (*)(const float* w, std::size_t stride, const float* values, const std::size_t* rows,
                            std::size_t kept, float* y, std::size_t columns);

// The body once for every instruction set; the compiler vectorises it (SSE2 or NEON without a target).
#define ONNXCOMP_ACCUMULATE(name)                                                                                    \
  inline void name(const float* w, std::size_t stride, const float* values, const std::size_t* rows,                 \
                   std::size_t kept, float* y, std::size_t columns) {                                                \
    accumulate_body(w, stride, values, rows, kept, y, columns);                                                      \
  }

ONNXCOMP_ACCUMULATE(accumulate_portable)
#if defined(ONNXCOMP_X86)
__attribute__((target("avx2,fma"))) ONNXCOMP_ACCUMULATE(accumulate_avx2)
__attribute__((target("avx2,fma,avx512f,avx512vl"))) ONNXCOMP_ACCUMULATE(accumulate_avx512)
#endif
#undef ONNXCOMP_ACCUMULATE

// The fastest that this machine runs. ONNXCOMP_ISA = portable | avx2 lowers the choice, for tests.
inline Accumulate choose_accumulate() {
#if defined(ONNXCOMP_X86)
  const char* wish = std::getenv("ONNXCOMP_ISA");
  const bool portable = wish != nullptr && std::strcmp(wish, "portable") == 0;
  const bool avx2 = wish != nullptr && std::strcmp(wish, "avx2") == 0;
  if (!portable && !avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma")) {
    return accumulate_avx512;
  }
  if (!portable && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return accumulate_avx2;
  }
#endif
  return accumulate_portable;
}

}  // namespace onnxcomp::threshold_matmul
