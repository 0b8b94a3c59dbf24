"""The vision half: image bytes in, packed embeddings out."""
