// Runs the blocks of a kernel one after another, and each thread of a block as a fiber.
//
// A thread runs until it has to wait: at a barrier, at a collective of its warp. So between two barriers the threads
// run one after another, in an order that can be reversed or shuffled: what two orders disagree on is a race.
#include "engine.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <random>
#include <sys/mman.h>

#include "device.h"

using namespace emulator;

extern "C" void onnxcomp_emulator_switch(void** from, void* to);
asm(R"(
.text
.globl onnxcomp_emulator_switch
.hidden onnxcomp_emulator_switch
.type onnxcomp_emulator_switch, @function
onnxcomp_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size onnxcomp_emulator_switch, .-onnxcomp_emulator_switch
)");

namespace {

constexpr size_t kStack = 512 << 10;

enum State { kReady, kAtBarrier, kAtCollective, kEnded };

struct Thread {
  State state;
  void* stack;     // its lowest address; null before its start
  void* pointer;   // of the stack, while another runs
  int line;        // where it waits
  int predicate;   // what it gave to the barrier
  int kind;        // of the collective
  unsigned mask;
  size_t bytes;
  unsigned char value[kLargestValue];
  Snapshot* held;
};

// Bits of lanes: those that have not ended, and those that wait at a collective.
struct Warp {
  unsigned live, waiting;
};

Engine engine;
std::mutex one_launch;
std::vector<Thread> threads;
std::vector<Warp> warps;
std::vector<void*> idle_stacks;
std::vector<Snapshot*> idle_snapshots;
void* scheduler;
Thread* running;
Votes votes;
int ended;
const Launch* launch;
int order_mode = -1;
unsigned order_seed;

void poison(const Region& region) { memset(region.data, 0xff, region.bytes); }

const char* kind_name(int kind) {
  static const char* names[] = {"__syncwarp", "a shuffle", "a vote", "a reduction", "a match", "__activemask"};
  return names[kind];
}

int number(const Thread* thread) { return int(thread - threads.data()); }

void* new_stack() {
  if (!idle_stacks.empty()) {
    void* stack = idle_stacks.back();
    idle_stacks.pop_back();
    return stack;
  }
  void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) fail(kLaunchFailed, 0, "no memory for the stack of a thread");
  mprotect(stack, 4096, PROT_NONE);
  return stack;
}

void drop(Thread& thread) {
  if (!thread.held) return;
  if (--thread.held->readers == 0) idle_snapshots.push_back(thread.held);
  thread.held = nullptr;
}

void wait() { onnxcomp_emulator_switch(&running->pointer, scheduler); }

void entry() {
  launch->function->run(launch->arguments, false);
  running->state = kEnded;
  ++ended;
  wait();
  abort();
}

void release(int warp, unsigned lanes) {
  Snapshot* snapshot;
  if (idle_snapshots.empty()) {
    snapshot = new Snapshot;
  } else {
    snapshot = idle_snapshots.back();
    idle_snapshots.pop_back();
  }
  snapshot->lanes = lanes;
  snapshot->readers = __builtin_popcount(lanes);
  memset(snapshot->value, 0xff, sizeof snapshot->value);
  warps[warp].waiting &= ~lanes;
  for (unsigned left = lanes; left; left &= left - 1) {
    int lane = __builtin_ctz(left);
    Thread& thread = threads[size_t(warp) * kWarp + lane];
    memcpy(snapshot->value[lane], thread.value, thread.bytes);
    thread.held = snapshot;
    thread.state = kReady;
  }
}

// Lets the lanes of a warp go on that one of them waits for, once all that its mask names and that live are there.
void release_complete(int warp, int lane) {
  const Warp& all = warps[warp];
  const Thread& first = threads[size_t(warp) * kWarp + lane];
  unsigned wanted = first.mask & all.live;
  if (first.kind == kActive || wanted & ~all.waiting) return;
  for (unsigned left = wanted; left; left &= left - 1) {
    const Thread& thread = threads[size_t(warp) * kWarp + __builtin_ctz(left)];
    if (thread.kind != first.kind || thread.mask != first.mask) return;
    if (thread.line != first.line) {
      fail(kLaunchFailed, thread.line, "lanes of a warp meet in %s at different lines, one of them %d",
           kind_name(first.kind), first.line);
    }
  }
  release(warp, wanted);
}

// When all else waits, the lanes that ask for the active ones are those which are.
bool release_active() {
  bool any = false;
  for (size_t at = 0; at < threads.size(); ++at) {
    const Thread& first = threads[at];
    if (first.state != kAtCollective || first.kind != kActive) continue;
    size_t warp = at / kWarp;
    unsigned lanes = 0;
    for (unsigned left = warps[warp].waiting; left; left &= left - 1) {
      const Thread& thread = threads[warp * kWarp + __builtin_ctz(left)];
      if (thread.kind == kActive && thread.line == first.line) lanes |= left & -left;
    }
    release(int(warp), lanes);
    any = true;
  }
  return any;
}

bool release_barrier() {
  const Thread* first = nullptr;
  Votes found{0, 1, 0};
  for (const Thread& thread : threads) {
    if (thread.state != kAtBarrier) return false;
    if (!first) first = &thread;
    if (thread.line != first->line) {
      running = nullptr;
      fail(kLaunchFailed, thread.line, "divergent barrier: thread %d waits here, thread %d at line %d", number(&thread),
           number(first), first->line);
    }
    found.count += thread.predicate != 0;
    found.all &= thread.predicate != 0;
    found.any |= thread.predicate != 0;
  }
  votes = found;
  for (Thread& thread : threads) thread.state = kReady;
  return true;
}

[[noreturn]] void stuck() {
  running = nullptr;
  const Thread *barrier = nullptr, *collective = nullptr;
  int at_barrier = 0;
  for (const Thread& thread : threads) {
    if (thread.state == kAtBarrier) barrier = &thread, ++at_barrier;
    if (thread.state == kAtCollective && !collective) collective = &thread;
  }
  if (collective) {
    fail(kLaunchFailed, collective->line,
         "a warp never meets: thread %d waits in %s with mask %08x, but not all of those lanes come; "
         "%d threads wait at __syncthreads, %d have ended",
         number(collective), kind_name(collective->kind), collective->mask, at_barrier, ended);
  }
  fail(kLaunchFailed, barrier->line,
       "divergent barrier: %d threads wait at __syncthreads, but %d have ended without it", at_barrier, ended);
}

void place(int at) {
  unsigned x = engine.block_size.x, y = engine.block_size.y;
  engine.thread = {at % x, at / x % y, at / (x * y)};
}

void resume(int at) {
  Thread& thread = threads[at];
  place(at);
  running = &thread;
  if (!thread.stack) {
    thread.stack = new_stack();
    void** top = reinterpret_cast<void**>(static_cast<char*>(thread.stack) + kStack - 64);
    top[1] = nullptr;
    top[0] = reinterpret_cast<void*>(&entry);
    thread.pointer = top - 6;
  }
  onnxcomp_emulator_switch(&scheduler, thread.pointer);
  if (thread.state == kEnded) {
    drop(thread);
    idle_stacks.push_back(thread.stack);
    thread.stack = nullptr;
    Warp& warp = warps[at / kWarp];
    warp.live &= ~(1u << at % kWarp);
    // Others may have waited for nobody but this one.
    for (int lane = 0; lane < kWarp; ++lane) {
      if (warp.waiting >> lane & 1) release_complete(at / kWarp, lane);
    }
  }
  running = nullptr;
}

void run_block(const std::vector<int>& order) {
  size_t count = threads.size();
  threads.assign(count, Thread{});
  warps.assign((count + kWarp - 1) / kWarp, Warp{0xffffffff, 0});
  if (count % kWarp) warps.back().live = (1u << count % kWarp) - 1;
  ended = 0;
  while (ended < int(count)) {
    bool moved = false;
    for (int at : order) {
      if (threads[at].state != kReady) continue;
      resume(at);
      moved = true;
    }
    if (!moved && !release_barrier() && !release_active()) stuck();
  }
}

Votes sync_block(int line, int predicate) {
  running->state = kAtBarrier;
  running->line = line;
  running->predicate = predicate;
  wait();
  return votes;
}

const Snapshot* exchange(int kind, int line, unsigned mask, const void* value, size_t bytes) {
  Thread& self = *running;
  int at = number(&self);
  if (kind != kActive && !(mask >> at % kWarp & 1)) {
    fail(kLaunchFailed, line, "the mask %08x of %s is without lane %d, which calls it", mask, kind_name(kind),
         at % kWarp);
  }
  drop(self);
  self.state = kAtCollective;
  self.kind = kind;
  self.line = line;
  self.mask = mask;
  self.bytes = bytes;
  memcpy(self.value, value, bytes);
  warps[at / kWarp].waiting |= 1u << at % kWarp;
  release_complete(at / kWarp, at % kWarp);
  wait();
  return self.held;
}

int lane() { return number(running) % kWarp; }

void* shared(int id, size_t bytes, const char* name) {
  Region& region = launch->function->shared[id];
  if (!region.data) {
    region = new_region(bytes, 16);
    region.name = name;
    poison(region);
  }
  return region.data;
}

void check_pointer(const void* pointer, int argument) {
  if (pointer && !find_region(pointer)) {
    running = nullptr;
    fail(kIllegalAddress, 0, "argument %d is the address %p, which is not in the device's memory", argument, pointer);
  }
}

std::vector<int> in_order(int count, std::mt19937& random) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (order_mode == 1) std::reverse(order.begin(), order.end());
  if (order_mode == 2) std::shuffle(order.begin(), order.end(), random);
  return order;
}

// After a failure nothing of what the fibers hold is of use.
void clear() {
  for (Thread& thread : threads) {
    if (thread.stack) idle_stacks.push_back(thread.stack);
    thread.stack = nullptr;
    drop(thread);
  }
  mend();
}

void run_grid(const Launch& one) {
  engine.grid = one.grid;
  engine.block_size = one.block;
  engine.dynamic_shared = one.dynamic_shared.data;
  threads.assign(size_t(one.block.x) * one.block.y * one.block.z, Thread{});
  std::mt19937 random(order_seed);
  auto& fixed_shared = one.function->shared;
  one.function->run(one.arguments, true);
  int blocks = int(one.grid.x * one.grid.y * one.grid.z);
  for (int at : in_order(blocks, random)) {
    engine.block = {at % one.grid.x, at / one.grid.x % one.grid.y, at / (one.grid.x * one.grid.y)};
    for (auto& [_, region] : fixed_shared) poison(region);
    if (one.dynamic_shared.bytes) poison(one.dynamic_shared);
    run_block(in_order(int(threads.size()), random));
  }
  size_t fixed = 0;
  std::string damage = mend() + mend(one.dynamic_shared);
  for (auto& [_, region] : fixed_shared) {
    fixed += region.bytes;
    damage += mend(region);
  }
  if (!damage.empty()) fail(kIllegalAddress, 0, "%s", damage.c_str());
  if (fixed > kFixedShared) {
    fail(kLaunchFailed, 0, "%zu bytes of shared memory of fixed size, where nvcc takes %zu at most", fixed,
         kFixedShared);
  }
}

}  // namespace

namespace emulator {

Engine* the_engine() {
  engine.shared = shared;
  engine.sync_block = sync_block;
  engine.exchange = exchange;
  engine.lane = lane;
  engine.fail = fail;
  engine.check_pointer = check_pointer;
  return &engine;
}

bool in_thread() { return running != nullptr; }

int run(const Launch& one) {
  std::lock_guard<std::mutex> lock(one_launch);
  if (order_mode < 0) {
    const char* wanted = getenv("ONNXCOMP_EMULATOR_ORDER");
    order_mode = wanted ? atoi(wanted) : 0;
  }
  launch = &one;
  running = nullptr;
  int code = guarded(one, engine, run_grid);
  if (code) clear();
  return code;
}

}  // namespace emulator

// 0: forward, 1: reversed, 2: shuffled by a seed.
extern "C" void onnxcomp_emulator_order(int mode, unsigned seed) {
  order_mode = mode;
  order_seed = seed;
}
