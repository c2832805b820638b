"""A learned variance of the steps back, beside what is predicted: its training and what it is in a step."""

import math

import torch
from torch import Tensor

from .ddpm import Diffusion

# Half the distance of two of 256 grey levels in -1 .. 1.
_HALF_LEVEL = 1.0 / 255.0


def split(said: Tensor, features: int, channels: int) -> tuple[Tensor, Tensor | None]:
    """What a model says of patch tokens [B, N, D]: the prediction, and the raw variance if there are twice as
    many channels as the data has. The channel runs fastest, the prediction's before the variance's.
    """
    if said.shape[-1] == features:
        return said, None
    if said.shape[-1] != 2 * features:
        raise ValueError(
            f"the model gives {said.shape[-1]} features a token of {features}; it must give as many, or twice"
        )
    mean, raw = said.unflatten(-1, (-1, 2 * channels)).split(channels, -1)
    return mean.flatten(-2), raw.flatten(-2)


def log_variance(raw: Tensor, beta: Tensor, posterior: Tensor) -> Tensor:
    """Between the log of the posterior's variance (raw -1) and that of beta (1) (Nichol and Dhariwal 2021,
    equation 15).
    """
    share = (raw + 1.0) / 2.0
    return share * beta.log() + (1.0 - share) * posterior.log()


def bound(process: Diffusion, x: Tensor, mixed: Tensor, said: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
    """The term of the variational bound at step t, bits by element (Nichol and Dhariwal 2021, section 3.1).

    The mean is detached, so it trains the variance alone; one term drawn of 1000 stands for their sum / 1000.
    """
    out, raw = said
    chain = torch.cat((torch.ones(1, dtype=torch.float64), process.alpha_bar)).to(t.device)
    now, then = chain[t.long() + 1], chain[t.long()]
    beta = 1.0 - now / then
    # the first step's posterior has no variance; its neighbour's stands for it
    second = (1.0 - chain[2] / chain[1]) * (1.0 - chain[1]) / (1.0 - chain[2])
    posterior = torch.where(t > 0, beta * (1.0 - then) / (1.0 - now), second)
    own, other = then.sqrt() * beta / (1.0 - now), (now / then).sqrt() * (1.0 - then) / (1.0 - now)
    apart = own.to(x.dtype) * (x - process.clean(mixed, out.detach(), t))
    learned = log_variance(raw, beta.to(x.dtype), posterior.to(x.dtype))
    true = posterior.log().to(x.dtype)
    divergence = 0.5 * (learned - true - 1.0 + (true - learned).exp() + apart.square() * (-learned).exp())
    mean = (own * process.clean(mixed, out.detach(), t) + other * mixed).to(x.dtype)
    first = -_level_likelihood(x, mean, learned)
    return torch.where(t > 0, divergence, first) / math.log(2.0)


def _level_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log of a Gaussian's mass on the grey level of x; the outermost reach to infinity (Ho et al. 2020,
    equation 13).
    """
    by = (-0.5 * log_variance).exp()
    upper = torch.special.ndtr(by * (x - mean + _HALF_LEVEL)).where(x < 1.0 - _HALF_LEVEL, 1.0)
    lower = torch.special.ndtr(by * (x - mean - _HALF_LEVEL)).where(x > _HALF_LEVEL - 1.0, 0.0)
    return (upper - lower).clamp_min(1e-12).log()
