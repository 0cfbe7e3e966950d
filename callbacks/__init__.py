"""Callbacks: when something happens, never how. Import them as drift.callbacks."""

from drift.callbacks.answers import AnswerCallback
from drift.callbacks.checkpoint import CheckpointCallback
from drift.callbacks.collapse import CollapseCallback
from drift.callbacks.curve import CurveCallback
from drift.callbacks.doctor import DoctorCallback
from drift.callbacks.export import ExportCallback
from drift.callbacks.feedback import FeedbackCallback
from drift.callbacks.mismatch import MismatchCallback
from drift.callbacks.predictions import PredictionCallback
from drift.callbacks.progress import ProgressCallback
from drift.callbacks.prompt import PromptCallback
from drift.callbacks.rescue import RescueCallback
from drift.callbacks.rollout import RolloutCallback
from drift.callbacks.samples import SampleTableCallback
from drift.callbacks.summary import SummaryCallback
from drift.callbacks.watchdog import WatchdogCallback

__all__ = [
    "AnswerCallback",
    "CheckpointCallback",
    "CollapseCallback",
    "CurveCallback",
    "DoctorCallback",
    "ExportCallback",
    "FeedbackCallback",
    "MismatchCallback",
    "PredictionCallback",
    "ProgressCallback",
    "PromptCallback",
    "RescueCallback",
    "RolloutCallback",
    "SampleTableCallback",
    "SummaryCallback",
    "WatchdogCallback",
]
