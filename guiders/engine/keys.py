"""The names under which the pack keeps things in the host's dicts: who writes each, and who reads it.

Wrappers, additional models (on a ModelPatcher):
    LODESTAR    the engine's wrappers, and the weak models and VAEs of its terms. attach writes, detach removes
    SHARED      the wrapper inside all others, which computes equal beginnings once. The OUTER_SAMPLE wrapper writes
    MAPS        the wrappers of FreCaS's maps
    WINDOWS     the wrapper of FreCaS's windows
    TIMER       the wrapper by which Compare Guidance takes the time

``transformer_options``:
    PLAN        the GuidancePlan of a model. attach writes; every run reads
    RUN         the Run of a sampling call. The OUTER_SAMPLE wrapper writes; all inner wrappers, CFG++ and FreCaS's maps read
    TELEMETRY   the Telemetry of a cascade. FreCaS writes into the models of its stages; the OUTER_SAMPLE wrapper reads
    LABELS      the number in the host's list of conds of every chunk in a batch, where ``cond_or_uncond`` has what it would be without
                us. Written around apply_model; the APPLY_MODEL wrapper reads
    NARROWED    in a part of a call: which rows of its chunks it has (None: all), and the uuids that the chunks have in the whole call.
                The APPLY_MODEL wrapper writes; FreCaS's maps read
    SHARED      the Chunks of a call of the model, some of which are equal until a variant's change. The APPLY_MODEL wrapper writes; the
                innermost one reads
    WINDOWS     the windows of self-attention. The wrapper of FreCaS's windows writes (in a UNet within its layers); their override reads
    AROUND      what has to be put around modules of the network for this forward pass: functions of the network that give a context
                manager. Perturbed attention writes; the APPLY_MODEL wrapper enters them
    CHUNKS      in a part of a module's or an attention call: which chunks of the forward pass it has. Perturbed attention and shared
                beginnings write; perturbed attention and the maps read

Attribute of a MODEL:
    OWN_WEIGHTS the same weak model on a second set of weights. Autoguidance writes and reads; clones do not have it
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LODESTAR = "lodestar"
MAPS = "lodestar maps"
WINDOWS = "lodestar windows"
TIMER = "lodestar_timer"

PLAN = "lodestar_plan"
RUN = "lodestar_run"
TELEMETRY = "lodestar_telemetry"
LABELS = "lodestar_labels"
NARROWED = "lodestar_narrowed"
SHARED = "lodestar_shared"
AROUND = "lodestar_around"
CHUNKS = "lodestar_chunks"

OWN_WEIGHTS = "lodestar_own_weights"

_OPTIONS_INDEX = 3  # of transformer_options among apply_model's arguments after x and t


def options_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The transformer_options among the arguments of apply_model after x and t."""
    return kwargs["transformer_options"] if "transformer_options" in kwargs else args[_OPTIONS_INDEX]


def with_options(options: dict[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with other transformer_options."""
    if "transformer_options" in kwargs:
        return args, {**kwargs, "transformer_options": options}
    return (*args[:_OPTIONS_INDEX], options, *args[_OPTIONS_INDEX + 1 :]), dict(kwargs)
