"""What speed costs in quality, measured on the bundle that ships (DynaMo, section "Evaluation")."""
