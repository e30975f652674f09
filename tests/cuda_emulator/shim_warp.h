// Barriers, and what the lanes of a warp do together.
#pragma once

#include "shim_bits.h"

#define __syncthreads() ((void)onnxcomp_engine->sync_block(__LINE__, 0))
#define __syncthreads_count(p) (onnxcomp_engine->sync_block(__LINE__, (p) != 0).count)
#define __syncthreads_and(p) (onnxcomp_engine->sync_block(__LINE__, (p) != 0).all)
#define __syncthreads_or(p) (onnxcomp_engine->sync_block(__LINE__, (p) != 0).any)

template <typename T> inline const emulator::Snapshot* onnxcomp_exchange(int kind, int line, unsigned mask, T value) {
  static_assert(sizeof(T) <= emulator::kLargestValue);
  return onnxcomp_engine->exchange(kind, line, mask, &value, sizeof value);
}
// Of a lane that did not take part the value is undefined: all bits set, NaN for a float.
template <typename T> inline T onnxcomp_given(const emulator::Snapshot* from, int lane) {
  T value;
  __builtin_memcpy(&value, from->value[lane], sizeof value);
  return value;
}

enum OnnxcompShuffle { kOnnxcompTo, kOnnxcompUp, kOnnxcompDown, kOnnxcompXor };
template <typename T>
inline T onnxcomp_shuffle(int line, OnnxcompShuffle how, unsigned mask, T value, int by, int width = 32) {
  auto all = onnxcomp_exchange(emulator::kShuffle, line, mask, value);
  int lane = onnxcomp_engine->lane(), first = lane & ~(width - 1), last = first + width - 1, from = lane;
  if (how == kOnnxcompTo) from = first + (by & (width - 1));
  if (how == kOnnxcompUp && lane - by >= first) from = lane - by;
  if (how == kOnnxcompDown && lane + by <= last) from = lane + by;
  if (how == kOnnxcompXor && (lane ^ by) <= last) from = lane ^ by;
  return onnxcomp_given<T>(all, from);
}
#define __shfl_sync(...) onnxcomp_shuffle(__LINE__, kOnnxcompTo, __VA_ARGS__)
#define __shfl_up_sync(...) onnxcomp_shuffle(__LINE__, kOnnxcompUp, __VA_ARGS__)
#define __shfl_down_sync(...) onnxcomp_shuffle(__LINE__, kOnnxcompDown, __VA_ARGS__)
#define __shfl_xor_sync(...) onnxcomp_shuffle(__LINE__, kOnnxcompXor, __VA_ARGS__)

inline void onnxcomp_sync_warp(int line, unsigned mask = 0xffffffff) {
  onnxcomp_exchange(emulator::kSync, line, mask, 0);
}
#define __syncwarp(...) onnxcomp_sync_warp(__LINE__, ##__VA_ARGS__)

inline unsigned onnxcomp_ballot(int line, unsigned mask, int predicate) {
  auto all = onnxcomp_exchange(emulator::kVote, line, mask, predicate != 0);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (all->lanes >> lane & 1 && onnxcomp_given<bool>(all, lane)) votes |= 1u << lane;
  }
  return votes;
}
inline bool onnxcomp_all(int line, unsigned mask, int predicate) {
  auto all = onnxcomp_exchange(emulator::kVote, line, mask, predicate != 0);
  for (int lane = 0; lane < 32; ++lane) {
    if (all->lanes >> lane & 1 && !onnxcomp_given<bool>(all, lane)) return false;
  }
  return true;
}
inline unsigned onnxcomp_active(int line) { return onnxcomp_exchange(emulator::kActive, line, 0, 0)->lanes; }
#define __ballot_sync(mask, p) onnxcomp_ballot(__LINE__, mask, p)
#define __any_sync(mask, p) (onnxcomp_ballot(__LINE__, mask, p) != 0)
#define __all_sync(mask, p) onnxcomp_all(__LINE__, mask, p)
#define __activemask() onnxcomp_active(__LINE__)

template <typename T, typename Combine> inline T onnxcomp_reduce(int line, unsigned mask, T value, Combine combine) {
  auto all = onnxcomp_exchange(emulator::kReduce, line, mask, value);
  bool first = true;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(all->lanes >> lane & 1)) continue;
    T other = onnxcomp_given<T>(all, lane);
    value = first ? other : combine(value, other);
    first = false;
  }
  return value;
}
#define ONNXCOMP_REDUCE(mask, value, result) \
  onnxcomp_reduce(__LINE__, mask, value, [](auto a, auto b) { return decltype(a)(result); })
#define __reduce_add_sync(mask, value) ONNXCOMP_REDUCE(mask, value, a + b)
#define __reduce_min_sync(mask, value) ONNXCOMP_REDUCE(mask, value, a < b ? a : b)
#define __reduce_max_sync(mask, value) ONNXCOMP_REDUCE(mask, value, a < b ? b : a)
#define __reduce_and_sync(mask, value) ONNXCOMP_REDUCE(mask, value, a & b)
#define __reduce_or_sync(mask, value) ONNXCOMP_REDUCE(mask, value, a | b)
#define __reduce_xor_sync(mask, value) ONNXCOMP_REDUCE(mask, value, a ^ b)

template <typename T> inline unsigned onnxcomp_match(int line, unsigned mask, T value) {
  auto all = onnxcomp_exchange(emulator::kMatch, line, mask, value);
  unsigned same = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (all->lanes >> lane & 1 && onnxcomp_given<T>(all, lane) == value) same |= 1u << lane;
  }
  return same;
}
#define __match_any_sync(mask, value) onnxcomp_match(__LINE__, mask, value)
