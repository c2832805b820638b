"""The texts of a batch: embeddings of different length, padded, and one vector for each whole text."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..data.clip import Clip


@dataclass(frozen=True)
class Text:
    """What a model is told beside the class, the same on every rank of a sample.

    Attributes:
        states: Embeddings, float32 [B, J, E]; what follows a row's own words is padding of any content.
        lengths: Words of each row, at least 1.
        pooled: One vector for each text, float32 [B, P], or None.
    """

    states: Tensor
    lengths: tuple[int, ...]
    pooled: Tensor | None = None

    @classmethod
    def of(cls, clips: Sequence[Clip]) -> "Text | None":
        """Of these clips, padded with zeros; None if they have none."""
        texts = [clip.text for clip in clips if clip.text is not None]
        if len(texts) < len(clips):
            return None
        pooled = [torch.from_numpy(clip.pooled) for clip in clips if clip.pooled is not None]
        states = torch.zeros(len(texts), max(map(len, texts)), texts[0].shape[1])
        for row, text in zip(states, texts, strict=True):
            row[: len(text)] = torch.from_numpy(text)
        return cls(states, tuple(map(len, texts)), torch.stack(pooled) if pooled else None)

    def without(self, dropped: Tensor) -> "Text":
        """With the text that stands for none, a single word of zeros, in the rows where bool [B] is true."""
        pooled = None if self.pooled is None else self.pooled.masked_fill(dropped[:, None], 0.0)
        lengths = zip(self.lengths, dropped.tolist(), strict=True)
        return Text(
            self.states.masked_fill(dropped[:, None, None], 0.0),
            tuple(1 if none else length for length, none in lengths),
            pooled,
        )

    def none(self) -> "Text":
        """`without` any."""
        return self.without(torch.ones(len(self.lengths), dtype=torch.bool, device=self.states.device))

    def to(self, device: torch.device) -> "Text":
        pooled = None if self.pooled is None else self.pooled.to(device)
        return replace(self, states=self.states.to(device), pooled=pooled)

    def arguments(self) -> dict[str, Any]:
        """What a model with texts takes by name."""
        whole = all(n == self.states.shape[1] for n in self.lengths)
        given: dict[str, Any] = {"text": self.states}
        return (
            given
            | ({} if whole else {"lengths": self.lengths})
            | ({} if self.pooled is None else {"pooled": self.pooled})
        )
