// The fibers, their meetings and the asynchronous copies of emulator.h.
#include "emulator.h"

#include <algorithm>
#include <csetjmp>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include <ucontext.h>

dim3 gridDim, blockDim;
uint3 blockIdx, threadIdx;

namespace emulator {
namespace {

constexpr size_t STACK = 1 << 17, CANARY = 64;

struct Copy { void* target; const void* source; size_t bytes, zeros; };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[STACK]};
  ucontext_t start;
  jmp_buf at;
  bool begun = false, done = true;
  const int64_t* waits_for = nullptr;  // until it reaches the value
  int64_t value = 0;
  int64_t collectives = 0;  // of this lane so far
  bool fenced = false;      // towards bulk copies, since the block's last barrier
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};

// Two meetings in turn: a lane can be one collective ahead of the slowest, never two.
struct Meeting {
  int64_t number = -1, finished = -1;
  unsigned arrived = 0;
  int kind = 0;
  Lanes lanes;
};
struct Warp { Meeting meetings[2]; };
struct BoxCopy {
  unsigned char* target;
  CUtensorMap map;
  int at[5];
  size_t bytes;
};
constexpr uint64_t OPEN = 0xba221e20ba221e20;  // what lies where a barrier is
struct Barrier {
  uint64_t* place;
  int64_t phase = 0, bytes = 0;  // phases that are over; bytes expected and not there
  bool arrived = false;
  std::vector<BoxCopy> copies;  // under way
};
struct Block {
  uint3 index;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<Barrier>> open;
  size_t shared_bytes;
  std::vector<unsigned char> shared;
  unsigned at_barrier = 0;
  int64_t barriers = 0;

  unsigned char* memory() {
    return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared.data()) + 1023) / 1024 * 1024);
  }
};

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Block> resident;  // one, or all of a cooperative launch
Block* block = nullptr;       // the running fiber's
Fiber* current = nullptr;
unsigned num_threads = 0, at_grid_barrier = 0, seed = 0;
int64_t grid_barriers = 0;
jmp_buf scheduler;
std::string failure;
const std::function<void()>* body = nullptr;

void leave() {
  if (_setjmp(current->at) == 0) _longjmp(scheduler, 1);
}

void wait_until(const int64_t& counter, int64_t value) {
  current->waits_for = &counter, current->value = value;
  leave();
}

[[noreturn]] void fail(const std::string& what) {
  failure = what + " (block " + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", thread " +
            std::to_string(threadIdx.x) + ")";
  _longjmp(scheduler, 1);
}

void fiber_main() {
  for (;;) {
    (*body)();
    current->done = true;
    leave();
  }
}

void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.begun) _longjmp(fiber.at, 1);
  fiber.begun = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = STACK;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, fiber_main, 0);
  setcontext(&fiber.start);
}

template <typename T> void put_in_order(std::vector<T>& items, std::minstd_rand& random) {
  if (seed == 1) std::reverse(items.begin(), items.end());
  if (seed > 1) std::shuffle(items.begin(), items.end(), random);
}

void end_phase_if_complete(Barrier& barrier) {
  if (!barrier.arrived || barrier.bytes) return;
  ++barrier.phase, barrier.arrived = false;
}

// The copies that a thread waits for arrive. False if there are none.
bool land_copies(const std::vector<unsigned>& order) {
  bool any = false;
  for (unsigned i : order)
    for (auto& barrier : resident[i / num_threads].open) {
      if (fibers[i]->done || fibers[i]->waits_for != &barrier->phase) continue;
      for (const BoxCopy& copy : std::exchange(barrier->copies, {})) {
        any = true;
        read_box(copy.map, copy.at, copy.target);
        barrier->bytes -= int64_t(copy.bytes);
        if (barrier->bytes < 0) failure = "bulk copies bring more bytes than their barrier expects";
        end_phase_if_complete(*barrier);
      }
    }
  return any;
}

// Runs the resident blocks' threads in the given order until all are done.
void run_resident(size_t shared_bytes, const std::vector<unsigned>& order) {
  for (Block& each : resident) {
    each.warps.assign(num_threads / 32, {});
    each.shared.assign(shared_bytes + 1024 + CANARY, 0xff);
    each.at_barrier = 0, each.barriers = 0, each.shared_bytes = shared_bytes;
    each.open.clear();
  }
  at_grid_barrier = 0, grid_barriers = 0;
  for (unsigned i : order) {
    Fiber& fiber = *fibers[i];
    fiber.done = false, fiber.waits_for = nullptr, fiber.collectives = 0, fiber.fenced = false;
    fiber.groups.clear(), fiber.open.clear();
  }
  for (bool progress = true, left = true; left; ) {
    progress = left = false;
    for (unsigned i : order) {
      Fiber& fiber = *fibers[i];
      if (fiber.done) continue;
      left = true;
      if (fiber.waits_for && *fiber.waits_for < fiber.value) continue;
      fiber.waits_for = nullptr;
      block = &resident[i / num_threads];
      blockIdx = block->index, threadIdx = {i % num_threads, 0, 0};
      resume(fiber);
      if (!failure.empty()) return;
      progress = true;
    }
    if (left && !progress && !land_copies(order))
      failure = "threads wait at a barrier, for their warp or for a phase that others never reach";
    if (!failure.empty()) return;
  }
  for (Block& each : resident) {
    for (size_t i = 0; i < CANARY; ++i)
      if (each.memory()[shared_bytes + i] != 0xff) failure = "wrote past the end of its shared memory";
    for (auto& barrier : each.open)
      if (!barrier->copies.empty()) failure = "a block ended with bulk copies under way";
  }
}

Barrier& barrier_at(uint64_t* place) {
  for (auto& each : block->open) {
    if (each->place != place) continue;
    if (*place != OPEN) fail("a barrier was written over");
    return *each;
  }
  fail("a barrier that is not open");
}

}  // namespace

const char* run(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel, bool cooperative) {
  static std::mutex one_launch;
  static thread_local std::string report;
  std::lock_guard<std::mutex> lock(one_launch);
  if (threads == 0 || threads % 32 || threads > 1024) return "the block is not of whole warps, at most 1024 threads";
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) return "invalid grid";
  if (shared_bytes > 99 * 1024) return "more shared memory than a block has on the smallest supported GPU";
  uint64_t all = uint64_t(grid.x) * grid.y * grid.z;
  if (cooperative && all > RESIDENT_BLOCKS) return "more blocks than are resident together";
  std::minstd_rand random(seed);
  gridDim = grid, blockDim = threads, num_threads = threads, body = &kernel;
  resident.resize(cooperative ? all : 1);
  std::vector<unsigned> order(resident.size() * threads);
  while (fibers.size() < order.size()) fibers.emplace_back(new Fiber);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  put_in_order(order, random);
  std::vector<uint64_t> blocks(all);
  for (uint64_t i = 0; i < all; ++i) blocks[i] = i;
  put_in_order(blocks, random);
  failure.clear();
  for (size_t first = 0; first < all && failure.empty(); first += resident.size()) {
    for (size_t i = 0; i < resident.size(); ++i) {
      uint64_t index = blocks[first + i];
      resident[i].index = {unsigned(index % grid.x), unsigned(index / grid.x % grid.y), unsigned(index / grid.x / grid.y)};
    }
    run_resident(shared_bytes, order);
  }
  if (failure.empty()) return nullptr;
  for (auto& fiber : fibers) fiber->begun = false;  // whatever was on their stacks is dropped
  report = failure;
  return report.c_str();
}

void set_order(unsigned value) { seed = value; }

unsigned char* shared_memory() { return block->memory(); }

unsigned lane() { return threadIdx.x % 32; }

void barrier() {
  current->fenced = false;
  if (++block->at_barrier < num_threads) return wait_until(block->barriers, block->barriers + 1);
  block->at_barrier = 0;
  ++block->barriers;
}

void grid_barrier() {
  if (++at_grid_barrier < resident.size() * num_threads) return wait_until(grid_barriers, grid_barriers + 1);
  at_grid_barrier = 0;
  ++grid_barriers;
}

Lanes& meet(unsigned mask, int kind, const void* mine, size_t size) {
  if (mask != ~0u) fail("a collective of part of a warp");
  int64_t number = current->collectives++;
  Meeting& meeting = block->warps[threadIdx.x / 32].meetings[number % 2];
  if (meeting.number != number) meeting.number = number, meeting.arrived = 0, meeting.kind = kind;
  if (meeting.kind != kind) fail("lanes of one warp meet in different collectives");
  if (size) memcpy(meeting.lanes.bytes[lane()], mine, size);
  meeting.arrived |= 1u << lane();
  if (meeting.arrived == ~0u)
    meeting.finished = number;
  else
    wait_until(meeting.finished, number);
  return meeting.lanes;
}

void copy_later(void* target, const void* source, size_t bytes, size_t zeros) {
  if (reinterpret_cast<uintptr_t>(target) % (bytes + zeros)) fail("a misaligned target of an asynchronous copy");
  if (bytes && reinterpret_cast<uintptr_t>(source) % (bytes + zeros)) fail("a misaligned source of an asynchronous copy");
  memset(target, 0xff, bytes + zeros);
  current->open.push_back({target, source, bytes, zeros});
}

void close_group() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

void finish_groups(int but) {
  while (current->groups.size() > size_t(but)) {
    for (const Copy& copy : current->groups.front()) {
      memcpy(copy.target, copy.source, copy.bytes);
      memset(static_cast<char*>(copy.target) + copy.bytes, 0, copy.zeros);
    }
    current->groups.erase(current->groups.begin());
  }
}

void open_barrier(uint64_t* place) {
  auto* byte = reinterpret_cast<unsigned char*>(place);
  bool inside = byte >= block->memory() && byte + sizeof *place <= block->memory() + block->shared_bytes;
  if (!inside || reinterpret_cast<uintptr_t>(place) % 8) fail("a barrier outside of shared memory, or misaligned");
  for (auto& each : block->open)
    if (each->place == place) fail("a barrier is opened twice");
  *place = OPEN;
  block->open.emplace_back(new Barrier{});
  block->open.back()->place = place;
}

void close_barrier(uint64_t* place) {
  Barrier& barrier = barrier_at(place);
  if (barrier.arrived || barrier.bytes || !barrier.copies.empty()) fail("a barrier is closed in the midst of a phase");
  for (auto& fiber : fibers)
    if (!fiber->done && fiber->waits_for == &barrier.phase) fail("a barrier is closed while threads wait at it");
  auto here = [&](const std::unique_ptr<Barrier>& each) { return each->place == place; };
  block->open.erase(std::find_if(block->open.begin(), block->open.end(), here));
  memset(place, 0xff, sizeof *place);
}

void fence_bulk_copies() { current->fenced = true; }

void expect_bytes(uint64_t* place, unsigned bytes) {
  Barrier& barrier = barrier_at(place);
  if (barrier.arrived) fail("a second arrival at a barrier in one phase");
  barrier.arrived = true, barrier.bytes += bytes;
  end_phase_if_complete(barrier);
}

void wait_for_phase(uint64_t* place, unsigned parity) {
  Barrier& barrier = barrier_at(place);
  if (parity > 1) fail("a parity that is neither 0 nor 1");
  if (barrier.phase % 2 == int64_t(parity)) wait_until(barrier.phase, barrier.phase + 1);
}

void copy_box_later(void* target, const CUtensorMap& map, const int (&at)[5], uint64_t* place) {
  Barrier& barrier = barrier_at(place);
  if (!current->fenced) fail("a bulk copy, and no fence towards it since the block's last barrier");
  if (const char* fault = box_fault(map, target)) fail(fault);
  BoxCopy copy{static_cast<unsigned char*>(target), map, {}, box_bytes(map)};
  std::copy(at, at + 5, copy.at);
  if (copy.target < block->memory() || copy.target + copy.bytes > block->memory() + block->shared_bytes)
    fail("a bulk copy past the end of shared memory");
  for (auto& each : block->open)
    for (const BoxCopy& other : each->copies)
      if (copy.target < other.target + other.bytes && other.target < copy.target + copy.bytes)
        fail("two bulk copies under way to one place");
  memset(target, 0xff, copy.bytes);
  barrier.copies.push_back(copy);
}

}  // namespace emulator
