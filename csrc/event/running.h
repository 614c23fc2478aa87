// A call under way: what each kind of step does. Layers, whose tasks are strips of sums, are in run_layer.cpp.
#pragma once

#include <algorithm>
#include <vector>

#include "event/bits.h"
#include "event/layers.h"
#include "event/thread_pool.h"
#include "event/values.h"

namespace iirsnn::event {

// What a thread counts of a layer, on a cache line of its own.
struct alignas(64) Counts {
  int64_t spikes = 0, additions = 0, multiplications = 0, weight_bytes = 0;
};

class Running {
 public:
  Running(const Network& network, const float* images, float* logits, int threads, Call& call)
      : net_(network), images_(images), logits_(logits), threads_(threads), call_(call) {}

  void pool(const Step& step, LayerReport& report);
  void channels(const Step& step, LayerReport& report);
  void sum(const Step& step, LayerReport& report);
  void layer(const Step& step, LayerReport& report);
  void output(const Step& step, LayerReport& report);

 private:
  template <typename F>
  void in_parts(int64_t count, int64_t work, const F& f) const;
  int64_t frames() const { return call_.images * net_.timesteps; }
  int64_t steps(const Step& step) const { return step.constant ? 1 : net_.timesteps; }
  const uint64_t* bits(int64_t source) const { return call_.bits[source - 1].data(); }
  int64_t bytes(int64_t source) const { return 8 * int64_t(call_.bits[source - 1].size()); }
  int64_t plane(const Source& source) const { return frames() * source.image_words(); }
  CountsIn counts(int64_t source) const {
    const Source& from = net_.source(source);
    return {bits(source), from.planes, plane(from), from.words()};
  }
  CountsOut given(int64_t source) const {
    const Source& to = net_.source(source);
    return {call_.bits[source - 1].data(), to.planes, plane(to), to.words()};
  }
  float* values(int64_t source) const { return reinterpret_cast<float*>(call_.values[net_.source(source).slot].get()); }
  int64_t value_bytes(int64_t source) const {
    const Source& from = net_.source(source);
    return from.real() ? frames() * from.values() * int64_t(sizeof(float)) : 0;
  }
  void traffic(const Step& step, LayerReport& report) const;

  void add_up(const Step& step, const Strip& strip, void* sums, Counts& counts) const;
  void add_products(const Step& step, const Connection& c, const Piece& piece, const Strip& strip, void* sums,
                    const std::vector<Tap>& taps) const;
  Work add_events(const Step& step, const Connection& c, const Piece& piece, const Strip& strip, void* sums,
                  const std::vector<Tap>& taps) const;
  void add_others(const Step& step, const Strip& strip, void* sums, Counts& counts) const;
  void keep(const Step& step, const Strip& strip, const void* sums) const;
  void finish(const Step& step, const Strip& strip, const void* sums, Counts& counts);

  const Network& net_;
  const float* images_;
  float* logits_;
  int threads_;
  Call& call_;
};

// f(first, last) over parts of `count` positions or rows, so many at a time that a part is some thousands of steps of
// work: one is over in a nanosecond.
template <typename F>
void Running::in_parts(int64_t count, int64_t work, const F& f) const {
  const int64_t together = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, work));
  parallel_for(ceil_div(count, together), threads_,
               [&](int64_t task, int) { f(task * together, std::min(count, (task + 1) * together)); });
}

}  // namespace iirsnn::event
