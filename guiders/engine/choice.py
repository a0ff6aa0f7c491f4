"""Choice: what one model evaluation computes, and for which rows of the batch."""

from __future__ import annotations

from dataclasses import dataclass

Rows = bool | tuple[bool, ...]  # all rows of the batch, none, or one bool per row


def common(a: Rows, b: Rows) -> Rows:
    """The rows that are in both."""
    if isinstance(a, bool):
        return b if a else False
    if isinstance(b, bool):
        return a if b else False
    rows = tuple(p and q for p, q in zip(a, b, strict=True))
    return rows if any(rows) else False


@dataclass(frozen=True)
class Choice:
    """What one evaluation computes.

    weight: the CFG weight in place of the sampler's; 1 is D_c alone, 0 is D_u alone, and neither costs the other's evaluation.
    uncond: the rows that are guided; the others are D_c and cost no evaluation of D_u.
    predicted: whether D_u is not evaluated for any row, but made by ``Policy.predict``.
    terms: the rows to which terms are added; the branches of the others are not evaluated.
    """

    weight: float | None = None
    uncond: Rows = True
    predicted: bool = False
    terms: Rows = True

    def __and__(self, other: Choice) -> Choice:
        """What is left where both are to hold: every rule may take evaluations away."""
        weights = [weight for weight in (self.weight, other.weight) if weight is not None]
        weight = 1.0 if 1 in weights else next(iter(weights), None)
        predicted = self.predicted or other.predicted
        return Choice(weight, common(self.uncond, other.uncond), predicted, common(self.terms, other.terms))

    @property
    def evaluated(self) -> Rows:
        """The rows whose D_u the model computes."""
        return False if self.predicted else self.uncond
