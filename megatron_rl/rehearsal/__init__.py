"""One rank of a cluster that is not there: the project's own step on fake tensors, and what a recorder saw of it.

docs/rehearsal.md says how to read it and what it cannot know. Written for torch 2.14.1 and megatron-core 0.19.2.
"""
