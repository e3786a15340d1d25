"""Everything that touches weights or a text generator: adapters, harvesting, SAE training and the zoo."""
