// Vector types of CUDA.
#pragma once

#define ONNXCOMP_VECTORS(type, name, one, two, four)                                              \
  struct name##1 { type x; };                                                                     \
  struct __attribute__((aligned(two))) name##2 { type x, y; };                                    \
  struct name##3 { type x, y, z; };                                                               \
  struct __attribute__((aligned(four))) name##4 { type x, y, z, w; };                             \
  inline name##1 make_##name##1(type x) { return {x}; }                                           \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                     \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

ONNXCOMP_VECTORS(signed char, char, 1, 2, 4)
ONNXCOMP_VECTORS(unsigned char, uchar, 1, 2, 4)
ONNXCOMP_VECTORS(short, short, 2, 4, 8)
ONNXCOMP_VECTORS(unsigned short, ushort, 2, 4, 8)
ONNXCOMP_VECTORS(int, int, 4, 8, 16)
ONNXCOMP_VECTORS(unsigned int, uint, 4, 8, 16)
ONNXCOMP_VECTORS(long long, longlong, 8, 16, 16)
ONNXCOMP_VECTORS(unsigned long long, ulonglong, 8, 16, 16)
ONNXCOMP_VECTORS(float, float, 4, 8, 16)
ONNXCOMP_VECTORS(double, double, 8, 16, 16)
#undef ONNXCOMP_VECTORS
