"""DDIM inversion with CFG++. Chung et al., ICLR 2025, arXiv 2406.08070, Algorithm 3 (from the authors' code): from a picture to its noise.

The roles of the predictions are swapped: the clean estimate is the unconditional one, and the noise is guided.
"""

from __future__ import annotations

from typing import Any

import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from .cfgpp import Level, cfgpp_step, ddim, levels_of
from .cfgpp_sampler import INVERSION, Predictor, check_guider, check_lambda
from .spaces import is_flow

FURTHEST = 0.9999  # of a flow model's t: at 1 there is no latent left in which the host could hand over the noise
