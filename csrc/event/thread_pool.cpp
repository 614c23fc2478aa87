#include "event/thread_pool.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <limits>
#include <mutex>
#include <thread>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#endif

namespace iirsnn {
namespace {

constexpr int kHelpers = 255, kJobs = 32;
// How long a thread looks for work before it sleeps: waking takes about as long, and the layers of a network follow
// each other within this time.
constexpr std::chrono::microseconds kPatience{50};

using Clock = std::chrono::steady_clock;

// A thread that shares its core with another process is stopped for milliseconds, in the middle of a task. If it took
// this much longer for one than the caller, which waited, it rests for a multiple of the time that it was waited for.
constexpr std::chrono::microseconds kStopped{200};
constexpr int kRest = 20;
constexpr std::chrono::milliseconds kLongestRest{200};

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether done() was true before the patience was over.
template <typename Done>
bool spin_until(const Done& done) {
  const auto end = Clock::now() + kPatience;
  do {
    for (int i = 0; i < 32; ++i) {
      if (done()) return true;
      pause();
    }
  } while (Clock::now() < end);
  return false;
}

// Tasks of one caller at a time. Helpers may look at a job at any moment, also while the next caller sets it up: what
// they read is theirs only if they then take a task of the same generation.
class alignas(64) Job {
 public:
  bool reserve() { return !reserved_.load() && !reserved_.exchange(true); }
  void release() { reserved_ = false; }

  void open(uint32_t count, int threads, Task task, const void* context) {
    count_ = count;
    threads_ = threads;
    task_ = task;
    context_ = context;
    failed_ = false;
    longest_ = Clock::duration{0};
    idle_ = Clock::time_point{};
    undone_ = count;
    waiting_ = (((waiting_ >> 32) + 1) << 32) | count;  // from here on tasks are taken
  }

  // Runs the tasks that are left, one by one. Returns for how long the caller had to wait for one of them because the
  // system had stopped this thread.
  Clock::duration work(int worker) {
    Clock::duration held{0};
    uint64_t seen = waiting_;
    while (uint32_t(seen) != 0) {
      const uint32_t count = count_;
      const Task task = task_;
      const void* const context = context_;
      if (worker >= threads_) break;
      if (!waiting_.compare_exchange_weak(seen, seen - 1)) continue;
      held = std::max(held, run(task, context, count - uint32_t(seen), worker));
      seen = waiting_;
    }
    return held;
  }

  // Until all tasks are done. Throws what one of them has thrown.
  void finish() {
    const auto done = [this] { return undone_ == 0; };
    if (done()) return rethrow();
    idle_ = Clock::now();
    if (!spin_until(done)) {
      std::unique_lock lock(mutex_);
      all_done_.wait(lock, done);
    }
    rethrow();
  }

 private:
  void rethrow() {
    if (failed_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  Clock::duration run(Task task, const void* context, uint32_t index, int worker) {
    const Clock::time_point start = Clock::now();
    if (!failed_) {
      try {
        task(context, index, worker);
      } catch (...) {
        if (!failed_.exchange(true)) error_ = std::current_exception();
      }
    }
    const Clock::time_point end = Clock::now(), idle = idle_;
    Clock::duration held{0};
    if (worker == 0) {
      longest_ = std::max<Clock::duration>(longest_, end - start);
    } else if (idle != Clock::time_point{} && end - start > 4 * longest_.load() + kStopped) {
      held = end - idle;
    }
    if (--undone_ == 0 && worker != 0) {
      mutex_.lock();  // the caller either has not looked yet, or sleeps
      mutex_.unlock();
      all_done_.notify_one();
    }
    return held;
  }

  std::atomic<bool> reserved_{false};
  std::atomic<uint32_t> count_{0};
  std::atomic<int> threads_{0};
  std::atomic<Task> task_{nullptr};
  std::atomic<const void*> context_{nullptr};
  alignas(64) std::atomic<uint64_t> waiting_{0};  // the generation; below it, the number of tasks that nobody has taken
  alignas(64) std::atomic<uint32_t> undone_{0};
  std::atomic<Clock::duration> longest_{};  // of the caller's own tasks
  std::atomic<Clock::time_point> idle_{};   // since when the caller has nothing to do but to wait
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
  std::mutex mutex_;
  std::condition_variable all_done_;
};

class ThreadPool {
 public:
  void run(uint32_t count, int threads, Task task, const void* context) {
    Job* const job = reserve();
    if (!job) {  // so many callers need no help
      for (uint32_t i = 0; i < count; ++i) task(context, i, 0);
      return;
    }
    job->open(count, threads, task, context);
    call(threads - 1);
    job->work(0);
    struct Release {
      Job* job;
      ~Release() { job->release(); }
    } release{job};
    job->finish();
  }

 private:
  struct alignas(64) Helper {
    std::mutex mutex;
    std::condition_variable called;
    std::atomic<bool> asleep{false};
  };

  Job* reserve() {
    for (Job& job : jobs_) {
      if (job.reserve()) return &job;
    }
    return nullptr;
  }

  // The first `count` helpers, which are made where they are missing.
  void call(int count) {
    if (count > helper_count_) hire(count);
    ++calls_;
    for (int i = 0; i < std::min<int>(count, helper_count_); ++i) {
      Helper& helper = helpers_[i];
      if (!helper.asleep) continue;
      helper.mutex.lock();  // it either has not looked yet, or sleeps
      helper.mutex.unlock();
      helper.called.notify_one();
    }
  }

  void hire(int count) {
    const std::lock_guard lock(hiring_);
#if defined(__unix__) || defined(__APPLE__)
    sigset_t others, before;  // signals are for the program's own threads, but for those of a thread's own faults
    sigfillset(&others);
    for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&others, fault);
    pthread_sigmask(SIG_SETMASK, &others, &before);
#endif
    try {
      for (int i = helper_count_; i < std::min(count, most_); ++i) {
        std::thread([this, i] { help(i); }).detach();
        helper_count_ = i + 1;
      }
    } catch (const std::exception&) {  // the system gives no more threads
      most_ = helper_count_;
    }
#if defined(__unix__) || defined(__APPLE__)
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
  }

  void help(int number) {
    Helper& helper = helpers_[number];
    for (uint64_t seen = calls_;; seen = calls_) {
      Clock::duration held{0};
      for (Job& job : jobs_) held = std::max(held, job.work(number + 1));
      if (held > held.zero()) std::this_thread::sleep_for(std::min<Clock::duration>(kRest * held, kLongestRest));
      const auto called = [&] { return calls_ != seen; };
      if (spin_until(called)) continue;
      std::unique_lock lock(helper.mutex);
      helper.asleep = true;
      helper.called.wait(lock, called);
      helper.asleep = false;
    }
  }

  std::array<Job, kJobs> jobs_;
  std::array<Helper, kHelpers> helpers_;
  alignas(64) std::atomic<uint64_t> calls_{0};
  std::atomic<int> helper_count_{0};
  std::mutex hiring_;
  int most_ = kHelpers;
};

// Lives as long as the process does: its threads may run until then.
std::atomic<ThreadPool*> current{nullptr};

#if defined(__unix__) || defined(__APPLE__)
// A fork takes no threads along, and perhaps a lock that is held: the child makes a pool of its own.
[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] { current = nullptr; });
#endif

ThreadPool& pool() {
  if (ThreadPool* const made = current) return *made;
  ThreadPool* expected = nullptr;
  ThreadPool* const mine = new ThreadPool;
  if (current.compare_exchange_strong(expected, mine)) return *mine;
  delete mine;
  return *expected;
}

}  // namespace

void run_tasks(int64_t count, int threads, Task task, const void* context) {
  threads = int(std::min<int64_t>(threads, count));
  if (threads > 1 && count <= std::numeric_limits<uint32_t>::max()) {
    pool().run(uint32_t(count), threads, task, context);
    return;
  }
  for (int64_t i = 0; i < count; ++i) task(context, i, 0);
}

}  // namespace iirsnn
