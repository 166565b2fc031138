"""Is a model collapsed? The command collapse-check, `check`, and CollapseCallback for a Trainer."""

from collapse.check.callback import CollapseCallback
from collapse.check.command import check
from collapse.check.report import Report

__all__ = ["CollapseCallback", "Report", "check"]
