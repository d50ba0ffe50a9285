"""The recipe: which model, on which text, into which form, and how much of it to keep.

A recipe is data: frozen, complete and comparable. Unknown keys are refused, contradictions are refused before any work
starts, and `Recipe.dump` writes every value, defaults included, so that a result can be traced to what produced it.
"""

from molae_compress.recipe.files import bundled_recipes, format_size, parse_size
from molae_compress.recipe.recipe import Recipe

__all__ = ["Recipe", "bundled_recipes", "format_size", "parse_size"]
