"""The memory that a run needs on each GPU, from its settings alone, and what to change if it is too much."""

from drift.plan.advice import Advice, Combination, Option, advice
from drift.plan.memory import MemoryPlan, plan_memory
from drift.plan.report import report
from drift.plan.settings import PlanSettings
from drift.plan.sizes import PolicySizes, policy_sizes

__all__ = [
    "Advice",
    "Combination",
    "MemoryPlan",
    "Option",
    "PlanSettings",
    "PolicySizes",
    "advice",
    "plan_memory",
    "policy_sizes",
    "report",
]
