"""Networks and pure functions on tensors: what is computed."""
