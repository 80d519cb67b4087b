// Many short parallel loops inside one OpenMP region, for a loop whose steps depend on each other.
//
// v1  The leader publishes a job of numbered tasks and works on it too; helpers take tasks from a shared counter. Nobody
//     waits for a thread that took nothing: with the cores busy elsewhere, a fork and join per step made a sweep of
//     exact_moves 4 to 45 times a matrix product of its size, this 1.6 to 3.
// v2  Where steps change much of what the next ones read, help costs more than it brings on cores far apart (a first sweep:
//     1.6 times the time of one thread; 0.9 on near ones). Pace tells which, as it goes: who works leaves the results as
//     they are.
#pragma once
#include <sched.h>
#include <time.h>

#include "isa.h"

namespace gradclust::GRADCLUST_ISA {
namespace {

class Team {
 public:
  // Leader: job(task) for task in [0, tasks), each once, on whatever threads are free. Returns when all are done.
  template <typename Job> void run(int64_t tasks, const Job& job) {
    if (alone) {
      for (int64_t task = 0; task < tasks; ++task) job(task);
      return;
    }
    call_ = [](const void* erased, int64_t task) { (*static_cast<const Job*>(erased))(task); };
    job_ = &job;
    first_ = published_;
    __atomic_store_n(&published_, first_ + tasks, __ATOMIC_RELEASE);
    while (work()) {}
    while (__atomic_load_n(&done_, __ATOMIC_ACQUIRE) != published_) pause();
  }
  // Everyone else, until the leader calls finish().
  void help() {
    while (!__atomic_load_n(&finished_, __ATOMIC_ACQUIRE))
      if (!work()) pause();
  }
  void finish() { __atomic_store_n(&finished_, true, __ATOMIC_RELEASE); }

  bool alone = false;  // whether the leader does its jobs itself

 private:
  // A taken task keeps its job alive: the leader goes on only when every published task is done.
  bool work() {
    int64_t task = __atomic_load_n(&next_, __ATOMIC_RELAXED);
    do {
      if (task >= __atomic_load_n(&published_, __ATOMIC_ACQUIRE)) return false;
    } while (!__atomic_compare_exchange_n(&next_, &task, task + 1, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
    call_(job_, task - first_);
    __atomic_fetch_add(&done_, 1, __ATOMIC_RELEASE);
    return true;
  }
  void pause() {
    thread_local int spins = 0;
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();  // two threads of one core: the one that waits leaves the units to the other
#endif
    if (++spins % 64 == 0) sched_yield();
  }

  void (*call_)(const void*, int64_t) = nullptr;
  const void* job_ = nullptr;
  int64_t first_ = 0;
  alignas(64) int64_t next_ = 0;
  alignas(64) int64_t published_ = 0;
  alignas(64) int64_t done_ = 0;
  bool finished_ = false;
};

// Whether a leader's steps go faster without help: some steps of every hundred are taken each way and timed.
class Pace {
 public:
  // Before a step.
  bool alone() {
    const int64_t place = step_ % PERIOD;
    if (place == 0) time_[0] = time_[1] = 0;
    return place < 2 * PROBES ? place >= PROBES : time_[1] < time_[0];
  }
  void begin() { begun_ = now(); }
  // After it; the first step each way brings the data over and does not count.
  void end() {
    const int64_t place = step_++ % PERIOD;
    if (place < 2 * PROBES && place % PROBES) time_[place / PROBES] += now() - begun_;
  }

 private:
  static constexpr int64_t PERIOD = 128, PROBES = 4;
  static int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return int64_t(time.tv_sec) * 1000000000 + time.tv_nsec;
  }
  int64_t step_ = 0, begun_ = 0, time_[2] = {};
};

}  // namespace
}  // namespace gradclust::GRADCLUST_ISA
