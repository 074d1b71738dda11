"""What is particular to models whose UNet or pipeline is not shaped as diffusers shapes it."""
