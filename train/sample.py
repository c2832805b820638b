"""python -m longspan.train.sample run.dir=runs/latest prompt='def main('"""

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from torch import Tensor

from ..kernels.attention import attention
from ..kernels.mask import Mask
from ..kernels.span import Span
from ..models.gpt import GPT
from .config import Run, made, typed
from .entry import entry, guarded
from .job import Launch, build_model, processes
from .trained import config_of, load_weights


@dataclass
class Sampling:
    """The root keys of conf/sample.yaml."""

    run: Run = field(default_factory=Run)
    checkpoint: str = "auto"
    device: str = "auto"
    prompt: str = ""
    tokens: int = 200
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0


class Cache:
    """An `attend` that keeps the keys and values of all tokens so far, layer by layer in the order of the
    calls.
    """

    def __init__(self) -> None:
        self.length = 0
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._layer = 0

    def begin(self, tokens: int) -> Tensor:
        """Announces a forward over the next `tokens` tokens: their global positions."""
        self._layer, start = 0, self.length
        self.length += tokens
        return torch.arange(start, self.length)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        if self._layer < len(self._kept):
            k, v = (torch.cat(pair, 1) for pair in zip(self._kept[self._layer], (k, v), strict=True))
            self._kept[self._layer] = (k, v)
        else:
            self._kept.append((k, v))
        self._layer += 1
        new = q.shape[1]
        return attention(q, k, v, mask, (Span(self.length - new, new),), (Span(0, self.length),))[0].to(
            q.dtype
        )


@torch.no_grad()
def logits(model: GPT, cache: Cache, tokens: list[int], before: int) -> Tensor:
    """Logits [tokens, vocab] of the next tokens of a sequence; before: the token that precedes them, -1 for
    none.
    """
    device = model.embed.weight.device
    at = cache.begin(len(tokens)).to(device)
    ids = torch.tensor([tokens], device=device)
    previous = torch.tensor([[before, *tokens[:-1]]], device=device)
    hidden = model(ids, at, cache, previous=previous)[0]
    out: Tensor = model.head(hidden).float()
    return out


def choose(scores: Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token from logits [vocab]: the greatest at temperature 0, else drawn from the smallest set that
    holds `top_p`.
    """
    if temperature == 0:
        return int(scores.argmax())
    p, order = (scores.double() / temperature).softmax(-1).sort(descending=True)
    kept = p.cumsum(-1) - p < top_p  # the most likely one always stays
    drawn = torch.multinomial(p * kept, 1, generator=generator)
    return int(order[drawn])


def generate(model: GPT, prompt: list[int], cfg: DictConfig) -> Iterator[int]:
    """Token after token, cfg.tokens of them."""
    if cfg.temperature < 0 or not 0 < cfg.top_p <= 1 or cfg.tokens < 1:
        raise ValueError(
            f"temperature is {cfg.temperature}, top_p {cfg.top_p}, tokens {cfg.tokens}; "
            f"they need temperature >= 0, 0 < top_p <= 1, tokens >= 1"
        )
    generator = torch.Generator().manual_seed(cfg.seed)
    cache, tokens, before = Cache(), prompt, -1
    for _ in range(cfg.tokens):
        scores = logits(model, cache, tokens, before)[-1].cpu()
        before = tokens[-1]
        tokens = [choose(scores, temperature=cfg.temperature, top_p=cfg.top_p, generator=generator)]
        yield tokens[0]


def quoted(argument: str) -> str:
    """A prompt as it is, whatever it holds, for Hydra, whose grammar gives a meaning to quotes, brackets,
    commas, spaces and ${.
    """
    name, equals, text = argument.partition("=")
    if name != "prompt" or not equals:
        return argument
    # backslashes are doubled only where they stand before something that needs one
    text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    text = re.sub(r'(\\*)"', r'\1\1\\"', text)
    text = re.sub(r"(\\*)\Z", r"\1\1", text, count=1)
    return f'prompt="{text}"'


@hydra.main(version_base="1.3", config_path="pkg://longspan.conf", config_name="sample")
def _composed(cfg: DictConfig) -> None:
    launch = Launch.of(os.environ)
    sys.exit(guarded(lambda: sample(typed(cfg, Sampling), launch), launch))


def sample(cfg: DictConfig, launch: Launch) -> int:
    """Prints the prompt and what the model makes of it."""
    folder = Path(cfg.run.dir)
    config = config_of(folder)
    with processes(launch, cfg.device, 600.0) as device:
        data = made(config.data)
        model = build_model(config, data, made(config.mask)).to(device).eval()
        load_weights(folder, cfg.checkpoint, model, lambda line: print(line, file=sys.stderr), cfg=config)
        prompt = data.encode(cfg.prompt)
        if not prompt:
            raise ValueError("prompt is empty; give at least one character")
        assert isinstance(model, GPT)
        print(cfg.prompt + data.decode(generate(model, prompt, cfg)))
    return 0


def main() -> None:
    """Composes the config and samples; exit codes are listed in `entry`."""
    sys.argv = [quoted(argument) for argument in sys.argv]
    entry(_composed, "sample", os.environ)


if __name__ == "__main__":
    main()
