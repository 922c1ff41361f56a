"""Sampling with SGLang: start an engine, speak to it over HTTP, collect groups of responses."""
