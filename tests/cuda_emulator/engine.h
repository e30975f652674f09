// What the emulated driver and a kernel compiled for it know of each other.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

struct Index {
  unsigned x, y, z;
};

constexpr int kWarp = 32;
constexpr int kLargestValue = 16;  // bytes that a lane gives to a collective

enum Collective : int { kSync, kShuffle, kVote, kReduce, kMatch, kActive };

// What the lanes of a warp gave to a collective; read by each of them after it.
struct Snapshot {
  unsigned lanes;    // which took part
  int readers;       // which still hold it
  alignas(16) unsigned char value[kWarp][kLargestValue];
};

// Result of a barrier of the whole block, over all of its threads.
struct Votes {
  int count, all, any;
};

struct Engine {
  Index thread, block, block_size, grid;
  void* dynamic_shared;
  void* (*shared)(int id, size_t bytes, const char* name);
  Votes (*sync_block)(int line, int predicate);
  const Snapshot* (*exchange)(int kind, int line, unsigned mask, const void* value, size_t bytes);
  int (*lane)();
  void (*fail)(int code, int line, const char* format, ...);
  void (*check_pointer)(const void* pointer, int argument);
};

constexpr int kIllegalAddress = 700, kAssert = 710, kMisaligned = 716, kLaunchFailed = 719;

using Run = void (*)(void** arguments, bool check);

}  // namespace emulator
