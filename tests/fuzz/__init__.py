"""Bounded, seeded fuzzing of all that comes from elsewhere: files, prompts, infotexts, requests.

`make fuzz`, or `python -m tests.fuzz --seed 1 --target pickles --inputs 500`. Of an input, the library gives
a result or its own error in a sentence. Anything else is a fault: another exception, too much time or memory,
a file that is made, changed, renamed or removed, a path or a character that acts in what is said.
"""
