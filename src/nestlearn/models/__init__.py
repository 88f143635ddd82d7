"""Language models after Hugging Face conventions."""
