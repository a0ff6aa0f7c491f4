"""What is measured on generated pictures [N, 3, H, W] in [0, 1], against fresh pictures of the same captions.

A metric is a function of row numbers, so that the bootstrap can resample it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from skimage.color import rgb2hsv
from skimage.metrics import structural_similarity
from torch import Tensor

from lodestar.demo import classifier
from lodestar.demo.shapes import SIZE, Scenes, draw, random_scenes

from .cells import PER_CAPTION, repeated

RESAMPLES = 400  # of the bootstrap
NEIGHBOURS = 3  # k of precision and recall
REAL_PER_CAPTION = 32
_SEED = 79

Rows = np.ndarray  # [M] numbers of pictures
OfRows = Callable[[Rows], float]


@dataclass(frozen=True)
class Pictures:
    """Pictures with the captions they were made for; what is derived from them is computed once.

    pictures: [N, 3, H, W] in [0, 1]. What the classifier sees is shrunk to the size it knows.
    scenes: what each shows, or should show.
    """

    pictures: Tensor
    scenes: Scenes

    def __len__(self) -> int:
        return len(self.pictures)

    @cached_property
    def features(self) -> Tensor:
        """The classifier's features [N, 96] in float64."""
        return self._classified[0]

    @cached_property
    def right(self) -> np.ndarray:
        """Whether every attribute of the caption is found [N], as 0 and 1."""
        return self._classified[1]

    @cached_property
    def _classified(self) -> tuple[Tensor, np.ndarray]:
        net = classifier.load_classifier()
        small = self.pictures if self.pictures.shape[-1] == SIZE else F.interpolate(self.pictures, size=SIZE, mode="area")
        with torch.inference_mode():
            features = torch.cat([net.features(part) for part in small.split(256)])
            logits = {name: head(features) for name, head in net.heads.items()}
        return features.double(), classifier.correct(logits, self.scenes)["all"].double().numpy()

    @cached_property
    def spread(self) -> np.ndarray:
        """Mean distance of each picture's features to those of the other pictures of its caption [N]."""
        groups = rearrange(self.features, "(caption n) f -> caption n f", n=PER_CAPTION)
        return (torch.cdist(groups, groups).sum(-1) / (PER_CAPTION - 1)).flatten().numpy()

    @cached_property
    def saturation(self) -> np.ndarray:
        """Mean HSV saturation of each picture [N]."""
        return rgb2hsv(self._channels_last)[..., 1].mean(axis=(1, 2))

    @cached_property
    def contrast(self) -> np.ndarray:
        """Standard deviation of grey in each picture [N]."""
        return (self._channels_last @ np.array([0.299, 0.587, 0.114])).std(axis=(1, 2))

    @cached_property
    def _channels_last(self) -> np.ndarray:
        return self.pictures.movedim(1, -1).double().numpy()


def similarity(pictures: Tensor, reference: Tensor) -> np.ndarray:
    """SSIM of each picture to its counterpart [N], in windows of 7x7 (Wang et al. 2004, in scikit-image)."""
    pairs = zip(pictures.double().numpy(), reference.double().numpy(), strict=True)
    return np.array([structural_similarity(a, b, channel_axis=0, data_range=1.0) for a, b in pairs])


def frechet_distance(features: Tensor, reference: Moments) -> float:
    """Squared Fréchet distance between Gaussians fitted to both sets (Heusel et al. 2017, eq. 6): [N, F] against moments.

    Biased upward for small N, by the same amount for sets of equal size: only those are compared.
    """
    mean, covariance = features.mean(dim=0), features.T.cov()
    cross = torch.linalg.eigvalsh(reference.root @ covariance @ reference.root).clamp_min(0).sqrt().sum()
    return float((mean - reference.mean).square().sum() + covariance.trace() + reference.covariance.trace() - 2 * cross)


@dataclass(frozen=True)
class Moments:
    """Mean [F], covariance [F, F] and its square root of reference features."""

    mean: Tensor
    covariance: Tensor
    root: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """From features [N, F]."""
        covariance = features.T.cov()
        values, vectors = torch.linalg.eigh(covariance)
        return cls(features.mean(dim=0), covariance, (vectors * values.clamp_min(0).sqrt()) @ vectors.T)


def covered(points: Tensor, support: Tensor) -> np.ndarray:
    """Which points [N, F] lie in the union of the k-NN balls around ``support`` [M, F] (Kynkäänniemi et al. 2019, eq. 1), as 0 and 1."""
    radius = torch.cdist(support, support).kthvalue(NEIGHBOURS + 1, dim=1).values  # the nearest is the point itself
    return (torch.cdist(points, support) <= radius).any(dim=1).double().numpy()


@dataclass(frozen=True)
class Real:
    """Fresh pictures from the data generator.

    fresh: as many as a cell has, for comparing set with set.
    many: REAL_PER_CAPTION times as many as there are captions, for what the data are.
    captions: whether both show the captions of the cells, in their order.
    """

    fresh: Pictures
    many: Pictures
    captions: bool
    _moments: dict[bytes, Moments] = field(default_factory=dict)

    @classmethod
    def of_captions(cls, scenes: Scenes) -> Real:
        """Of the captions that the cells show."""
        captions = Scenes(*(part[::PER_CAPTION] for part in (scenes.objects, scenes.background, scenes.relation)))
        return cls._drawn(scenes, repeated(captions, REAL_PER_CAPTION), torch.Generator().manual_seed(_SEED), captions=True)

    @classmethod
    def of_everything(cls, samples: int) -> Real:
        """Of all that the models were trained on, for pictures without a prompt."""
        generator = torch.Generator().manual_seed(_SEED)
        many = samples // PER_CAPTION * REAL_PER_CAPTION
        return cls._drawn(random_scenes(samples, generator), random_scenes(many, generator), generator, captions=False)

    @classmethod
    def _drawn(cls, fresh: Scenes, many: Scenes, generator: torch.Generator, captions: bool) -> Real:
        return cls(Pictures(draw(fresh, generator), fresh), Pictures(draw(many, generator), many), captions)

    def moments(self, rows: Rows) -> Moments:
        """Of the features of ``many``; where these go by caption, of the captions that ``rows`` of a cell show."""
        key = rows.tobytes() if self.captions else b""
        if key not in self._moments:
            features = self.many.features
            if self.captions:
                captions = rows[::PER_CAPTION, None] // PER_CAPTION
                features = features[(captions * REAL_PER_CAPTION + np.arange(REAL_PER_CAPTION)).ravel()]
            self._moments[key] = Moments.of(features)
        return self._moments[key]


@dataclass(frozen=True)
class Resamples:
    """Rows of the bootstrap: whole captions are drawn with replacement, since pictures of one caption are alike."""

    everything: Rows
    rows: list[Rows]

    @classmethod
    def of(cls, samples: int) -> Resamples:
        """The same for every cell, so that differences between cells are resampled in pairs."""
        captions = samples // PER_CAPTION
        drawn = np.random.default_rng(0).integers(captions, size=(RESAMPLES, captions, 1))
        rows = (drawn * PER_CAPTION + np.arange(PER_CAPTION)).reshape(RESAMPLES, -1)
        return cls(np.arange(samples), list(rows))


@dataclass(frozen=True)
class Metric:
    """A number for a set of pictures.

    of: makes the function of rows from (pictures, real).
    sign: 1 where more is better, -1 where less is.
    """

    name: str
    of: Callable[[Pictures, Real], OfRows]
    sign: int


def mean_of(values: np.ndarray) -> OfRows:
    """The mean of one number per picture [N]."""
    return lambda rows: float(values[rows].mean())


def similarity_to(reference: Pictures, label: str) -> Metric:
    """Mean SSIM to the pictures that another cell made from the same noise."""
    return Metric(f"SSIM to {label}", lambda made, _: mean_of(similarity(made.pictures, reference.pictures)), 1)


def _off(values: np.ndarray, real: np.ndarray) -> OfRows:
    return lambda rows: abs(float(values[rows].mean() - real.mean()))


def _frechet(made: Pictures, real: Real) -> OfRows:
    return lambda rows: frechet_distance(made.features[rows], real.moments(rows))


def _recall(made: Pictures, real: Real) -> OfRows:
    """Only the real pictures are resampled: a support with repeated points has balls of radius 0."""
    return mean_of(covered(real.fresh.features, made.features))


ACCURACY = Metric("accuracy", lambda made, _: mean_of(made.right), 1)
FRECHET = Metric("Fréchet distance", _frechet, -1)
PRECISION = Metric("precision", lambda made, real: mean_of(covered(made.features, real.many.features)), 1)
RECALL = Metric("recall", _recall, 1)
DIVERSITY = Metric("diversity", lambda made, _: mean_of(made.spread), 1)
SATURATION = Metric("saturation error", lambda made, real: _off(made.saturation, real.many.saturation), -1)
CONTRAST = Metric("contrast error", lambda made, real: _off(made.contrast, real.many.contrast), -1)
METRICS = (ACCURACY, FRECHET, PRECISION, RECALL, DIVERSITY, SATURATION, CONTRAST)
