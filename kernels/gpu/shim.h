// Runs GPU kernels on a CPU, to check them: one OS thread, blocks one after the other, a block's threads as
// fibers that take turns wherever they wait for each other. What deadlocks a GPU fails the launch. A warp
// runs on as far as it can, another one first after every barrier: a missing barrier gives wrong results.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#define TRANSMUTE_GLOBAL
#define TRANSMUTE_DEVICE inline
#define TRANSMUTE_HOST_DEVICE inline
#define TRANSMUTE_BOUNDS(...)
#define TRANSMUTE_SHARED(type, name, count) alignas(16) static thread_local type name[count]

namespace transmute {
namespace shim {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;  // bytes

struct Fiber {
  jmp_buf place;
  ucontext_t start;
  std::unique_ptr<char[]> stack;
  bool started = false;
  int64_t shuffles = 0;
};

struct Grid {
  std::function<void()> kernel;
  int64_t blocks = 0, block = 0;
  int threads = 0, thread = 0;
  int arrived = 0, returned = 0;  // threads of the block: at the barrier; done with the kernel
  int64_t barriers = 0;           // passed so far
  int idle = 0;                   // turns since anything happened
  bool deadlock = false;
  std::vector<Fiber> fibers;
  std::vector<int64_t> exchanged;  // per warp: values handed to shuffles
  std::vector<float> slots[2];     // those of even and odd shuffles: no lane is two ahead of another
  jmp_buf home;
};

static thread_local Grid* grid = nullptr;

void fiber_main();

// Swapping with setjmp and longjmp alone: swapcontext makes a system call per turn.
void resume(int thread) {
  grid->thread = thread;
  Fiber& next = grid->fibers[thread];
  if (next.started) _longjmp(next.place, 1);
  next.started = true;
  setcontext(&next.start);
}

__attribute__((noinline)) void yield(int next) {
  if (++grid->idle > 4 * grid->threads) {
    grid->deadlock = true;
    _longjmp(grid->home, 1);
  }
  const int me = grid->thread;
  if (_setjmp(grid->fibers[me].place) == 0) resume(next % grid->threads);
}

void open_barrier_if_all_are_there() {
  if (grid->arrived == 0 || grid->arrived < grid->threads - grid->returned) return;
  grid->arrived = 0;
  ++grid->barriers;
  grid->idle = 0;
}

void fiber_main() {
  for (int64_t block = 0; block < grid->blocks; ++block) {
    grid->kernel();
    ++grid->returned;
    grid->idle = 0;
    open_barrier_if_all_are_there();
    if (grid->returned == grid->threads) grid->returned = 0, ++grid->block;
    while (grid->block == block) yield(grid->thread + 1);
  }
  _longjmp(grid->home, 1);  // whoever gets here first: all are done
}

// Whether all blocks ran to their end; if not, `message` says why.
bool run(int64_t blocks, int threads, std::function<void()> kernel, const char*& message) {
  if (blocks < 1) {
    message = "a launch needs at least one block";
    return false;
  }
  Grid here;
  here.kernel = std::move(kernel);
  here.blocks = blocks;
  here.threads = threads;
  here.fibers = std::vector<Fiber>(threads);
  here.exchanged.assign((threads + kWarp - 1) / kWarp, 0);
  for (auto& slots : here.slots) slots.assign(threads, 0);
  for (Fiber& fiber : here.fibers) {
    fiber.stack.reset(new char[kStack]);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    makecontext(&fiber.start, fiber_main, 0);
  }
  grid = &here;
  if (_setjmp(here.home) == 0) resume(0);
  grid = nullptr;
  if (here.deadlock) message = "the threads of a block wait for each other in vain";
  return !here.deadlock;
}

}  // namespace
}  // namespace shim

inline int thread_index() { return shim::grid->thread; }
inline int64_t block_index() { return shim::grid->block; }

inline void sync_threads() {
  shim::Grid& grid = *shim::grid;
  const int64_t passed = grid.barriers;
  ++grid.arrived;
  shim::open_barrier_if_all_are_there();
  while (grid.barriers == passed) shim::yield(grid.thread + 1);
}

// As on a GPU, every thread of a warp takes part; `mask` is less than `width`, so both are in one warp.
inline float shuffle_xor(float x, int mask, int /*width*/) {
  shim::Grid& grid = *shim::grid;
  const int me = grid.thread, warp = me / shim::kWarp;
  const int64_t number = grid.fibers[me].shuffles++;
  grid.slots[number & 1][me] = x;
  grid.idle = 0;
  ++grid.exchanged[warp];
  while (grid.exchanged[warp] < (number + 1) * shim::kWarp)
    shim::yield(warp * shim::kWarp + (me + 1) % shim::kWarp);
  return grid.slots[number & 1][me ^ mask];
}

}  // namespace transmute
