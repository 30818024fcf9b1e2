"""One generation: what it does differently, what it says, and what was applied."""
