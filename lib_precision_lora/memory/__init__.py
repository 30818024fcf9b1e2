"""Memory, planned before it is used: the budget, what goes where, and what was really taken."""
