from tests.recipe_fixtures import model_folder, no_report, settings, tokenizer, write_rows

__all__ = ["model_folder", "no_report", "settings", "tokenizer", "write_rows"]
