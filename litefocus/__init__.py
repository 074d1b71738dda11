"""LiteFocus attention for text-to-audio diffusion pipelines: long clips, faster, in one line."""

from litefocus._decoding import TiledDecoding, tile_decoding
from litefocus._patch import Patch, patch, unpatch
from litefocus._probe import Probe, probe
from litefocus._processor import LiteFocusAttnProcessor
from litefocus._prompts import PromptSchedule, schedule_prompts
from litefocus._status import Status, status
from litefocus._tango import set_duration
from litefocus.attention import focus_attention
from litefocus.config import LiteFocusConfig
from litefocus.focus import FocusSet, focus_set

__all__ = [
    "FocusSet",
    "LiteFocusAttnProcessor",
    "LiteFocusConfig",
    "Patch",
    "Probe",
    "PromptSchedule",
    "Status",
    "TiledDecoding",
    "focus_attention",
    "focus_set",
    "patch",
    "probe",
    "schedule_prompts",
    "set_duration",
    "status",
    "tile_decoding",
    "unpatch",
]

__version__ = "0.1.0"
