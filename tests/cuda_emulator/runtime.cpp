// libcudart.so.13 of the emulated device: the part of the runtime's interface that TVM's runtime calls.
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <cstring>

#include "device.h"

using namespace emulator;

namespace {

constexpr size_t kMemory = size_t(8) << 30;

struct Event {
  std::chrono::steady_clock::time_point time;
};

// cudaDeviceProp of CUDA 13; only what is named here is filled.
struct Properties {
  char name[256];
  char ids[32];
  size_t memory;
  size_t shared;
  int registers;
  int warp;
  size_t pitch;
  int threads;
  int block[3];
  int grid[3];
  size_t constant;
  int major, minor;
  size_t texture[2];
  int processors;
  char unused[208];
  int cache;
  int persisting_cache;
  int threads_per_processor;
  int more[3];
  size_t shared_per_processor;
  char rest[376];
};
static_assert(offsetof(Properties, memory) == 288 && offsetof(Properties, major) == 360);
static_assert(offsetof(Properties, processors) == 384 && offsetof(Properties, cache) == 596);
static_assert(offsetof(Properties, shared_per_processor) == 624 && sizeof(Properties) == 1008);

int last_error;

int kept(int code) { return code ? last_error = code : code; }

}  // namespace

#define API extern "C"

API int cudaGetDeviceCount(int* count) { return *count = 1, kSuccess; }
API int cudaGetDevice(int* device) { return *device = 0, kSuccess; }
API int cudaSetDevice(int device) { return kept(device == 0 ? kSuccess : kInvalidValue); }
API int cudaGetLastError() {
  int code = last_error;
  last_error = kSuccess;
  return code;
}
API int cudaPeekAtLastError() { return last_error; }
API const char* cudaGetErrorName(int code) { return title(code); }
API const char* cudaGetErrorString(int code) { return describe(code); }
API int cudaDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 1: case 2: case 3: *value = 1024; break;   // threads of a block
    case 4: *value = 64; break;
    case 5: *value = 0x7fffffff; break;             // blocks of a grid
    case 6: case 7: *value = 65535; break;
    case 8: *value = int(kFixedShared); break;
    case 10: *value = kWarp; break;
    case 12: *value = 65536; break;                 // registers of a block
    case 13: *value = 1000000; break;               // kHz
    case 16: *value = 16; break;                    // multiprocessors
    case 38: *value = 4 << 20; break;               // L2 cache
    case 39: *value = 1536; break;                  // threads of a multiprocessor
    case 75: *value = architecture() / 10; break;
    case 76: *value = architecture() % 10; break;
    case 81: *value = int(most_shared() + 1024); break;
    case 97: *value = int(most_shared()); break;
    default: *value = 0;
  }
  return kSuccess;
}
API int cudaGetDeviceProperties(Properties* out, int) {
  memset(out, 0, sizeof *out);
  strcpy(out->name, "emulated by onnxcomp");
  out->memory = kMemory;
  out->shared = kFixedShared;
  out->registers = 65536;
  out->warp = kWarp;
  out->threads = out->block[0] = out->block[1] = 1024;
  out->block[2] = 64;
  out->grid[0] = 0x7fffffff;
  out->grid[1] = out->grid[2] = 65535;
  out->constant = 65536;
  out->major = architecture() / 10;
  out->minor = architecture() % 10;
  out->processors = 16;
  out->cache = 4 << 20;
  out->threads_per_processor = 1536;
  out->shared_per_processor = most_shared() + 1024;
  return kSuccess;
}
API int cudaMemGetInfo(size_t* free, size_t* total) {
  *total = kMemory;
  *free = kMemory - allocated();
  return kSuccess;
}
API int cudaMalloc(void** out, size_t bytes) { return kept(allocate(out, bytes)); }
API int cudaFree(void* pointer) { return kept(release(pointer)); }
API int cudaMallocHost(void** out, size_t bytes) {
  *out = aligned_alloc(64, (bytes + 64) / 64 * 64);
  return *out ? kSuccess : kOutOfMemory;
}
API int cudaFreeHost(void* pointer) { return free(pointer), kSuccess; }
API int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int, void*) {
  if (!inside(to, bytes) || !inside(from, bytes)) return kept(kInvalidValue);
  memmove(to, from, bytes);
  return kSuccess;
}
API int cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, void* stream) {
  return cudaMemcpyAsync(to, from, bytes, 0, stream);
}
API int cudaStreamCreate(void** out) { return *out = malloc(1), kSuccess; }
API int cudaStreamCreateWithFlags(void** out, unsigned) { return cudaStreamCreate(out); }
API int cudaStreamDestroy(void* stream) { return free(stream), kSuccess; }
API int cudaStreamSynchronize(void*) { return kSuccess; }
API int cudaStreamWaitEvent(void*, void*, unsigned) { return kSuccess; }
API int cudaEventCreate(void** out) { return *out = new Event{}, kSuccess; }
API int cudaEventDestroy(void* event) { return delete static_cast<Event*>(event), kSuccess; }
API int cudaEventRecord(void* event, void*) {
  static_cast<Event*>(event)->time = std::chrono::steady_clock::now();
  return kSuccess;
}
API int cudaEventSynchronize(void*) { return kSuccess; }
API int cudaEventElapsedTime(float* ms, void* from, void* to) {
  auto passed = static_cast<Event*>(to)->time - static_cast<Event*>(from)->time;
  *ms = std::chrono::duration<float, std::milli>(passed).count();
  return kSuccess;
}
API int cudaStreamBeginCapture(void*, int) { return kept(kNotSupported); }
API int cudaStreamEndCapture(void*, void**) { return kept(kNotSupported); }
API int cudaGraphInstantiate(void**, void*, unsigned long long) { return kept(kNotSupported); }
API int cudaGraphLaunch(void*, void*) { return kept(kNotSupported); }
API int cudaGraphDestroy(void*) { return kSuccess; }
API int cudaGraphExecDestroy(void*) { return kSuccess; }

