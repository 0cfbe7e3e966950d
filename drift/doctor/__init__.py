"""The doctor: is this policy what its folder says, and do the parts around it agree about it?"""

from drift.doctor.checks import Check, failures, table
from drift.doctor.examination import examine
from drift.doctor.folder import examine_folder
from drift.doctor.probes import Probe, built_in_probes

__all__ = ["Check", "Probe", "built_in_probes", "examine", "examine_folder", "failures", "table"]
