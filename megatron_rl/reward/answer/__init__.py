"""Compares one answer with its reference, in steps that can each be tested alone.

- latex removes markup that only changes the look.
- formula reads a tree; value computes it and says whether it is worked out.
- words and units know what is not algebra.
- read says what kind of answer it is.
- compare says when two answers are the same.
- copies says whether an answer only repeats the question.
"""
