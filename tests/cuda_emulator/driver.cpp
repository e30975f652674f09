// libcuda.so.1 of the emulated device: the part of the driver's interface that TVM's runtime calls.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "device.h"

using namespace emulator;

namespace emulator {

int architecture() {
  const char* name = getenv("ONNXCOMP_EMULATOR_ARCH");
  return name ? atoi(name) : 90;
}

size_t most_shared() {
  switch (architecture()) {
    case 80: case 87: return 163 << 10;
    case 86: case 89: case 120: return 99 << 10;
    default: return 227 << 10;
  }
}

const char* describe(int code) {
  if (code >= 700 && code < 720 && !last_failure().empty()) return last_failure().c_str();
  switch (code) {
    case kSuccess: return "no error";
    case kInvalidValue: return "invalid value";
    case kOutOfMemory: return "out of memory";
    case kInvalidImage: return "not compiled for the emulator";
    case kNotFound: return "no such kernel";
    case kNotSupported: return "not supported by the emulator";
    default: return "unknown error";
  }
}

const char* title(int code) {
  switch (code) {
    case kSuccess: return "CUDA_SUCCESS";
    case kInvalidValue: return "CUDA_ERROR_INVALID_VALUE";
    case kOutOfMemory: return "CUDA_ERROR_OUT_OF_MEMORY";
    case kInvalidImage: return "CUDA_ERROR_INVALID_IMAGE";
    case kNotFound: return "CUDA_ERROR_NOT_FOUND";
    case kIllegalAddress: return "CUDA_ERROR_ILLEGAL_ADDRESS";
    case kAssert: return "CUDA_ERROR_ASSERT";
    case kMisaligned: return "CUDA_ERROR_MISALIGNED_ADDRESS";
    case kLaunchFailed: return "CUDA_ERROR_LAUNCH_FAILED";
    case kNotSupported: return "CUDA_ERROR_NOT_SUPPORTED";
    default: return "CUDA_ERROR_UNKNOWN";
  }
}

}  // namespace emulator

namespace {

struct Module {
  void* library;
  int file;
  std::map<std::string, Function> functions;
};

struct LaunchConfig {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};

}  // namespace

#define API extern "C"

API int cuDeviceGetName(char* out, int length, int) { return snprintf(out, length, "emulated by onnxcomp"), kSuccess; }
// TVM shows the name alone, so it says what happened too.
API int cuGetErrorName(int code, const char** out) {
  static std::string text;
  text = title(code);
  if (describe(code) == last_failure()) text += ": " + last_failure();
  return *out = text.c_str(), kSuccess;
}
API int cuGetErrorString(int code, const char** out) { return *out = describe(code), kSuccess; }
API int cuTensorMapEncodeTiled() { return kNotSupported; }

API int cuModuleLoadData(void** out, const void* image) {
  static const char* head = "ONNXCOMP-EMULATED ";
  const char* text = static_cast<const char*>(image);
  if (strncmp(text, head, strlen(head)) != 0) return kInvalidImage;
  char* end;
  size_t bytes = strtoul(text + strlen(head), &end, 10);
  int file = memfd_create("onnxcomp-emulated", 0);
  if (file < 0) return kOutOfMemory;
  for (const char *at = end + 1, *last = at + bytes; at < last;) {
    ssize_t done = write(file, at, last - at);
    if (done <= 0) return close(file), kOutOfMemory;
    at += done;
  }
  char path[64];
  snprintf(path, sizeof path, "/proc/self/fd/%d", file);
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) fprintf(stderr, "CUDA emulator: %s\n", dlerror());
  if (!library) return close(file), kInvalidImage;
  auto attach = reinterpret_cast<void (*)(Engine*)>(dlsym(library, "onnxcomp_emulator_attach"));
  if (!attach) return close(file), kInvalidImage;
  attach(the_engine());
  *out = new Module{library, file, {}};
  return kSuccess;
}
API int cuModuleUnload(void* handle) {
  Module* module = static_cast<Module*>(handle);
  close(module->file);
  for (auto& [_, function] : module->functions) {
    for (auto& [_, region] : function.shared) free_region(region);
  }
  dlclose(module->library);
  delete module;
  return kSuccess;
}
API int cuModuleGetFunction(void** out, void* handle, const char* name) {
  Module* module = static_cast<Module*>(handle);
  auto run = reinterpret_cast<Run>(dlsym(module->library, (std::string("onnxcomp_run_") + name).c_str()));
  if (!run) return kNotFound;
  Function& function = module->functions[name];
  function.run = run;
  function.name = name;
  function.source = static_cast<const char*>(dlsym(module->library, "onnxcomp_source"));
  function.file = module->file;
  *out = &function;
  return kSuccess;
}
API int cuFuncSetAttribute(void* handle, int attribute, int value) {
  if (attribute != 8) return kSuccess;  // the most dynamic shared memory
  if (size_t(value) > most_shared()) return kInvalidValue;
  static_cast<Function*>(handle)->most_dynamic_shared = size_t(value);
  return kSuccess;
}
API int cuLaunchKernel(void* handle, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                       unsigned shared, void*, void** arguments, void** extra) {
  Function* function = static_cast<Function*>(handle);
  size_t count = size_t(bx) * by * bz;
  if (extra || !count || count > 1024 || bz > 64 || !gx || !gy || !gz || gx > 0x7fffffff || gy > 65535 || gz > 65535) {
    return kInvalidValue;
  }
  if (shared > function->most_dynamic_shared) return kInvalidValue;
  Launch launch{function, {gx, gy, gz}, {bx, by, bz}, {}, arguments};
  if (shared) {
    launch.dynamic_shared = new_region(shared, 16);
    launch.dynamic_shared.name = "dynamic shared memory";
  }
  int code = run(launch);
  free_region(launch.dynamic_shared);
  return code;
}
API int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** arguments, void** extra) {
  return cuLaunchKernel(function, config->grid[0], config->grid[1], config->grid[2], config->block[0], config->block[1],
                        config->block[2], config->shared, config->stream, arguments, extra);
}
