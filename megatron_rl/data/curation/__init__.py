"""Curation of problem sets (the report's Sec. 2.3): each step splits a file into what stays and what goes, and why."""
