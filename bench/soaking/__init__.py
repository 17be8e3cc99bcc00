"""The parts of the soak: what breaks, what asks, what is seen, and what is made of it."""
