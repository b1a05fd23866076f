"""What a method alters in a model before it trains."""
