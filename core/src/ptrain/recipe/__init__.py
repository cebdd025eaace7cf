"""Recipes: YAML with positions -> a typed, frozen `Recipe`. Imports no torch."""
