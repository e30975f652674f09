// Mathematics of CUDA in single and double precision. What is fast but inexact on a GPU is exact here.
#pragma once

#include "shim_vectors.h"

extern "C" {
#define ONNXCOMP_UNARY(name) float name##f(float) noexcept; double name(double) noexcept;
#define ONNXCOMP_BINARY(name) float name##f(float, float) noexcept; double name(double, double) noexcept;
ONNXCOMP_UNARY(exp) ONNXCOMP_UNARY(exp2) ONNXCOMP_UNARY(exp10) ONNXCOMP_UNARY(expm1) ONNXCOMP_UNARY(log)
ONNXCOMP_UNARY(log2) ONNXCOMP_UNARY(log10) ONNXCOMP_UNARY(log1p) ONNXCOMP_UNARY(sqrt) ONNXCOMP_UNARY(cbrt)
ONNXCOMP_UNARY(sin) ONNXCOMP_UNARY(cos) ONNXCOMP_UNARY(tan) ONNXCOMP_UNARY(asin) ONNXCOMP_UNARY(acos)
ONNXCOMP_UNARY(atan) ONNXCOMP_UNARY(sinh) ONNXCOMP_UNARY(cosh) ONNXCOMP_UNARY(tanh) ONNXCOMP_UNARY(asinh)
ONNXCOMP_UNARY(acosh) ONNXCOMP_UNARY(atanh) ONNXCOMP_UNARY(erf) ONNXCOMP_UNARY(erfc) ONNXCOMP_UNARY(floor)
ONNXCOMP_UNARY(ceil) ONNXCOMP_UNARY(trunc) ONNXCOMP_UNARY(round) ONNXCOMP_UNARY(rint) ONNXCOMP_UNARY(nearbyint)
ONNXCOMP_UNARY(fabs) ONNXCOMP_UNARY(lgamma) ONNXCOMP_UNARY(tgamma)
ONNXCOMP_BINARY(pow) ONNXCOMP_BINARY(fmod) ONNXCOMP_BINARY(atan2) ONNXCOMP_BINARY(hypot) ONNXCOMP_BINARY(copysign)
ONNXCOMP_BINARY(nextafter) ONNXCOMP_BINARY(fmin) ONNXCOMP_BINARY(fmax) ONNXCOMP_BINARY(remainder)
float fmaf(float, float, float) noexcept;
double fma(double, double, double) noexcept;
float ldexpf(float, int) noexcept;
double ldexp(double, int) noexcept;
int abs(int) noexcept;
int printf(const char*, ...);
void* memcpy(void*, const void*, size_t) noexcept;
void* memset(void*, int, size_t) noexcept;
}
#undef ONNXCOMP_UNARY
#undef ONNXCOMP_BINARY

// Names that CUDA overloads for float.
#define ONNXCOMP_OVERLOAD(name) inline float name(float x) { return name##f(x); }
ONNXCOMP_OVERLOAD(exp) ONNXCOMP_OVERLOAD(exp2) ONNXCOMP_OVERLOAD(log) ONNXCOMP_OVERLOAD(log2) ONNXCOMP_OVERLOAD(sqrt)
ONNXCOMP_OVERLOAD(sin) ONNXCOMP_OVERLOAD(cos) ONNXCOMP_OVERLOAD(tan) ONNXCOMP_OVERLOAD(tanh) ONNXCOMP_OVERLOAD(erf)
ONNXCOMP_OVERLOAD(floor) ONNXCOMP_OVERLOAD(ceil) ONNXCOMP_OVERLOAD(trunc) ONNXCOMP_OVERLOAD(round)
ONNXCOMP_OVERLOAD(rint) ONNXCOMP_OVERLOAD(nearbyint) ONNXCOMP_OVERLOAD(fabs)
#undef ONNXCOMP_OVERLOAD
inline float pow(float x, float y) { return powf(x, y); }
inline float fma(float a, float b, float c) { return fmaf(a, b, c); }
inline float abs(float x) { return fabsf(x); }
inline double abs(double x) { return fabs(x); }
inline long long abs(long long x) { return x < 0 ? -x : x; }
inline long abs(long x) { return x < 0 ? -x : x; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline float rcbrtf(float x) { return 1.0f / cbrtf(x); }
inline float __saturatef(float x) { return x > 0 ? x < 1 ? x : 1 : 0; }
inline float normcdff(float x) { return 0.5f * erfcf(-x * 0.70710678f); }
template <typename T> inline bool isnan(T x) { return __builtin_isnan(x); }
template <typename T> inline bool isinf(T x) { return __builtin_isinf(x); }
template <typename T> inline bool isfinite(T x) { return __builtin_isfinite(x); }

template <typename T> inline T onnxcomp_max(T a, T b) {
  if constexpr (std::is_same_v<T, float>) return fmaxf(a, b);
  else if constexpr (std::is_same_v<T, double>) return fmax(a, b);
  else return a < b ? b : a;
}
template <typename T> inline T onnxcomp_min(T a, T b) {
  if constexpr (std::is_same_v<T, float>) return fminf(a, b);
  else if constexpr (std::is_same_v<T, double>) return fmin(a, b);
  else return b < a ? b : a;
}
template <typename A, typename B, typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
inline std::common_type_t<A, B> max(A a, B b) { return onnxcomp_max<std::common_type_t<A, B>>(a, b); }
template <typename A, typename B, typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
inline std::common_type_t<A, B> min(A a, B b) { return onnxcomp_min<std::common_type_t<A, B>>(a, b); }

inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return exp10f(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __tanf(float x) { return tanf(x); }
inline float __tanhf(float x) { return tanhf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
// Their whole point is that nothing is contracted into them.
#define ONNXCOMP_EXACT __attribute__((noinline, optimize("fp-contract=off")))
ONNXCOMP_EXACT static float __fmul_rn(float a, float b) { return a * b; }
ONNXCOMP_EXACT static float __fadd_rn(float a, float b) { return a + b; }
ONNXCOMP_EXACT static float __fsub_rn(float a, float b) { return a - b; }
#undef ONNXCOMP_EXACT
inline float2 __fmul2_rn(float2 a, float2 b) { return {__fmul_rn(a.x, b.x), __fmul_rn(a.y, b.y)}; }
inline float2 __fadd2_rn(float2 a, float2 b) { return {__fadd_rn(a.x, b.x), __fadd_rn(a.y, b.y)}; }

#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_nanf("")
#define CUDART_INF __builtin_inf()
#define CUDART_NAN __builtin_nan("")
#ifndef INFINITY
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")
#endif
