"""Ways to compute one gradient's per-sample norms and its weighted sum; `catalogue.STRATEGIES` lists them."""
