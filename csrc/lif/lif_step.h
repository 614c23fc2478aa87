// One neuron, one timestep, forward and backward: the only LIF arithmetic, shared by the CPU and the CUDA kernels.
//
//   soft:          h = leak v + x                    s = spike(h)   v' = h - threshold s
//   hard:          h = leak v + x                    s = spike(h)   v' = v_reset where it spiked, else h
//   none:          h = leak v + x                    s = spike(h)   v' = h
//   soft_delayed:  h = leak v + x - threshold spike(v)   s = spike(h)   v' = h
//
// soft_delayed needs no memory of the last spike: its v is the last h, so spike(v) is the last spike.
#pragma once

#include "lif/surrogate.h"

namespace iirsnn {

enum class Reset : int { soft = 0, hard = 1, none = 2, soft_delayed = 3 };

// acc_t is float, or double when the current is double; or many of them (lanes.h). One neuron's parameters.
template <typename acc_t>
struct Neuron {
  acc_t threshold;
  acc_t inverse_threshold;  // 1 / threshold, rounded; only the backward pass reads it
  acc_t leak;
  acc_t v_reset;
};

// 1 above the threshold, 0 at or below it, NaN for NaN.
template <typename acc_t>
IIRSNN_INLINE acc_t spike(acc_t h, acc_t threshold) {
  return select(h > threshold, acc_t(1), select(h == h, acc_t(0), h));
}

// The membrane before the reset.
template <Reset kReset, typename acc_t>
IIRSNN_INLINE acc_t charge(acc_t x, acc_t v, const Neuron<acc_t>& p) {
  const acc_t h = add(mul(p.leak, v), x);
  if constexpr (kReset == Reset::soft_delayed) {
    return sub(h, select(v > p.threshold, p.threshold, acc_t(0)));
  } else {
    return h;
  }
}

// The membrane after the reset.
template <Reset kReset, typename acc_t>
IIRSNN_INLINE acc_t discharge(acc_t h, const Neuron<acc_t>& p) {
  if constexpr (kReset == Reset::soft) return sub(h, select(h > p.threshold, p.threshold, acc_t(0)));
  if constexpr (kReset == Reset::hard) return select(h > p.threshold, p.v_reset, h);
  return h;
}

// What backward hands from one timestep to the one before it.
template <typename acc_t>
struct Carry {
  acc_t grad_v;      // of the membrane v' this timestep leaves
  acc_t grad_reset;  // of this timestep's spike, from the delayed reset; soft_delayed without detach_reset only
};

template <typename acc_t>
struct StepGrad {
  acc_t x;          // grad_x of this neuron and timestep, = grad_h
  acc_t threshold;  // to be summed over neurons and time
  acc_t leak;       // likewise
};

// ds/dh in place of the spike's own derivative.
template <Surrogate kSurrogate, typename acc_t>
IIRSNN_INLINE acc_t spike_slope(acc_t h, const Neuron<acc_t>& p, acc_t scale) {
  const acc_t z = sub(mul(h, p.inverse_threshold), acc_t(1));
  return mul(surrogate<kSurrogate>(z, scale), p.inverse_threshold);
}

// grad_s: of this timestep's spike; h: its membrane; v: the membrane it started from; slope: ds/dh. Updates the carry.
template <Reset kReset, typename acc_t>
IIRSNN_INLINE StepGrad<acc_t> backward_step(acc_t grad_s, acc_t h, acc_t v, acc_t slope, const Neuron<acc_t>& p,
                                            bool detach_reset, Carry<acc_t>& carry) {
  const acc_t grad_v = carry.grad_v, zero = acc_t(0);
  acc_t g = grad_s, straight = grad_v;
  if constexpr (kReset == Reset::soft) g = detach_reset ? g : sub(g, mul(p.threshold, grad_v));
  if constexpr (kReset == Reset::hard) {
    g = detach_reset ? g : add(g, mul(sub(p.v_reset, h), grad_v));
    straight = select(h > p.threshold, zero, grad_v);
  }
  if constexpr (kReset == Reset::soft_delayed) g = detach_reset ? g : add(g, carry.grad_reset);
  const acc_t through_spike = mul(g, slope);
  StepGrad<acc_t> grad;
  grad.x = add(through_spike, straight);
  grad.threshold = -mul(through_spike, mul(h, p.inverse_threshold));  // ds/dthreshold = -ds/dh h / threshold
  if constexpr (kReset == Reset::soft) grad.threshold = sub(grad.threshold, select(h > p.threshold, grad_v, zero));
  if constexpr (kReset == Reset::soft_delayed) {
    grad.threshold = sub(grad.threshold, select(v > p.threshold, grad.x, zero));
    carry.grad_reset = -mul(p.threshold, grad.x);
  }
  grad.leak = mul(grad.x, v);
  carry.grad_v = mul(p.leak, grad.x);
  return grad;
}

template <Reset kReset, Surrogate kSurrogate, typename acc_t>
IIRSNN_INLINE StepGrad<acc_t> backward_step(acc_t grad_s, acc_t h, acc_t v, const Neuron<acc_t>& p, acc_t scale,
                                            bool detach_reset, Carry<acc_t>& carry) {
  return backward_step<kReset>(grad_s, h, v, spike_slope<kSurrogate>(h, p, scale), p, detach_reset, carry);
}

// The spike(v0) of a delayed reset is a spike like any other: call once after the first timestep when v0 was given.
// Adds what it owes to the carry's grad_v (= grad_v0) and returns its share of the threshold's gradient.
template <typename acc_t>
IIRSNN_INLINE acc_t backward_v0_delayed(acc_t v0, acc_t slope, const Neuron<acc_t>& p, Carry<acc_t>& carry) {
  const acc_t through_spike = mul(carry.grad_reset, slope);
  carry.grad_v = add(carry.grad_v, through_spike);
  return -mul(through_spike, mul(v0, p.inverse_threshold));
}

template <Surrogate kSurrogate, typename acc_t>
IIRSNN_INLINE acc_t backward_v0_delayed(acc_t v0, const Neuron<acc_t>& p, acc_t scale, Carry<acc_t>& carry) {
  return backward_v0_delayed(v0, spike_slope<kSurrogate>(v0, p, scale), p, carry);
}

}  // namespace iirsnn
