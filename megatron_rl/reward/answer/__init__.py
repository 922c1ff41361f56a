"""One answer against its reference, in steps of which each can be tested alone.

latex takes the dressing off. formula reads a tree, value says what it is worth and whether it is worked out. words and
units know what is no algebra. read says of which kind an answer is, compare when two are the same, copies whether an
answer only repeats the question.
"""
