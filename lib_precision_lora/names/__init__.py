"""How trainers and hosts name a model's layers, and how files name the tensors of each family.

Nothing here imports torch: attaching and planning both ask it.
"""
