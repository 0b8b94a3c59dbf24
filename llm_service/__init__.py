"""The language half: prompts and embeddings in, text out, behind an OpenAI-compatible API."""
