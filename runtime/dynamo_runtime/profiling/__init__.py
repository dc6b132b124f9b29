"""What a device makes of a bundle: measured once, kept, and decided with."""
