"""How workers start, are watched over and stop."""
