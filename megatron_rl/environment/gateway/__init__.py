"""An HTTP server that speaks OpenAI's and Anthropic's protocol and keeps the token ids of every conversation."""
