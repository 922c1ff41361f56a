"""A user's module that cannot be imported."""

not_defined  # noqa: B018, F821 -- the fault
