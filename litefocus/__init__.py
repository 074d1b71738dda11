"""LiteFocus attention for text-to-audio diffusion pipelines: long clips, faster, in one line."""

from litefocus.attention import focus_attention
from litefocus.clients.tango import set_duration
from litefocus.config import LiteFocusConfig
from litefocus.focus import FocusSet, focus_set
from litefocus.patch import Patch, patch, status, unpatch
from litefocus.probe import Probe, probe
from litefocus.processor import LiteFocusAttnProcessor
from litefocus.report import Status

__all__ = [
    "FocusSet",
    "LiteFocusAttnProcessor",
    "LiteFocusConfig",
    "Patch",
    "Probe",
    "Status",
    "focus_attention",
    "focus_set",
    "patch",
    "probe",
    "set_duration",
    "status",
    "unpatch",
]

__version__ = "0.1.0"
