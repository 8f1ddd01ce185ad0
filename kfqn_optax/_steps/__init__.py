"""How far a step goes along its direction."""
