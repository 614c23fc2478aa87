// Threads that share the tasks of a loop. Tasks are handed out one by one, so a thread that the system has stopped
// holds up the one task that it is at, and a thread that comes late finds nothing left: nobody waits for it. Waiting
// threads sleep after some microseconds.
#pragma once

#include <cstdint>

namespace iirsnn {

using Task = void (*)(const void* context, int64_t index, int worker);

// See parallel_for.
void run_tasks(int64_t count, int threads, Task task, const void* context);

// f(index, worker) for each index below `count`, by the calling thread, which is worker 0, and by up to threads - 1
// others, each with its own number below `threads`. Any number of threads may call this at once, tasks too.
// The first exception that a task throws is thrown here, when no task runs any more; tasks not begun are left out.
template <typename F>
void parallel_for(int64_t count, int threads, const F& f) {
  run_tasks(
      count, threads, [](const void* f, int64_t index, int worker) { (*static_cast<const F*>(f))(index, worker); }, &f);
}

}  // namespace iirsnn
