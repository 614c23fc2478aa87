"""The definition itself: against numbers worked out by hand, and against the written-out BPTT."""

import math

import pytest
import torch

from iirsnn.ops import reference


def run(x, threshold=1.0, leak=1.0, v0=None, reset="soft", v_reset=0.0):
    """One neuron over time: its spikes and its last membrane, as numbers."""
    x = torch.tensor(x, dtype=torch.float64).view(-1, 1)
    parameters = [torch.tensor([p], dtype=torch.float64) for p in (threshold, leak)]
    v0 = None if v0 is None else torch.tensor([v0], dtype=torch.float64)
    s, v = reference.lif_forward(x, *parameters, v0, reset, v_reset, True, "triangle", 0.3, True)
    return s.flatten().tolist(), v.item()


def test_soft_reset_keeps_what_exceeds_the_threshold():
    # h = .75, 1.5 | v = .5, h = 1.25 | v = .25, h = 1.0: not above the threshold
    assert run([0.75, 0.75, 0.75, 0.75]) == ([0, 1, 1, 0], 1.0)


def test_leak_acts_on_the_membrane_and_not_on_the_current():
    assert run([1.0, 0.5, 0.5], leak=0.5) == ([0, 0, 0], 1.0)
    assert run([1.0, 0.75], leak=0.5) == ([0, 1], 0.25)


def test_hard_reset_puts_the_membrane_at_v_reset():
    assert run([1.5, 0.25], reset="hard", v_reset=0.25) == ([1, 0], 0.5)


def test_hard_reset_is_a_select_that_survives_infinity():
    assert run([math.inf, 0.25], reset="hard", v_reset=0.5) == ([1, 0], 0.75)


def test_no_reset():
    assert run([1.5, 0.25], reset="none") == ([1, 1], 1.75)


def test_delayed_reset_subtracts_one_timestep_later_without_leaking():
    # h = 1.5 | h = .75 + 1 - 1 = .75 (the subtraction is not multiplied by leak)
    assert run([1.5, 1.0], leak=0.5, reset="soft_delayed") == ([1, 0], 0.75)


def test_delayed_reset_starts_with_the_spike_of_v0():
    assert run([0.5], v0=2.0, reset="soft_delayed") == ([1], 1.5)
    assert run([0.5], v0=1.0, reset="soft_delayed") == ([1], 1.5)
    assert run([0.5], v0=0.5, reset="soft_delayed") == ([0], 1.0)


def test_a_membrane_at_the_threshold_does_not_spike():
    above = math.nextafter(1.0, 2.0)
    assert run([1.0])[0] == [0]
    assert run([above])[0] == [1]


def test_special_values():
    x = torch.tensor([[math.nan, math.inf, -math.inf]])
    one = torch.ones(1)
    s, _ = reference.lif_forward(x, one, one, None, "soft", 0.0, True, "triangle", 0.3, False)
    assert s[0, 0].isnan()
    assert s[0, 1:].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "at_zero", "at_half"),
    [
        ("triangle", 0.3, 0.15),
        ("atan", 1.0, 1 / (1 + (math.pi / 2) ** 2)),
        ("sigmoid", 1.0, 4 * math.exp(-2) / (1 + math.exp(-2)) ** 2),
        ("fast_sigmoid", 1.0, 1 / 13.5**2),
        ("boxcar", 1.0, 1.0),
    ],
)
def test_surrogates_at_their_default_scale(name, at_zero, at_half):
    f, scale = reference.SURROGATES[name]
    z = torch.tensor([0.0, 0.5, -0.5], dtype=torch.float64)
    expected = torch.tensor([at_zero, at_half, at_half], dtype=torch.float64)
    torch.testing.assert_close(f(z, scale), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["atan", "sigmoid", "boxcar"])
def test_surrogates_that_are_derivatives_of_a_step_have_area_one(name):
    f, scale = reference.SURROGATES[name]
    z = torch.linspace(-2000, 2000, 4_000_001, dtype=torch.float64)
    assert torch.trapezoid(f(z, scale), z).item() == pytest.approx(1, abs=1e-3)


def written_out(x, threshold, leak, v0, reset, v_reset, detach, surrogate, grad_s, grad_v):
    """BPTT of one neuron, step by step in Python floats: grad_x, threshold, leak, v0."""
    f, a = reference.SURROGATES[surrogate]

    def slope(h):
        return f(torch.tensor(h / threshold - 1, dtype=torch.float64), a).item() / threshold

    nd = 0.0 if detach else 1.0
    v, hs, vs = v0 if v0 is not None else 0.0, [], []
    fired = v0 is not None and v0 > threshold
    for x_t in x:
        vs.append((v, fired))
        h = leak * v + x_t - (threshold if reset == "soft_delayed" and fired else 0.0)
        fired = h > threshold
        v = {"soft": h - threshold * fired, "hard": v_reset if fired else h}.get(reset, h)
        hs.append(h)
    g_v, g_h_next, grad_threshold, grad_leak, grad_x = grad_v, 0.0, 0.0, 0.0, []
    for t in reversed(range(len(x))):
        h, (v_before, fired_before) = hs[t], vs[t]
        s = float(h > threshold)
        g, straight, direct = grad_s[t], g_v, 0.0
        if reset == "soft":
            g, direct = g - nd * threshold * g_v, -s * g_v
        elif reset == "hard":
            g, straight = g + nd * (v_reset - h) * g_v, (0.0 if s else g_v)
        elif reset == "soft_delayed":
            g = g - nd * threshold * g_h_next
        g_h = g * slope(h) + straight
        if reset == "soft_delayed":
            direct = -float(fired_before) * g_h
        grad_threshold += -g * slope(h) * h / threshold + direct
        grad_leak += g_h * v_before
        grad_x.insert(0, g_h)
        g_v, g_h_next = leak * g_h, g_h
    if reset == "soft_delayed" and v0 is not None:
        through_spike = -nd * threshold * g_h_next * slope(v0)
        g_v += through_spike
        grad_threshold += -through_spike * v0 / threshold
    return grad_x, grad_threshold, grad_leak, g_v


@pytest.mark.parametrize("with_v0", [False, True], ids=["", "v0"])
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("surrogate", reference.SURROGATES)
@pytest.mark.parametrize("reset", reference.RESETS)
def test_gradients_are_those_of_the_written_out_bptt(reset, surrogate, detach, with_v0):
    x, grad_s = torch.tensor(
        [[1.0, -0.9, 0.5, -0.3, 1.4, 0.2], [0.7, -1.1, 0.4, 1.3, -0.5, 0.9]], dtype=torch.float64
    ).unsqueeze(-1)
    threshold, leak, v0, grad_v = (
        torch.tensor([p], dtype=torch.float64) for p in (0.8, 0.7, 1.1, -0.6)
    )
    wanted = [t.requires_grad_() for t in (x, threshold, leak, v0)]
    f_scale = reference.SURROGATES[surrogate][1]
    s, v = reference.lif_forward(
        x, threshold, leak, v0 if with_v0 else None, reset, 0.2, detach, surrogate, f_scale, True
    )
    got = torch.autograd.grad([s, v], wanted, [grad_s, grad_v], allow_unused=True)
    expected = written_out(
        x.flatten().tolist(),
        0.8,
        0.7,
        1.1 if with_v0 else None,
        reset,
        0.2,
        detach,
        surrogate,
        grad_s.flatten().tolist(),
        -0.6,
    )
    assert 0 < s.sum() < 6
    assert got[0].flatten().tolist() == pytest.approx(expected[0], rel=1e-12, abs=1e-14)
    assert got[1].item() == pytest.approx(expected[1], rel=1e-12)
    assert got[2].item() == pytest.approx(expected[2], rel=1e-12)
    if with_v0:
        assert got[3].item() == pytest.approx(expected[3], rel=1e-12)


def test_per_channel_parameters_act_along_dim_2():
    x = torch.rand(3, 2, 4, 5)
    threshold, leak = torch.rand(4) + 0.5, torch.rand(4)
    how = (None, "soft", 0.0, True, "triangle", 0.3, True)
    s, v = reference.lif_forward(x, threshold, leak, *how)
    for c in range(4):
        s_c, v_c = reference.lif_forward(x[:, :, c], threshold[c : c + 1], leak[c : c + 1], *how)
        assert torch.equal(s[:, :, c], s_c)
        assert torch.equal(v[:, c], v_c)


def test_bits_are_in_memory_order_least_significant_first():
    s = torch.zeros(1, 1, 3, 2, 2)
    s[0, 0, 1, 0, 0] = 1  # neuron 4 when contiguous, 1 when channels_last
    assert reference.pack(s).tolist() == [[0b10000, 0, 0, 0, 0, 0, 0, 0]]
    last = s.squeeze(0).contiguous(memory_format=torch.channels_last).unsqueeze(0)
    assert reference.pack(last).tolist() == [[0b10, 0, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("threshold", "leak", "message"),
    [
        (0.0, 1.0, "threshold: expected finite values > 0, got"),
        (-1.0, 1.0, "threshold: expected finite values > 0, got"),
        (math.nan, 1.0, "threshold: expected finite values > 0, got"),
        (1.0, math.inf, "leak: expected finite values, got"),
    ],
)
def test_parameters_out_of_range_are_refused(threshold, leak, message):
    with pytest.raises(ValueError, match=message):
        run([1.0], threshold, leak)


def test_nan_cannot_be_packed():
    x, one = torch.full((1, 3), math.nan), torch.ones(1)
    with pytest.raises(ValueError, match="packed: expected a current without NaN"):
        reference.lif_packed(x, one, one, None, "soft", 0.0, False)
