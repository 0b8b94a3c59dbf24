"""What both services must agree on: types, identity, wire format, checkpoint loading and the embedding cache."""
