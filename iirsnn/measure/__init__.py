"""What a network does: operations, energy, accuracy, latency; and where a figure comes from."""
