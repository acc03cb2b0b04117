"""Rules that are on trial: bench/compare.py knows them beside those of molf.py, as `--score NAME`.

u is Adam's direction, m / (sqrt(v) + eps). |dW(u)| is how far W_eff moves along it, see molf.movement.
"""
import torch

from molf import movement, total


def direction(e, m, v):
    return [x / (y.sqrt() + e.eps) for x, y in zip(m, v)]

def gain(e):
    """What the step of earlier batches would have gained on this one: S = lr g.u. Not divided by a length: a
    larger step that helps more is better."""
    u = direction(e, e.m_before, e.v_before)
    return e.lr * total(g * x for g, x in zip(e.g, u))

def trend(e):
    """align with the mean of the last batches' gradients in the place of this one's: S = m.u / |dW(u)|, with
    u from before. Less noise, but u has seen most of these gradients."""
    u = direction(e, e.m_before, e.v_before)
    return total(m * x for m, x in zip(e.m, u)) / (movement(e, u) + 1e-30)

def fisher(e):
    """Gain for each unit of movement, which Fisher's information weighs: S = g.u / sqrt(sum v u^2). This is
    also how many standard deviations g.u lies above 0, if entries of g are independent with variance v."""
    u = direction(e, e.m_before, e.v_before)
    square = total(v * x.square() for v, x in zip(e.v_before, u))
    return total(g * x for g, x in zip(e.g, u)) / (square.sqrt() + 1e-30)

def flat(e):
    """EPD without shape, scale and learning rate: S = sum m^2 / sqrt(v) over sum sqrt(v). Where all gradients
    of an expert are c times as large, so are both sums."""
    descent = total(m.square() / (v.sqrt() + e.eps) for m, v in zip(e.m, e.v))
    return descent / (total(v.sqrt() for v in e.v) + 1e-30)

def pace(e):
    """EPD for each unit of movement: S = sum m^2 / sqrt(v) over |dW(u)|. Unlike align it expects that the
    next gradient is m."""
    u = direction(e, e.m, e.v)
    return total(m * x for m, x in zip(e.m, u)) / (movement(e, u) + 1e-30)

PAST = {}       # of t_test: place of an expert's weight -> its t, mean and mean square

def t_test(e, beta=0.9):
    """Is g.u above 0 from batch to batch? S = its mean over its standard deviation, of the last ten batches
    or so; 0 at first. PAST is a state of its own: it wants --eager on a GPU, and --resume begins it anew."""
    u = direction(e, e.m_before, e.v_before)
    x = total(g * x for g, x in zip(e.g, u))
    t, key = int(e.t), e.w[0].data_ptr()
    seen, mean, square = PAST.get(key, (0, x, x ** 2))
    if t <= 2 or seen != t - 1:                             # (at t = 1 there was no u yet)
        mean, square = x, x ** 2
    mean, square = torch.lerp(x, mean, beta), torch.lerp(x ** 2, square, beta)
    PAST[key] = t, mean, square
    variance = square - mean ** 2
    return torch.where(variance > 0, mean / variance.sqrt(), 0.0)


CANDIDATES = {f.__name__: f for f in (gain, trend, fisher, flat, pace, t_test)}
