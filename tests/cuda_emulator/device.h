// The emulated device: its memory, and what is launched on it.
#pragma once

#include <cstddef>
#include <map>
#include <string>
#include <vector>

#include "engine.h"

namespace emulator {

constexpr size_t kFixedShared = 48 << 10;  // bytes of shared memory that a kernel has without asking for more
constexpr int kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2, kInvalidImage = 200, kNotFound = 500,
              kNotSupported = 801;

// Compute capability, 90 for 9.0, and what it gives of shared memory.
int architecture();
size_t most_shared();

const char* title(int code);
const char* describe(int code);

// Memory that ends, but for its alignment, right before pages that nothing may touch, and begins after such pages.
struct Region {
  char* data = nullptr;
  size_t bytes = 0;
  char* pages = nullptr;
  size_t page_bytes = 0;
  std::string name;
};

Region new_region(size_t bytes, size_t alignment);
void free_region(const Region& region);

// Which allocation of the device an address lies in.
const Region* find_region(const void* pointer);

// Allocations of the device; a code of an error, or 0.
int allocate(void** out, size_t bytes);
int release(void* pointer);
size_t allocated();

// Whether bytes at an address lie in one allocation, or outside of the device's memory.
bool inside(const void* pointer, size_t bytes);

// Says what was written into the bytes around a region, or around any allocation, and undoes it; empty where nothing
// was.
std::string mend(const Region& region);
std::string mend();

// How an address lies to a region, or to the nearest allocation; empty where it is far.
std::string describe_near(const void* pointer, const Region& region);
std::string describe_near(const void* pointer);

struct Function {
  Run run;
  std::string name;
  const char* source;  // in CUDA C++
  int file;            // descriptor of the shared object
  size_t most_dynamic_shared = kFixedShared;
  std::map<int, Region> shared;  // arrays of fixed size
};

struct Launch {
  Function* function;
  Index grid, block;
  Region dynamic_shared;
  void** arguments;
};

Engine* the_engine();

// Whether a thread of a block runs, rather than what runs them.
bool in_thread();

// Ends the kernel that runs. Lines are those of the CUDA source, 0 where none is to blame.
[[noreturn]] void fail(int code, int line, const char* format, ...);

// Runs what may fail; the code of the error, or 0.
int guarded(const Launch& launch, const Engine& engine, void (*body)(const Launch&));
const std::string& last_failure();

// Runs a kernel; the code of the error, or 0.
int run(const Launch& launch);

}  // namespace emulator
