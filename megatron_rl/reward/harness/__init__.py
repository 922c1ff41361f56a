"""Source files that run inside the sandbox, beside the judged program. They import the standard library only."""
