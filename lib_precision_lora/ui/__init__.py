"""What people see: texts and components (gradio only, no host internals)."""
