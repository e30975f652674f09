// Memory of the emulated device: what leaves an allocation is found.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "device.h"

namespace emulator {

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kGap = 16 << 20;  // that nothing may touch, on both sides
constexpr unsigned char kCanary = 0xff;

std::map<const char*, Region> allocations;  // by their first byte
std::mutex lock_of_allocations;
size_t allocated_bytes;

size_t up(size_t value, size_t to) { return (value + to - 1) / to * to; }

}  // namespace

Region new_region(size_t bytes, size_t alignment) {
  Region region;
  region.bytes = bytes;
  size_t inside = up(up(bytes ? bytes : 1, alignment), kPage);
  region.page_bytes = inside + 2 * kGap;
  void* pages = mmap(nullptr, region.page_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) return Region{};
  region.pages = static_cast<char*>(pages);
  mprotect(region.pages + kGap, inside, PROT_READ | PROT_WRITE);
  memset(region.pages + kGap, kCanary, inside);
  region.data = region.pages + kGap + inside - up(bytes ? bytes : 1, alignment);
  return region;
}

void free_region(const Region& region) {
  if (region.pages) munmap(region.pages, region.page_bytes);
}

const Region* find_region(const void* pointer) {
  std::lock_guard<std::mutex> lock(lock_of_allocations);
  const char* at = static_cast<const char*>(pointer);
  auto found = allocations.upper_bound(at);
  if (found == allocations.begin()) return nullptr;
  const Region& region = (--found)->second;
  return at <= region.data + region.bytes ? &region : nullptr;
}

std::string mend(const Region& region) {
  if (!region.pages) return "";
  char* first = region.pages + kGap;
  char* end = region.data + region.bytes;
  char* last = region.pages + region.page_bytes - kGap;
  auto harmed = [](char byte) { return static_cast<unsigned char>(byte) != kCanary; };
  char* behind = std::find_if(end, last, harmed);
  char* before = region.data;
  while (before > first && !harmed(before[-1])) --before;
  if (behind == last && before == first) return "";
  memset(first, kCanary, region.data - first);
  memset(end, kCanary, last - end);
  return "write out of bounds" + describe_near(behind < last ? behind : before - 1, region);
}

std::string mend() {
  std::lock_guard<std::mutex> lock(lock_of_allocations);
  std::string found;
  for (const auto& [_, region] : allocations) {
    std::string one = mend(region);
    if (found.empty()) found = one;
  }
  return found;
}

std::string describe_near(const void* pointer, const Region& region) {
  const char* at = static_cast<const char*>(pointer);
  if (!region.pages || at < region.pages || at >= region.pages + region.page_bytes) return "";
  char text[256];
  const char* what = region.name.empty() ? "memory" : region.name.c_str();
  ptrdiff_t before = region.data - at;
  if (before > 0) {
    snprintf(text, sizeof text, ", %zd bytes before the begin of %zu bytes of %s", before, region.bytes, what);
  } else {
    ptrdiff_t behind = -before - ptrdiff_t(region.bytes);
    snprintf(text, sizeof text, ", %zd bytes behind the end of %zu bytes of %s", behind, region.bytes, what);
  }
  return text;
}

std::string describe_near(const void* pointer) {
  for (const auto& [_, region] : allocations) {
    std::string found = describe_near(pointer, region);
    if (!found.empty()) return found;
  }
  return "";
}

// A copy may not leave an allocation at either end that is in the device's memory.
bool inside(const void* pointer, size_t bytes) {
  const Region* region = find_region(pointer);
  return !region || static_cast<const char*>(pointer) + bytes <= region->data + region->bytes;
}

int allocate(void** out, size_t bytes) {
  // Vector loads need 16 bytes, and TVM's own functions demand 64 of what they are given.
  Region region = new_region(bytes, 64);
  if (!region.data) return kOutOfMemory;
  region.name = "global memory";
  std::lock_guard<std::mutex> lock(lock_of_allocations);
  allocations[region.data] = region;
  allocated_bytes += bytes;
  *out = region.data;
  return kSuccess;
}

int release(void* pointer) {
  if (!pointer) return kSuccess;
  std::lock_guard<std::mutex> lock(lock_of_allocations);
  auto found = allocations.find(static_cast<char*>(pointer));
  if (found == allocations.end()) return kInvalidValue;
  allocated_bytes -= found->second.bytes;
  free_region(found->second);
  allocations.erase(found);
  return kSuccess;
}

size_t allocated() { return allocated_bytes; }

}  // namespace emulator
