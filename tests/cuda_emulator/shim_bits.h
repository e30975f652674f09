// Bits, integers and memory: dot products of bytes, conversions, atomics.
#pragma once

#include "shim_math.h"

template <typename To, typename From> inline To onnxcomp_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  __builtin_memcpy(&out, &value, sizeof out);
  return out;
}
inline int __float_as_int(float x) { return onnxcomp_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return onnxcomp_bits<unsigned>(x); }
inline float __int_as_float(int x) { return onnxcomp_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return onnxcomp_bits<float>(x); }
inline long long __double_as_longlong(double x) { return onnxcomp_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return onnxcomp_bits<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)(x)) : 64; }
inline unsigned __brev(unsigned x) {
  unsigned out = 0;
  for (int bit = 0; bit < 32; ++bit) out |= (x >> bit & 1) << (31 - bit);
  return out;
}
inline int __mulhi(int a, int b) { return int(((long long)(a)*b) >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(((unsigned long long)(a)*b) >> 32); }
// Conversions saturate, and make 0 of NaN.
template <typename T> inline T onnxcomp_integer(float x) {
  constexpr bool is_signed = std::is_signed_v<T>;
  constexpr float low = is_signed ? -0x1p31f : 0.0f, high = is_signed ? 0x1p31f : 0x1p32f;
  if (x != x) return 0;
  return x <= low ? T(is_signed ? 0x80000000 : 0) : x >= high ? T(is_signed ? 0x7fffffff : 0xffffffff) : T(x);
}
inline int __float2int_rn(float x) { return onnxcomp_integer<int>(rintf(x)); }
inline int __float2int_rz(float x) { return onnxcomp_integer<int>(truncf(x)); }
inline int __float2int_rd(float x) { return onnxcomp_integer<int>(floorf(x)); }
inline int __float2int_ru(float x) { return onnxcomp_integer<int>(ceilf(x)); }
inline unsigned __float2uint_rn(float x) { return onnxcomp_integer<unsigned>(rintf(x)); }
inline unsigned __float2uint_rz(float x) { return onnxcomp_integer<unsigned>(truncf(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned select) {
  uint64_t both = (uint64_t(b) << 32) | a;
  unsigned out = 0;
  for (int at = 0; at < 4; ++at) {
    unsigned which = select >> (4 * at) & 0xf;
    unsigned byte = unsigned(both >> (8 * (which & 7))) & 0xff;
    if (which & 8) byte = byte & 0x80 ? 0xff : 0;
    out |= byte << (8 * at);
  }
  return out;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return unsigned(((uint64_t(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}

template <typename A, typename B> inline int onnxcomp_dot(unsigned a, unsigned b, int c) {
  for (int at = 0; at < 4; ++at) c += int(A(a >> (8 * at))) * int(B(b >> (8 * at)));
  return c;
}
inline int __dp4a(int a, int b, int c) { return onnxcomp_dot<int8_t, int8_t>(a, b, c); }
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) { return onnxcomp_dot<uint8_t, uint8_t>(a, b, int(c)); }
inline int __dp4a(unsigned a, int b, int c) { return onnxcomp_dot<uint8_t, int8_t>(a, b, c); }
inline int __dp4a(int a, unsigned b, int c) { return onnxcomp_dot<int8_t, uint8_t>(a, b, c); }
inline int __dp4a(char4 a, char4 b, int c) { return __dp4a(onnxcomp_bits<int>(a), onnxcomp_bits<int>(b), c); }
inline unsigned __dp4a(uchar4 a, uchar4 b, unsigned c) {
  return __dp4a(onnxcomp_bits<unsigned>(a), onnxcomp_bits<unsigned>(b), c);
}

// Threads run one at a time, so that nothing comes between the parts of an atomic operation.

template <typename T> inline T __ldg(const T* from) { return *from; }
template <typename T> inline T __ldcs(const T* from) { return *from; }
template <typename T> inline T __ldca(const T* from) { return *from; }
template <typename T> inline T __ldcg(const T* from) { return *from; }
template <typename T> inline void __stcs(T* to, T value) { *to = value; }
template <typename T> inline void __stcg(T* to, T value) { *to = value; }
template <typename T> struct OnnxcompSame { using type = T; };
template <typename T> using OnnxcompSameType = typename OnnxcompSame<T>::type;
#define ONNXCOMP_ATOMIC(name, result)                                            \
  template <typename T> inline T name(T* at, OnnxcompSameType<T> value) {        \
    T old = *at;                                                                 \
    *at = result;                                                                \
    return old;                                                                  \
  }
ONNXCOMP_ATOMIC(atomicAdd, old + value)
ONNXCOMP_ATOMIC(atomicSub, old - value)
ONNXCOMP_ATOMIC(atomicExch, value)
ONNXCOMP_ATOMIC(atomicMax, old < value ? value : old)
ONNXCOMP_ATOMIC(atomicMin, value < old ? value : old)
ONNXCOMP_ATOMIC(atomicAnd, old & value)
ONNXCOMP_ATOMIC(atomicOr, old | value)
ONNXCOMP_ATOMIC(atomicXor, old ^ value)
#undef ONNXCOMP_ATOMIC
template <typename T> inline T atomicCAS(T* at, OnnxcompSameType<T> wanted, OnnxcompSameType<T> value) {
  T old = *at;
  if (old == wanted) *at = value;
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned) {}
[[noreturn]] inline void __trap() {
  onnxcomp_engine->fail(emulator::kAssert, 0, "the kernel stops itself by __trap");
  __builtin_unreachable();
}
