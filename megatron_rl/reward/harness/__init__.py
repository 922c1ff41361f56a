"""Sources that run inside the sandbox, beside the program that is judged. They import the standard library only."""
