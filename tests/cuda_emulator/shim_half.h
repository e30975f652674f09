// Half precision and bfloat16: computed in single precision, and rounded at each step.
#pragma once

#include "shim_bits.h"

inline uint16_t onnxcomp_to_half(float value) {
  uint32_t bits = onnxcomp_bits<uint32_t>(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return uint16_t(sign | 0x7fff);
  if (size >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (size < 0x38800000) {  // subnormal: adding 0.5 leaves the bits, rounded, at the end
    float shifted = onnxcomp_bits<float>(size) + 0.5f;
    return uint16_t(sign | (onnxcomp_bits<uint32_t>(shifted) - 0x3f000000));
  }
  return uint16_t(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
}
inline float onnxcomp_from_half(uint16_t bits) {
  uint32_t sign = uint32_t(bits & 0x8000) << 16, size = bits & 0x7fff;
  if (size >= 0x7c00) return onnxcomp_bits<float>(sign | 0x7f800000 | (size & 0x3ff) << 13);
  if (size < 0x400) return onnxcomp_bits<float>(sign | onnxcomp_bits<uint32_t>(float(size) * 0x1p-24f));
  return onnxcomp_bits<float>(sign | ((size << 13) + 0x38000000));
}
inline uint16_t onnxcomp_to_bfloat(float value) {
  uint32_t bits = onnxcomp_bits<uint32_t>(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float onnxcomp_from_bfloat(uint16_t bits) { return onnxcomp_bits<float>(uint32_t(bits) << 16); }

template <uint16_t (*To)(float), float (*From)(uint16_t)> struct OnnxcompShort {
  uint16_t bits;
  OnnxcompShort() = default;
  template <typename T, typename = std::enable_if_t<std::is_arithmetic_v<T>>>
  OnnxcompShort(T value) : bits(To(float(value))) {}
  operator float() const { return From(bits); }
};
struct __half : OnnxcompShort<onnxcomp_to_half, onnxcomp_from_half> {
  using OnnxcompShort::OnnxcompShort;
  __half() = default;
};
struct __nv_bfloat16 : OnnxcompShort<onnxcomp_to_bfloat, onnxcomp_from_bfloat> {
  using OnnxcompShort::OnnxcompShort;
  __nv_bfloat16() = default;
};
using half = __half;
using nv_bfloat16 = __nv_bfloat16;
template <typename T> struct __attribute__((aligned(4))) OnnxcompShort2 {
  T x, y;
  OnnxcompShort2() = default;
  OnnxcompShort2(T x, T y) : x(x), y(y) {}
};
using __half2 = OnnxcompShort2<__half>;
using __nv_bfloat162 = OnnxcompShort2<__nv_bfloat16>;
using half2 = __half2;
using nv_bfloat162 = __nv_bfloat162;

#define ONNXCOMP_SHORT(type, pair)                                                                     \
  inline type operator+(type a, type b) { return type(float(a) + float(b)); }                         \
  inline type operator-(type a, type b) { return type(float(a) - float(b)); }                         \
  inline type operator*(type a, type b) { return type(float(a) * float(b)); }                         \
  inline type operator/(type a, type b) { return type(float(a) / float(b)); }                         \
  inline type operator-(type a) { return type(-float(a)); }                                           \
  inline type& operator+=(type& a, type b) { return a = a + b; }                                      \
  inline type& operator-=(type& a, type b) { return a = a - b; }                                      \
  inline type& operator*=(type& a, type b) { return a = a * b; }                                      \
  inline bool operator<(type a, type b) { return float(a) < float(b); }                               \
  inline bool operator>(type a, type b) { return float(a) > float(b); }                               \
  inline bool operator<=(type a, type b) { return float(a) <= float(b); }                             \
  inline bool operator>=(type a, type b) { return float(a) >= float(b); }                             \
  inline bool operator==(type a, type b) { return float(a) == float(b); }                             \
  inline bool operator!=(type a, type b) { return float(a) != float(b); }                             \
  inline bool __hgt(type a, type b) { return a > b; }                                                 \
  inline bool __hlt(type a, type b) { return a < b; }                                                 \
  inline bool __hge(type a, type b) { return a >= b; }                                                \
  inline bool __hle(type a, type b) { return a <= b; }                                                \
  inline bool __heq(type a, type b) { return a == b; }                                                \
  inline bool __hisnan(type a) { return isnan(float(a)); }                                            \
  inline type __hadd(type a, type b) { return a + b; }                                                \
  inline type __hsub(type a, type b) { return a - b; }                                                \
  inline type __hmul(type a, type b) { return a * b; }                                                \
  inline type __hdiv(type a, type b) { return a / b; }                                                \
  inline type __hneg(type a) { return -a; }                                                           \
  inline type __habs(type a) { return type(fabsf(a)); }                                               \
  inline type __hmax(type a, type b) { return type(fmaxf(a, b)); }                                    \
  inline type __hmin(type a, type b) { return type(fminf(a, b)); }                                    \
  inline type __hfma(type a, type b, type c) { return type(fmaf(a, b, c)); }                          \
  inline type hexp(type a) { return type(expf(a)); }                                                  \
  inline type hexp2(type a) { return type(exp2f(a)); }                                                \
  inline type hlog(type a) { return type(logf(a)); }                                                  \
  inline type hlog2(type a) { return type(log2f(a)); }                                                \
  inline type hlog10(type a) { return type(log10f(a)); }                                              \
  inline type hsqrt(type a) { return type(sqrtf(a)); }                                                \
  inline type hrsqrt(type a) { return type(rsqrtf(a)); }                                              \
  inline type hrcp(type a) { return type(1.0f / float(a)); }                                          \
  inline type hsin(type a) { return type(sinf(a)); }                                                  \
  inline type hcos(type a) { return type(cosf(a)); }                                                  \
  inline type htan(type a) { return type(tanf(a)); }                                                  \
  inline type hatan(type a) { return type(atanf(a)); }                                                \
  inline type htanh(type a) { return type(tanhf(a)); }                                                \
  inline type herf(type a) { return type(erff(a)); }                                                  \
  inline type hpow(type a, type b) { return type(powf(a, b)); }                                       \
  inline type hfloor(type a) { return type(floorf(a)); }                                              \
  inline type hceil(type a) { return type(ceilf(a)); }                                                \
  inline type htrunc(type a) { return type(truncf(a)); }                                              \
  inline type hrint(type a) { return type(rintf(a)); }                                                \
  inline pair operator+(pair a, pair b) { return {a.x + b.x, a.y + b.y}; }                            \
  inline pair operator-(pair a, pair b) { return {a.x - b.x, a.y - b.y}; }                            \
  inline pair operator*(pair a, pair b) { return {a.x * b.x, a.y * b.y}; }                            \
  inline pair __hadd2(pair a, pair b) { return a + b; }                                               \
  inline pair __hsub2(pair a, pair b) { return a - b; }                                               \
  inline pair __hmul2(pair a, pair b) { return a * b; }                                               \
  inline pair __hfma2(pair a, pair b, pair c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; } \
  inline pair __hmax2(pair a, pair b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }                \
  inline pair __hmin2(pair a, pair b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }
ONNXCOMP_SHORT(__half, __half2)
ONNXCOMP_SHORT(__nv_bfloat16, __nv_bfloat162)
#undef ONNXCOMP_SHORT

inline float __half2float(half a) { return a; }
inline half __float2half(float a) { return half(a); }
inline half __float2half_rn(float a) { return half(a); }
inline half __int2half_rn(int a) { return half(float(a)); }
inline int __half2int_rn(half a) { return int(rintf(a)); }
inline unsigned short __half_as_ushort(half a) { return a.bits; }
inline half __ushort_as_half(unsigned short bits) { return onnxcomp_bits<half>(bits); }
inline half2 __halves2half2(half x, half y) { return {x, y}; }
inline half2 make_half2(half x, half y) { return {x, y}; }
inline half2 __float2half2_rn(float a) { return {half(a), half(a)}; }
inline half2 __half2half2(half a) { return {a, a}; }
inline half2 __floats2half2_rn(float x, float y) { return {half(x), half(y)}; }
inline half2 __float22half2_rn(float2 a) { return {half(a.x), half(a.y)}; }
inline float2 __half22float2(half2 a) { return {float(a.x), float(a.y)}; }
inline half __low2half(half2 a) { return a.x; }
inline half __high2half(half2 a) { return a.y; }
inline float __low2float(half2 a) { return a.x; }
inline float __high2float(half2 a) { return a.y; }
inline float __bfloat162float(nv_bfloat16 a) { return a; }
inline nv_bfloat16 __float2bfloat16(float a) { return nv_bfloat16(a); }
inline nv_bfloat16 __float2bfloat16_rn(float a) { return nv_bfloat16(a); }
inline nv_bfloat162 __float22bfloat162_rn(float2 a) { return {nv_bfloat16(a.x), nv_bfloat16(a.y)}; }
inline float2 __bfloat1622float2(nv_bfloat162 a) { return {float(a.x), float(a.y)}; }

#define CUDART_INF_FP16 half(__builtin_inff())
#define CUDART_NAN_FP16 half(__builtin_nanf(""))
