"""Memory, planned before it is used: the budget, what goes where, and what was really taken."""

from lib_precision_lora.memory.budget import Plan, plan_budget

__all__ = ["Plan", "plan_budget"]
