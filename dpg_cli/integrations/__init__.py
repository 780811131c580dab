"""Other people's trainers, driven by our reward. They are optional extras, imported where they are used."""
