"""The memory plan, told to the host before it places models."""
