"""Training: data, losses, loop and one file a recipe kind. The library never imports this package."""
