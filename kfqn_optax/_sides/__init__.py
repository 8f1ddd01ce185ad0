"""The two sides of a layer's preconditioner: how H_a and H_g are kept."""
