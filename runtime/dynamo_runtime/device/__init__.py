"""What is known of the device: its profile as data, the machine it is, and the plan that follows. Below the engine."""
