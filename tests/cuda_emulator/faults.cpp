// Ends a kernel that does what a device forbids, and says what and where.
#include <dlfcn.h>

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <unistd.h>

#include "device.h"

namespace emulator {

namespace {

sigjmp_buf failed;
bool guarding;
const Launch* launch;
const Engine* engine;
std::string failure;
int failed_line;               // of the CUDA source; 0 where it is not known
const void* failed_address;  // of the instruction, where it tells the line

// Line of the source that an instruction belongs to, by the debug information of the kernels.
int line_of(const void* address) {
  Dl_info info;
  if (!dladdr(address, &info) || !info.dli_fbase) return 0;
  char command[128];
  snprintf(command, sizeof command, "addr2line -e /proc/%d/fd/%d %#zx 2>/dev/null", getpid(), launch->function->file,
           size_t(static_cast<const char*>(address) - static_cast<const char*>(info.dli_fbase)));
  FILE* pipe = popen(command, "r");
  if (!pipe) return 0;
  char text[512] = "";
  char* got = fgets(text, sizeof text, pipe);
  pclose(pipe);
  char* colon = got ? strrchr(text, ':') : nullptr;
  return colon ? atoi(colon + 1) : 0;
}

std::string source_line(int line) {
  const char* at = launch->function->source;
  for (; at && line > 1; --line) {
    at = strchr(at, '\n');
    if (at) ++at;
  }
  if (!at) return "";
  at += strspn(at, " ");
  return std::string(at, strcspn(at, "\n"));
}

void on_signal(int signal, siginfo_t* info, void* context) {
  if (!guarding) {
    std::signal(signal, SIG_DFL);
    return;
  }
  failed_address = reinterpret_cast<void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
  if (signal == SIGFPE) fail(kLaunchFailed, 0, "division of an integer by zero");
  if (signal == SIGILL) fail(kLaunchFailed, 0, "illegal instruction");
  std::string near = describe_near(info->si_addr, launch->dynamic_shared);
  for (auto& [_, region] : launch->function->shared) near += describe_near(info->si_addr, region);
  if (near.empty()) near = describe_near(info->si_addr);
  fail(kIllegalAddress, 0, "access out of bounds, at address %p%s", info->si_addr, near.c_str());
}

// Catches signals while it lives.
class Handlers {
 public:
  Handlers() : stack_(64 << 10) {
    stack_t stack{};
    stack.ss_sp = stack_.data();
    stack.ss_size = stack_.size();
    sigaltstack(&stack, &old_stack_);
    struct sigaction action {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &action, &old_[i]);
    guarding = true;
  }
  ~Handlers() {
    guarding = false;
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  static constexpr int kSignals[4] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
  std::vector<char> stack_;
  struct sigaction old_[4];
  stack_t old_stack_;
};

}  // namespace

const std::string& last_failure() { return failure; }

void fail(int code, int line, const char* format, ...) {
  char text[1024];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  failure = text;
  Index block = engine->block, thread = engine->thread;
  const char* name = launch->function->name.c_str();
  snprintf(text, sizeof text, " [kernel %s, block (%u, %u, %u)", name, block.x, block.y, block.z);
  failure += text;
  if (in_thread()) {
    snprintf(text, sizeof text, ", thread (%u, %u, %u)", thread.x, thread.y, thread.z);
    failure += text;
  }
  failed_line = line;
  siglongjmp(failed, code);
}

int guarded(const Launch& one, const Engine& state, void (*body)(const Launch&)) {
  launch = &one;
  engine = &state;
  failure.clear();
  failed_address = nullptr;
  int code;
  {
    Handlers handlers;
    code = sigsetjmp(failed, 1);
    if (code == 0) body(one);
  }
  if (code) {
    if (failed_address) failed_line = line_of(failed_address);
    if (failed_line) failure += ", line " + std::to_string(failed_line) + ": " + source_line(failed_line);
    failure += "]";
  }
  return code;
}

}  // namespace emulator
