"""Validation of raw datasets with Great Expectations: quarantine, published tables, report."""

from pipeline_tasks.validation.datasets import RoleResult, ValidationResult, validate
from pipeline_tasks.validation.limits import ValidationLimits

__all__ = ["RoleResult", "ValidationLimits", "ValidationResult", "validate"]
