"""What tests of several rooms share: bundles by hand, checkpoints, made-up results and profiles, naive algorithms."""
