"""Word-level caption encoder of the demo models, in the form the host's CLIP object expects.

Words have fixed vectors (nothing is trained): what a word means is learned by the diffusion models alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from comfy import sd1_clip

from .shapes import WORDS

LENGTH = 16
WIDTH = 64
_PADDING = 0


class CaptionTokenizer:
    """Splits a caption into words the demo models were trained on; knows the host's ``(word:1.2)`` weights."""

    vocabulary, length = WORDS, LENGTH

    def __init__(self, embedding_directory: object = None, tokenizer_data: object = None) -> None:
        pass

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **_: object) -> dict[str, list]:
        """One row of at most ``length`` (id, weight) pairs. Raises ValueError for a word that the demo models do not know."""
        ids = {word: index for index, word in enumerate(self.vocabulary, start=1)}
        weighted = [
            (word, weight)
            for part, weight in sd1_clip.token_weights(sd1_clip.escape_important(text), 1.0)
            for word in sd1_clip.unescape_important(part).lower().replace(",", " ").replace(".", " ").split()
        ]
        unknown = [word for word, _ in weighted if word not in ids]
        if unknown:
            raise ValueError(f"The demo model does not know {', '.join(map(repr, unknown))}; it knows: {', '.join(self.vocabulary)}.")
        if len(weighted) > self.length:
            raise ValueError(f"The caption has {len(weighted)} words; the demo model reads at most {self.length}.")
        row = [(ids[word], weight) for word, weight in weighted] + [(_PADDING, 1.0)] * (self.length - len(weighted))
        return {"words": [[(*token, index + 1) for index, token in enumerate(row)] if return_word_ids else row]}


class CaptionEncoder(torch.nn.Module):
    """Ids -> cond [B, 16, 64] (word plus place) and pooled [B, 64] (sum of the words)."""

    tokenizer = CaptionTokenizer

    def __init__(self, dtype: torch.dtype | None = None, device: object = None, model_options: object = None) -> None:
        super().__init__()
        self.dtypes = {torch.float32}
        self.words = torch.nn.Embedding(len(self.tokenizer.vocabulary) + 1, WIDTH, padding_idx=_PADDING, device=device)
        self.requires_grad_(False)

    def set_clip_options(self, options: dict) -> None:
        """The host's options (skipped layers and the like) do not apply to a table of words."""

    def reset_clip_options(self) -> None:
        """See set_clip_options."""

    def encode_token_weights(self, tokens: dict[str, list]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode what the tokenizer returns; weights scale the words."""
        rows = tokens["words"]
        ids = torch.tensor([[token[0] for token in row] for row in rows])
        weights = torch.tensor([[token[1] for token in row] for row in rows])
        return self(ids, weights)

    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids, weights [B, 16] -> cond [B, 16, 64], pooled [B, 64]."""
        words = self.words(ids.to(self.words.weight.device)).float() * weights[..., None].to(self.words.weight.device)
        return words + _places(words.device), words.sum(dim=1) / math.sqrt(8)

    def encode(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Plain captions to (cond, pooled), for training."""
        rows = [self.tokenizer().tokenize_with_weights(text)["words"][0] for text in texts]
        return self.encode_token_weights({"words": rows})

    def load_sd(self, state: dict[str, torch.Tensor]) -> tuple[list[str], list[str]]:
        """Load weights the way the host's CLIP object asks for."""
        return self.load_state_dict(state, strict=False)


def word_table(vocabulary: Sequence[str] = WORDS) -> dict[str, torch.Tensor]:
    """The fixed word vectors: orthonormal rows scaled to unit variance, zero for the padding."""
    square = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    rows = torch.linalg.qr(square).Q[: len(vocabulary)].float() * math.sqrt(WIDTH)
    return {"words.weight": torch.cat([torch.zeros(1, WIDTH), rows])}


def _places(device: torch.device) -> torch.Tensor:
    place = torch.arange(LENGTH, device=device)[:, None]
    rate = torch.exp(-math.log(50) * torch.arange(WIDTH // 2, device=device) / (WIDTH // 2))
    return torch.cat([(place * rate).sin(), (place * rate).cos()], dim=-1)
